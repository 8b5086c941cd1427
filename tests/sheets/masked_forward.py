"""masked_forward, the official semantics before others."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from maker import DTYPES, INDICES, LAYOUTS, Maker, identical
from torch import Tensor

import sanm_kernels as sk
from sanm_kernels.config import DROPS, FILLS, POSITIONS
from sheets import OURS, Case, Inputs, Operation, Sheet, close, with_compiled

OFFICIAL = sk.MaskConfig.official_cifar()


def inputs(B: int = 3, C: int = 9, h: int = 3, H: int = 13, K: int = 5) -> Inputs:
    return {
        # Multiples of 1/8: E is exact in any order of summation, so all agree on the boxes.
        "features": (8 * torch.randn(B, C, h, h)).relu().round() / 8,
        "targets": torch.softmax(4 * torch.randn(B, K), 1),
        "clean_prob": torch.rand(B),
        "draws": torch.rand(B, OFFICIAL.num_draws(3), dtype=torch.float64),
        "images": torch.rand(B, 3, H, H),
        "weight": torch.randn(K, C),
        "bias": torch.randn(K),
    }


def run(x: Inputs, **options: Any) -> Inputs:
    """Official semantics, both views and the targets."""
    result = sk.masked_forward(
        x["features"], x["targets"], x["clean_prob"], images=x["images"], draws=x["draws"],
        config=OFFICIAL, **options,
    )  # fmt: skip
    assert result.images_masked is not None and result.targets_max is not None
    return {"images_masked": result.images_masked, "targets_max": result.targets_max}


def _run_classifier(x: Inputs, **options: Any) -> Inputs:
    result = sk.masked_forward(
        x["features"], x["targets"], x["clean_prob"], size=(20, 21), draws=x["draws"][:, :2],
        classifier=(x["weight"], x["bias"]), **options,
    )  # fmt: skip
    assert result.logits is not None and result.loss is not None
    return {"logits": result.logits, "loss": result.loss}


def _run_clamped(x: Inputs, **options: Any) -> Inputs:
    """The paper's drop, whose gradient in the targets is an operator of its own."""
    result = sk.masked_forward(
        x["features"], x["targets"], x["clean_prob"], size=(13, 13), draws=x["draws"][:, :2],
        **options,
    )  # fmt: skip
    assert result.targets_max is not None and result.targets_min is not None
    return {"targets_max": result.targets_max, "targets_min": result.targets_min}


def _run_into(x: Inputs, **options: Any) -> Inputs:
    """Two calls: the second writes into the result of the first, which had other draws."""

    def call(draws: Tensor, out: sk.MaskedForward | None = None) -> sk.MaskedForward:
        return sk.masked_forward(
            x["features"], x["targets"], x["clean_prob"], images=x["images"], draws=draws,
            config=OFFICIAL, out=out, **options,
        )  # fmt: skip

    result = call(x["draws"], call(1 - x["draws"]))
    assert result.images_masked is not None and result.targets_max is not None
    return {"images_masked": result.images_masked, "targets_max": result.targets_max}


def _run_drawn(x: Inputs, config: sk.MaskConfig, hard: bool = False, **options: Any) -> Inputs:
    """Numbers drawn for the samples' indices; `hard`: targets are class indices."""
    B, K = x["targets"].shape
    result = sk.masked_forward(
        x["features"], x["targets"].argmax(1) if hard else x["targets"], x["clean_prob"],
        images=x["images"], num_classes=K, config=config,
        generator=torch.tensor(3, device=x["images"].device),
        sample_index=torch.arange(B, device=x["images"].device), **options,
    )  # fmt: skip
    views = result.images_max if result.images_masked is None else result.images_masked
    assert views is not None
    return {"views": views}


def features_of(m: Maker, shape: tuple[int, ...], exact: bool) -> Tensor:
    """A feature map, possibly with ties, zeros and rows that are not finite.

    An exact one has multiples of 1/8 whose energy is the same in any order of summation.
    """
    f = m.normal(*shape) * m.choice([0.5, 1, 3])
    if m.chance(0.6):
        f = f.relu()
    if exact:
        f = (f * 8).round().clamp(-63, 63) / 8
    elif m.chance(0.2):
        f = (f * 2).round() / 2
    if m.chance(0.15):
        f[m.integer(0, shape[0] - 1)] = m.choice([0.0, 1.0, math.inf, math.nan])
    return f


def random_config(m: Maker) -> sk.MaskConfig:
    if m.chance(0.3):
        presets = ("paper", "official_cifar", "official_clothing1m")
        return getattr(sk.MaskConfig, m.choice(presets))()
    if m.chance(0.1):  # sides below a pixel, beyond the image, and both
        aspects = sorted((10 ** m.real(-6, 6), 10 ** m.real(-6, 6)))
        return sk.MaskConfig(
            position=m.choice(POSITIONS),
            area_scale=10 ** m.real(-30, 6),
            views=m.choice([("max", "min"), ("max",), ("min",)]),
            ratio_low=0.0,
            ratio_high=m.choice([0.0, 1e-40, 1.0]),
            ratio_gamma=0.0,
            aspect_low=aspects[0],
            aspect_high=aspects[1],
        )
    low = m.real(0, 0.6) if m.chance(0.7) else 0.0
    high = low + m.real(0, 0.3)
    aspect = m.real(0.3, 1.5)
    return sk.MaskConfig(
        position=m.choice(POSITIONS),
        area_scale=m.choice([0.01, 0.5, 1.0, 3.0]),
        views=m.choice([("max", "min"), ("max", "min"), ("max",), ("min",)]),
        shared_draws=m.chance(0.5),
        quantize=m.chance(0.5),
        fill=m.choice(FILLS),
        fill_value=m.choice([0.0, 0.3, -1.7]),
        ratio_low=low,
        ratio_high=high,
        ratio_gamma=m.choice([0.0, 0.03, 1 - high]),
        aspect_low=aspect,
        aspect_high=aspect + m.choice([0.0, 0.45]),
        drop=m.choice(DROPS),
    )


def map_shape(m: Maker) -> tuple[int, int, int, int]:
    return m.integer(1, 5), m.size(1500, 60), m.size(20, 6), m.size(20, 6)


def _random(m: Maker) -> None:
    B, C, h, w = map_shape(m)
    H, W, channels, K = m.size(60, 30), m.size(60, 30), m.choice([1, 3, 3, 4]), m.size(200, 40) + 1
    if not m.small and m.chance(0.01):  # large results take another way to memory
        H, W = m.integer(200, 260), m.integer(200, 260)
    config = random_config(m)
    one_pass = "max" in config.views and m.chance(0.4)
    images = not one_pass or m.chance(0.3)
    exact = m.small or one_pass or m.chance(0.5)
    f = features_of(m, (B, C, h, w), exact)
    if one_pass:
        f = torch.where(f.isfinite(), f, 0)
    soft = m.chance(0.7)
    targets = (
        m.spoil(m.rows(B, K), [math.nan, math.inf], "targets")
        if soft
        else m.spoil(m.indices(K, B), [-1, K], "targets")
    )
    given: dict[str, Any] = {
        "features": m.give(f, DTYPES if exact else DTYPES[:3], grad=one_pass,
                           layouts=LAYOUTS if exact else LAYOUTS[:2]),
        "targets": m.give(targets, DTYPES if soft else INDICES, grad=exact and m.chance(0.7)),
        "clean_prob": m.give(m.spoil(m.uniform(B), [1.5, -0.1, math.nan], "clean_prob")),
    }  # fmt: skip
    if images:
        # a mean in float64 is not rounded further, so that other orders of summation show
        dtypes = DTYPES[:3] if config.fill == "mean" and not exact else DTYPES
        x = m.uniform(B, channels, H, W)
        given["images"] = m.give(x, dtypes, grad=exact and m.chance(0.7))
    if one_pass:
        weight = m.give(m.normal(K, C) / C**0.5, grad=True)
        bias = m.give(m.normal(K), grad=True) if m.chance(0.6) else None
        given["classifier"] = (weight, bias)
    if m.chance(0.5):
        given["sample_index"] = m.give(m.indices(2**50, B), [torch.int64])
    if m.chance(0.3):
        uniforms = m.uniform(B, config.num_draws(channels if images else 0)).double()
        uniforms = m.spoil(uniforms, [1.0, -0.5, math.nan], "draws")
        given["draws"] = m.give(uniforms, [torch.float64])
    options: dict[str, Any] = {"config": config, "generator": m.integer(0, 2**62)}
    options |= {"num_classes": None if soft else K, "size": None if images else (H, W)}
    again = m.chance(0.1)
    if images and again and m.spoiling and not m.call.wrong:
        m.call.wrong = "out"

    def run(x: dict[str, Any], backend: str) -> sk.MaskedForward:
        result = sk.masked_forward(**x, **options, backend=backend)
        if again:  # into tensors that hold something else
            with torch.no_grad():
                into = sk.masked_forward(**x, **options | {"generator": 1}, backend=backend)
                if m.call.wrong == "out":  # it is written to while it is read
                    x = x | {"images": into.images_masked[: len(x["images"])]}
                sk.masked_forward(**x, **options, out=into, backend=backend)
            for a, b in zip(result.buffers, into.buffers, strict=True):
                assert identical(a, b), "out= gives other results"
        return result

    m.call.inputs, m.call.run, m.call.exact = given, run, exact
    m.call.narrow = one_pass and given["features"].dtype != torch.float64
    m.call.same = (
        "stats.peak",
        "stats.trough",
        "stats.max",
        "stats.min",
        "ratio",
        "box",
        "targets",
    )
    if not (images and config.fill == "mean" and given["images"].dtype == torch.float64):
        m.call.same += ("images",)
    m.call.roundings = 32.0


# What one writes without this package: the functions work on whole batches, and are also what
# torch.compile gets; OpenCV goes sample by sample.
LOW, HIGH, GAMMA = 0.02, 0.07, 0.03  # the mask ratio of the official CIFAR configuration
ASPECT_LOW, ASPECT_HIGH = 0.8, 1.25


def _opencv(
    features: Tensor, targets: Tensor, clean_prob: Tensor, images: Tensor, draws: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Official masking sample by sample: upsample with OpenCV, quantise, find, fill, modulate.

    features (B, C, h, w), targets (B, K), clean_prob (B,), images (B, Cin, H, W), draws (B, D)
    → modulated targets (B, K), images with the peak's box filled and with the trough's.
    """
    import cv2

    device = images.device  # OpenCV works in the CPU's memory: the transfers are part of the time
    features, targets, clean_prob, images, draws = (
        x.cpu() for x in (features, targets, clean_prob, images, draws)
    )
    maps = F.normalize((features**2).sum(1).flatten(1)).view(-1, *features.shape[2:]).numpy()
    channels, H, W = images.shape[1:]
    images_max, images_min, new_targets = images.clone(), images.clone(), targets.clone()
    for i, (area_draw, aspect_draw, *fills) in enumerate(draws.tolist()):
        cam = cv2.resize(maps[i], (W, H))
        cam = cam - cam.min()
        cam = np.uint8(np.floor(255 * cam / (cam.max() + 1e-12)))
        ratio = np.float32(LOW + (HIGH - LOW) * area_draw) + GAMMA * (1 - clean_prob[i].numpy())
        aspect = np.float32(ASPECT_LOW + (ASPECT_HIGH - ASPECT_LOW) * aspect_draw)
        area = ratio * (H * W) * 0.5
        height = min(max(round(math.sqrt(area * aspect)), 1), H)
        width = min(max(round(math.sqrt(area / aspect)), 1), W)
        for image, flat, fill in (
            (images_max[i], cam.argmax(), fills[:channels]),
            (images_min[i], cam.argmin(), fills[channels:]),
        ):
            y, x = np.unravel_index(flat, cam.shape)
            y, x = min(y, H - height), min(x, W - width)
            for c in range(channels):
                image[c, y : y + height, x : x + width] = fill[c]
        top = targets[i].argmax()
        new_targets[i] += float(ratio / np.float32(targets.shape[1] - 1))
        new_targets[i, top] = targets[i, top] - float(ratio)
    return new_targets.to(device), images_max.to(device), images_min.to(device)


def _torch(
    features: Tensor, targets: Tensor, clean_prob: Tensor, images: Tensor, draws: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The same on whole batches."""
    channels, H, W = images.shape[1:]
    maps = F.normalize((features**2).sum(1).flatten(1)).view(-1, 1, *features.shape[2:])
    cam = F.interpolate(maps, (H, W), mode="bilinear", align_corners=False).flatten(1)
    low, high = cam.amin(1, keepdim=True), cam.amax(1, keepdim=True)
    # Not uint8: torch.compile's argmin of it is wrong (github.com/pytorch/pytorch/issues/191499).
    cam = (255 * (cam - low) / (high - low + 1e-12)).floor()
    ratio = (LOW + (HIGH - LOW) * draws[:, 0]).float() + GAMMA * (1 - clean_prob)
    aspect = (ASPECT_LOW + (ASPECT_HIGH - ASPECT_LOW) * draws[:, 1]).float()
    area = ratio * (H * W) * 0.5
    height = (area * aspect).sqrt().round().long().clamp(1, H)[:, None, None]
    width = (area / aspect).sqrt().round().long().clamp(1, W)[:, None, None]
    rows = torch.arange(H, device=images.device)[:, None]
    columns = torch.arange(W, device=images.device)

    def view(flat: Tensor, fill: Tensor) -> Tensor:
        y = torch.minimum(flat[:, None, None] // W, H - height)
        x = torch.minimum(flat[:, None, None] % W, W - width)
        hidden = (rows >= y) & (rows < y + height) & (columns >= x) & (columns < x + width)
        return torch.where(hidden[:, None], fill.float()[:, :, None, None], images)

    fills = draws[:, 2:].split(channels, 1)
    return modulate(targets, ratio), view(cam.argmax(1), fills[0]), view(cam.argmin(1), fills[1])


def modulate(targets: Tensor, ratio: Tensor) -> Tensor:
    """targets (…, K), each row's largest lowered by ratio (…), which the other classes share."""
    top = targets.argmax(-1, keepdim=True)
    ratio = ratio[..., None]
    lowered = targets.gather(-1, top) - ratio
    return (targets + ratio / (targets.shape[-1] - 1)).scatter(-1, top, lowered)


@functools.cache
def _kornia_eraser() -> Callable[[Tensor], Tensor]:
    from kornia.augmentation import RandomErasing

    return RandomErasing(scale=(LOW, HIGH), ratio=(ASPECT_LOW, ASPECT_HIGH), value=0.0, p=1.0)


@functools.cache
def _timm_eraser(device: str) -> Callable[[Tensor], Tensor]:
    from timm.data.random_erasing import RandomErasing

    return RandomErasing(1.0, LOW, HIGH, ASPECT_LOW, ASPECT_HIGH, mode="const", device=device)


def random_erasing_kornia(images: Tensor) -> Tensor:
    """images (B, C, H, W) with a random box of each set to 0; new memory."""
    return _kornia_eraser()(images)


def random_erasing_timm(images: Tensor) -> Tensor:
    """The same by timm, sample by sample; it works in place, so on a copy."""
    return _timm_eraser(images.device.type)(images.clone())


def _case(B: int, C: int, h: int, H: int, K: int) -> Case:
    def make() -> tuple[tuple[Tensor, ...], sk.MaskedForward]:
        activity = torch.rand(B, 1, h, h)  # clear peaks, as trained networks have
        inputs = (
            torch.randn(B, C, h, h).relu_().mul_(activity),
            torch.softmax(4 * torch.randn(B, K), 1),
            torch.rand(B),
            torch.rand(B, 3, H, H),
            torch.rand(B, OFFICIAL.num_draws(3), dtype=torch.float64),
        )
        return inputs, full(inputs, None)

    def full(inputs: tuple[Tensor, ...], out: sk.MaskedForward | None) -> sk.MaskedForward:
        features, targets, clean_prob, images, draws = inputs
        return sk.masked_forward(
            features, targets, clean_prob, images=images, draws=draws, config=OFFICIAL, out=out
        )

    def ours(inputs: tuple[Tensor, ...], out: sk.MaskedForward | None) -> Sequence[Tensor]:
        result = full(inputs, out)
        return result.targets_max, result.images_max, result.images_min

    run = {
        OURS: lambda x: ours(*x),
        "ours, new outputs": lambda x: ours(x[0], None),
        "OpenCV": lambda x: _opencv(*x[0]),
        **with_compiled(_torch, lambda f, x: f(*x[0])),
        "kornia": lambda x: erased(random_erasing_kornia, x[0]),
        "timm": lambda x: erased(random_erasing_timm, x[0]),
    }
    image = B * 3 * H * H
    read, written = 4 * (B * C * h * h + image + B * K), 4 * (2 * image + B * K)
    shape = f"B={B} C={C} h={h} H={H} K={K}"
    less = frozenset({"kornia", "timm"})  # random places, and labels as they were
    return Case("masked_forward", shape, make, run, read, written, B, agree, less)


def erased(function: Callable[[Tensor], Tensor], inputs: tuple[Tensor, ...]) -> Sequence[Tensor]:
    """The targets as they are, and two views of the images, each with a random box erased."""
    _, targets, _, images, _ = inputs
    return targets, function(images), function(images)


def agree(a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
    """Targets agree, and of at least 95 % of the samples both views.

    Where a sample's maximum falls on level 255 or 254 is decided by the last bit, and with it which
    pixel is the first of the highest level. torch's interpolation rounds otherwise than OpenCV's,
    which the official semantics, and so ours, follow to the bit.
    """
    close(a[:1], b[:1])
    same = [torch.isclose(x, y).flatten(1).all(1) for x, y in zip(a[1:], b[1:], strict=True)]
    share = (same[0] & same[1]).float().mean().item()
    assert share >= 0.95, f"only {share:.0%} of the samples agree"


def _operation(
    run: Callable[..., Inputs], wrt: tuple[str, ...], cast: tuple[str, ...]
) -> Operation:
    sizes = {"B": 128, "C": 512, "h": 4, "H": 32, "K": 10}
    return Operation("masked_forward", inputs, run, wrt, cast, sizes)


def _drawn(config: sk.MaskConfig, hard: bool = False) -> Operation:
    run = functools.partial(_run_drawn, config=config, hard=hard)
    return _operation(run, ("images",), ("images",))


SHEET = Sheet(
    {
        "masked_forward": _operation(run, ("images", "targets"), ("images",)),
        "masked_forward, classifier": _operation(
            _run_classifier, ("features", "weight", "bias"), ("features",)
        ),
        "masked_forward, clamped": _operation(_run_clamped, ("targets",), ("targets",)),
        "masked_forward, out=": _operation(_run_into, (), ("images",)),
    },
    variants={
        "masked_forward, paper": _drawn(sk.MaskConfig()),
        "masked_forward, class indices": _drawn(OFFICIAL, hard=True),
        "masked_forward, two draws": _drawn(sk.MaskConfig.official_clothing1m()),
        "masked_forward, mean": _drawn(sk.MaskConfig(fill="mean")),
        "masked_forward, pixel": _drawn(sk.MaskConfig(fill="pixel", views=("max",))),
    },
    random=_random,
    share=38,
    case=_case,
    shapes=[  # B, C, h = w, H = W, K
        (128, 512, 4, 32, 10),
        (768, 512, 4, 32, 100),
        (32, 2048, 7, 224, 14),
        (64, 2048, 7, 224, 1000),
    ],
    headline=[(128, 512, 4, 32, 10), (32, 2048, 7, 224, 14)],
    compiled=[{"B": 128, "C": 512, "h": 4, "H": 32, "K": 10}],
    compiled_large=[
        {"B": 32, "C": 2048, "h": 7, "H": 224, "K": 1000},
        {"B": 512, "C": 2048, "h": 7, "H": 224, "K": 1000},
    ],
)
