"""masked_forward of the GPU backends against the others: on a GPU, or emulated on the CPU."""

from __future__ import annotations

import pytest
import torch
from inputs import (
    DTYPES,
    EXACT,
    GPU_DEVICES,
    LAYOUTS,
    MASK_CONFIGS,
    each,
    example,
    lay_out,
    more,
    random_case,
    same,
    upstreams,
)
from tolerances import assert_accurate

import sanm_kernels as sk

SANITIZED = (
    "cuda and spread and (mean or pixel)",
    "cuda and not (same_energy or statistics or modulated or bfloat16 or float64)",
)


def move(case: dict, backend: str) -> dict:
    device = GPU_DEVICES[backend]
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in case.items()}


def exact_energy(case: dict, seed: int) -> dict:
    """The case with features whose energy is the same whatever the order of summation."""
    f = case["features"]
    # one rounded product, or sums of multiples of 1/64
    return case | {"features": f[:, :1] if seed % 2 else (f[:, :100] * 8).round() / 8}


@pytest.mark.parametrize("block", range(7))
@pytest.mark.parametrize("seeds", [range(2), *more(range(2, 72))], ids=str)
def test_same_energy_gives_equal_results_to_the_last_bit(backend, seeds, block):
    """Boxes, views and targets of 504 random calls equal the CPU kernels'."""
    name = list(MASK_CONFIGS)[block]
    for seed in seeds:
        case = exact_energy(random_case(2000 * block + seed), seed)
        dtype = (torch.float32, torch.bfloat16, torch.float16)[seed % 3]
        case["images"] = case["images"].to(dtype)
        config = MASK_CONFIGS[name]
        a = sk.masked_forward(**move(case, backend), config=config, backend=backend)
        b = sk.masked_forward(**case, config=config, backend="cpu")
        for field in EXACT:
            got = getattr(a, field)
            assert same(None if got is None else got.cpu(), getattr(b, field)), (seed, field)
        assert torch.equal(a.stats.peak.cpu(), b.stats.peak), seed
        assert torch.equal(a.stats.trough.cpu(), b.stats.trough), seed


@each(shape=[(3, 40, 7, 6), (2, 5, 1, 1), (2, 700, 4, 4)], layout=LAYOUTS, dtype=DTYPES)
def test_statistics_against_float64(backend, dtype, layout, shape):
    f = lay_out(torch.randn(shape).to(dtype), layout)
    got = sk.activation_stats(f.to(GPU_DEVICES[backend]), (14, 11), backend=backend)
    exact = sk.activation_stats(f.double(), (14, 11), backend="reference")
    eager = sk.activation_stats(f, (14, 11), backend="reference")
    for name in ("max", "min", "mean", "std", "entropy"):
        assert_accurate(
            getattr(got, name).cpu(), getattr(exact, name), getattr(eager, name), name, 32.0
        )


def test_statistics_of_special_maps(backend):
    flat, zero, spike = torch.ones(3, 8, 4, 4).unbind(0)
    zero, spike = torch.zeros_like(zero), torch.zeros_like(spike)
    spike[:, 2, 1] = 3
    nan, inf = flat.clone(), flat.clone()
    nan[0, 1, 1], inf[0, 1, 1] = float("nan"), float("inf")
    f = torch.stack([flat, zero, spike, nan, inf])
    for quantize in (False, True):
        a, b = (
            sk.activation_stats(
                f.to(device),
                (8, 8),
                config=sk.MaskConfig().replace(quantize=quantize),
                backend=where,
            )
            for device, where in ((GPU_DEVICES[backend], backend), ("cpu", "reference"))
        )
        assert torch.equal(a.peak.cpu(), b.peak) and torch.equal(a.trough.cpu(), b.trough)
        for name in ("max", "min", "mean", "std", "entropy"):
            torch.testing.assert_close(
                getattr(a, name).cpu(), getattr(b, name), equal_nan=True, rtol=1e-6, atol=1e-6
            )


@pytest.mark.parametrize(
    "size",
    [
        (7, 7, 32, 32),
        (1, 1, 5, 9),
        *more((16, 16, 8, 8), (40, 3, 33, 70), (40, 40, 9, 64), (41, 43, 50, 7)),
    ],
    ids=str,
)
@pytest.mark.parametrize("quantize", [False, *more(True)])
def test_positions_over_map_and_image_sizes(backend, size, quantize):
    h, w, height, width = size
    f = (torch.randn(3, 5, h, w) * 8).round() / 8
    config = sk.MaskConfig().replace(quantize=quantize)
    for x in (f, f.contiguous(memory_format=torch.channels_last)):
        x = x.to(GPU_DEVICES[backend])
        a = sk.activation_stats(x, (height, width), config=config, backend=backend)
        b = sk.activation_stats(f, (height, width), config=config, backend="cpu")
        assert torch.equal(a.peak.cpu(), b.peak) and torch.equal(a.trough.cpu(), b.trough)


def test_a_map_too_large_for_shared_memory(backend):
    f = torch.randn(2, 1, 150, 160)
    a = sk.activation_stats(f.to(GPU_DEVICES[backend]), (20, 24), backend=backend)
    b = sk.activation_stats(f, (20, 24), backend="cpu")
    assert torch.equal(a.peak.cpu(), b.peak) and torch.equal(a.trough.cpu(), b.trough)
    torch.testing.assert_close(a.mean.cpu(), b.mean)


def test_calls_that_need_different_amounts_of_shared_memory(backend):
    """What a small call asks of the runtime does not take away what a larger one has asked for."""
    for side in (90, 70):
        f = torch.randn(2, 1, side, side)
        a = sk.activation_stats(f.to(GPU_DEVICES[backend]), (20, 24), backend=backend)
        b = sk.activation_stats(f, (20, 24), backend="cpu")
        assert torch.equal(a.peak.cpu(), b.peak)


@each(
    shape=[(2, 11, 4, 4, 16, 12), (1, 1600, 3, 4, 90, 70)],
    channels_last=[False, True],
    fill=["constant", "uniform", "mean", "pixel"],
)
def test_samples_spread_over_several_programs(backend, fill, channels_last, shape, monkeypatch):
    """Energy and painting in parts give what one part gives."""
    B, C, h, w, H, W = shape  # the larger one is spread as it is
    if backend == "triton":
        from sanm_kernels.backends.triton import masked_forward

        monkeypatch.setattr(masked_forward, "SPLIT", 1)
        monkeypatch.setattr(masked_forward, "BUSY", 9)
    f, t, q, x = example(B, C, h, w, height=H, width=W)
    f = (f * 8).round() / 8
    if channels_last:
        f, x = (v.contiguous(memory_format=torch.channels_last) for v in (f, x))
    config = sk.MaskConfig().replace(fill=fill)
    case = {"features": f, "targets": t, "clean_prob": q, "images": x, "generator": 3}
    a = sk.masked_forward(**move(case, backend), config=config, backend=backend)
    b = sk.masked_forward(**case, config=config, backend="cpu")
    for field in EXACT:
        assert same(getattr(a, field).cpu(), getattr(b, field)), field


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_empty_batches(backend, layout):
    f, t, q, x = example()
    f = (f * 8).round() / 8
    base = sk.masked_forward(f, t, q, images=x, generator=1, backend="cpu")
    f, t, q, x = (lay_out(v, layout).to(GPU_DEVICES[backend]) for v in (f, t, q, x))
    for given in (f, f[:1].expand(4, -1, -1, -1)):
        result = sk.masked_forward(given, t, q, images=x, generator=1, backend=backend)
        if given is f:
            assert torch.equal(result.images_masked.cpu(), base.images_masked)
            assert torch.equal(result.targets_max.cpu(), base.targets_max)
    empty = sk.masked_forward(f[:0], t[:0], q[:0], images=x[:0], generator=1, backend=backend)
    assert empty.images_max.shape == (0, 3, 16, 12) and empty.box_max.shape == (0, 4)


@each(kind=["soft", "transposed", "indices"], dtype=DTYPES, K=[2, 10, 100, 1000, 1001])
def test_modulated_targets_are_exact(backend, kind, dtype, K):
    f = torch.randn(3, 1, 2, 2)
    targets = torch.softmax(torch.randn(3, K) * 3, 1).to(dtype)
    if kind == "transposed":
        targets = lay_out(targets, "transposed")
    elif kind == "indices":
        targets = targets.argmax(1)
    for drop in ("clamped", "unclamped"):
        config = sk.MaskConfig().replace(drop=drop, ratio_high=0.9)
        case = {"features": f, "targets": targets, "clean_prob": torch.rand(3)}
        options = {"size": (8, 8), "num_classes": K, "generator": 2, "config": config}
        a = sk.masked_forward(**move(case, backend), **options, backend=backend)
        b = sk.masked_forward(**case, **options, backend="reference")
        assert torch.equal(a.targets_max.cpu(), b.targets_max)


@each(fill=["constant", "mean"], dtype=DTYPES[:3])
def test_gradients_in_targets_and_images(backend, dtype, fill):
    f, t, q, x = example(dtype=dtype)
    f = (f * 8).round() / 8
    config = sk.MaskConfig().replace(fill=fill, ratio_high=0.9, shared_draws=False)
    shape = torch.Size((4, 3, 16, 12))
    for name, upstream in upstreams(shape, dtype).items():
        grads = []
        for where, kind in (
            (backend, dtype),
            ("reference", torch.float64),
            ("reference", dtype),
        ):
            device = GPU_DEVICES.get(where, "cpu")
            images = x.to(device, kind).requires_grad_()
            targets = t.to(device).requires_grad_()
            out = sk.masked_forward(f.to(device), targets, q.to(device), images=images,
                                    config=config, generator=3, backend=where)  # fmt: skip
            g = upstream.to(device, kind)
            gt = torch.linspace(-1, 2, 20).view(5, 4).T.to(device)
            total = (out.images_max * g).sum() + (out.images_min * g).sum()
            total = total + (out.targets_max * gt).sum() + (out.targets_min * gt.flip(0)).sum()
            grads.append([v.cpu() for v in torch.autograd.grad(total, (images, targets))])
        got, exact, eager = grads
        assert_accurate(got[0], exact[0], eager[0], name)
        assert_accurate(got[1], eager[1].double(), eager[1], name)
