"""masked_forward and activation_stats against float64, the reference and recorded results."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from inputs import (
    BACKENDS,
    DTYPES,
    EXACT,
    LAYOUTS,
    MASK_CONFIGS,
    each,
    example,
    lay_out,
    random_case,
    same,
)
from tolerances import assert_accurate

import sanm_kernels as sk
from sanm_kernels.reference import activation, draws

PAPER = sk.MaskConfig.paper()
GOLDEN = sorted((Path(__file__).parent.parent / "golden").glob("*.npz"))
backends = pytest.mark.parametrize("backend", BACKENDS)


@backends
@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
def test_recorded_results_are_equal_to_the_last_bit(backend, path):
    case = {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(path).items()}
    result = sk.masked_forward(
        case["features"],
        case["targets"],
        case["clean_prob"],
        images=case["images"],
        config=sk.MaskConfig.official_cifar(),
        draws=case["draws"],
        backend=backend,
    )
    for name in ("box_max", "box_min", "images_max", "images_min"):
        assert torch.equal(getattr(result, name), case[name]), name
    assert torch.equal(result.targets_max, case["targets_out"])


def test_all_recorded_cases_are_there():
    assert len(GOLDEN) == 11


@pytest.mark.parametrize("block", range(7))
def test_cpu_equals_reference_to_the_last_bit(block):
    """504 random cases: every configuration, both memory formats, odd sizes, 1 to 4 channels."""
    name = list(MASK_CONFIGS)[block]
    for seed in range(72):
        case = random_case(1000 * block + seed)
        dtype = (torch.float32, torch.float32, torch.bfloat16, torch.float16)[seed % 4]
        case["features"], case["images"] = case["features"].to(dtype), case["images"].to(dtype)
        a, b = (sk.masked_forward(**case, config=MASK_CONFIGS[name], backend=k) for k in BACKENDS)
        for field in EXACT:
            assert same(getattr(a, field), getattr(b, field)), (name, seed, field)
        for field in ("max", "min", "peak", "trough"):
            assert torch.equal(getattr(a.stats, field), getattr(b.stats, field)), (seed, field)


@each(
    shape=[
        (2, 5000, 1, 3),
        (1, 4200, 6, 6),
        (3, 1100, 1, 1),
        (2, 64, 9, 57),
        (1, 7, 40, 40),
        (2, 33, 1, 32),
        (2, 300, 5, 8),
    ],
    channels_last=[False, True],
)
def test_energy_is_torchs_sum_to_the_last_bit(shape, channels_last):
    f = torch.randn(shape)
    if channels_last:
        f = f.contiguous(memory_format=torch.channels_last)
    a, b = (sk.activation_stats(f, (19, 23), backend=k) for k in BACKENDS)
    e = f.square().sum(1).flatten(1)
    assert torch.equal(b.max, e.amax(1)) and torch.equal(b.min, e.amin(1))
    assert torch.equal(a.peak, b.peak) and torch.equal(a.trough, b.trough)


@backends
@each(dtype=DTYPES, layout=LAYOUTS)
def test_statistics_against_float64(backend, dtype, layout):
    f = lay_out(torch.randn(5, 40, 7, 6).to(dtype), layout)
    result = sk.activation_stats(f, (14, 14), backend=backend)
    e = f.double().square().sum(1).flatten(1)
    eager = f.to(torch.promote_types(dtype, torch.float32)).square().sum(1).flatten(1)

    def expected(e):
        p = e / e.sum(1, keepdim=True)
        entropy = -(p * p.log()).sum(1) / np.log(e.shape[1])
        return e.amax(1), e.amin(1), e.mean(1), e.std(1, unbiased=False), entropy

    for name, exact, base in zip(result._fields, expected(e), expected(eager), strict=False):
        assert_accurate(getattr(result, name), exact, base, name)


@backends
def test_statistics_of_special_maps(backend):
    flat, zero, spike = torch.ones(3, 8, 4, 4).unbind(0)
    zero, spike = torch.zeros_like(zero), torch.zeros_like(spike)
    spike[:, 2, 1] = 3
    nan = flat.clone()
    nan[0, 1, 1] = float("nan")
    stats = sk.activation_stats(torch.stack([flat, zero, spike, nan]), (8, 8), backend=backend)
    assert stats.entropy[:3].tolist() == pytest.approx([1, 1, 0], abs=1e-6)
    assert stats.std[:2].tolist() == [0, 0]
    assert stats.peak.tolist() == [[0, 0], [0, 0], [4, 2], [0, 0]]
    assert stats.trough.tolist()[:2] == [[0, 0], [0, 0]]
    assert torch.isnan(stats.max[3]) and torch.isnan(stats.mean[3])
    one = sk.activation_stats(torch.rand(2, 3, 1, 1), (5, 5), backend=backend)
    assert one.entropy.tolist() == [1, 1] and one.peak.tolist() == [[0, 0], [0, 0]]


@backends
@each(dtype=DTYPES, layout=LAYOUTS)
def test_any_layout_gives_the_same_result_and_leaves_the_inputs_alone(backend, dtype, layout):
    f, t, q, x = example(dtype=dtype)
    base = sk.masked_forward(f, t, q, images=x, generator=1, backend=backend)
    given = [lay_out(v, layout) for v in (f, t, q, x)]
    before = [v.clone() for v in given]
    result = sk.masked_forward(*given[:3], images=given[3], generator=1, backend=backend)
    for v, w in zip(given, before, strict=True):
        assert torch.equal(v, w)
    assert torch.equal(result.box_max, base.box_max)
    assert torch.equal(result.images_masked, base.images_masked)
    assert torch.equal(result.targets_max, base.targets_max)
    assert result.images_max.dtype == dtype
    if layout == "channels_last":
        assert result.images_max.is_contiguous(memory_format=torch.channels_last)
    else:
        assert result.images_max.is_contiguous()


@backends
@pytest.mark.parametrize("config", MASK_CONFIGS.values(), ids=MASK_CONFIGS)
def test_outside_the_boxes_nothing_changes(backend, config):
    f, t, q, x = example(batch=6)
    result = sk.masked_forward(f, t, q, images=x, config=config, generator=5, backend=backend)
    assert (result.images_max is None) == ("max" not in config.views)
    for kind in config.views:
        box, image = getattr(result, f"box_{kind}"), getattr(result, f"images_{kind}")
        ratio, targets = getattr(result, f"ratio_{kind}"), getattr(result, f"targets_{kind}")
        for i, (y0, x0, y1, x1) in enumerate(box.tolist()):
            assert 0 <= y0 < y1 <= 16 and 0 <= x0 < x1 <= 12
            hidden = torch.zeros(16, 12, dtype=torch.bool)
            hidden[y0:y1, x0:x1] = True
            assert torch.equal(image[i][:, ~hidden], x[i][:, ~hidden])
            if config.fill == "constant":
                assert (image[i][:, hidden] == config.fill_value).all()
            elif config.fill == "uniform":
                assert (image[i, :, y0:y1, x0:x1] == image[i, :, y0, x0, None, None]).all()
            elif config.fill == "mean":
                torch.testing.assert_close(image[i, :, y0, x0], x[i].mean((1, 2)))
        torch.testing.assert_close(targets.sum(1), t.sum(1))
        drop = (t - targets).gather(1, t.argmax(1, keepdim=True))[:, 0]
        expected = torch.minimum(ratio, t.amax(1)) if config.drop == "clamped" else ratio
        torch.testing.assert_close(drop, expected)
        low = config.ratio_low + config.ratio_gamma * (1 - q) - 1e-6
        high = config.ratio_high + config.ratio_gamma * (1 - q) + 1e-6
        assert ((ratio >= low) & (ratio <= high)).all()


@backends
def test_centred_and_corner_boxes(backend):
    f = torch.zeros(1, 2, 8, 8)
    f[0, :, 4, 5] = 1
    args = (f, torch.tensor([[0.9, 0.1]]), torch.tensor([1.0]))
    options = {
        "size": (64, 64),
        "draws": torch.full((1, 2), 0.5, dtype=torch.float64),
        "backend": backend,
    }
    y, x = sk.activation_stats(f, (64, 64), backend=backend).peak[0].tolist()
    assert (y, x) == (35, 43)
    centre = sk.masked_forward(*args, **options).box_max[0].tolist()
    corner = sk.masked_forward(*args, **options, config=PAPER.replace(position="corner"))
    side = centre[2] - centre[0]
    assert centre[:2] == [y - side // 2, x - (centre[3] - centre[1]) // 2]
    assert corner.box_max[0, :2].tolist() == [y, x]
    # A = 0.045·64², aspect 1.025
    assert side == round((0.045 * 64 * 64 * 1.025) ** 0.5)


@backends
def test_class_indices_are_one_hot_targets(backend):
    f, _, q, x = example()
    labels = torch.tensor([4, 0, 2, 2])
    hot = torch.nn.functional.one_hot(labels, 5).float()
    for config in (PAPER, sk.MaskConfig.official_cifar()):
        a = sk.masked_forward(
            f, labels, q, images=x, num_classes=5, generator=2, backend=backend, config=config
        )
        b = sk.masked_forward(f, hot, q, images=x, generator=2, backend=backend, config=config)
        assert torch.equal(a.targets_max, b.targets_max)
    c = sk.masked_forward(
        f,
        labels.int(),
        q,
        size=(16, 12),
        generator=2,
        backend=backend,
        classifier=(torch.randn(5, 24), None),
    )
    assert c.targets_max.shape == (4, 5) and c.loss.shape == ()


@backends
def test_draws_depend_on_seed_and_sample_alone(backend):
    f, t, q, x = example(batch=5)
    index = torch.tensor([7, 2**40, 3, 11, 0])
    config = sk.MaskConfig.official_clothing1m()
    run = lambda o: sk.masked_forward(  # noqa: E731
        f[o],
        t[o],
        q[o],
        images=x[o],
        config=config,
        generator=99,
        sample_index=index[o],
        backend=backend,
    )
    base, order = run(torch.arange(5)), torch.tensor([3, 0, 4])
    other = run(order)
    for name in EXACT:
        assert torch.equal(getattr(base, name)[order], getattr(other, name)), name
    explicit = draws.uniforms(config.num_draws(3), index, torch.tensor(99))
    given = sk.masked_forward(f, t, q, images=x, config=config, draws=explicit, backend=backend)
    assert torch.equal(given.images_masked, base.images_masked)
    third = sk.masked_forward(
        f, t, q, images=x, config=config, generator=100, sample_index=index, backend=backend
    )
    assert not torch.equal(third.ratio_max, base.ratio_max)


def test_default_generator_is_torchs():
    f, t, q, x = example()
    first, second = (_seeded(lambda: sk.masked_forward(f, t, q, images=x)) for _ in range(2))
    assert torch.equal(first.images_masked, second.images_masked)
    g = torch.Generator().manual_seed(4)
    a, b = (sk.masked_forward(f, t, q, images=x, generator=g) for _ in range(2))
    assert not torch.equal(a.ratio_max, b.ratio_max)


def _seeded(call):
    torch.manual_seed(11)
    return call()


def test_philox_known_answers():
    """The vectors published with Random123 (kat_vectors, philox4x32 10)."""
    words = draws.philox(torch.tensor([0]), 0, torch.tensor([0]), torch.tensor(0))
    assert [int(w) for w in words] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = torch.tensor([-1])
    words = draws.philox(torch.tensor([0xFFFFFFFF]), 0xFFFFFFFF, ones, torch.tensor(-1))
    assert [int(w) for w in words] == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


def test_pixel_noise_is_normal():
    n = draws.normals(200_000, 1, torch.tensor([5]), torch.tensor(3))[0]
    assert abs(n.mean()) < 0.01 and abs(n.std() - 1) < 0.01
    assert abs((n**3).mean()) < 0.03 and abs((n**4).mean() - 3) < 0.1
    u = torch.tensor([0, 1, 2**29, 2**30, 3 * 2**29, 2**31, 3 * 2**30, 2**32 - 1])
    torch.testing.assert_close(
        draws._cos_turn(u), torch.cos(2 * np.pi * u.double() / 2**32), atol=1e-12, rtol=0
    )
    v = torch.logspace(-10, 0, 50, dtype=torch.float64)
    torch.testing.assert_close(draws._log(v), v.log(), atol=1e-12, rtol=1e-12)


def test_roots_are_rounded_once():
    x = torch.rand(20_000, dtype=torch.float64) * 50
    assert draws._sqrt(x).tolist() == [math.sqrt(v) for v in x.tolist()]


def test_fma_rounds_once():
    a, b, c = (torch.randn(20000) * 10.0 ** torch.randint(-6, 6, (20000,)) for _ in range(3))
    c = torch.where(torch.rand(20000) < 0.5, -(a * b) * (1 + c * 1e-7), c)  # cancellation
    exact = [float(np.float32(x)) for x in _fractions(a[:500], b[:500], c[:500])]
    assert activation.fma(a[:500], b[:500], c[:500]).tolist() == exact


def _fractions(*columns):
    from fractions import Fraction

    for a, b, c in zip(*(x.tolist() for x in columns), strict=True):
        value = Fraction(a) * Fraction(b) + Fraction(c)
        guess = np.float32(float(value))
        around = [
            guess,
            np.nextafter(guess, np.float32(np.inf)),
            np.nextafter(guess, np.float32(-np.inf)),
        ]
        yield min(around, key=lambda v: (abs(Fraction(float(v)) - value), _odd(v)))


def _odd(value):
    return int(np.float32(value).view(np.int32)) & 1
