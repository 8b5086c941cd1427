"""masked_forward: the one-pass mode, gradients, and what surrounds an operator."""

from __future__ import annotations

import pytest
import torch
from inputs import BACKENDS, DTYPES, EXACT, MASK_CONFIGS, each, example, same, upstreams
from tolerances import assert_accurate, assert_parallel

import sanm_kernels as sk
from sanm_kernels.masking import _settings
from sanm_kernels.reference import draws
from sanm_kernels.reference.masked_classifier import visibility

PAPER = sk.MaskConfig.paper()
backends = pytest.mark.parametrize("backend", BACKENDS)


def composed(f, weight, bias, box, targets, height, width):
    """The one-pass loss from plain torch."""
    v = visibility(box, f.shape[2], f.shape[3], height, width, f.dtype)
    logits = (f * v[:, None]).sum((2, 3)) @ weight.T + bias
    return logits, -(targets * torch.log_softmax(logits, 1)).sum(1).mean()


@backends
@each(dtype=DTYPES, channels_last=[False, True])
def test_one_pass_mode_against_float64(backend, dtype, channels_last):
    f, t, q, _ = example(batch=6, channels=40, h=5, w=3)
    weight, bias = torch.randn(5, 40) / 6, torch.randn(5)
    f, weight, bias = (v.to(dtype) for v in (f, weight, bias))
    if channels_last:
        f = f.contiguous(memory_format=torch.channels_last)
    leaves = [v.requires_grad_() for v in (f, weight, bias)]
    config = PAPER.replace(ratio_high=0.3)
    result = sk.masked_forward(
        f,
        t,
        q,
        size=(20, 17),
        classifier=(weight, bias),
        config=config,
        generator=8,
        backend=backend,
    )
    for name, up in upstreams((6, 5), result.logits.dtype).items():
        up = up.to(result.logits.dtype)
        grads = torch.autograd.grad(
            (result.logits * up).sum() + 0.7 * result.loss, leaves, retain_graph=True
        )
        targets = result.targets_max.detach()

        def baseline(kind, targets=targets, up=up):
            copies = [v.detach().to(kind).requires_grad_() for v in leaves]
            logits, loss = composed(*copies, result.box_max, targets.to(kind), 20, 17)
            total = (logits * up.to(kind)).sum() + 0.7 * loss
            return logits, loss, torch.autograd.grad(total, copies)

        exact, eager = baseline(torch.float64), baseline(torch.promote_types(dtype, torch.float32))
        assert_accurate(result.logits, exact[0], eager[0], "logits", 16)
        assert_accurate(result.loss, exact[1], eager[1], "loss", 16)
        for grad, leaf, e, b in zip(grads, leaves, exact[2], eager[2], strict=True):
            assert grad.dtype == leaf.dtype
            assert_accurate(grad, e, b.to(dtype), f"gradient ({name})", 16)
            assert_parallel(grad, e)


@backends
def test_one_pass_mode_where_nothing_is_visible(backend):
    f, t, q, _ = example(batch=2)
    config = PAPER.replace(
        ratio_low=1.0, ratio_high=1.0, ratio_gamma=0.0, aspect_low=1.0, aspect_high=1.0
    )
    weight, bias = torch.randn(5, 24, requires_grad=True), torch.randn(5, requires_grad=True)
    f.requires_grad_()
    result = sk.masked_forward(
        f, t, q, size=(8, 8), classifier=(weight, bias), config=config, generator=0, backend=backend
    )
    assert result.box_max.tolist() == [[0, 0, 8, 8]] * 2
    torch.testing.assert_close(result.logits, bias.expand(2, 5))
    result.loss.backward()
    assert not f.grad.any() and not weight.grad.any() and bias.grad.any()


@each(backend=BACKENDS, config=MASK_CONFIGS)
def test_gradcheck(backend, config):
    config = MASK_CONFIGS[config]
    torch.manual_seed(3)
    f = torch.randn(3, 5, 3, 2, dtype=torch.float64, requires_grad=True)
    x = torch.rand(3, 2, 7, 6, dtype=torch.float64, requires_grad=True)
    t = torch.softmax(torch.randn(3, 4, dtype=torch.float64) * 4, 1).requires_grad_()
    weight = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    q = torch.rand(3)
    one_pass = "max" in config.views
    config = config.replace(ratio_high=0.5, ratio_gamma=0.4)

    def call(f, t, x, weight, bias):
        r = sk.masked_forward(
            f,
            t,
            q,
            images=x,
            config=config,
            generator=3,
            backend=backend,
            classifier=(weight, bias) if one_pass else None,
        )
        return tuple(
            v
            for v in (r.targets_max, r.targets_min, r.images_max, r.images_min, r.logits)
            if v is not None
        )

    fast = backend == "reference"  # which the numerical Jacobian would take minutes of
    assert torch.autograd.gradcheck(call, (f, t, x, weight, bias), fast_mode=fast)
    if one_pass:
        assert torch.autograd.gradcheck(
            lambda f, weight, bias: (
                sk.masked_forward(
                    f,
                    t.detach(),
                    q,
                    size=(7, 6),
                    classifier=(weight, bias),
                    config=config,
                    generator=3,
                    backend=backend,
                ).loss
            ),
            (f, weight, bias),
            fast_mode=fast,
        )


@each(config=MASK_CONFIGS, channels_last=[False, True])
def test_view_gradients_agree_between_backends(config, channels_last):
    config = MASK_CONFIGS[config]
    grads = {}
    for backend in BACKENDS:
        torch.manual_seed(1)
        f, t, q, x = example()
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        x.requires_grad_()
        t.requires_grad_()
        r = sk.masked_forward(f, t, q, images=x, config=config, generator=4, backend=backend)
        up = upstreams(r.images_masked.shape, torch.float32)
        kind = config.views[0]
        grads[backend] = [
            torch.autograd.grad(r.images_masked, x, g, retain_graph=True)[0] for g in up.values()
        ]
        grads[backend].append(
            torch.autograd.grad(getattr(r, f"targets_{kind}"), t, torch.randn(4, 5))[0]
        )
    for a, b in zip(*grads.values(), strict=True):
        torch.testing.assert_close(a, b)
        assert a.stride() == b.stride()


def test_statistics_and_boxes_are_constants():
    f, t, q, x = example()
    r = sk.masked_forward(f.requires_grad_(), t, q, images=x)
    tensors = [*r.stats, r.ratio_max, r.ratio_min, r.box_max, r.targets_max, r.images_max]
    assert not any(v.requires_grad for v in tensors)
    assert not any(v.requires_grad for v in sk.activation_stats(f, (8, 8)))


# --- surroundings ------------------------------------------------------------------------------


@each(backend=BACKENDS, config=MASK_CONFIGS)
def test_opcheck(backend, config):
    config = MASK_CONFIGS[config]
    f, t, q, x = example()
    given = draws.uniforms(config.num_draws(3), torch.arange(4), torch.tensor(0))
    settings = _settings(config)._replace(fill_value=[0.5]).numbers()
    op = getattr(torch.ops.sanm_kernels.masked_forward, backend)
    torch.library.opcheck(
        op, (f, t.requires_grad_(), q, given, torch.tensor(7), None, x, 16, 12, 5, settings)
    )
    op = getattr(torch.ops.sanm_kernels.activation_stats, backend)
    torch.library.opcheck(op, (f, 16, 12, config.quantize))


@backends
@pytest.mark.parametrize("bias", [False, True])
def test_opcheck_of_the_classifier(backend, bias):
    f, t, *_ = example()
    box = torch.tensor([[0, 0, 16, 12], [3, 2, 9, 12], [0, 0, 1, 1], [5, 5, 5, 5]]).int()
    weight, b = torch.randn(5, 24, requires_grad=True), torch.randn(5, requires_grad=True)
    op = getattr(torch.ops.sanm_kernels.masked_classifier, backend)
    torch.library.opcheck(op, (f.requires_grad_(), box, t, weight, b if bias else None, 16, 12))


@backends
def test_compiles_whole_with_a_dynamic_batch(backend):
    weight = torch.randn(5, 24, requires_grad=True)

    def step(f, t, q, x):
        r = sk.masked_forward(
            f * 1.0, t, q, images=x, classifier=(weight, None), generator=6, backend=backend
        )
        return r.images_masked, r.targets_max, r.stats.entropy, r.box_min, r.loss

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (4, 7):
        args = example(batch=batch)
        for a, b in zip(compiled(*args), step(*args), strict=True):
            torch.testing.assert_close(a, b)
    compiled(*example())[-1].backward()
    assert weight.grad is not None


@backends
def test_autocast_changes_nothing(backend):
    f, t, q, x = example(dtype=torch.bfloat16)
    weight = torch.randn(5, 24)
    plain = sk.masked_forward(
        f, t, q, images=x, classifier=(weight, None), generator=1, backend=backend
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = sk.masked_forward(
            f, t, q, images=x, classifier=(weight, None), generator=1, backend=backend
        )
    assert torch.equal(plain.loss, cast.loss) and plain.loss.dtype == torch.float32
    assert torch.equal(plain.images_masked, cast.images_masked)


@backends
def test_empty_batch(backend):
    f, t, q, x = (v[:0] for v in example())
    weight = torch.randn(5, 24, requires_grad=True)
    for config in MASK_CONFIGS.values():
        one_pass = (weight, None) if "max" in config.views else None
        r = sk.masked_forward(
            f, t, q, images=x, classifier=one_pass, config=config, backend=backend
        )
        assert r.images_masked.shape == (0, 3, 16, 12) and r.stats.max.shape == (0,)
        if one_pass:
            assert r.loss == 0
            assert not torch.autograd.grad(r.loss, weight)[0].any()


@each(backend=BACKENDS, config=MASK_CONFIGS)
def test_out_is_overwritten_and_returned(backend, config):
    config = MASK_CONFIGS[config]
    f, t, q, x = example()
    classifier = (torch.randn(5, 24), None) if "max" in config.views else None
    options = {"config": config, "classifier": classifier, "backend": backend}
    first = sk.masked_forward(f, t, q, images=x, generator=1, **options)
    memory = [b.data_ptr() for b in first.buffers]
    fresh = sk.masked_forward(f, t, q, images=x, generator=2, **options)
    again = sk.masked_forward(f, t, q, images=x, generator=2, out=first, **options)
    assert again is first and memory == [b.data_ptr() for b in first.buffers]
    for name in EXACT:
        assert same(getattr(again, name), getattr(fresh, name)), name
    for a, b in zip(again.buffers, fresh.buffers, strict=True):
        assert torch.equal(a, b)


def test_result_does_not_depend_on_the_number_of_threads():
    f, t, q, x = example(batch=64, channels=256, h=7, w=7, height=64, width=64)
    args = {"images": x, "generator": 0, "classifier": (torch.randn(5, 256), torch.randn(5))}
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = sk.masked_forward(f, t, q, backend="cpu", **args)
        torch.set_num_threads(4)
        four = sk.masked_forward(f, t, q, backend="cpu", **args)
    finally:
        torch.set_num_threads(before)
    for a, b in zip(one.buffers[:6], four.buffers[:6], strict=True):
        assert torch.equal(a, b)


def test_vmap_refuses_or_agrees():
    f = torch.randn(3, 2, 8, 4, 4)
    try:
        batched = torch.vmap(lambda x: sk.activation_stats(x, (8, 8)).max)(f)
    except RuntimeError as error:
        assert "Batching rule" in str(error)
    else:
        torch.testing.assert_close(batched, f.square().sum(2).amax((2, 3)))
