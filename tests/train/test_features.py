"""Which layer's output is the feature map, how it is laid out, and what a model returns."""

from __future__ import annotations

import copy
import gc
import re
import warnings
from collections import namedtuple

import pytest
import torch
from inputs import extended
from torch import Tensor, nn

import sanm_kernels as sk
from sanm_train.features import PROPOSED
from sanm_train.layouts import Layout, layout_of
from sanm_train.models import SmallCNN
from sanm_train.sanm import SANM, Batch

SQUARE = (224, 224)


def batch(side: int = 16, channels: int = 3, size: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(size, channels, side, side, generator=generator)
    return Batch(images, torch.arange(size), torch.ones(size), torch.arange(size))


@pytest.mark.parametrize(
    ("shape", "image", "width", "found"),
    [
        ((2, 768, 7, 7), SQUARE, 768, Layout("BCHW", (7, 7))),
        ((2, 7, 7, 768), SQUARE, 768, Layout("BHWC", (7, 7))),
        ((2, 512, 7, 7), SQUARE, 4096, Layout("BCHW", (7, 7))),  # VGG: by the aspect alone
        ((2, 8, 4, 4), (8, 8), 10, Layout("BCHW", (4, 4))),
        ((2, 4, 4, 6), (8, 12), 10, Layout("BCHW", (4, 6))),
        ((2, 6, 8, 6), (12, 16), 6, Layout("BHWC", (6, 8))),  # the width agrees with both
        ((2, 10, 8, 8), (32, 32), 5, Layout("BCHW", (8, 8))),  # both near the aspect, one in it
        ((2, 197, 768), SQUARE, 768, Layout("BNC", (14, 14), 1)),
        ((2, 198, 192), SQUARE, 192, Layout("BNC", (14, 14), 2)),  # DeiT's distillation token
        ((2, 201, 384), SQUARE, 384, Layout("BNC", (14, 14), 5)),  # four registers
        ((2, 49, 768), SQUARE, 768, Layout("BNC", (7, 7), 0)),
        ((2, 141, 192), (224, 160), 192, Layout("BNC", (14, 10), 1)),
        ((2, 97, 192), (200, 130), 192, Layout("BNC", (12, 8), 1)),  # patches that do not divide
    ],
)  # fmt: skip
def test_auto_layout(shape, image, width, found):
    assert layout_of(shape, image, widths=frozenset([width])) == found


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((2, 8, 8, 8), {}, r"for images of 32 × 32 pixels and a classifier of width 8 can be"),
        ((2, 9, 9, 9), {}, "say which: layout='BCHW' or layout='BHWC'"),
        ((2, 8, 4, 16), {}, "can be"),  # in the aspect as BCHW alone, of the width in neither
        ((2, 64, 1, 8), {}, "neither 1 × 8 nor 64 × 1 cells have the image's aspect"),
        ((2, 64, 1, 1), {}, "one cell"),
        ((2, 1, 1, 64), {}, "one cell"),
        ((2, 1, 1, 64), {"layout": "BHWC"}, "one cell"),
        ((2, 7, 7, 768), {"layout": "BCHW"}, "as BCHW has 7 × 768 cells, far from the aspect"),
        ((2, 64), {}, "which is not .* name a layer before the pooling, or give to_map="),
        ((2, 64, 4, 4, 4), {}, "which is not"),
        ((2, 64, 4, 4), {"layout": "BNC"}, r"which is not \(B, N, C\)"),
        ((2, 16, 64), {"layout": "BHWC"}, "which is not BHWC: four dimensions"),
        ((2, 2, 64), {}, "one cell"),
        ((2, 60, 64), {}, "whose 60 tokens do not form a grid .* say grid="),
        ((2, 17, 64), {"grid": (5, 5)}, r"not those of grid=\(5, 5\)"),
        ((2, 17, 64), {"grid": (2, 2)}, r"not those of grid=\(2, 2\)"),
        ((2, 64, 4, 4), {"grid": (2, 2)}, r"or grid=\(2, 2\)"),
        ((2, 8, 17), {}, "of which the classifier's width, 8, is the second dimension"),
    ],
)  # fmt: skip
def test_refused_layouts(shape, options, message):
    with pytest.raises(ValueError, match=message):
        layout_of(shape, (32, 32), widths=frozenset([8]), **options)


def test_grids_of_any_shape_are_found_from_the_patches():
    """As many tokens as patches of p pixels, with up to five more, for many sizes of image."""
    sizes = [(s, s) for s in range(32, 257, 16)]
    sizes += [(224, 160), (160, 224), (128, 384), (96, 160), (384, 128), (64, 48), (240, 320)]
    for image in sizes:
        for patch in (8, 14, 16):
            grid = (image[0] // patch, image[1] // patch)
            if grid[0] * grid[1] < 2 or max(grid) > 2 * min(grid) * max(image) / min(image):
                continue
            for extra in (0, 1, 2, 5):
                tokens = (1, grid[0] * grid[1] + extra, 7)
                assert layout_of(tokens, image, patch=patch) == ("BNC", grid, extra)
                found = layout_of(tokens, image)  # by the aspect alone
                divides = image[0] % patch + image[1] % patch == 0
                assert found.grid == grid or found.extra < extra
                assert found.grid == grid or not divides or tokens[1] < 30


class Net(nn.Module):
    """Two convolutions; `form` makes the output of the layer "last" of the map (B, 8, 4, 4)."""

    def __init__(self, form: nn.Module | None = None, wrap=lambda z: z) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1))
        self.last = nn.Identity() if form is None else form
        self.wrap = wrap
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        features = self.body(x)
        self.last(features)
        return self.wrap(self.fc(features.mean((2, 3))))


class Tokens(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        return torch.cat([9 + 0 * tokens[:, :2], tokens], 1)


class ChannelsLast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


class Tuple(nn.Module):
    def forward(self, x: Tensor) -> tuple:
        return x, None


class Pyramid(nn.Module):
    def forward(self, x: Tensor) -> list:
        return [x[:, :, :1], x]


class Pooled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


class Hidden(nn.Module):
    def forward(self, x: Tensor) -> dict:
        return {"pooled": x.mean((2, 3)), "last_hidden_state": Tokens()(x)}


@pytest.mark.parametrize(
    ("form", "options"),
    [
        (nn.Identity(), {}),
        (ChannelsLast(), {}),
        (ChannelsLast(), {"layout": "BHWC"}),
        (Tokens(), {}),
        (Tokens(), {"layout": "BNC", "grid": (4, 4)}),
        (Tuple(), {}),
        (Pyramid(), {}),
        (Hidden(), {}),
        (Hidden(), {"to_map": lambda out: out["last_hidden_state"][:, 2:].mT.unflatten(2, (4, 4))}),
        (nn.Flatten(), {"to_map": lambda x: x.unflatten(1, (8, 4, 4))}),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, nn.Module) else "-".join(x),
)
def test_a_map_of_any_form_is_the_map(form, options):
    net = Net(form).eval()
    sanm = SANM(net, "last", image_shape=(3, 16, 16), **options).eval()
    data = batch()
    wanted = net.body(data.images)
    features = sanm.forward_features(data.images)[1]
    assert torch.equal(features, wanted)
    assert sanm.decoder.map_shape == (8, 4, 4)
    losses = sanm(data, generator=0)
    direct = sk.masked_forward(
        wanted, data.targets, data.clean_prob, images=data.images, num_classes=5, generator=0,
        sample_index=data.sample_index,
    )  # fmt: skip
    for one, other in zip(losses.masked.stats, direct.stats, strict=True):
        torch.testing.assert_close(one, other)
    assert torch.equal(losses.masked.box_max, direct.box_max)
    assert torch.equal(losses.masked.box_min, direct.box_min)


Output = namedtuple("Output", "loss logits")


@pytest.mark.parametrize(
    ("wrap", "options"),
    [
        (lambda z: (z, None), {}),
        (lambda z: [z], {}),
        (lambda z: {"logits": z}, {}),
        (lambda z: Output(None, z), {}),
        (lambda z: {"out": z}, {"logits": lambda out: out["out"]}),
    ],
    ids=["tuple", "list", "dict", "logits", "callable"],
)
def test_logits_of_any_form(wrap, options):
    net = Net(wrap=wrap).eval()
    sanm = SANM(net, "last", image_shape=(3, 16, 16), **options).eval()
    images = batch().images
    assert torch.equal(sanm(images), net.fc(net.body(images).mean((2, 3))))
    assert sanm(batch()).logits.shape == (4, 5)


def test_a_head_of_one_s_own_is_trained_too():
    features_only = nn.Sequential(nn.Conv2d(3, 12, 3, 2, 1), Pyramid())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5))

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = head

        def forward(self, maps: list) -> Tensor:
            return self.head(maps[-1])

    sanm = SANM(features_only, "1", image_shape=(3, 16, 16), logits=Last())
    sanm(batch(), generator=0).total.backward()
    assert all(p.grad is not None for p in sanm.parameters())
    assert set(head.parameters()) <= set(sanm.parameters())


@pytest.mark.parametrize(
    ("wrap", "came"),
    [
        (lambda z: {"scores": z}, "dict of 'scores'"),
        (lambda z: [z[:, :, None], z], r"list of \(4, 5, 1\), \(4, 5\)"),
        (lambda z: z.argmax(1), r"a tensor \(4,\) of torch.int64"),
        (lambda z: z[:2], r"a tensor \(2, 5\)"),
        (lambda z: None, "NoneType"),
        (lambda z: z[:, :1], r"a tensor \(4, 1\)"),
    ],
)
def test_what_is_no_logits_is_named(wrap, came):
    message = f"which returned {came}.*; give logits=, a callable"
    with pytest.raises(ValueError, match=message):
        SANM(Net(wrap=wrap), "last").forward_features(batch().images)
    with pytest.raises(ValueError, match=message):
        SANM(Net(wrap=wrap), "last")(batch().images)


class PixelValues(nn.Module):
    """A model as transformers has some: the images are not the first argument."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, ids=None, pixel_values=None):
        assert ids is None
        return {"logits": self.net(pixel_values)}


def test_images_go_to_pixel_values():
    sanm = SANM(PixelValues(), "net.last", image_shape=(3, 16, 16))
    assert sanm(batch()).logits.shape == (4, 5)


def test_the_last_map_is_proposed():
    with pytest.warns(UserWarning, match=r"taking 'last', .* \(B, 8, 4, 4\); name it to be sure"):
        sanm = SANM(Net(), image_shape=(3, 16, 16))
    assert sanm.feature_layer == "last"
    sanm = SANM(Net(Pooled()))  # the pooled output is no map, and the batch says the image's size
    assert sanm.feature_layer is None
    with pytest.warns(UserWarning, match="taking 'body'"):  # not body.1, which gives the same
        sanm.forward_features(batch().images)
    assert sanm.feature_layer == "body"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sanm.forward_features(batch().images)


def test_a_dry_run_leaves_no_trace():
    net = Net(nn.BatchNorm2d(8))
    net.body.eval()
    before = copy.deepcopy(net.state_dict())
    with pytest.warns(UserWarning, match="taking"):
        SANM(net, image_shape=(3, 16, 16))
    assert net.last.training and net.training and not net.body.training
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])
    hooks = {n: len(m._forward_hooks) for n, m in net.named_modules() if m._forward_hooks}
    assert hooks == {"last": 1}


class Deep(nn.Module):
    """Seven maps of different sizes before one cell, which is the layer "cell"."""

    def __init__(self) -> None:
        super().__init__()
        steps = [nn.Conv2d(4 if i else 3, 4, 2) for i in range(7)]
        self.steps = nn.Sequential(*steps)
        self.cell, self.unused = nn.AdaptiveAvgPool2d(1), nn.Identity()
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        return self.fc(self.cell(self.steps(x)).flatten(1))


def test_errors_list_five_layers_with_their_shapes():
    images = batch(32).images
    for layer in ("cell", "unused", "fc"):
        with pytest.raises((ValueError, RuntimeError)) as error:
            SANM(Deep(), layer).forward_features(images)
        text = str(error.value)
        assert f"feature_layer {layer!r}" in text
        names = re.findall(r"'(steps[.\d]*)' \(B, 4, \d+, \d+\)", text)
        assert len(names) == PROPOSED == 5  # the container gives what its last part does
        assert names == ["steps", "steps.5", "steps.4", "steps.3", "steps.2"]


class Empty(nn.Module):
    def forward(self, x: Tensor) -> dict:
        return {"map": None}


@pytest.mark.parametrize(
    ("to_map", "message"),
    [
        (None, "feature_layer 'last' gave dict of 'map', not a tensor; give a to_map="),
        (lambda out: [out["map"]], "to_map made of feature_layer 'last' list of NoneType, not a"),
        (lambda out: torch.ones(1, 8), r"to_map made of feature_layer 'last' \(B, 8\), which is"),
    ],
)
def test_what_is_no_map_is_named(to_map, message):
    with pytest.raises(ValueError, match=message):
        SANM(Net(Empty()), "last", image_shape=(3, 16, 16), to_map=to_map)


def test_no_map_at_all():
    net = nn.Sequential(nn.Flatten(), nn.Linear(768, 5))
    with pytest.raises(ValueError, match=r"no layer gives .* are of neither three nor four dimen"):
        SANM(net, image_shape=(3, 16, 16))
    with pytest.raises(
        ValueError, match=r"one cell.* the last outputs are '1' \(B, 8, 1, 1\), '0'"
    ):
        SANM(
            nn.Sequential(nn.Conv2d(3, 8, 16), nn.ReLU(), nn.Flatten(), nn.Linear(8, 5)),
            image_shape=(3, 16, 16),
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "BWHC"}, "layout: expected one of 'auto', 'BCHW', 'BHWC', 'BNC', got 'BWHC'"),
        ({"grid": 14}, "grid: expected"),
        ({"grid": (0, 3)}, r"grid: expected \(h, w\), two integers ≥ 1, got \(0, 3\)"),
        ({"to_map": "BCHW"}, "to_map: expected a callable or None, got str"),
        ({"logits": "logits"}, "logits: expected a callable or None, got str"),
        ({"feature_layer": "lost"}, "no module 'lost'; nearest: 'last'"),
        ({"feature_layer": nn.Linear(1, 1)}, "this Linear is not part of the model"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        SANM(Net(), **{"feature_layer": "last", **options})


def test_maps_of_mean_zero_are_told(recwarn):
    """As of a transformer's last LayerNorm, which its classifier reads."""
    norm = nn.LayerNorm(8)
    net = Net(nn.Sequential(ChannelsLast(), norm))
    with torch.no_grad():
        norm.weight.normal_()
    SANM(net, "last", image_shape=(3, 16, 16))
    SANM(net, "body", image_shape=(3, 16, 16))
    nn.init.zeros_(net.body[1].weight)  # a map of zeros says nothing: images differ
    nn.init.zeros_(net.body[1].bias)
    SANM(net, "body", image_shape=(3, 16, 16))
    assert not recwarn.list
    net.body[1].reset_parameters()
    norm.reset_parameters()
    with pytest.warns(UserWarning, match=r"'last' gave a map whose mean .* name the layer before"):
        SANM(net, "last", image_shape=(3, 16, 16))


@pytest.mark.parametrize("to_map", [None, lambda x: x], ids=["", "to_map"])
def test_captured_before_it_is_changed_in_place(to_map):
    net = nn.Sequential(
        nn.Conv2d(3, 12, 3, 2, 1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(12, 5),
    )  # fmt: skip
    sanm = SANM(net, "0", image_shape=(3, 16, 16), to_map=to_map)
    features = sanm.forward_features(batch().images)[1]
    assert torch.equal(features, net[0](batch().images)) and bool((features < 0).any())
    sanm(batch(), generator=0).total.backward()


def test_a_replaced_layer_is_read():
    sanm = SANM(SmallCNN(), "features.10", image_shape=(1, 8, 8))
    sanm.model.features[10] = nn.Identity()
    assert sanm.forward_features(batch(8, 1).images)[1].shape == (4, 64, 4, 4)


COMPILED = {
    "before": lambda: SANM(torch.compile(Net(), backend="eager"), "last", image_shape=(3, 16, 16)),
    "in place before": lambda: SANM(compiled_in_place(Net()), "last", image_shape=(3, 16, 16)),
    "proposed": lambda: SANM(torch.compile(Net(), backend="eager"), image_shape=(3, 16, 16)),
    "after": lambda: torch.compile(
        SANM(Net(), "last", image_shape=(3, 16, 16)), backend="eager", fullgraph=True
    ),
    "in place after": lambda: compiled_in_place(SANM(Net(), "last", image_shape=(3, 16, 16))),
    "first batch": lambda: torch.compile(SANM(Net()), backend="eager"),
    "the layer": lambda: SANM(
        Net(torch.compile(nn.Identity(), backend="eager")), "last", image_shape=(3, 16, 16)
    ),
}


def compiled_in_place(module: nn.Module) -> nn.Module:
    module.compile(backend="eager")
    return module


@pytest.mark.parametrize("order", ["images first", "losses first"])
@pytest.mark.parametrize("how", COMPILED)
@pytest.mark.filterwarnings("ignore:feature_layer", "ignore:the decoder was built")
def test_compiled_models_are_read(how, order):
    torch._dynamo.reset()
    sanm = COMPILED[how]()
    inner = getattr(sanm, "_orig_mod", sanm)
    data = batch()
    if order == "images first":
        sanm(data.images)
    losses = sanm(data, generator=0)
    losses.total.backward()
    net = getattr(inner.model, "_orig_mod", inner.model)
    wanted = sk.activation_stats(net.body(data.images).detach(), (16, 16))
    torch.testing.assert_close(losses.masked.stats.max, wanted.max)
    assert torch.equal(losses.masked.stats.peak, wanted.peak)
    sanm(data.images)
    assert inner.reader.tap.found is None and not inner.reader.tap.on
    del losses
    gc.collect()
    kept = [x for x in gc.get_objects() if type(x) is Tensor and x.shape == (4, 8, 4, 4)]
    assert not kept  # no feature map, by whatever Dynamo has stored
    torch.testing.assert_close(inner.forward_features(data.images)[1], net.body(data.images))


def test_a_compiled_function_that_calls_losses():
    torch._dynamo.reset()
    sanm = SANM(Net(), "last", image_shape=(3, 16, 16))
    data = batch()
    step = torch.compile(lambda b: sanm.losses(b, 0).total, fullgraph=True, backend="eager")
    torch.testing.assert_close(step(data), sanm.losses(data, 0).total)
    assert sanm.reader.tap.found is None


def test_compiled_and_run_before_it_was_wrapped():
    torch._dynamo.reset()
    net = torch.compile(Net(), backend="eager")
    net(batch().images)
    sanm = SANM(net, "last")
    with pytest.raises(RuntimeError, match=r"wrap it first, or call torch.compiler.reset\(\)"):
        sanm.forward_features(batch().images)
    torch.compiler.reset()
    sanm.forward_features(batch().images)


@extended
def test_compiled_by_inductor():
    torch._dynamo.reset()
    sanm = SANM(Net(), "last", image_shape=(3, 16, 16))
    eager = sanm(batch(), generator=0)
    compiled = torch.compile(sanm)(batch(), generator=0)
    torch.testing.assert_close(compiled.total, eager.total)
    assert torch.equal(compiled.masked.box_max, eager.masked.box_max)
