"""Operators called past the public functions, with arguments that do not fit together.

``python tests/direct_calls.py BACKEND`` makes them and prints how many ran: a kernel that reads
past the end of a tensor ends the process, for sure where AddressSanitizer is compiled in.
"""

from __future__ import annotations

import math
import os
import resource
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from sheets import OPERATIONS, VARIANTS, Recorder, inputs_of, with_gradients
from torch import Tensor

from sanm_kernels import backends
from sanm_kernels.backends import cpu


def recorded(backend: str) -> list[tuple[str, Any, tuple[Any, ...]]]:
    """A right call of every operator of the backend, those of backward and variants among them."""
    with torch.enable_grad(), Recorder() as recorder:
        for operation in (OPERATIONS | VARIANTS).values():
            if backends.serves(backend, operation.op, "cpu") is None:
                inputs = inputs_of(operation, "cpu", torch.float32)
                with_gradients(operation, inputs, backend=backend)
    return [call for call in recorder.calls if call[1]._overloadname == backend]


def misfits(x: Tensor) -> Iterator[tuple[bool, Any]]:
    """Whether it must raise, and what is not x: another dtype, shape, or indices far away."""
    floating = x.is_floating_point()
    for dtype in (torch.int32, torch.int64, torch.bool):
        if dtype != x.dtype:
            yield True, x.to(dtype)
    yield False, None
    yield False, x.to(torch.float16 if x.dtype != torch.float16 else torch.float64)
    yield False, x[None]
    yield False, x.new_zeros((1,) * (0 if x.dim() else 2))
    for d, length in enumerate(x.shape):
        one = x.narrow(d, 0, 1) if length else x.new_zeros(*x.shape[:d], 1, *x.shape[d + 1 :])
        for size in {0, 1, length - 1, length + 1, 300} - {length, -1}:
            yield False, one.expand(*x.shape[:d], size, *x.shape[d + 1 :])
    for far in (-1, 2**30, -(2**31), 2**62 + 1):
        if not floating and x.dtype.itemsize * 8 > far.bit_length():
            yield False, torch.full_like(x, far)


def changes(value: Any) -> Iterator[tuple[bool, Any]]:
    """Whether it must raise, and what an argument may be changed to."""
    if isinstance(value, Tensor):
        yield from misfits(value)
    elif isinstance(value, list) and value:
        yield isinstance(value[0], Tensor), []
        yield False, value[:-1]
        for must_raise, other in changes(value[-1]):
            yield must_raise, [*value[:-1], other]
    elif isinstance(value, bool):
        yield False, not value
    elif isinstance(value, int):
        for other in (-1, 0, 1, value + 1, 2**31, 2**62, 2**62 + 2**18, -(2**63)):
            yield False, other
    elif isinstance(value, float):
        for number in (0.0, -1.0, 1e300, math.nan, math.inf):
            yield False, number


@torch.no_grad()
def main(backend: str) -> None:
    if os.environ.get("SANM_TEST_CPU_LIBRARIES"):  # with AddressSanitizer, which reserves terabytes
        cpu.LIBRARIES = Path(os.environ["SANM_TEST_CPU_LIBRARIES"])
    else:
        resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
    made: Counter[str] = Counter()
    for name, op, args in recorded(backend):
        op(*args)
        for i, value in enumerate(args):
            for must_raise, other in changes(value):
                try:
                    op(*args[:i], other, *args[i + 1 :])
                except (RuntimeError, TypeError, ValueError, MemoryError):
                    made[f"{name} raised"] += 1
                else:
                    made[f"{name} ran"] += 1
                    assert not must_raise, (
                        f"{op._schema.arguments[i].name} of {name} may be {other!r}"
                    )
    for line, count in sorted(made.items()):
        print(line, count)


if __name__ == "__main__":
    main(sys.argv[1])
