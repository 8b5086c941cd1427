"""Recipes and loop: short runs, degenerate splits, metrics, determinism."""

from __future__ import annotations

import csv
import warnings

import pytest
import torch
import torch.nn.functional as F
from inputs import each, more

from sanm_train import RECIPES, Recipe, TrainConfig, checkpoint, register, train
from sanm_train.data import generator
from sanm_train.loop import Loop, launched
from sanm_train.train import CONFIG, METRICS, build

BUILT_IN = ("sanm-dividemix", "dividemix", "sanm-ce", "ce", "sanm-elr", "elr", "sanm-onepass")
WITH_QUALITY = tuple(name for name in BUILT_IN if RECIPES[name].uses_quality)


def numbers(result) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in result.history]


@pytest.mark.parametrize("recipe", [BUILT_IN[0], *more(*BUILT_IN[1:])])
def test_each_recipe_runs_and_repeats_itself(tiny, recipe):
    runs = [train(tiny(recipe=recipe)) for _ in range(2)]
    assert len(runs[0].history) == 2
    for row in runs[0].history:
        assert all(torch.isfinite(torch.tensor(v)) for v in row.values() if v is not None)
    assert numbers(runs[0]) == numbers(runs[1])
    assert torch.equal(runs[0].quality, runs[1].quality)
    assert numbers(train(tiny(recipe=recipe, seed=1))) != numbers(runs[0])


@pytest.mark.parametrize(
    "switch",
    [
        {"reconstruct": False},
        *more(
            {"views": "max"},
            {"views": "min"},
            {"box": "random"},
            {"modulate": False},
            {"mask": "official-cifar"},
            {"noise": "asymmetric", "rate": 0.4},
            {"average_losses": True, "epochs": 4},
            {"batch_size": 33, "strong_views": 0},
        ),
    ],
    ids=str,
)
def test_switches_of_sanm_dividemix(tiny, switch):
    result = train(tiny(**switch))
    row = result.history[-1]
    assert torch.isfinite(torch.tensor(row["train_loss"]))
    assert (row["reconstruction"] == 0) == (switch == {"reconstruct": False})


@each(recipe=BUILT_IN, settings=[{"warmup": 0}, {"limit": 65}, {"limit": 33}])
def test_odd_sizes(tiny, recipe, settings):
    """No warm-up; data sets that leave a remainder of one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert len(train(tiny(recipe=recipe, **settings)).history) == 2


def one_epoch(config, change) -> tuple[Recipe, dict[str, float]]:
    """An epoch of a recipe that `change` has been called with; its mean losses."""
    recipe = build(config).recipe
    change(recipe)
    with launched(config) as fabric:
        loop = Loop(fabric, config, recipe)
        list(loop.steps())
    return recipe, loop.mean_losses()


def with_quality(quality):
    """Gives a recipe that label quality, for good."""

    def change(recipe):
        recipe.quality[:] = quality
        recipe.fit_quality = lambda: None

    return change


@pytest.mark.parametrize(("quality", "empty"), [(0.1, "labelled"), (0.9, "unlabelled")])
@pytest.mark.parametrize("recipe", ["sanm-dividemix", *more("dividemix")])
def test_empty_split_falls_back(tiny, recipe, quality, empty):
    config = tiny(recipe=recipe, warmup=0)
    with pytest.warns(UserWarning, match=f"no sample is {empty}"):
        made, losses = one_epoch(config, with_quality(quality))
    assert made.divided == [False, False]
    assert torch.isfinite(torch.tensor(losses["loss"]))


@pytest.mark.parametrize("few", ["labelled", *more("unlabelled")])
def test_a_single_sample_on_one_side(tiny, few):
    quality = torch.full((130,), 0.1 if few == "labelled" else 0.9)
    quality[17] = 1 - quality[17]
    made, losses = one_epoch(tiny(warmup=0), with_quality(quality))
    assert made.divided == [True, True]
    assert torch.isfinite(torch.tensor(losses["loss"])) and losses["reconstruction"] > 0


@pytest.mark.filterwarnings("ignore:epoch 0, network")
@pytest.mark.parametrize("recipe", [WITH_QUALITY[0], *more(*WITH_QUALITY[1:])])
def test_equal_losses_fall_back(tiny, recipe):
    """A network that gives the same logits for everything: no two groups to tell apart."""

    def change(made):
        made.data.labels.zero_()
        for network in made.networks:
            torch.nn.init.zeros_(network.model.linear.weight)

    config = tiny(recipe=recipe, warmup=0, limit=64)
    with pytest.warns(UserWarning, match="do not fall into two groups"):
        made, losses = one_epoch(config, change)
    assert (made.quality == 1).all()
    assert torch.isfinite(torch.tensor(losses["loss"]))


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
    names = [CONFIG, METRICS, checkpoint.NAME, "run.json"]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names)  # no temporary file is left


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


def test_a_diverging_run_keeps_its_last_good_checkpoint(tiny, tmp_path):
    config = tiny(recipe="ce", lr=1e30, epochs=3, checkpoint_steps=1)
    with pytest.raises(FloatingPointError, match="training loss is"):
        train(config, tmp_path)
    saved = checkpoint.load(tmp_path)
    assert saved is not None and saved["step"] > 0
    assert all(total.isfinite() for total in saved["ranks"][0]["sums"].values())


def test_mean_losses_are_over_the_passes_that_have_them(tiny):
    with launched(tiny()) as fabric:
        loop = Loop(fabric, tiny(), build(tiny()).recipe)
    loop.sums = {"loss": torch.tensor(6.0), "labeled": torch.tensor(4.0)}
    loop.counts.update({"loss": 3, "labeled": 2})
    assert loop.mean_losses() == {"loss": 2.0, "labeled": 2.0}


def test_warns_of_runs_that_are_not_what_they_are_called(tiny):
    with pytest.warns(UserWarning, match=r"never leaves its warm-up \(warmup 2, epochs 2\)"):
        build(tiny(warmup=2))
    with pytest.warns(UserWarning, match=r"the first 3 samples lack \d of 10 classes"):
        build(tiny(recipe="ce", limit=3, batch_size=2))


def test_ranks_seeds_and_purposes_draw_differently():
    first = [
        torch.rand(3, generator=generator(seed, purpose, rank)).tolist()
        for seed in (0, 1)
        for purpose in ("masking", "order")
        for rank in range(4)
    ]
    assert len({tuple(draws) for draws in first}) == len(first)


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
