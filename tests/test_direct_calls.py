"""The operators themselves raise, or give something, whatever they are called with: no crash.

tests/direct_calls.py makes the calls, each with one argument that does not fit the others.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from inputs import CUDA_DEVICE, extended

from sanm_kernels import backends

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("backend", ["cpu", pytest.param("cuda", marks=extended)])
def test_arguments_that_do_not_fit_together_end_no_process(backend: str) -> None:
    """On a GPU such a call may raise for all calls to come: there it is not made."""
    reason = backends.load(backend) if CUDA_DEVICE == "cpu" or backend == "cpu" else "a GPU is here"
    if reason is not None:
        pytest.skip(reason)
    done = subprocess.run(
        [sys.executable, "tests/direct_calls.py", backend], cwd=ROOT, capture_output=True,
        text=True, timeout=600, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, (done.returncode, done.stderr[-3000:])
    raised = {line.split()[0] for line in done.stdout.splitlines() if " raised " in line}
    served = {op for op in backends.operators if backends.serves(backend, op, "cpu") is None}
    assert raised == served
