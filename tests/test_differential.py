"""Random calls on each backend against the reference: differential.py says what holds.

A call is made from its number alone. ``python tests/differential.py NUMBER BACKEND`` repeats one.
"""

from __future__ import annotations

import pytest
from differential import compare
from inputs import GPU_DEVICES, extended
from maker import SMALL
from random_calls import random_call

from sanm_kernels import backends

#: Backend → its first call, how many make a test, and how many tests there are.
CALLS = {"cpu": (0, 500, 10), "triton": (SMALL, 25, 8), "cuda": (SMALL, 100, 4)}
BLOCKS = [
    pytest.param(backend, first + block * size, marks=extended if block else ())
    for backend, (first, size, blocks) in CALLS.items()
    for block in range(blocks)
]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of Triton's interpreter
@pytest.mark.parametrize("backend, first", BLOCKS)
def test_random_calls_agree_with_the_reference(backend: str, first: int) -> None:
    device = "cpu" if backend == "cpu" else GPU_DEVICES[backend]
    if device is None:
        pytest.skip(backends.load(backend) or "not here")
    size, compared, called = CALLS[backend][1], 0, 0
    for number in range(first, first + size):
        call = random_call(number)
        if call.wrong and device == "cuda":
            continue  # values are not looked at there
        if backends.serves(backend, call.function, device) is not None:
            continue  # test_operators.py says so
        try:
            compared += compare(call, backend)
        except Exception as error:
            raise AssertionError(f"python tests/differential.py {number} {backend}") from error
        called += 1
    assert compared > size  # tensors
    assert called >= 0.7 * size
