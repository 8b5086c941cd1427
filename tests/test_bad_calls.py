"""Wrong calls: each gives an error that names the argument, and leaves the arguments unchanged."""

from __future__ import annotations

import re

import numpy
import pytest
import torch

import sanm_kernels as sk
from sanm_kernels import MaskConfig

B, C, K = 3, 4, 5
NAN = float("nan")


def good():
    """Arguments of every function that a test may spoil."""
    torch.manual_seed(0)
    return {
        "features": torch.rand(B, C, 2, 2),
        "targets": torch.softmax(torch.randn(B, K), 1),
        "labels": torch.tensor([0, 4, 2]),
        "q": torch.tensor([0.0, 0.5, 1.0]),
        "images": torch.rand(B, 3, 8, 8),
        "logits": torch.randn(B, K),
        "weight": torch.randn(K, C),
        "permutation": torch.tensor([2, 0, 1]),
        "boxes": torch.tensor([[[0, 0, 2, 2]] * B] * 2, dtype=torch.int32),
        "reconstruction": torch.rand(2 * B, 3, 8, 8),
        "losses": torch.rand(50),
        "draws": torch.rand(B, 2, dtype=torch.float64),
    }


def forward(a, *, targets=None, **options):
    options.setdefault("images", a["images"])
    return sk.masked_forward(
        a["features"], a["targets"] if targets is None else targets, a["q"], **options
    )


def set_at(name, value, *where):
    def spoil(a):
        a[name][where] = value

    return spoil


def put(name, change):
    def spoil(a):
        a[name] = change(a[name])

    return spoil


def nothing(a): ...


# fmt: off
#: What is wrong → (how the arguments are spoiled, the call, the error's type, the error's text).
CALLS = {
    # masked_forward
    "features not a tensor": (put("features", lambda x: x.tolist()), forward, TypeError,
                              "features: expected a torch.Tensor, got list"),
    "features of 3 dimensions": (put("features", lambda x: x[0]), forward, ValueError,
                                 "features: expected shape (B, C, h, w), got [4, 2, 2]"),
    "features of integers": (put("features", lambda x: x.long()), forward, TypeError,
                             "features: expected float16, bfloat16, float32 or float64"),
    "features complex": (put("features", lambda x: x + 0j), forward, TypeError,
                         "features: expected float16, bfloat16"),
    "features without channels": (put("features", lambda x: x[:, :0]), forward, ValueError,
                                  "features: expected no empty dimension but the batch"),
    "features on another device": (put("features", lambda x: x.to("meta")), forward, ValueError,
                                   "clean_prob: expected a tensor on meta, where features is"),
    "clean_prob NaN": (set_at("q", NAN, 1), forward, ValueError,
                       "clean_prob: expected values in [0, 1], got nan at index [1]"),
    "clean_prob above 1": (set_at("q", 1.5, 2), forward, ValueError,
                           "clean_prob: expected values in [0, 1], got 1.5 at index [2]"),
    "clean_prob below 0": (set_at("q", -0.25, 0), forward, ValueError,
                           "clean_prob: expected values in [0, 1], got -0.25 at index [0]"),
    "clean_prob too short": (put("q", lambda x: x[:2]), forward, ValueError,
                             "clean_prob: expected 3 rows (the batch of features), got 2"),
    "clean_prob as two columns": (put("q", lambda x: x[:, None].expand(3, 2)), forward, ValueError,
                                  "clean_prob: expected shape (B,) or (B, 1), got [3, 2]"),
    "targets too short": (put("targets", lambda x: x[:1]), forward, ValueError,
                          "targets: expected 3 rows (the batch of features), got 1"),
    "targets of one class": (put("targets", lambda x: x[:, :1]), forward, ValueError,
                             "targets: expected at least 2 classes, got 1"),
    "targets NaN": (set_at("targets", NAN, 1, 3), forward, ValueError,
                    "targets: expected finite values, got nan at index [1, 3]"),
    "targets of 3 dimensions": (put("targets", lambda x: x[None]), forward, ValueError,
                                "targets: expected shape (B, K), or (B,) class indices"),
    "class indices without num_classes": (
        nothing, lambda a: forward(a, targets=a["labels"]), ValueError,
        "num_classes: expected the number of classes where targets are class indices"),
    "class index too large": (
        set_at("labels", 5, 1), lambda a: forward(a, targets=a["labels"], num_classes=5),
        ValueError, "targets: expected indices in [0, 5), got 5 at index [1]"),
    "class index negative": (
        set_at("labels", -1, 0), lambda a: forward(a, targets=a["labels"], num_classes=5),
        ValueError, "targets: expected indices in [0, 5), got -1 at index [0]"),
    "class indices of floats": (
        nothing, lambda a: forward(a, targets=a["labels"].float(), num_classes=5), TypeError,
        "targets: expected an integer dtype"),
    "num_classes against the targets": (nothing, lambda a: forward(a, num_classes=7), ValueError,
                                        "num_classes: expected 5, the columns of targets"),
    "num_classes a string": (
        nothing, lambda a: forward(a, targets=a["labels"], num_classes="5"), TypeError,
        "num_classes: expected an int, got str"),
    "num_classes a fraction": (
        nothing, lambda a: forward(a, targets=a["labels"], num_classes=5.5), TypeError,
        "num_classes: expected an int, got float"),
    "num_classes of 1": (
        nothing, lambda a: forward(a, targets=a["labels"], num_classes=1), ValueError,
        "num_classes: expected an int in [2, 2147483648), got 1"),
    "features sparse": (
        nothing, lambda a: sk.activation_stats(a["features"].to_sparse(), (8, 8)), TypeError,
        "features: expected a dense torch.Tensor, got one of layout torch.sparse_coo"),
    "size one number, with images": (nothing, lambda a: forward(a, size=8), ValueError,
                                     "size: expected (H, W), got 8"),
    "size beyond int32": (nothing, lambda a: forward(a, images=None, size=(2**31, 8)), ValueError,
                          "size: expected two integers ≥ 1 and < 2³¹, got (2147483648, 8)"),
    "images of another batch": (put("images", lambda x: x[:2]), forward, ValueError,
                                "images: expected 3 rows (the batch of features), got 2"),
    "images of 3 dimensions": (put("images", lambda x: x[:, 0]), forward, ValueError,
                               "images: expected shape (B, Cin, H, W), got [3, 8, 8]"),
    "images of bytes": (put("images", lambda x: x.byte()), forward, TypeError,
                        "images: expected float16, bfloat16, float32 or float64, got torch.uint8"),
    "images of no height": (put("images", lambda x: x[:, :, :0]), forward, ValueError,
                            "images: expected no empty dimension but the batch"),
    "neither images nor size": (nothing, lambda a: forward(a, images=None), ValueError,
                                "size: expected (H, W) of the image where images is not given"),
    "size against the images": (nothing, lambda a: forward(a, size=(9, 9)), ValueError,
                                "size: expected the images' (8, 8) or None, got (9, 9)"),
    "size of zero": (nothing, lambda a: forward(a, images=None, size=(0, 8)), ValueError,
                     "size: expected two integers ≥ 1 and < 2³¹, got (0, 8)"),
    "size one number": (nothing, lambda a: forward(a, images=None, size=8), ValueError,
                        "size: expected (H, W), got 8"),
    "config a dict": (nothing, lambda a: forward(a, config={}), TypeError,
                      "config: expected a MaskConfig or None, got dict"),
    "fill_value nan": (nothing, lambda a: MaskConfig(fill_value=(0.0, NAN, 0.0)), ValueError,
                       "fill_value: expected finite numbers, got nan"),
    "fill_value for other channels": (
        nothing, lambda a: forward(a, config=MaskConfig(fill_value=(0.1, 0.2))), ValueError,
        "config: expected fill_value of 1 or 3 numbers for images of 3 channels, got 2"),
    "draws too few": (put("draws", lambda x: x[:, :1]), lambda a: forward(a, draws=a["draws"]),
                      ValueError, "draws: expected 2 columns (config.num_draws(3)), got 1"),
    "draws of 1": (set_at("draws", 1.0, 0, 1), lambda a: forward(a, draws=a["draws"]), ValueError,
                   "draws: expected values in [0, 1), got 1"),
    "draws of float32": (put("draws", lambda x: x.float()), lambda a: forward(a, draws=a["draws"]),
                         TypeError, "draws: expected torch.float64, got torch.float32"),
    "generator a string": (nothing, lambda a: forward(a, generator="7"), TypeError,
                           "generator: expected a torch.Generator, a seed or None, got str"),
    "generator negative": (nothing, lambda a: forward(a, generator=-1), ValueError,
                           "generator: expected a seed in [0, 2⁶³), got -1"),
    "sample_index of floats": (nothing, lambda a: forward(a, sample_index=a["q"]), TypeError,
                               "sample_index: expected an integer dtype"),
    "classifier not a pair": (nothing, lambda a: forward(a, classifier=a["weight"]), TypeError,
                              "classifier: expected a pair (weight, bias), got Tensor"),
    "classifier of other channels": (
        nothing, lambda a: forward(a, classifier=(a["weight"][:, :2], None)), ValueError,
        "classifier: expected a weight of 4 columns, as features have channels"),
    "classifier of other classes": (
        nothing, lambda a: forward(a, classifier=(a["weight"][:3], None)), ValueError,
        "classifier: expected a weight of 5 rows, as targets have classes"),
    "classifier's bias too short": (
        nothing, lambda a: forward(a, classifier=(a["weight"], a["q"])), ValueError,
        "classifier: expected 5 rows (the bias, one per row of the weight), got 3"),
    "classifier without a max view": (
        nothing, lambda a: forward(a, classifier=(a["weight"], None),
                                   config=MaskConfig(views=("min",))),
        ValueError, "classifier: expected a config whose views include 'max'"),
    "out of another shape": (
        nothing, lambda a: forward(a, out=forward(a, images=a["images"][:, :, :4])), ValueError,
        "out: expected views of shape [6, 3, 8, 8]"),
    "out a tensor": (nothing, lambda a: forward(a, out=a["images"]), TypeError,
                     "out: expected a MaskedForward, got Tensor"),
    "out is an argument": (nothing, lambda a: reuse(a), ValueError,
                           "out: shares its views with the argument images"),
    "out with a tensor of its own": (
        nothing, lambda a: replaced(a, targets_max=torch.zeros(B, K)), ValueError,
        "out: its targets_max is no longer a slice of its buffers"),
    "out with another statistic": (
        nothing, lambda a: replaced(a, stats=lambda r: r.stats._replace(std=r.stats.mean)),
        ValueError, "out: its std is no longer a slice of its buffers"),
    "out with views exchanged": (
        nothing, lambda a: replaced(a, images_min=lambda r: r.images_max), ValueError,
        "out: its images_min is no longer a slice of its buffers"),
    "out with few buffers": (
        nothing, lambda a: replaced(a, buffers=lambda r: r.buffers[:3]), TypeError,
        "out: expected buffers of 6 tensors"),
    "out in memory of its own": (nothing, lambda a: overlapping(a), ValueError,
                                 "out: its boxes shares memory with its ratio"),
    "out in an argument's memory, of another storage": (
        nothing, lambda a: second_storage(a), ValueError,
        "out: shares its views with the argument images"),
    "out where a gradient is needed": (put("images", lambda x: x.requires_grad_()),
                                       lambda a: forward(a, out=forward(a)), RuntimeError,
                                       "out: cannot be given where images requires grad"),
    "unknown backend": (nothing, lambda a: forward(a, backend="gpu"), ValueError,
                        "backend: expected one of 'reference', 'cpu', 'triton', 'cuda'"),
    # masked_loss
    "one class": (put("logits", lambda x: x[:, :1]),
                  lambda a: sk.masked_loss(a["logits"], a["targets"][:, :1]), ValueError, "logits"),
    "permutation negative": (
        set_at("permutation", -1, 0),
        lambda a: sk.masked_loss(a["logits"], a["targets"], mix=(0.7, a["permutation"])),
        ValueError, "got -1 at index [0]"),
    "permutation too large": (
        set_at("permutation", 3, 2),
        lambda a: sk.masked_loss(a["logits"], a["targets"], mix=(0.7, a["permutation"])),
        ValueError, "got 3 at index [2]"),
    "lam above 1": (nothing, lambda a: sk.masked_loss(a["logits"], a["targets"],
                                                      mix=(1.5, a["permutation"])), ValueError,
                    "got 1.5"),
    "label too large": (set_at("labels", 9, 1), lambda a: sk.masked_loss(a["logits"], a["labels"]),
                        ValueError, "targets: expected indices in [0, 5), got 9 at index [1]"),
    "targets of other classes": (nothing, lambda a: sk.masked_loss(a["logits"],
                                                                   a["targets"][:, :4]),
                                 ValueError, "targets"),
    "num_labeled above the rows": (
        nothing, lambda a: sk.masked_loss(a["logits"], a["targets"], num_labeled=4), ValueError,
        "num_labeled"),
    "ignore_index none": (
        nothing, lambda a: sk.masked_loss(a["logits"], a["labels"], ignore_index=None), TypeError,
        "ignore_index: expected an int, got NoneType"),
    "unknown drop": (nothing, lambda a: sk.masked_loss(a["logits"], a["targets"], drop="soft"),
                     ValueError, "drop: expected one of 'clamped', 'unclamped', got 'soft'"),
    "unknown reduction": (nothing, lambda a: sk.masked_loss(a["logits"], a["targets"],
                                                            reduction="max"),
                          ValueError, "reduction: expected one of"),
    # the others
    "no views": (nothing, lambda a: sk.mixup_views([], 0.5, a["permutation"]), ValueError, "views"),
    "views of other shapes": (
        nothing, lambda a: sk.mixup_views([a["images"], a["images"][..., 1:]], 0.5,
                                          torch.arange(6)), ValueError, "views"),
    "mixup with itself twice": (
        set_at("permutation", 0, 0),
        lambda a: sk.mixup_views([a["images"]], 0.5, a["permutation"]), ValueError, "permutation"),
    "labels without clean_prob": (
        nothing, lambda a: sk.refine_targets(a["logits"], labels=a["labels"]), ValueError,
        "clean_prob"),
    "soft labels that are not probabilities": (
        nothing, lambda a: sk.refine_targets(a["logits"], labels=a["targets"] - 1,
                                             clean_prob=a["q"]), ValueError,
        "labels: expected values in [0, 1], got -"),
    "temperature of 0": (nothing, lambda a: sk.refine_targets(a["logits"], temperature=0),
                         ValueError, "temperature"),
    "box bigger than the image": (
        set_at("boxes", 9, 0, 1, 2),
        lambda a: sk.reconstruction_loss(a["reconstruction"], a["images"], boxes=a["boxes"],
                                         region="masked"), ValueError, "boxes"),
    "masked region without boxes": (
        nothing, lambda a: sk.reconstruction_loss(a["reconstruction"], a["images"],
                                                  region="masked"), ValueError, "boxes"),
    "reconstruction of half a view": (
        put("reconstruction", lambda x: x[:4]),
        lambda a: sk.reconstruction_loss(a["reconstruction"], a["images"]), ValueError,
        "reconstruction"),
    "labels of other length": (nothing, lambda a: sk.sample_loss(a["logits"], a["labels"][:2]),
                               ValueError, "labels: expected 3 rows (the rows of logits), got 2"),
    "loss NaN": (set_at("losses", NAN, 7), lambda a: sk.fit_label_quality(a["losses"]), ValueError,
                 "losses: expected finite values, got nan at index [7]"),
    "losses as a column": (nothing, lambda a: sk.fit_label_quality(a["losses"][:, None]),
                           ValueError, "losses"),
    "max_iter of 0": (nothing, lambda a: sk.fit_label_quality(a["losses"], max_iter=0), ValueError,
                      "max_iter"),
    "max_iter beyond int64": (
        nothing, lambda a: sk.fit_label_quality(a["losses"], max_iter=2**63), ValueError,
        "max_iter: expected an int of 64 bits, at least 1, got 9223372036854775808"),
    "unknown backend to force": (nothing, lambda a: sk.use_backend("fast").__enter__(), ValueError,
                                 "name: expected one of 'reference'"),
}
# fmt: on


def reuse(a):
    first = forward(a)
    return forward(a, images=first.images_masked[:B], out=first)


def replaced(a, **changes):
    """Into a result in which tensors have been replaced."""
    first = forward(a)
    changes = {name: x(first) if callable(x) else x for name, x in changes.items()}
    return forward(a, out=first._replace(**changes))


def overlapping(a):
    """Into the memory of a result whose ratio and boxes are set to the same bytes."""
    first = forward(a)
    memory = torch.zeros(60, dtype=torch.int32)
    starts = {"ratio": memory[4:].view(torch.float32), "box": memory}
    for name, start in starts.items():
        of_buffer = first.buffers[2 if name == "ratio" else 3]
        of_buffer.set_(start[: of_buffer.numel()].view(of_buffer.shape))
        for kind, part in zip(("max", "min"), 2 * tuple(of_buffer), strict=False):
            getattr(first, f"{name}_{kind}").set_(part)
    return forward(a, out=first)


def second_storage(a):
    """Into a result whose views lie where the images do, which no storage tells."""
    first, memory = forward(a), numpy.zeros(3000, numpy.float32)
    views = first.buffers[5]
    views.set_(torch.from_numpy(memory[: views.numel()]).view(views.shape))
    first.images_masked.set_(views)
    for k, part in enumerate(views.chunk(2)):
        (first.images_max, first.images_min)[k].set_(part)
    return forward(a, images=torch.from_numpy(memory[100 : 100 + 3 * B * 64]).view(B, 3, 8, 8),
                   out=first)  # fmt: skip


def snapshot(x):
    return x.clone() if isinstance(x, torch.Tensor) and x.device.type == "cpu" else x


def unchanged(x, y):
    if not isinstance(x, torch.Tensor) or x.device.type != "cpu":
        return x is y or x == y
    return torch.equal(
        torch.nan_to_num(x.detach().to(torch.complex128).real, 7e9),
        torch.nan_to_num(y.detach().to(torch.complex128).real, 7e9),
    )


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", CALLS)
def test_wrong_call(name, backend):
    spoil, call, kind, text = CALLS[name]
    arguments = good()
    spoil(arguments)
    before = {k: snapshot(v) for k, v in arguments.items()}
    with sk.use_backend(backend), pytest.raises(kind, match=re.escape(text)) as error:
        call(arguments)
    assert type(error.value) is kind
    assert "\n" not in str(error.value)
    for key, value in arguments.items():
        assert unchanged(value, before[key]), key


@pytest.mark.parametrize("name", ["num_labeled", "rows", "num_classes", "size", "ignore_index"])
def test_what_equals_a_right_argument_is_still_wrong(name):
    """Checks are remembered by the arguments' kinds, and True == 1 == 1.0."""
    a = good()
    right, call = {
        "num_labeled": (1, lambda x: sk.masked_loss(a["logits"], a["labels"], num_labeled=x)),
        "rows": (1, lambda x: sk.mixup_views([a["images"]], 0.5, a["permutation"], rows=x)),
        "num_classes": (5, lambda x: forward(a, targets=a["labels"], num_classes=x)),
        "size": ((1, 8), lambda x: forward(a, images=None, size=x)),
        "ignore_index": (1, lambda x: sk.masked_loss(a["logits"], a["labels"], ignore_index=x)),
    }[name]
    call(right)
    wrong = [(True, 8), [1.0, 8]] if name == "size" else [bool(right), float(right)]
    for x in wrong:
        for _ in range(2):
            with pytest.raises(TypeError, match=f"{name}: expected"):
                call(x)
    call(right)


def test_a_size_that_changes_is_read_again():
    class Size(list):
        pass

    a, size = good(), Size([8, 8])
    assert forward(a, images=None, size=size).box_max.amax() <= 8
    size[:] = [0, 8]
    with pytest.raises(ValueError, match="size: expected two integers ≥ 1"):
        forward(a, images=None, size=size)


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr(sk.validate, "MOST_KINDS", 3)
    calls = []

    @sk.validate.by_kinds()
    def check(x, y):
        calls.append((x.shape, y))
        return len(calls)

    for _ in range(2):
        assert [check(torch.zeros(n), "a") for n in (1, 2, 3)] == [1, 2, 3]
    assert check(torch.zeros(4), "a") == 4  # forgets the others
    assert check(torch.zeros(4), "a") == 4
    assert check(torch.zeros(1), "a") == 5
    assert check(torch.zeros(1), "b") == 6
    assert check(torch.zeros(1, dtype=torch.float64), "b") == 7
    assert check(torch.zeros(1), {}) == 8 and check(torch.zeros(1), {}) == 9  # it may change


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("position", "middle", "position: expected one of 'center', 'corner', got 'middle'"),
        ("fill", "noise", "fill: expected one of"),
        ("drop", None, "drop: expected one of"),
        ("views", (), "views: expected at least one of"),
        ("views", ("max", "mid"), "views: expected at least one of 'max' and 'min', and no other"),
        ("ratio_low", 0.5, "ratio_low: expected"),
        ("ratio_high", 0.99, "ratio_high: expected ratio_high + ratio_gamma ≤ 1"),
        ("ratio_gamma", -0.1, "ratio_gamma: expected a finite number ≥ 0"),
        ("aspect_low", 0.0, "aspect_low: expected 1/1000000 ≤ aspect_low"),
        ("aspect_low", 1e-50, "aspect_low: expected 1/1000000 ≤"),
        ("aspect_high", 1e300, "aspect_high ≤ 1000000"),
        ("area_scale", 1e38, "area_scale: expected a number in (0, 1000000], got 1e+38"),
        ("area_scale", NAN, "area_scale: expected"),
        ("aspect_high", 0.1, "≤ aspect_low ≤ aspect_high ≤"),
    ],
)
def test_wrong_configuration(field, value, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        MaskConfig(**{field: value})


def test_wrong_types_of_a_configuration():
    for field, value in (
        ("views", "max"),
        ("views", 3),
        ("quantize", 1),
        ("ratio_low", "0.1"),
        ("fill_value", "0.1"),
        ("fill_value", None),
        ("fill_value", ("red", 0, 0)),
        ("fill_value", ()),
    ):
        with pytest.raises(TypeError, match=f"{field}: expected .*, got "):
            MaskConfig(**{field: value})
    assert len(CALLS) >= 40


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_numpy_integers_and_rounded_probabilities_are_fine(backend):
    features, labels = torch.randn(2, 4, 2, 2), torch.tensor([0, 1])
    q = torch.tensor([1 + 1e-9, 0.5], dtype=torch.float64)  # 1 in float32
    size, three = (numpy.int64(8), numpy.int32(9)), numpy.int64(3)
    got = sk.masked_forward(
        features, labels, q, size=size, num_classes=three, generator=three, backend=backend
    )
    plain = sk.masked_forward(
        features, labels, q.float(), size=(8, 9), num_classes=3, generator=3, backend=backend
    )
    assert torch.equal(got.targets_max, plain.targets_max)
    assert torch.equal(got.box_min, plain.box_min)
    z = torch.randn(2, 3)
    options = {"labels": labels, "backend": backend}
    refined = sk.refine_targets(z, clean_prob=q, **options)
    assert torch.equal(refined, sk.refine_targets(z, clean_prob=q.float(), **options))
    loss = sk.masked_loss(z, labels, num_labeled=numpy.int64(1), backend=backend)
    assert torch.equal(loss.total, sk.masked_loss(z, labels, num_labeled=1, backend=backend).total)
    mixed = sk.mixup_views([z], 0.5, labels, rows=numpy.int64(1), backend=backend)
    assert len(mixed) == 1
