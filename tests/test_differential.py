"""Thousands of random calls on each backend against the reference: differential.py says what holds.

A call is made from its number alone. ``python tests/differential.py NUMBER BACKEND`` repeats one.
"""

from __future__ import annotations

from collections import Counter

import pytest
from differential import compare
from inputs import GPU_DEVICES
from random_calls import FUNCTIONS, SMALL, random_call

from sanm_kernels import backends

#: Backend → its first call, how many calls, and how many of them make a test.
CALLS = {"cpu": (0, 6000, 500), "triton": (SMALL, 200, 50), "cuda": (SMALL, 400, 100)}
BLOCKS = [
    (backend, number)
    for backend, (first, count, block) in CALLS.items()
    for number in range(first, first + count, block)
]


@pytest.fixture(scope="module")
def done() -> dict[str, Counter[str]]:
    """Backend → how often each function was called and compared."""
    return {backend: Counter() for backend in CALLS}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of Triton's interpreter
@pytest.mark.parametrize("backend, first", BLOCKS)
def test_random_calls_agree_with_the_reference(
    backend: str, first: int, done: dict[str, Counter[str]]
) -> None:
    device = "cpu" if backend == "cpu" else GPU_DEVICES[backend]
    if device is None:
        pytest.skip(backends.load(backend) or "not here")
    compared = 0
    for number in range(first, first + CALLS[backend][2]):
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
        done[backend][call.function] += 1
    assert compared > CALLS[backend][2]  # tensors


@pytest.mark.parametrize("backend", CALLS)
def test_enough_calls_were_compared(backend: str, done: dict[str, Counter[str]]) -> None:
    """5,000 on the CPU kernels; hundreds where kernels are interpreted or emulated."""
    called = done[backend]
    if not called:
        pytest.skip("none of the calls were selected, or the backend is not here")
    if backend == "cpu":
        assert called.total() == CALLS[backend][1] >= 5000
    else:
        assert called.total() >= 0.8 * CALLS[backend][1]
    for function in FUNCTIONS:
        least = 0 if (backend, function) == ("cuda", "sample_loss") else 0.04 * called.total()
        assert called[function] >= least, function
