"""What holds of every call of the public functions, on examples that hypothesis draws.

Always the same examples: a failure repeats, and hypothesis prints the smallest one that fails.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inputs import BACKENDS, DTYPES, EXACT, LAYOUTS, lay_out, same
from torch import Tensor

import sanm_kernels as sk
from sanm_kernels.config import DROPS, FILLS, POSITIONS

backends = pytest.mark.parametrize("backend", BACKENDS)
examples = settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
#: A seed of the values of an example; what it is about is drawn by name.
seeds = st.integers(0, 2**32)
sizes = st.one_of(st.integers(1, 9), st.integers(1, 40))
classes = st.one_of(st.integers(2, 20), st.integers(2, 130))
dtypes = st.sampled_from(DTYPES)
layouts = st.sampled_from(LAYOUTS)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def close(a: Tensor, b: Tensor, roundings: float = 64.0, scale: float = 1.0) -> bool:
    """Within so many ulps of the largest of b, or of `scale`; shapes alike."""
    assert a.shape == b.shape
    if a.numel() == 0:
        return True
    limit = roundings * max(torch.finfo(x.dtype).eps for x in (a, b))
    a, b = a.double(), b.double()
    return bool((a - b).abs().max() <= limit * max(b.abs().max().item(), scale))


def alike(a: Tensor, b: Tensor, backend: str) -> bool:
    """Equal; the reference's sums over strided rows are torch's, in another order."""
    return torch.equal(a, b) if backend == "cpu" else close(a, b)


# --- masked_forward and activation_stats ---------------------------------------------------------


@st.composite
def feature_maps(draw: st.DrawFn, dtype: torch.dtype | None = None) -> Tensor:
    """(B, C, h, w) of multiples of 1/8: zeros, equal values, ties; exact in every order of sums."""
    shape = draw(st.integers(1, 4)), draw(sizes), draw(sizes), draw(sizes)
    f = (torch.randn(shape, generator=generator(draw(seeds))) * 8).round().clamp(-63, 63) / 8
    kind = draw(st.sampled_from(("signed", "positive", "coarse", "flat", "zero", "one row")))
    if kind == "positive":
        f = f.relu()
    elif kind == "coarse":
        f = f.round()
    elif kind == "flat":
        f = torch.full_like(f, draw(st.sampled_from((0.125, 1.0, 3.0))))
    elif kind == "zero":
        f = torch.zeros_like(f)
    elif kind == "one row":
        f[1:] = 0
    return f.to(dtype or draw(dtypes))


@st.composite
def configs(draw: st.DrawFn) -> sk.MaskConfig:
    low = draw(st.floats(0, 0.6))
    high = low + draw(st.floats(0, 1 - low))
    aspect = draw(st.floats(0.2, 2))
    return sk.MaskConfig(
        position=draw(st.sampled_from(POSITIONS)),
        area_scale=draw(st.floats(0.01, 3)),
        views=draw(st.sampled_from((("max", "min"), ("max",), ("min",)))),
        shared_draws=draw(st.booleans()),
        quantize=draw(st.booleans()),
        fill=draw(st.sampled_from(FILLS)),
        fill_value=draw(st.floats(-2, 2, width=16)),
        ratio_low=low,
        ratio_high=min(high, 1.0),
        ratio_gamma=draw(st.floats(0, 1 - min(high, 1.0))),
        aspect_low=aspect,
        aspect_high=aspect + draw(st.floats(0, 2)),
        drop=draw(st.sampled_from(DROPS)),
    )


@st.composite
def masked_calls(draw: st.DrawFn) -> dict[str, Any]:
    """Keyword arguments of masked_forward with images; targets soft, one-hot, flat or indices."""
    f = draw(feature_maps())
    g, B, K = generator(draw(seeds)), len(f), draw(classes)
    kind = draw(st.sampled_from(("soft", "one-hot", "flat", "indices")))
    targets = torch.randint(0, K, (B,), generator=g)
    if kind == "one-hot":
        targets = F.one_hot(targets, K).to(draw(dtypes))
    elif kind != "indices":
        t = torch.randn(B, K, generator=g) * (3 if kind == "soft" else 0)
        targets = torch.softmax(t, 1).to(draw(dtypes))
    q = torch.rand(B, generator=g)
    q[0] = draw(st.sampled_from((0.0, 1.0, q[0].item())))
    shape = B, draw(st.integers(1, 4)), draw(sizes), draw(sizes)
    return {
        "features": f,
        "targets": targets,
        "clean_prob": q,
        "images": torch.rand(shape, generator=g).to(draw(dtypes)),
        "num_classes": K,
        "config": draw(configs()),
        "generator": draw(st.integers(0, 2**63 - 1)),
        "sample_index": torch.randint(-(2**62), 2**62, (B,), generator=g),
    }


@backends
@examples
@given(call=masked_calls())
def test_boxes_lie_inside_and_outside_nothing_changes(backend: str, call: dict[str, Any]) -> None:
    result, images, config = (
        sk.masked_forward(**call, backend=backend),
        call["images"],
        call["config"],
    )
    height, width = images.shape[2:]
    for kind in config.views:
        view = getattr(result, f"images_{kind}")
        for i, (y0, x0, y1, x1) in enumerate(getattr(result, f"box_{kind}").tolist()):
            assert 0 <= y0 < y1 <= height and 0 <= x0 < x1 <= width
            hidden = torch.zeros(height, width, dtype=torch.bool)
            hidden[y0:y1, x0:x1] = True
            assert torch.equal(view[i][:, ~hidden], images[i][:, ~hidden])
            inside = view[i][:, hidden]
            if config.fill == "constant":
                assert (inside == config.fill_value).all()
            elif config.fill == "uniform":
                assert (inside == inside[:, :1]).all() and ((inside >= 0) & (inside <= 1)).all()
            elif config.fill == "mean":
                assert close(inside, images[i].double().mean((1, 2))[:, None].expand_as(inside), 2)


@backends
@examples
@given(call=masked_calls())
def test_the_label_loses_the_ratio_and_rows_keep_their_sum(
    backend: str, call: dict[str, Any]
) -> None:
    result, config, q = (
        sk.masked_forward(**call, backend=backend),
        call["config"],
        call["clean_prob"],
    )
    t, K = call["targets"], call["num_classes"]
    t = t if t.is_floating_point() else F.one_hot(t, K).float()
    for kind in config.views:
        ratio, moved = getattr(result, f"ratio_{kind}"), getattr(result, f"targets_{kind}")
        for bound, sign in ((config.ratio_low, 1), (config.ratio_high, -1)):
            assert (sign * (ratio - bound - config.ratio_gamma * (1 - q)) >= -1e-6).all()
        assert moved.dtype == t.dtype
        wide, best = t.double(), t.amax(1).double()
        drop = torch.minimum(ratio.double(), best) if config.drop == "clamped" else ratio.double()
        expected = wide + (drop / (K - 1))[:, None]
        expected.scatter_(1, t.argmax(1, keepdim=True), (best - drop)[:, None])
        assert close(moved, expected, 4)
        assert close(moved.double().sum(1), wide.sum(1), 4 * K * torch.finfo(t.dtype).eps / 2e-16)
        if config.drop == "clamped":
            assert (moved >= 0).all()


@backends
@examples
@given(call=masked_calls(), power=st.integers(-7, 7))
def test_a_positive_scale_of_the_features_changes_no_box(
    backend: str, call: dict[str, Any], power: int
) -> None:
    base = sk.masked_forward(**call, backend=backend)
    call["features"] = call["features"] * 2.0**power
    result = sk.masked_forward(**call, backend=backend)
    for name in EXACT:
        assert same(getattr(result, name), getattr(base, name)), name
    for name in ("max", "min", "mean", "std"):
        expected = getattr(base.stats, name) * 4.0**power
        assert close(getattr(result.stats, name), expected, scale=0), name
    assert close(result.stats.entropy, base.stats.entropy)


@backends
@examples
@given(call=masked_calls(), data=st.data())
def test_batch_order_and_company_do_not_matter(
    backend: str, call: dict[str, Any], data: st.DataObject
) -> None:
    base = sk.masked_forward(**call, backend=backend)
    order = torch.tensor(data.draw(st.permutations(range(len(call["features"])))))
    order = order[: data.draw(st.integers(1, len(order)))]
    per_sample = ("features", "targets", "clean_prob", "images", "sample_index")
    chosen = {name: x[order] if name in per_sample else x for name, x in call.items()}
    result = sk.masked_forward(**chosen, backend=backend)
    for name in EXACT:
        whole = getattr(base, name)
        assert same(getattr(result, name), None if whole is None else whole[order]), name
    for name, part, whole in zip(base.stats._fields, result.stats, base.stats, strict=True):
        assert torch.equal(part, whole[order]), name


@backends
@examples
@given(call=masked_calls(), layout=layouts)
def test_memory_layout_does_not_matter_and_arguments_stay(
    backend: str, call: dict[str, Any], layout: str
) -> None:
    base = sk.masked_forward(**call, backend=backend)
    given_ = {k: lay_out(x, layout) if isinstance(x, Tensor) else x for k, x in call.items()}
    result = sk.masked_forward(**given_, backend=backend)
    mean64 = call["config"].fill == "mean" and call["images"].dtype == torch.float64
    for name in EXACT:
        a, b = getattr(result, name), getattr(base, name)
        # the mean of float64 images is not rounded to fewer digits than it is summed in
        assert close(a, b) if mean64 and name in ("images_max", "images_min") and b is not None \
            else same(a, b), name  # fmt: skip
    assert all(torch.equal(x, call[k]) for k, x in given_.items() if isinstance(x, Tensor))
    if layout == "channels_last" and result.images_max is not None:
        assert result.images_max.is_contiguous(memory_format=torch.channels_last)


@backends
@examples
@given(call=masked_calls(), value=st.sampled_from((math.nan, math.inf, -math.inf)), seed=seeds)
def test_a_map_that_is_not_finite_counts_as_flat_and_alone(
    backend: str, call: dict[str, Any], value: float, seed: int
) -> None:
    f, g = call["features"], generator(seed)
    row = int(torch.randint(0, len(f), (), generator=g))
    flat, broken = f.clone(), f.clone()
    flat[row] = 0
    where = torch.randint(0, f[0].numel(), (), generator=g)
    broken[row].view(-1)[where] = value
    a = sk.masked_forward(**call | {"features": broken}, backend=backend)
    b = sk.masked_forward(**call | {"features": flat}, backend=backend)
    for name in EXACT:
        assert same(getattr(a, name), getattr(b, name)), name
    assert a.stats.peak[row].tolist() == a.stats.trough[row].tolist() == [0, 0]
    assert not a.stats.max[row].isfinite() and not a.stats.mean[row].isfinite()
    rest = torch.arange(len(f)) != row
    assert all(torch.equal(x[rest], y[rest]) for x, y in zip(a.stats, b.stats, strict=True))


@backends
@examples
@given(f=feature_maps(), height=sizes, width=sizes, layout=layouts)
def test_statistics_are_ordered_and_the_peak_is_one(
    backend: str, f: Tensor, height: int, width: int, layout: str
) -> None:
    stats = sk.activation_stats(lay_out(f, layout), (height, width), backend=backend)
    e = f.double().square().sum(1)
    slack = 1e-5 * (stats.max + 1e-30)
    assert (stats.min <= stats.mean + slack).all() and (stats.mean <= stats.max + slack).all()
    assert (stats.std >= 0).all() and (stats.std <= (stats.max - stats.min) / 2 + slack).all()
    assert ((stats.entropy >= -1e-5) & (stats.entropy <= 1 + 1e-5)).all()
    assert torch.equal(stats.max.double(), e.amax((1, 2)))
    assert torch.equal(stats.min.double(), e.amin((1, 2)))
    u = F.interpolate(e[:, None], (height, width), mode="bilinear", align_corners=False)[:, 0]
    for i, ((y, x), (v, w)) in enumerate(
        zip(stats.peak.tolist(), stats.trough.tolist(), strict=True)
    ):
        span = 1e-6 * u[i].max()
        assert u[i, y, x] >= u[i].max() - span and u[i, v, w] <= u[i].min() + span


# --- losses and targets --------------------------------------------------------------------------


@st.composite
def rows_of_logits(draw: st.DrawFn) -> tuple[Tensor, torch.Generator]:
    g = generator(draw(seeds))
    shape = draw(st.one_of(st.integers(1, 6), st.integers(1, 140))), draw(classes)
    z = torch.randn(shape, generator=g) * draw(st.sampled_from((0.0, 1.0, 5.0)))
    return z.to(draw(dtypes)), g


@backends
@examples
@given(drawn=rows_of_logits(), layout=layouts, share=st.floats(0, 1), ratio=st.booleans())
def test_masked_loss_parts(
    backend: str, drawn: tuple[Tensor, torch.Generator], layout: str, share: float, ratio: bool
) -> None:
    logits, g = drawn
    n, K = logits.shape
    x = round(share * n)
    t = torch.softmax(torch.randn(n, K, generator=g) * 3, 1)
    options: dict[str, Any] = {"num_labeled": x, "unlabeled_weight": 3.0, "prior_weight": 0.7}
    options |= {"ratio": torch.rand(n, generator=g)} if ratio else {}

    def call(z: Tensor, targets: Tensor, **more: Any) -> tuple[sk.MaskedLoss, Tensor]:
        z = z.detach().requires_grad_()
        loss = sk.masked_loss(z, targets, backend=backend, **options | more)
        return loss, torch.autograd.grad(loss.total, z)[0]

    loss, grad = call(logits, t)
    assert loss.labeled >= 0 and 0 <= loss.unlabeled <= 2 / K + 1e-5
    assert loss.prior >= -1e-6 and -math.log(K) - 1e-5 <= loss.confidence <= 1e-6
    expected = loss.labeled + 3 * loss.unlabeled + 0.7 * loss.prior
    assert close(loss.total, expected)
    # a constant added to a row's logits changes nothing
    assert close(grad.double().sum(1), torch.zeros(n), 8 * K * torch.finfo(grad.dtype).eps / 1e-7)
    # rows may come in any order, labelled ones first
    labeled, rest = torch.randperm(x, generator=g), x + torch.randperm(n - x, generator=g)
    order = torch.cat([labeled, rest])
    other = {"ratio": options["ratio"][order]} if ratio else {}
    shuffled, moved = call(lay_out(logits[order], layout), lay_out(t[order], layout), **other)
    assert alike(shuffled.per_sample, loss.per_sample[order], backend)
    assert all(close(a, b) for a, b in zip(shuffled[:5], loss[:5], strict=True))
    assert close(moved, grad[order])
    # λ = 1 mixes nothing
    alone, _ = call(logits, t, mix=(1.0, torch.randperm(n, generator=g)))
    assert all(close(a, b) for a, b in zip(alone, loss, strict=True))


@backends
@examples
@given(drawn=rows_of_logits(), layout=layouts)
def test_sample_loss_is_a_distribution(
    backend: str, drawn: tuple[Tensor, torch.Generator], layout: str
) -> None:
    logits, g = drawn
    n, K = logits.shape
    labels = torch.randint(0, K, (n,), generator=g)
    loss = sk.sample_loss(logits, labels, backend=backend)
    assert (loss >= -1e-5).all()
    again = sk.sample_loss(lay_out(logits, layout), lay_out(labels, layout), backend=backend)
    assert alike(again, loss, backend)
    every = sk.sample_loss(logits[:1].expand(K, K), torch.arange(K), backend=backend)
    assert close((-every).exp().sum(), torch.ones(()), 8 * K)
    assert close(every[labels[0]], loss[0])


@backends
@examples
@given(drawn=rows_of_logits(), layout=layouts, temperature=st.floats(0.1, 4), soft=st.booleans())
def test_refined_targets_are_distributions(
    backend: str, drawn: tuple[Tensor, torch.Generator], layout: str, temperature: float, soft: bool
) -> None:
    z, g = drawn
    n, K = z.shape
    labels = torch.randint(0, K, (n,), generator=g)
    given_labels = torch.softmax(torch.randn(n, K, generator=g), 1) if soft else labels
    q = torch.rand(n, generator=g)
    logits = [z, z.flip(0), z.roll(1, 1)]
    options: dict[str, Any] = {"temperature": temperature, "backend": backend}
    p = sk.refine_targets(logits, labels=given_labels, clean_prob=q, **options)
    assert (p >= 0).all() and close(p.sum(1), torch.ones(n), 8 * K)
    again = sk.refine_targets(
        [lay_out(x, layout) for x in logits], labels=lay_out(given_labels, layout), clean_prob=q,
        **options,
    )  # fmt: skip
    assert alike(again, p, backend)
    turned = sk.refine_targets(logits[::-1], labels=given_labels, clean_prob=q, **options)
    assert close(turned, p, 64 / temperature)
    sure = sk.refine_targets(logits, labels=labels, clean_prob=torch.ones(n), **options)
    assert torch.equal(sure, F.one_hot(labels, K).to(sure.dtype))
    alone = sk.refine_targets(z, **options)
    assert torch.equal(alone.gather(1, z.argmax(1, keepdim=True))[:, 0], alone.amax(1))


@backends
@examples
@given(seed=seeds, dtype=dtypes, layout=layouts, shape=st.tuples(sizes, sizes, sizes),
       counts=st.lists(st.integers(0, 4), min_size=1, max_size=5), lam=st.floats(0, 1))  # fmt: skip
def test_mixed_views(
    backend: str, seed: int, dtype: torch.dtype, layout: str, shape: tuple[int, ...],
    counts: list[int], lam: float,
) -> None:  # fmt: skip
    g = generator(seed)
    views = [lay_out(torch.rand((b, *shape), generator=g).to(dtype), layout) for b in counts]
    total = sum(counts)
    rows = int(torch.randint(0, total + 1, (), generator=g))
    partner = torch.randperm(total, generator=g)
    v = torch.cat(views)
    mixed = sk.mixup_views(views, lam, partner, rows=rows, backend=backend)
    assert torch.equal(
        sk.mixup_views([v.contiguous()], lam, partner, rows=rows, backend=backend), mixed
    )
    for share, expected in ((1.0, v[:rows]), (0.0, v[partner[:rows]])):
        assert torch.equal(
            sk.mixup_views(views, share, partner, rows=rows, backend=backend), expected
        )
    low, high = (
        torch.minimum(v[:rows], v[partner[:rows]]),
        torch.maximum(v[:rows], v[partner[:rows]]),
    )
    slack = 4 * torch.finfo(dtype).eps
    assert ((mixed >= low - slack) & (mixed <= high + slack)).all()


@backends
@examples
@given(seed=seeds, dtype=dtypes, layout=layouts, views=st.integers(1, 3), batch=st.integers(1, 4),
       shape=st.tuples(st.integers(1, 4), sizes, sizes))  # fmt: skip
def test_reconstruction_loss_counts_the_boxes(
    backend: str, seed: int, dtype: torch.dtype, layout: str, views: int, batch: int,
    shape: tuple[int, int, int],
) -> None:  # fmt: skip
    g, (_, height, width) = generator(seed), shape
    images = torch.rand((batch, *shape), generator=g).to(dtype)
    rebuilt = torch.rand((views * batch, *shape), generator=g).to(dtype)
    y = torch.randint(0, height + 1, (views, batch, 2), generator=g).sort(2).values
    x = torch.randint(0, width + 1, (views, batch, 2), generator=g).sort(2).values
    boxes = torch.stack([y[..., 0], x[..., 0], y[..., 1], x[..., 1]], 2)

    def call(r: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        r = r.detach().requires_grad_()
        loss = sk.reconstruction_loss(r, images, backend=backend, **options)
        return loss.detach(), torch.autograd.grad(loss, r)[0]

    for options in ({}, {"boxes": boxes, "region": "masked"}):
        loss, grad = call(rebuilt, **options)
        other, moved = call(lay_out(rebuilt, layout), **options)
        assert loss >= 0 and close(other, loss) and close(moved, grad, scale=0)
        nothing, still = call(images.repeat(views, 1, 1, 1), **options)
        assert nothing == 0 and not still.any()
    pixels = grad.view(views, batch, *shape)
    for v in range(views):
        for i, (y0, x0, y1, x1) in enumerate(boxes[v].tolist()):
            outside = pixels[v, i].clone()
            outside[:, y0:y1, x0:x1] = 0
            assert not outside.any()
    everything = torch.tensor([0, 0, height, width]).expand(views, batch, 4)
    whole, _ = call(rebuilt, boxes=everything, region="masked")
    assert close(whole, call(rebuilt)[0])


@backends
@examples
@given(seed=seeds, n=st.integers(0, 5) | st.integers(2, 600), dtype=dtypes, layout=layouts,
       power=st.integers(0, 5), epochs=st.integers(0, 6), wrong=st.floats(0, 1))  # fmt: skip
def test_label_quality_is_a_probability_of_the_losses_alone(
    backend: str, seed: int, n: int, dtype: torch.dtype, layout: str, power: int, epochs: int,
    wrong: float,
) -> None:  # fmt: skip
    g = generator(seed)
    mislabelled = torch.rand(n, generator=g) < wrong
    losses = (torch.randn(n, generator=g) + 4 * mislabelled).abs().to(dtype)
    history = torch.stack([losses] * epochs) * 0.5 if epochs else None
    fit = sk.fit_label_quality(losses, history=history, backend=backend)
    assert ((fit.clean_prob >= 0) & (fit.clean_prob <= 1)).all()
    assert fit.means[0] <= fit.means[1] and (fit.variances > 0).all()
    assert close(fit.weights.sum(), torch.ones((), dtype=torch.float64))
    assert 0 <= fit.n_iter <= 10 and (n >= 2 or fit.degenerate)
    if fit.degenerate:
        assert (fit.clean_prob == 1).all() and fit.n_iter == 0
    # min–max normalised, so that a unit of the losses means nothing
    scaled = sk.fit_label_quality(
        lay_out(losses * 2.0**power, layout),
        history=None if history is None else lay_out(history * 2.0**power, layout),
        backend=backend,
    )
    assert all(torch.equal(a, b) for a, b in zip(scaled, fit, strict=True))
