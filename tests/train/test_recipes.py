"""What the recipes compute, a recipe of one's own, and starting from pre-trained weights."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import sanm_train
from sanm_train import DATASETS, MODELS, RECIPES, Batch, Recipe, TrainConfig, register, train
from sanm_train.errors import ConfigError
from sanm_train.models import PreActResNet18, SmallCNN, classifier
from sanm_train.train import build as build_run

DOCS = Path(__file__).resolve().parents[2] / "docs/training.md"


@pytest.fixture
def build(tiny):
    """A maker of recipes, with their data, before any training."""

    def make(recipe: str, **settings) -> Recipe:
        return build_run(tiny(recipe=recipe, **settings)).recipe

    return make


def test_elr_is_its_definition(build):
    made = build("elr", elr_momentum=0.7, elr_weight=3.0)
    torch.manual_seed(0)
    expected = torch.zeros(130, 10, dtype=torch.double)
    for rows in (torch.tensor([5, 2, 9]), torch.tensor([9, 5, 100])):
        for view in ("image", "max", "min"):
            logits = (3 * torch.randn(3, 10)).requires_grad_()
            labels = torch.randn(3, 10).softmax(1)
            z = logits.detach().double().requires_grad_()
            p = z.softmax(1).clamp(1e-4, 1 - 1e-4)
            if view == "image":  # a masked view leaves t where it is
                for i, row in zip(rows.tolist(), p.detach(), strict=True):
                    expected[i] = 0.7 * expected[i] + 0.3 * row / row.sum()
            wanted = 3 * (1 - (expected[rows] * p).sum(1)).log()
            wanted = wanted - (labels * z.log_softmax(1)).sum(1)
            found = made.criterion(logits, labels, rows, view)
            torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(made.ensemble.double(), expected)
            # The targets are constants: the gradient is that of log(1 − ⟨t, p⟩) in p alone.
            upstream = torch.randn(3)
            (wanted_gradient,) = torch.autograd.grad(wanted, z, upstream.double())
            (gradient,) = torch.autograd.grad(found, logits, upstream)
            torch.testing.assert_close(gradient.double(), wanted_gradient, rtol=1e-4, atol=1e-6)
    assert not made.ensemble.requires_grad


def test_elr_of_a_certain_network_is_finite(build):
    made = build("elr", elr_momentum=0.0)
    logits = torch.full((2, 10), -1000.0).index_fill(1, torch.tensor([3]), 1000.0).requires_grad_()
    labels = F.one_hot(torch.tensor([3, 1]), 10).float()
    value = made.criterion(logits, labels, torch.tensor([0, 1]), "image").sum()
    value.backward()
    assert value.isfinite() and logits.grad.isfinite().all()


def test_elr_weight_and_ensemble_in_a_run(tiny):
    first = train(tiny(recipe="elr", elr_weight=0.0)).history[-1]
    plain = train(tiny(recipe="ce")).history[-1]
    assert first["train_loss"] == pytest.approx(plain["train_loss"])  # λ = 0 is cross-entropy
    result = train(tiny(recipe="elr"))
    row, ensemble = result.history[-1], result.recipe.ensemble
    assert row["train_loss"] < row["labeled"]  # log(1 − ⟨t, p⟩) is negative
    assert ((ensemble.sum(1) - (1 - 0.7**2)).abs() < 1e-5).all()  # each sample twice in two epochs


def test_sanm_elr_adds_masked_views_after_the_warmup(tiny):
    warm, masked = train(tiny(recipe="sanm-elr")).history
    assert "reconstruction" not in warm and masked["reconstruction"] > 0


@pytest.mark.parametrize("views", ["both", "max", "min"])
@pytest.mark.parametrize("modulate", [True, False])
def test_every_view_is_trained_with_the_recipe_s_criterion(build, views, modulate):
    made = build("sanm-elr", warmup=0, views=views, modulate=modulate, elr_weight=2.0)
    network, batch = made.networks[0].eval(), one_batch(made)
    made.ensemble.copy_(torch.rand_like(made.ensemble) / 10)
    before = made.ensemble.clone()
    losses = network.losses(batch, 5, made.criterion)
    masked = losses.masked
    kinds = [(batch.images, F.one_hot(batch.targets, 10).float())]
    for images, targets in (
        (masked.images_max, masked.targets_max),
        (masked.images_min, masked.targets_min),
    ):
        if images is not None:
            kinds.append((images, targets if modulate else kinds[0][1]))
    rows = torch.arange(len(batch.images))
    p = network(batch.images).softmax(1).clamp(1e-4, 1 - 1e-4).detach()
    ensemble = before[rows] * 0.7 + 0.3 * p / p.sum(1, keepdim=True)
    torch.testing.assert_close(made.ensemble[rows], ensemble)
    wanted = []
    for images, targets in kinds:
        z = network(images)
        p = z.softmax(1).clamp(1e-4, 1 - 1e-4)
        wanted.append(F.cross_entropy(z, targets) + 2 * (1 - (ensemble * p).sum(1)).log().mean())
    torch.testing.assert_close(losses.classification, torch.stack(wanted).mean())
    plain = network.losses(batch, 5)  # cross-entropy, fused and as a criterion

    def cross_entropy(z, t, rows, view):
        return F.cross_entropy(z, t, reduction="none")

    torch.testing.assert_close(network.losses(batch, 5, cross_entropy).total, plain.total)
    torch.testing.assert_close(losses.sample_loss, plain.sample_loss)


@pytest.mark.parametrize("recipe", ["sanm-ce", "sanm-elr"])
@pytest.mark.parametrize("views", ["both", "max"])
def test_the_control_trains_as_many_plain_views(build, recipe, views):
    made = build(recipe, warmup=1, box="none", views=views)
    assert made.networks[0].decoder is None
    network, batch, seen = made.networks[0].eval(), one_batch(made), []
    network.register_forward_hook(lambda _, given, __: seen.append(given[0]))
    torch.manual_seed(3)
    made.loss(network, batch, 0)
    assert len(seen) == 1  # nothing in the warm-up
    torch.manual_seed(3)
    loss = made.loss(network, batch, 1)["loss"]
    torch.manual_seed(3)
    kinds = [made.augment.weak(batch.images) for _ in range(3 if views == "both" else 2)]
    assert not torch.equal(kinds[0], kinds[-1])
    torch.testing.assert_close(torch.cat(seen[1:]), torch.cat(kinds))
    if recipe == "sanm-ce":
        wanted = [F.cross_entropy(network(kind), batch.targets) for kind in kinds]
        torch.testing.assert_close(loss, torch.stack(wanted).mean())


def test_the_control_of_dividemix_is_dividemix_with_more_weak_views(tiny):
    settings = {"epochs": 4, "limit": 400, "rate": 0.2, "seed": 1}
    control = train(tiny(recipe="sanm-dividemix", box="none", **settings))
    assert any(row.get("unlabeled") for row in control.history)  # it has divided
    assert control.history[-1]["reconstruction"] == 0
    more = train(tiny(recipe="dividemix", weak_views=3, **settings))
    rows = [(r.history[-1]["labeled"], r.last_accuracy) for r in (control, more)]
    assert rows[0] == pytest.approx(rows[1], rel=0.2)


def one_batch(made: Recipe, size: int = 32, quality: torch.Tensor | None = None) -> Batch:
    if quality is None:
        quality = torch.rand(len(made.data), generator=torch.Generator().manual_seed(4))
    index = torch.arange(size)
    (images,) = made.data.images.stream([index])
    return Batch(images, made.data.labels[index], quality[index], made.data.index[index], index)


def test_onepass_is_its_definition_and_runs_the_network_once(build, monkeypatch):
    made = build("sanm-onepass", warmup=0)
    network, batch = made.networks[0].eval(), one_batch(made)
    monkeypatch.setattr(made.augment, "weak", made.augment.plain)
    kept = {}
    whole = sanm_train.recipes.onepass.sk.masked_forward

    def recorded(*arguments, **options):
        kept["result"] = whole(*arguments, **options)
        return kept["result"]

    monkeypatch.setattr("sanm_kernels.masked_forward", recorded)
    runs = []
    network.model.register_forward_hook(lambda *_: runs.append(1))
    losses = made.loss(network, batch, 0)
    losses["loss"].backward()
    assert len(runs) == 1
    found = [p.grad.clone() for p in network.parameters()]
    network.zero_grad()

    masked = kept["result"]
    logits, features = network.forward_features(made.augment.plain(batch.images))
    # Share of each 2×2 cell that the peak's box leaves visible, counted pixel by pixel.
    visible = torch.ones(len(batch.images), 1, 8, 8)
    for i, (y0, x0, y1, x1) in enumerate(masked.box_max.tolist()):
        visible[i, :, y0:y1, x0:x1] = 0
    visible = F.avg_pool2d(visible, 2)
    pooled = (visible * features).sum((2, 3)) / visible.sum((2, 3))
    hidden = -(masked.targets_max * network.model.linear(pooled).log_softmax(1)).sum(1).mean()
    labeled = F.cross_entropy(logits, batch.targets)
    torch.testing.assert_close(losses["labeled"], labeled)
    torch.testing.assert_close(losses["masked"], hidden)
    torch.testing.assert_close(losses["loss"], (labeled + hidden) / 2)
    ((labeled + hidden) / 2).backward()  # reaches classifier and convolutions by both terms
    for gradient, parameter in zip(found, network.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-6)


def test_onepass_hides_more_of_doubtful_labels(build, monkeypatch):
    made = build("sanm-onepass", warmup=0)
    network, ratios = made.networks[0], []
    whole = sanm_train.recipes.onepass.sk.masked_forward

    def recorded(*arguments, **options):
        result = whole(*arguments, **options)
        ratios.append(result.ratio_max)
        return result

    monkeypatch.setattr("sanm_kernels.masked_forward", recorded)
    for quality in (0.0, 1.0):
        made.quality[:] = quality
        made.loss(network, one_batch(made, 64, made.quality[0]), 0)
    assert ratios[0].min() > 0.16 > 0.13 >= ratios[1].max()  # lo + γ above, at most hi below


def test_onepass_settings(tiny):
    assert len(train(tiny(recipe="sanm-onepass", modulate=False, views="max")).history) == 2
    with pytest.raises(ConfigError, match=r"views must be both or max for sanm-onepass"):
        tiny(recipe="sanm-onepass", views="min")
    with pytest.raises(ConfigError, match=r"box must be activation for sanm-onepass"):
        tiny(recipe="sanm-onepass", box="random")


def test_classifier_layer():
    model = SmallCNN()
    assert classifier(model) is model.linear
    assert classifier(torch.nn.Sequential(torch.nn.Linear(1, 2), model.linear)) is model.linear
    with pytest.raises(ValueError, match="Flatten must have a linear layer"):
        classifier(torch.nn.Flatten())
    model.classifier_layer = "head"
    with pytest.raises(ValueError, match="SmallCNN must have a linear layer 'head'"):
        classifier(model)


def test_register_refuses_what_it_cannot_use():
    with pytest.raises(TypeError, match="expected a subclass of Recipe, got <class 'int'>"):
        register("number")(int)
    with pytest.raises(ValueError, match="CrossEntropy has that name already"):

        @register("ce")
        class Other(Recipe):
            pass

    assert RECIPES["ce"].__name__ == "CrossEntropy" and "number" not in RECIPES
    try:
        for _ in range(2):  # a notebook's cell that is run again

            @register("again")
            class Again(Recipe):
                pass

        assert RECIPES["again"] is Again
    finally:
        del RECIPES["again"]


def test_examples_of_the_docs_run():
    examples = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.S)
    known, names = dict(RECIPES), {"__name__": "docs"}
    try:
        assert examples
        for example in examples:
            exec(compile(example, DOCS.name, "exec", dont_inherit=True), names)
        added = set(RECIPES) - set(known)
        found = train(TrainConfig(recipe="sanm-gce", epochs=2, warmup=1, limit=130)).history[-1]
        assert found["reconstruction"] > 0 and found["train_loss"] < found["labeled"]
        assert (
            added == {"smooth", "sanm-gce"}
            and {"stripes"} <= {*DATASETS}
            and {"plain"} <= {*MODELS}
        )
    finally:
        for registry in (RECIPES, DATASETS, MODELS):
            for name in ("smooth", "sanm-gce", "stripes", "plain"):
                registry.pop(name, None)
                registry.configs.pop(name, None)


def test_docs_list_every_recipe():
    assert set(re.findall(r"^\| `([a-z][\w-]*)` \| \d", DOCS.read_text(), re.M)) == set(RECIPES)


def test_pretrained_weights_start_both_networks(build, tmp_path):
    torch.manual_seed(7)
    model = SmallCNN()
    path = tmp_path / "weights.pt"
    torch.save(model.state_dict(), path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = build("dividemix", pretrained=str(path))
    for network in made.networks:
        for name, value in network.model.state_dict().items():
            assert torch.equal(value, model.state_dict()[name])


@pytest.mark.parametrize("head", ["none", "of 7 classes"])
@pytest.mark.parametrize("wrapped", ["", "model"])
def test_a_classifier_that_does_not_fit_starts_afresh(build, tmp_path, head, wrapped):
    model = SmallCNN(num_classes=7)
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    if head == "none":
        state = {name: value for name, value in state.items() if "linear" not in name}
    path = tmp_path / "weights.pt"
    torch.save({wrapped: state, "epoch": 3} if wrapped else state, path)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        made = build("dividemix", pretrained=str(path))
    assert [str(w.message) for w in said if "classifier of" in str(w.message)] == [
        f"pretrained: the classifier of {path} is missing or of another shape; "
        "it starts from fresh weights"
    ]
    first, second = (network.model for network in made.networks)
    assert torch.equal(first.features[0].weight, model.features[0].weight)
    assert torch.equal(second.features[-2].weight, model.features[-2].weight)
    assert first.linear.weight.shape == (10, 64)
    assert not torch.equal(first.linear.weight, second.linear.weight)


def test_pretrained_weights_that_do_not_fit(build, tmp_path):
    path = tmp_path / "weights.pt"
    state = SmallCNN().state_dict()
    state["features.0.weight"] = torch.zeros(16, 3, 3, 3)
    state["head.0.bias"] = state.pop("features.3.weight")
    torch.save(state, path)
    with pytest.raises(ConfigError) as error:
        build("dividemix", pretrained=str(path))
    assert str(error.value) == (
        f"pretrained: {path} does not fit the network; missing: features.3.weight; "
        "not in the network: head.0.bias; "
        "of another shape: features.0.weight (16, 3, 3, 3) instead of (16, 1, 3, 3)"
    )
    torch.save(PreActResNet18(in_channels=1, width=1).state_dict(), path)
    with pytest.raises(ConfigError, match=r"missing: features\.0\.weight, .* and \d+ more; not in"):
        build("dividemix", pretrained=str(path))


def test_narrow_networks_do_not_spoil_memory(build):
    """In channels_last, on two threads, torch wrote past its memory and the process died."""
    settings = {"model": "resnet20", "threads": 2}
    assert build("ce", **settings).channels_last
    narrow = build("ce", width=4, **settings)
    assert not narrow.channels_last
    run = TrainConfig(recipe="ce", epochs=2, limit=400, width=4, **settings)
    assert train(run).history[-1]["train_loss"] > 0


class Evil:
    def __reduce__(self):
        return (print, ("called",))


def test_pretrained_files_that_cannot_be_loaded(build, tmp_path, capsys):
    with pytest.raises(ConfigError, match=r"pretrained must be a file, got 'nowhere\.pt'"):
        TrainConfig(pretrained="nowhere.pt")
    path = tmp_path / "weights.pt"
    path.write_bytes(b"\x80\x02 no weights")
    with pytest.raises(ConfigError, match=r"weights\.pt cannot be loaded: ."):
        build("ce", pretrained=str(path))
    torch.save({"linear.weight": Evil()}, path)
    with pytest.raises(ConfigError, match=r"cannot be loaded: it names what is not a tensor"):
        build("ce", pretrained=str(path))
    assert capsys.readouterr().out == ""
    torch.save({"epoch": 3}, path)
    with pytest.raises(ConfigError, match="must hold a state dict of tensors"):
        build("ce", pretrained=str(path))
