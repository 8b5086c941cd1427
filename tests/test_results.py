"""Results and configurations that are copied, pickled, saved, and written to again."""

from __future__ import annotations

import copy
import io
import itertools
import pickle

import pytest
import torch
from inputs import CPU_BACKENDS, each, example
from torch.utils._pytree import tree_map_only

import sanm_kernels as sk
from sanm_kernels.backends import load
from sanm_kernels.masking import _settings


def saved(x: object) -> object:
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


COPIES = {
    "clone": lambda x: tree_map_only(torch.Tensor, torch.clone, x),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "torch.load": saved,
}
CONFIGS = [sk.MaskConfig.paper(), sk.MaskConfig.official_clothing1m().replace(views=("min",))]


@pytest.mark.parametrize("config", CONFIGS, ids=["paper", "min"])
@pytest.mark.parametrize("images", [True, False])
@pytest.mark.parametrize("how", COPIES)
def test_out_of_a_copy_is_written_to_or_refused(how, images, config):
    f, t, q, x = example()
    options = {"images": x} if images else {"size": x.shape[2:]}
    first = sk.masked_forward(f, t, q, generator=0, config=config, **options)
    wanted = sk.masked_forward(f, t, q, generator=1, config=config, **options)
    out = COPIES[how](first)
    if how in ("clone", "pickle"):  # whose parts share no memory with the buffers
        with pytest.raises(ValueError, match="no longer a slice of its buffers"):
            sk.masked_forward(f, t, q, generator=1, config=config, out=out, **options)
        return
    again = sk.masked_forward(f, t, q, generator=1, config=config, out=out, **options)
    assert again is out
    for name, value, other in zip(out._fields, out, wanted, strict=True):
        values, others = (x if isinstance(x, tuple) else (x,) for x in (value, other))
        for a, b in zip(values, others, strict=True):
            assert (a is None and b is None) or torch.equal(a, b), name


PARTS = (*sk.ActivationStats._fields, *sk.MaskedForward._fields[1:-1])
CHANGES = {
    "copied": torch.clone,
    "of another dtype": lambda x: x.view(torch.float32 if x.dtype == torch.int32 else torch.int32),
    "of another shape": lambda x: x[:-1] if x.dim() else x[None],
    "of other strides": lambda x: x.as_strided(x.shape, [0] * x.dim()) if x.dim() else x[None],
}


@each(backend=CPU_BACKENDS, change=list(CHANGES), part=PARTS)
def test_out_with_a_part_that_is_no_slice_is_refused(backend, change, part):
    """Whatever part and change it is: by the operator where kernels are compiled, or before it."""
    f, t, q, x = example()
    options = {"images": x, "classifier": (torch.randn(5, 24), None), "config": CONFIGS[0]}
    out = sk.masked_forward(f, t, q, generator=0, **options, backend=backend)
    own = out.stats if part in out.stats._fields else out
    replaced = own._replace(**{part: CHANGES[change](getattr(own, part))})
    before = [b.clone() for b in out.buffers]
    with pytest.raises(ValueError, match=f"its {part} is no longer a slice of its buffers"):
        sk.masked_forward(
            f, t, q, generator=1, **options, backend=backend,
            out=replaced if own is out else out._replace(stats=replaced),
        )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(before, out.buffers, strict=True))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("images", [True, False])
def test_out_of_a_call_with_a_classifier(backend, images):
    f, t, q, x = example()
    plain = {"config": CONFIGS[0], "backend": backend}
    plain |= {"images": x} if images else {"size": x.shape[2:]}
    options = plain | {"classifier": (torch.randn(5, 24), torch.randn(5))}
    first, wanted = (sk.masked_forward(f, t, q, generator=i, **options) for i in (0, 1))
    assert not torch.equal(first.logits, wanted.logits)
    again = sk.masked_forward(f, t, q, generator=1, **options, out=first)
    assert again is first and len(again.buffers) == 8
    for a, b in zip(again.buffers, wanted.buffers, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(again.logits, wanted.logits) and torch.equal(again.loss, wanted.loss)
    without = sk.masked_forward(f, t, q, generator=1, **plain)
    before = [b.clone() for b in (*first.buffers, *without.buffers)]
    with pytest.raises(TypeError, match="out: expected buffers of 6 tensors"):
        sk.masked_forward(f, t, q, generator=0, **plain, out=first)
    with pytest.raises(TypeError, match="out: expected buffers of 8 tensors"):
        sk.masked_forward(f, t, q, generator=0, **options, out=without)
    with pytest.raises(RuntimeError, match="out: cannot be given where features requires grad"):
        sk.masked_forward(f.clone().requires_grad_(), t, q, generator=0, **options, out=first)
    shared = first._replace(logits=f.view(-1)[:20].view(4, 5))
    shared = shared._replace(buffers=(*first.buffers[:6], shared.logits, first.loss))
    with pytest.raises(ValueError, match="out: shares its logits with the argument features"):
        sk.masked_forward(f, t, q, generator=0, **options, out=shared)
    after = (*first.buffers, *without.buffers)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.skipif(load("cpu") is not None, reason="the CPU kernels are not compiled")
def test_the_operator_itself_refuses_to_write_where_it_reads():
    f, t, q, x = example()
    out = sk.masked_forward(f, t, q, images=x, generator=0)
    settings = _settings(sk.MaskConfig.paper()).numbers()
    seed = torch.tensor(1)
    op = torch.ops.sanm_kernels.masked_forward_out.cpu

    def write(images, buffers):
        op(f, t, q, None, seed, None, images, *x.shape[2:], 5, settings, *buffers, None)

    write(x, out.buffers)
    with pytest.raises(ValueError, match="out: shares memory"):
        write(out.images_max, out.buffers)
    ratio, boxes = out.buffers[2:4]
    memory = torch.zeros(1 + boxes.numel(), dtype=torch.int32)
    buffers = list(out.buffers)
    buffers[2] = memory[: ratio.numel()].view(torch.float32).view(ratio.shape)
    buffers[3] = memory[1:].view(boxes.shape)
    with pytest.raises(ValueError, match="out: shares memory"):
        write(x, buffers)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.load"])
def test_configurations_and_results_come_back(how):
    config = sk.MaskConfig.official_cifar().replace(fill="constant", fill_value=(0.1, 0.2, 0.3))
    again = COPIES[how](config)
    assert again == config and type(again) is sk.MaskConfig
    quality = sk.fit_label_quality(torch.rand(50))
    again = COPIES[how](quality)
    assert type(again) is sk.LabelQuality
    assert all(torch.equal(a, b) for a, b in zip(again, quality, strict=True))


def test_a_configuration_that_was_tampered_with_is_refused():
    config = sk.MaskConfig.paper()
    object.__setattr__(config, "ratio_low", float("nan"))
    with pytest.raises(ValueError, match="ratio_low: expected a finite number"):
        saved(config)


@pytest.mark.parametrize("batch, channels", [(2, 1), (1, 1), (0, 3)])
def test_out_serves_both_memory_formats_where_they_are_the_same(batch, channels):
    """Strides of a dimension of length 1, and those of no sample, do not matter."""
    given = torch.randn(batch, 4, 3, 3), torch.zeros(batch, dtype=torch.int64), torch.rand(batch)
    images = torch.rand(batch, channels, 8, 8)
    options = {"num_classes": 5, "generator": 3}
    formats = [torch.contiguous_format, torch.channels_last]
    for first, second in itertools.product(formats, formats):
        out = sk.masked_forward(*given, images=images.to(memory_format=first), **options)
        again = images.to(memory_format=second)
        expected = sk.masked_forward(*given, images=again, **options)
        sk.masked_forward(*given, images=again, **options, out=out)
        assert torch.equal(out.images_masked, expected.images_masked)
        assert out.images_masked is out.buffers[5]
