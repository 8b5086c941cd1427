"""Random calls of the public functions, each made from its number alone; the sheets make them."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from inputs import TRITON_DEVICE
from maker import Call, Maker, identical
from sheets import SHEETS
from torch import Tensor
from torch.utils._pytree import tree_leaves

#: Names, each as often as its sheet has shares, shuffled so that any stretch has some of each.
TURNS = [name for name, sheet in SHEETS.items() for _ in range(sheet.share)]
random.Random(0).shuffle(TURNS)


def random_call(number: int) -> Call:
    """The call of this number."""
    m = Maker(number)
    m.call.function = TURNS[number % len(TURNS)]
    SHEETS[m.call.function].random(m)
    if not m.call.wrong and m.chance(0.1):
        m.call.run = repeated(m.call.run, m.choice([torch.float64, torch.bfloat16, torch.float16]))
    return m.call


def alike(a: Tensor, b: Tensor) -> bool:
    """Whether floating point differs by rounding at most, and integers not at all."""
    if not a.is_floating_point():
        return torch.equal(a, b)
    return torch.allclose(a, b, rtol=16 * torch.finfo(a.dtype).eps, atol=1e-5, equal_nan=True)


def repeated(
    run: Callable[[dict[str, Any], str], Any], default: torch.dtype
) -> Callable[[dict[str, Any], str], Any]:
    """The call with another default dtype, then in two threads at once: all give the same."""

    def thrice(inputs: dict[str, Any], backend: str) -> Any:
        usual = torch.get_default_dtype()
        results = [run(inputs, backend)]
        try:
            torch.set_default_dtype(default)
            results.append(run(inputs, backend))
        finally:
            torch.set_default_dtype(usual)
        # Triton's interpreter changes its language, for all threads, while a kernel runs
        with ThreadPoolExecutor(1 if (backend, TRITON_DEVICE) == ("triton", "cpu") else 2) as pool:
            results += pool.map(lambda _: run(inputs, backend), range(2))
        # of a classifier the products are torch's, and as deterministic as those
        same = identical if inputs.get("classifier") is None else alike
        for other in results[1:]:
            for a, b in zip(tree_leaves(results[0]), tree_leaves(other), strict=True):
                assert a is b is None or (a.dtype == b.dtype and same(a, b)), "not the same"
        return results[0]

    return thrice
