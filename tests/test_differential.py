"""Random calls on each backend against the reference: differential.py says what holds.

A call is made from its number alone. ``python tests/differential.py NUMBER BACKEND`` repeats one.
"""

from __future__ import annotations

from collections import Counter

import pytest
from differential import compare
from inputs import GPU_DEVICES, extended, more
from random_calls import FUNCTIONS, SMALL, random_call

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
            assert (backend, call.function) == ("cuda", "sample_loss")  # Triton's serves there
            continue
        try:
            compared += compare(call, backend)
        except Exception as error:
            raise AssertionError(f"python tests/differential.py {number} {backend}") from error
        called += 1
    assert compared > size  # tensors
    assert called == size if backend == "cpu" else called >= 0.7 * size


@pytest.mark.parametrize("backend", ["triton", "cuda", *more("cpu")])
def test_every_function_is_called_often_enough(backend: str) -> None:
    first, size, blocks = CALLS[backend]
    calls = range(first, first + size * blocks)
    called = Counter(random_call(number).function for number in calls)
    assert set(called) == set(FUNCTIONS)
    assert min(called.values()) >= 0.04 * len(calls)
