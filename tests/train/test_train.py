"""Recipes and engine: short runs, degenerate splits, metrics, determinism."""

from __future__ import annotations

import csv
import warnings

import pytest
import torch
import torch.nn.functional as F

from sanm_train import RECIPES, Recipe, TrainConfig, register, train
from sanm_train.data import load_digits
from sanm_train.recipes.dividemix import DivideMix
from sanm_train.train import METRICS, seed_everything

BUILT_IN = ("ce", "sanm-ce", "elr", "sanm-elr", "dividemix", "sanm-dividemix", "sanm-onepass")
WITH_QUALITY = tuple(name for name in BUILT_IN if RECIPES[name].uses_quality)


def numbers(result) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in result.history]


@pytest.mark.parametrize("recipe", BUILT_IN)
def test_each_recipe_runs_and_repeats_itself(tiny, recipe):
    runs = [train(tiny(recipe=recipe)) for _ in range(2)]
    assert len(runs[0].history) == 2
    for row in runs[0].history:
        assert all(torch.isfinite(torch.tensor(v)) for v in row.values() if v is not None)
    assert numbers(runs[0]) == numbers(runs[1])
    assert torch.equal(runs[0].recipe.quality, runs[1].recipe.quality)
    assert numbers(train(tiny(recipe=recipe, seed=1))) != numbers(runs[0])


@pytest.mark.parametrize(
    "switch",
    [
        {"views": "max"},
        {"views": "min"},
        {"box": "random"},
        {"modulate": False},
        {"reconstruct": False},
        {"mask": "official-cifar"},
        {"noise": "asymmetric", "rate": 0.4},
        {"average_losses": True, "epochs": 4},
        {"batch_size": 33, "strong_views": 0},
    ],
    ids=str,
)
def test_switches_of_sanm_dividemix(tiny, switch):
    result = train(tiny(**switch))
    row = result.history[-1]
    assert torch.isfinite(torch.tensor(row["train_loss"]))
    assert (row["reconstruction"] == 0) == (switch == {"reconstruct": False})


@pytest.mark.parametrize("recipe", BUILT_IN)
@pytest.mark.parametrize("settings", [{"warmup": 0}, {"limit": 65}, {"limit": 33}], ids=str)
def test_odd_sizes(tiny, recipe, settings):
    """No warm-up; data sets that leave a remainder of one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert len(train(tiny(recipe=recipe, **settings)).history) == 2


def divide_mix(tiny, quality, recipe: str = "sanm-dividemix") -> DivideMix:
    """A recipe past its warm-up whose label quality is `quality`."""
    config = tiny(recipe=recipe, warmup=0)
    data = load_digits().with_noise("symmetric", 0.5).subset(config.limit)
    made = RECIPES[recipe](config, data, seed_everything(0))
    made.quality[:] = quality
    made.fit_quality = lambda: None
    return made


@pytest.mark.parametrize(("quality", "empty"), [(0.1, "labelled"), (0.9, "unlabelled")])
@pytest.mark.parametrize("recipe", ["dividemix", "sanm-dividemix"])
def test_empty_split_falls_back(tiny, recipe, quality, empty):
    made = divide_mix(tiny, quality, recipe)
    with pytest.warns(UserWarning, match=f"no sample is {empty}"):
        losses = list(made.train_epoch(0))
    assert losses and all(step["loss"].isfinite() for step in losses)


@pytest.mark.parametrize("few", ["labelled", "unlabelled"])
def test_a_single_sample_on_one_side(tiny, few):
    quality = torch.full((130,), 0.1 if few == "labelled" else 0.9)
    quality[17] = 1 - quality[17]
    losses = list(divide_mix(tiny, quality).train_epoch(3))
    assert losses and all(step["loss"].isfinite() for step in losses)


@pytest.mark.filterwarnings("ignore:epoch 0, network")
@pytest.mark.parametrize("recipe", WITH_QUALITY)
def test_equal_losses_fall_back(tiny, recipe):
    """A network that gives the same logits for everything: no two groups to tell apart."""
    config = tiny(recipe=recipe, warmup=0, noise="none")
    data = load_digits()
    data = data.subset(64).__class__(
        **{**vars(data.subset(64)), "labels": torch.zeros(64, dtype=torch.long)}
    )
    made = RECIPES[recipe](config, data, seed_everything(0))
    for network in made.networks:
        torch.nn.init.zeros_(network.model.linear.weight)
    with pytest.warns(UserWarning, match="do not fall into two groups"):
        losses = list(made.train_epoch(0))
    assert (made.quality == 1).all()
    assert all(step["loss"].isfinite() for step in losses)


def test_metrics_file(tiny, tmp_path):
    result = train(tiny(epochs=3), tmp_path)
    with (tmp_path / METRICS).open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == [0, 1, 2]
    accuracies = [float(row["test_accuracy"]) for row in rows]
    assert accuracies[-1] == pytest.approx(result.last_accuracy, abs=1e-5)
    assert float(rows[-1]["best_accuracy"]) == pytest.approx(max(accuracies), abs=1e-5)
    assert result.best_accuracy == pytest.approx(max(accuracies), abs=1e-5)
    assert rows[0]["quality_auc"] == "" and 0 <= float(rows[-1]["quality_auc"]) <= 1
    assert {"lr", "train_loss", "labeled", "unlabeled", "prior", "reconstruction"} <= set(rows[0])
    assert [p.name for p in tmp_path.iterdir()] == [METRICS]  # no temporary file is left


def test_learning_rate_drops_once(tiny):
    result = train(tiny(recipe="ce", epochs=4))
    assert [row["lr"] for row in result.history] == pytest.approx([0.02, 0.02, 0.02, 0.002])


def test_interrupted_run_keeps_its_epochs(tiny, tmp_path):
    class Interrupted(RECIPES["ce"]):
        def loss(self, network, batch, epoch):
            if epoch == 2:
                raise KeyboardInterrupt
            return super().loss(network, batch, epoch)

    RECIPES["interrupted"] = Interrupted
    try:
        result = train(tiny(recipe="interrupted", epochs=5), tmp_path)
    finally:
        del RECIPES["interrupted"]
    assert result.interrupted and len(result.history) == 2
    assert len((tmp_path / METRICS).read_text().splitlines()) == 3


def test_no_noise_has_no_auc(tiny):
    result = train(tiny(recipe="ce", noise="none"))
    assert result.quality_auc is None and result.data.noise_rate == 0


def test_loss_that_is_not_finite_stops_the_run(tiny):
    with pytest.raises(FloatingPointError, match=r"not finite|training loss is"):
        train(tiny(recipe="ce", lr=1e30, epochs=2))


def test_a_recipe_of_one_s_own(tiny):
    @register("smooth")
    class Smooth(Recipe):
        def loss(self, network, batch, epoch):
            logits = network(self.augment.weak(batch.images))
            return {"loss": F.cross_entropy(logits, batch.targets, label_smoothing=0.1)}

    try:
        assert train(tiny(recipe="smooth")).last_accuracy >= 0
    finally:
        del RECIPES["smooth"]


def test_sanm_dividemix_tells_wrong_labels():
    """A tenth of the demo: the label quality tells wrong from right labels."""
    result = train(TrainConfig(epochs=9, warmup=8, limit=600, batch_size=32))
    assert result.quality_auc > 0.85
    assert result.last_accuracy > 0.6
