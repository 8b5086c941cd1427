"""The loop's options: accumulation, clipping, precision, compilation, checks, metrics."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch
from inputs import extended, more

from sanm_train import RECIPES, checkpoint, register, train
from sanm_train.cli import main
from sanm_train.errors import ConfigError
from sanm_train.loop import Loop, launched
from sanm_train.recipes.ce import CrossEntropy
from sanm_train.train import build

OTHERS = sorted(set(RECIPES) - {"sanm-dividemix"})


def first_step(config, monkeypatch):
    """The network's parameters after one epoch of plain, unaugmented cross-entropy."""
    recipe = build(config).recipe
    monkeypatch.setattr(recipe.augment, "weak", recipe.augment.plain)
    recipe.networks[0].eval()
    monkeypatch.setattr(torch.nn.Module, "train", lambda self, mode=True: self)  # no batch norm
    with launched(config) as fabric:
        loop = Loop(fabric, config, recipe)
        steps = len(list(loop.steps()))
    parameters = [p.detach().clone() for p in recipe.networks[0].parameters()]
    return steps, parameters, loop.mean_losses()["loss"]


def test_accumulated_gradients_are_those_of_the_whole_batch(tiny, monkeypatch):
    """Where batches are divided evenly: 128 samples, two steps of 64 against 2 × 4 of 16."""
    config = tiny(recipe="ce", limit=128, batch_size=64, epochs=1)
    divided = dataclasses.replace(config, accumulate=4)
    with monkeypatch.context() as patch:
        steps, whole, loss = first_step(config, patch)
    with monkeypatch.context() as patch:
        more, parts, mean = first_step(divided, patch)
    assert steps == more == 2  # of the optimiser, however many passes each is divided into
    assert mean == pytest.approx(loss, rel=1e-4)
    for ours, theirs in zip(parts, whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_metrics_count_steps_of_the_optimiser(tiny):
    plain, divided = (
        train(tiny(recipe="ce", limit=128, batch_size=64, epochs=1, accumulate=n)) for n in (1, 4)
    )
    assert plain.history[0]["steps"] == divided.history[0]["steps"] == 2


def test_a_device_that_training_cannot_use_is_named(tiny):
    with pytest.raises(ConfigError, match=r"device must be usable, got 'meta': .*accelerator"):
        train(tiny(device="meta"))


def test_clipping_bounds_the_step(tiny, monkeypatch):
    config = tiny(recipe="ce", limit=64, batch_size=64, epochs=1, weight_decay=0.0, momentum=0.0)
    start = [p.detach().clone() for p in build(config).recipe.networks[0].parameters()]
    moved = {}
    for clip in (0.0, 0.05):
        with monkeypatch.context() as patch:
            _, found, _ = first_step(dataclasses.replace(config, clip=clip), patch)
        steps = [(a - b).flatten() for a, b in zip(found, start, strict=True)]
        moved[clip] = torch.cat(steps).norm().item() / config.lr
    assert moved[0.05] == pytest.approx(0.05, rel=1e-3) and moved[0.0] > 0.06


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("recipe", ["sanm-dividemix", *more(*OTHERS)])
def test_precision(tiny, recipe, precision):
    result = train(tiny(recipe=recipe, precision=precision))
    plain = train(tiny(recipe=recipe))
    row, other = result.history[-1], plain.history[-1]
    assert row["train_loss"] == pytest.approx(other["train_loss"], rel=0.3)
    assert row["train_loss"] != other["train_loss"]
    assert all(p.dtype == torch.float32 for n in result.recipe.networks for p in n.parameters())
    assert result.losses.dtype == torch.float32


@extended
def test_compiled_networks_give_the_same(tiny):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = train(tiny(recipe="sanm-ce", compile=True, limit=64)).history
    plain = train(tiny(recipe="sanm-ce", limit=64)).history
    for ours, theirs in zip(compiled, plain, strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-3)


@pytest.mark.parametrize("channels_last", [True, False])
def test_memory_format_of_networks(tiny, channels_last):
    seen = []

    @register("looks")
    class Looks(CrossEntropy):
        def loss(self, network, batch, epoch):
            weight = network.model.features[3].weight
            seen.append(weight.is_contiguous(memory_format=torch.channels_last))
            return super().loss(network, batch, epoch)

    try:
        train(tiny(recipe="looks", epochs=1, channels_last=channels_last))
    finally:
        del RECIPES["looks"]
    assert set(seen) == {channels_last}


def test_a_loss_that_is_not_finite_is_seen_at_once(tiny, tmp_path, capsys):
    """Within the epoch, with the step; no checkpoint is made of the ruins."""
    arguments = ["--recipe", "ce", "--epochs", "2", "--limit", "130", "--lr", "1e30", "--quiet"]
    assert main(["train", "--out", str(tmp_path), *arguments]) == 1
    message = capsys.readouterr().err
    assert "sanm: error: training failed: epoch 0, step" in message
    assert "try a smaller --lr" in message
    assert checkpoint.load(tmp_path) is None


def test_tensorboard(tiny, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = train(tiny(recipe="ce", tensorboard=True), tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    scalars = events.Scalars("test_accuracy")
    assert [event.step for event in scalars] == [0, 1]
    assert scalars[-1].value == pytest.approx(result.last_accuracy)
    assert events.Scalars("noise_rate")[0].value == pytest.approx(result.data.noise_rate)


def test_all_labels_right_and_all_wrong(tiny):
    with pytest.warns(UserWarning, match="digits: all labels are right"):
        right = train(tiny(noise="none"))
    assert right.data.noise_rate == 0 and right.quality_auc is None
    assert "no noise added, 0.0% of the labels wrong" in right.noise
    with pytest.warns(UserWarning, match=r"digits: all labels are wrong \(noise symmetric\)"):
        wrong = train(tiny(rate=1.0))
    assert wrong.data.noise_rate == 1 and wrong.quality_auc is None
    assert "100.0% of the labels wrong" in wrong.noise
