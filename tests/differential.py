"""Compares a backend with the reference on a random call.

``python tests/differential.py NUMBER [BACKEND …]`` shows the call of this number and does so.
"""

from __future__ import annotations

import re
import sys
from typing import Any

import torch
from inputs import GPU_DEVICES
from maker import Call, identical
from random_calls import random_call
from sheets import slopes
from tolerances import assert_accurate
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

STATISTICS = ("max", "min", "mean", "std", "entropy")
TIGHT, FAST = 1e-9, 2e-5  # fit_label_quality on samples, and on a histogram of many


def outputs_of(result: Any, prefix: str = "") -> dict[str, Tensor | None]:
    """The tensors of a result by name; those of a tuple within it as "outer.inner"."""
    if isinstance(result, Tensor) or result is None:
        return {prefix or "result": result}
    found: dict[str, Tensor | None] = {}
    for name, value in result._asdict().items():
        if name != "buffers":
            found |= outputs_of(value, f"{prefix}.{name}" if prefix else name)
    return found


def run(call: Call, backend: str, dtype: torch.dtype | None = None) -> dict[str, Tensor | None]:
    """Outputs on the CPU, and the gradients of the leaves as "d 0", "d 1", …

    In `dtype` if one is given. The inputs are those of the call, wherever they need not be moved.
    """
    device = GPU_DEVICES.get(backend) or "cpu"

    def leaf(x: Tensor) -> Tensor:
        moved = x.detach().to(device)
        if x.is_floating_point() and dtype is not None:
            moved = moved.to(dtype)
        return moved.requires_grad_(x.requires_grad)

    inputs = tree_map_only(Tensor, leaf, call.inputs)
    results = outputs_of(call.run(inputs, backend))
    leaves = [x for x in tree_leaves(inputs) if isinstance(x, Tensor) and x.requires_grad]
    differentiable = [x for x in results.values() if x is not None and x.requires_grad]
    if differentiable:
        gradients = torch.autograd.grad(
            differentiable, leaves, [slopes(x) for x in differentiable], allow_unused=True
        )
        results |= {f"d {i}": g for i, g in enumerate(gradients)}
    return {name: None if x is None else x.detach().cpu() for name, x in results.items()}


def complaint(call: Call, backend: str) -> tuple[str, list[str]]:
    """What the wrong call raises: what was expected, and at which index it was not found."""
    try:
        run(call, backend)
    except ValueError as error:
        return str(error).partition(", got ")[0], re.findall(r" at index (\[.*?\])", str(error))
    raise AssertionError(f"{call.wrong}: a wrong value is accepted")


def compare(call: Call, backend: str) -> int:
    """Assert that the backend does what the reference does; returns how many tensors it compared.

    Same decisions and same bits where they are promised, else as tolerances.py says. The
    arguments stay as they are, and outputs have the reference's dtypes and memory formats.
    """
    if call.wrong:
        said, index = complaint(call, backend)
        expected, first = complaint(call, "reference")
        assert said == expected and said.startswith(f"{call.wrong}"), said
        assert index == first or not index or not first, "another index"
        return 1
    before = [x.clone() for x in tree_leaves(call.inputs) if isinstance(x, Tensor)]
    got, plain = run(call, backend), run(call, "reference")
    after = [x for x in tree_leaves(call.inputs) if isinstance(x, Tensor)]
    for x, y in zip(after, before, strict=True):
        assert identical(x, y), "an argument was changed"
    exact = run(call, "reference", torch.float64)
    assert got.keys() == plain.keys() == exact.keys()
    compared = 0
    for name, value in got.items():
        expected, wide = plain[name], exact[name]
        assert (value is None) == (expected is None), name
        if value is None or expected is None or wide is None:
            continue
        compared += 1
        assert (value.dtype, value.shape) == (expected.dtype, expected.shape), name
        kinds = [torch.contiguous_format, *[torch.channels_last] * (value.dim() == 4)]
        for kind in kinds:
            alike = value.is_contiguous(memory_format=kind)
            assert alike == expected.is_contiguous(memory_format=kind), f"{name}: {kind}"
        if name.startswith(call.same):
            assert identical(value, expected), f"{name}: other bits"
        elif call.function == "fit_label_quality":
            assert_close(value, wide, TIGHT if len(plain["clean_prob"]) < 8192 else FAST, name)
        else:
            assert call.exact or name.removeprefix("stats.") in STATISTICS, name
            assert identical(value.isnan(), wide.isnan()), f"{name}: NaN elsewhere"
            value = value.float() if call.narrow and value.dtype == torch.float64 else value
            assert_accurate(value, wide, expected, name, call.roundings, scale(call, name))
    return compared


def scale(call: Call, name: str) -> float:
    """The magnitude of the terms of masked_loss's penalties, and of all where nothing else shows.

    They are sums of either sign, or of what is next to 1; so is the gradient where all parts
    cancel, and a small cross-entropy, the logarithm of a sum next to 1. In float64 the reference is
    the yardstick itself: its own error is no allowance.
    """
    losses = ("masked_loss", "sample_loss")
    double = call.function in losses and call.inputs["logits"].dtype == torch.float64
    if call.function == "masked_loss" and name == "d 0" and not double:
        return 1 / max(call.inputs["logits"].numel(), 1)
    return 1.0 if double or name in ("prior", "total", "confidence") else 0.0


def assert_close(value: Tensor, exact: Tensor, tolerance: float, name: str) -> None:
    """Within the tolerance of the largest; a result in float32 is rounded besides."""
    if value.numel():
        error = (value.double() - exact).abs().max().item()
        rounding = 2e-7 if value.dtype == torch.float32 else 0.0
        allowed = tolerance * max(exact.abs().max().item(), 1.0) + rounding
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def main() -> None:
    call = random_call(int(sys.argv[1]))
    print(f"{call.function}{', wrong ' * bool(call.wrong)}{call.wrong}")
    for name, value in call.inputs.items():
        for x in tree_leaves(value):
            if isinstance(x, Tensor):
                print(f"  {name}: {x.dtype} {list(x.shape)}, strides {list(x.stride())}")
    for backend in sys.argv[2:]:
        print(f"{backend}: {compare(call, backend)} tensors agree")


if __name__ == "__main__":
    main()
