"""Optimisers, the course of the learning rate, and the running average of the weights."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from inputs import extended, more
from test_distributed import CUT, metrics_of, torchrun
from test_resume import cut_off, metrics

from sanm_train import TrainConfig, checkpoint, load_network, load_run, train
from sanm_train.cli import main
from sanm_train.errors import ConfigError
from sanm_train.loop import Loop, launched
from sanm_train.optimizers import learning_rate
from sanm_train.train import build

ALL = {"optimizer": "adamw", "schedule": "cosine", "lr_warmup_epochs": 0.5, "ema": 0.9}


def parameters(networks) -> list[torch.Tensor]:
    return [p.detach().clone() for network in networks for p in network.parameters()]


def same_networks(ours, theirs) -> bool:
    pairs = [(a.state_dict(), b.state_dict()) for a, b in zip(ours, theirs, strict=True)]
    return all(torch.equal(a[name], b[name]) for a, b in pairs for name in b)


# --- optimisers -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "kind", "expected"),
    [
        ({}, torch.optim.SGD, {"lr": 0.02, "momentum": 0.9, "weight_decay": 5e-4}),
        ({"optimizer": "sgd", "momentum": 0.8}, torch.optim.SGD, {"momentum": 0.8}),
        ({"optimizer": "adamw"}, torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 0.01}),
        ({"optimizer": "adamw", "lr": 1e-4}, torch.optim.AdamW, {"lr": 1e-4}),
    ],
)
def test_optimizers_are_torch_s(tiny, given, kind, expected):
    recipe = build(tiny(recipe="dividemix", **given)).recipe
    for network, optimizer in zip(recipe.networks, recipe.optimizers, strict=True):
        (group,) = optimizer.param_groups
        assert type(optimizer) is kind and expected.items() <= group.items()
        assert [id(p) for p in group["params"]] == [id(p) for p in network.parameters()]


def test_settings_belong_to_their_optimizer(tiny):
    assert not hasattr(tiny(optimizer="adamw"), "momentum")
    with pytest.raises(ConfigError, match="momentum is a setting of sgd only"):
        tiny(optimizer="adamw", momentum=0.9)
    with pytest.raises(ConfigError, match="did you mean 'adamw'"):
        tiny(optimizer="adam-w")


def test_a_step_of_adamw_moves_every_weight_by_the_rate(tiny):
    config = tiny(recipe="ce", limit=64, batch_size=64, epochs=1, optimizer="adamw", lr=1e-3)
    recipe = build(config).recipe
    before = parameters(recipe.networks)
    with launched(config) as fabric:
        assert len(list(Loop(fabric, config, recipe).steps())) == 1
    for p, q, moved in zip(
        before, recipe.networks[0].parameters(), parameters(recipe.networks), strict=True
    ):
        step = moved - p * (1 - config.lr * config.weight_decay)
        big = q.grad.abs() > 1e-4 if q.grad is not None else torch.ones_like(p, dtype=torch.bool)
        assert (step[big].abs() <= 1.01e-3).all()
        assert q.grad is None or (step[big].abs() > 0.9e-3).all()


# --- the course of the rate -------------------------------------------------------------------


def torch_s(make, epochs: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.02)
    scheduler, rates = make(optimizer), []
    for _ in range(epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("schedule", ["step", "cosine"])
@pytest.mark.parametrize("warmup", [0, 3])
def test_at_the_start_of_epochs_rates_are_those_of_torch(schedule, warmup):
    from torch.optim import lr_scheduler as lrs

    config = TrainConfig(epochs=12, schedule=schedule, lr_warmup_epochs=warmup, lr_drop=0.7)

    def make(optimizer):
        if schedule == "step":  # at epoch 8.4: the first that begins later
            main = lrs.MultiStepLR(optimizer, [9 - warmup])
        else:
            main = lrs.CosineAnnealingLR(optimizer, 12 - warmup)
        if not warmup:
            return main
        first = lrs.LinearLR(optimizer, 0.01, total_iters=warmup)
        return lrs.SequentialLR(optimizer, [first, main], [warmup])

    found = [learning_rate(config, epoch) for epoch in range(12)]
    assert found == pytest.approx(torch_s(make, 12), rel=1e-9)


def test_without_being_asked_the_rate_is_divided_once():
    config = TrainConfig(epochs=10)  # lr_drop 0.75
    steps = [learning_rate(config, epoch / 4) for epoch in range(40)]
    assert steps == [0.02] * 32 + [0.02 * 0.1] * 8  # between two epochs, not at 7.5


@pytest.mark.parametrize("recipe", ["sanm-dividemix", *more("ce")])
def test_every_step_of_every_network_has_its_rate(tiny, monkeypatch, recipe):
    """Of two networks too, whose epochs may have other numbers of steps; and with `accumulate`."""
    config = tiny(recipe=recipe, epochs=3, accumulate=2, schedule="cosine", lr_warmup_epochs=1)
    seen: dict[int, list[float]] = {}
    update = Loop._update

    def look(self, k):
        seen.setdefault(k, []).append(self.recipe.optimizers[k].param_groups[0]["lr"])
        update(self, k)

    monkeypatch.setattr(Loop, "_update", look)
    history = train(config).history
    assert len(seen) == len(build(config).recipe.networks)
    for rates in seen.values():
        top = rates.index(max(rates))
        assert rates[0] == pytest.approx(config.lr / 100) and max(rates) == config.lr
        assert rates[: top + 1] == sorted(rates[: top + 1])
        assert rates[top:] == sorted(rates[top:], reverse=True) and len(set(rates)) == len(rates)
        assert 0 < rates[-1] < 0.2 * config.lr
    assert history[-1]["lr"] == seen[0][-1]


def test_a_resumed_run_may_have_another_rate(tiny, tmp_path, monkeypatch):
    config = tiny(recipe="ce", schedule="cosine", checkpoint_steps=2)
    cut_off(monkeypatch, config, tmp_path, 6)
    changed = train(dataclasses.replace(config, lr=0.004), tmp_path, resume=True).history[-1]["lr"]
    assert changed == pytest.approx(train(config).history[-1]["lr"] / 5)


def test_a_rate_that_never_gets_there_is_refused(tiny):
    with pytest.raises(ConfigError, match=r"lr_warmup_epochs must be less than epochs, 2, got 2"):
        tiny(lr_warmup_epochs=2)


# --- averaged weights -------------------------------------------------------------------------


def test_the_average_is_its_definition(tiny):
    """Buffers are averaged as well; whole numbers are rounded down, as torch does."""
    config = tiny(recipe="dividemix", epochs=1, ema=0.8)
    recipe = build(config).recipe
    expected: dict[int, dict[str, torch.Tensor]] = {}
    update = Loop._update

    def average(self, k):
        update(self, k)
        state = copy.deepcopy(recipe.networks[k].state_dict())
        for name, value in expected.get(k, {}).items():
            if value.is_floating_point():
                state[name] = 0.8 * value + 0.2 * state[name]
        expected[k] = state

    with pytest.MonkeyPatch.context() as patch, launched(config) as fabric:
        patch.setattr(Loop, "_update", average)
        list(Loop(fabric, config, recipe).steps())
    assert len(recipe.tested) == 2
    for k, network in enumerate(recipe.tested):
        for name, value in network.state_dict().items():
            if value.is_floating_point():
                torch.testing.assert_close(value, expected[k][name], rtol=1e-4, atol=1e-6)
        assert not same_networks([network], [recipe.networks[k]])


@pytest.mark.parametrize("recipe", ["sanm-dividemix", *more("sanm-ce", "elr")])
def test_training_and_label_quality_do_not_see_the_average(tiny, tmp_path, recipe):
    plain = train(tiny(recipe=recipe))
    averaged = train(tiny(recipe=recipe, ema=0.9), tmp_path)
    assert same_networks(averaged.recipe.networks, plain.recipe.networks)
    assert torch.equal(averaged.quality, plain.quality)
    assert not same_networks(averaged.recipe.tested, averaged.recipe.networks)
    assert plain.recipe.tested is plain.recipe.networks


def test_what_is_tested_shown_and_exported_is_the_average(tiny, tmp_path, capsys):
    run = tmp_path / "run"
    result = train(tiny(ema=0.7, epochs=3), run)
    recipe, images = result.recipe, result.data.test_images
    logits = torch.stack([recipe.evaluate(net, images) for net in recipe.tested]).mean(0)
    right = (logits.argmax(1) == result.data.test_labels).double().mean().item()
    own = torch.stack([recipe.evaluate(net, images) for net in recipe.networks]).mean(0)
    assert result.last_accuracy == pytest.approx(right) and not torch.allclose(own, logits)
    assert torch.equal(recipe.predict(images), logits)

    again = load_run(run).recipe
    assert same_networks(again.tested, recipe.tested)
    assert same_networks(again.networks, recipe.networks)
    for part, network in zip(load_network(run).networks, recipe.tested, strict=True):
        assert same_networks([part.model], [network.model])
    assert main(["export", str(run)]) == 0
    for k, network in enumerate(recipe.tested, 1):
        saved = torch.load(run / f"export/weights-{k}.pt")
        assert all(torch.equal(saved[n], v) for n, v in network.model.state_dict().items())
    assert main(["eval", str(run)]) == 0
    assert f"accuracy {right:.2%}" in capsys.readouterr().out
    assert main(["inspect", str(run)]) == 0
    import numpy as np

    found = np.load(run / "inspect/pred_probs.npy")
    parts = [recipe.evaluate(net, result.data.images).softmax(1) for net in recipe.tested]
    np.testing.assert_allclose(found, torch.stack(parts).mean(0).numpy(), atol=1e-5)


def test_a_decay_that_would_keep_the_first_weights_is_refused(tiny):
    with pytest.raises(ConfigError, match=r"ema must be in \[0, 0.99999\], got 1.0"):
        tiny(ema=1.0)


# --- all together -----------------------------------------------------------------------------


@pytest.mark.parametrize("more_settings", [{}, *more({"accumulate": 2}, {"precision": "float16"})])
@pytest.mark.parametrize("recipe", ["sanm-dividemix", *more("sanm-elr")])
def test_cut_off_inside_an_epoch_nothing_changes(
    tiny, tmp_path, monkeypatch, recipe, more_settings
):
    config = tiny(recipe=recipe, epochs=3, checkpoint_steps=2, clip=1.0, **ALL, **more_settings)
    whole = train(config, tmp_path / "whole")
    out = tmp_path / "cut"
    passes = whole.history[0]["steps"] * config.accumulate
    cut_off(monkeypatch, config, out, passes - 1)
    cut_off(monkeypatch, config, out, passes + 1, resume=True)
    result = train(config, out, resume=True)
    assert metrics(out) == metrics(tmp_path / "whole")
    assert same_networks(result.recipe.networks, whole.recipe.networks)
    assert same_networks(result.recipe.tested, whole.recipe.tested)
    assert torch.equal(result.quality, whole.quality)


@extended
def test_two_ranks_cut_off_inside_an_epoch(tmp_path):
    settings = ["--epochs", "3", "--warmup", "1", "--limit", "333", "--batch-size", "32"]
    settings += ["--accumulate", "2", "--checkpoint-steps", "4", "--quiet"]
    for name, value in ALL.items():
        settings += ["--" + name.replace("_", "-"), str(value)]
    (tmp_path / "cut.py").write_text(CUT)
    command = ["-m", "sanm_train", "train", *settings, "--out"]
    done = torchrun(2, *command, str(tmp_path / "whole"))
    assert done.returncode == 0, done.stderr
    cut = [str(tmp_path / "cut.py"), "7", "train", *settings, "--out", str(tmp_path / "cut")]
    assert "cut off" in torchrun(2, *cut).stderr
    assert checkpoint.load(tmp_path / "cut")["step"] > 0
    again = torchrun(2, *command, str(tmp_path / "cut"), "--resume")
    assert again.returncode == 0, again.stderr
    assert metrics_of(tmp_path / "cut") == metrics_of(tmp_path / "whole")
    ours, theirs = (load_run(tmp_path / name).recipe for name in ("cut", "whole"))
    assert same_networks(ours.tested, theirs.tested)
    assert same_networks(ours.networks, theirs.networks)
