"""No result depends on torch's default dtype or default device."""

from __future__ import annotations

import contextlib
import random
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from forms import FORMS
from inputs import BACKENDS, each
from sheets import OPERATIONS, inputs_of, with_gradients
from torch import Tensor
from torch.utils._pytree import tree_leaves

import sanm_kernels as sk
from sanm_kernels import compat

DEFAULTS = [torch.float64, torch.bfloat16, torch.float16, "meta"]


@contextlib.contextmanager
def default(value: torch.dtype | str) -> Iterator[None]:
    before = torch.get_default_dtype()
    try:
        if isinstance(value, str):
            torch.set_default_device(value)
        else:
            torch.set_default_dtype(value)
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(before)


def assert_unmoved(run: Callable[[], Any], value: torch.dtype | str) -> None:
    """`run` gives the same bits and dtypes on the same devices; a ``with torch.device`` too."""
    expected = tree_leaves(run())
    scopes: list[Any] = [default(value)]
    if isinstance(value, str):
        scopes.append(torch.device(value))
    for scope in scopes:
        with scope:
            got = tree_leaves(run())
        assert len(got) == len(expected)
        for a, b in zip(got, expected, strict=True):
            if not isinstance(b, Tensor):
                assert a == b
                continue
            assert (a.dtype, a.device) == (b.dtype, b.device)
            assert torch.equal(a, b)


@each(name=OPERATIONS, value=DEFAULTS, backend=BACKENDS, dtype=[torch.float32, torch.float64])
def test_every_operation(name, value, backend, dtype):
    operation = OPERATIONS[name]
    x = inputs_of(operation, "cpu", dtype)

    def run() -> dict[str, Tensor]:
        slopes = {}  # the slopes that with_gradients makes are on the default device
        if operation.wrt and value == "meta":
            leaves = {k: x[k].detach().requires_grad_() for k in operation.wrt}
            outputs = operation.run({**x, **leaves}, backend=backend)
            total = sum(out.square().sum() for out in outputs.values())
            gradients = torch.autograd.grad(total, list(leaves.values()))
            slopes = {f"d {k}": g for k, g in zip(leaves, gradients, strict=True)}
            return {**{k: v.detach() for k, v in outputs.items()}, **slopes}
        return with_gradients(operation, x, backend=backend)

    assert_unmoved(run, value)


def calls(backend: str, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """Options that the operations do not use."""
    torch.manual_seed(0)
    z, soft = torch.randn(6, 4).to(dtype), torch.softmax(torch.randn(6, 4), 1)
    labels, q = torch.tensor([0, 3, -100, 1, 2, 2]), torch.rand(6)
    features, images = torch.randn(6, 5, 3, 3).to(dtype), torch.rand(6, 3, 9, 9).to(dtype)
    losses, permutation = torch.randn(40).abs().to(dtype), torch.randperm(6)
    weights = {"unlabeled_weight": 1 / 3, "prior_weight": 0.7, "confidence_weight": 0.1}
    options = {"backend": backend}

    def masked(config: sk.MaskConfig, **more: Any) -> Any:
        result = sk.masked_forward(
            features, labels.clamp(min=0), q, images=images, config=config, num_classes=4,
            generator=3, **more, **options,
        )  # fmt: skip
        return result.buffers[:6]

    return {
        "labels": lambda: sk.masked_loss(z, labels, num_labeled=3, **weights, **options),
        "none": lambda: sk.masked_loss(
            z, soft, num_labeled=2, unlabeled_weight=1 / 3, reduction="none", **options
        ),
        "sum": lambda: sk.masked_loss(
            z, soft, prior=soft[0], mix=(0.3, permutation), reduction="sum", **weights, **options
        ),
        "tensors": lambda: sk.masked_loss(
            z, soft, prior_weight=torch.zeros((), device="cpu", dtype=torch.float64), **options
        ),
        "clothing1m": lambda: masked(sk.MaskConfig.official_clothing1m()),
        "pixel": lambda: masked(sk.MaskConfig().replace(fill="pixel")),
        "mean": lambda: masked(sk.MaskConfig().replace(fill="mean")),
        "history": lambda: sk.fit_label_quality(losses, history=losses.view(1, -1) * 2, **options),
        "degenerate": lambda: sk.fit_label_quality(losses * 0, **options),
        "soft labels": lambda: sk.refine_targets(
            z, labels=soft, clean_prob=q, temperature=0.3, **options
        ),
        "all boxes": lambda: sk.reconstruction_loss(
            images, images.flip(0), boxes=[torch.tensor([[1, 1, 4, 5]], device="cpu").expand(6, 4)],
            region="masked", **options,
        ),
    }  # fmt: skip


@each(
    name=calls("cpu", torch.float32),
    value=DEFAULTS,
    backend=BACKENDS,
    dtype=[torch.float32, torch.float64, torch.bfloat16],
)
def test_other_options(name, value, backend, dtype):
    assert_unmoved(calls(backend, dtype)[name], value)


@each(name=["erase", "clothing1m", "semi", "entropy"], value=DEFAULTS)
def test_drop_in_functions(name, value):
    torch.manual_seed(0)
    images, features, q = torch.rand(4, 3, 8, 8), torch.rand(4, 5, 2, 2), torch.rand(4)
    z, soft = torch.randn(4, 5), torch.softmax(torch.randn(4, 5), 1)

    def run() -> Any:
        random.seed(1)
        if name == "erase":
            return compat.attention_erase_map(images, features, q, soft.clone())
        if name == "clothing1m":
            return compat.attention_erase_map_clothing1m(images, features, q)
        if name == "semi":
            return compat.SemiLoss()(z, soft, z.flip(0), soft, 3.0, 1.0)
        return compat.NegEntropy()(z)

    assert_unmoved(run, value)


@each(
    name=["SemiLoss: DivideMix", "SemiLoss: C2D, epoch, warm_up, lambda_u", "NegEntropy"],
    value=DEFAULTS,
)
def test_patch_finds_the_same(name, value):
    """About scripts that make no tensors of their own."""
    form = FORMS[name]
    module = types.ModuleType("their_script")
    vars(module)[form.name] = form.stub

    def run() -> Any:
        with compat.patch(module, verbose=False) as done:
            finding = done.findings[form.name]
            return finding.state, finding.reason, str(finding.differences)

    assert_unmoved(run, value)
