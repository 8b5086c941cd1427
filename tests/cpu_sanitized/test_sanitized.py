"""The sanitizers see what they are for, and see nothing in the kernels of csrc/cpu.

Random calls of every function, forward and backward, right and wrong. The whole suite is run in the
same way by hand: docs/proof.md says how, and what came of it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import cuda_host
import pytest
from inputs import extended

import cpu_sanitized
from sanm_kernels.backends import cpu

pytestmark = [
    extended,
    pytest.mark.skipif(
        cuda_host.why_not() is not None or cpu.load() is not None,
        reason=str(cuda_host.why_not() or cpu.load()),
    ),
]


def start(sanitize: str, *command: object, **more: str) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    if sanitize == "thread":  # its memory layout does not bear random addresses
        if shutil.which("setarch") is None:
            pytest.skip("no setarch")
        words = ["setarch", "-R", *words]
    return subprocess.run(
        words, env=os.environ | cpu_sanitized.environment(sanitize) | more, cwd=cuda_host.ROOT,
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    "mistake, sanitize, message",
    [
        ("none", "address", ""),
        ("none", "thread", ""),
        ("address", "address", "heap-buffer-overflow"),
        ("overflow", "address", "signed integer overflow"),
        ("cast", "address", "outside the range of representable values"),
        ("index", "address", "__n < this->size()"),
        ("race", "thread", "data race"),
    ],
)
def test_mistakes_show(mistake: str, sanitize: str, message: str) -> None:
    done = start(sanitize, cpu_sanitized.program(sanitize), mistake, LD_PRELOAD="")
    assert message in done.stderr and (done.returncode == 0) == (mistake == "none"), done.stderr
    assert mistake != "none" or (done.stdout, done.stderr) == ("done\n", "")


@pytest.mark.parametrize("sanitize", ["address", "thread"])
def test_random_calls_are_clean(sanitize: str) -> None:
    """500 calls on the instruction set that is loaded here; the kernels alone are instrumented."""
    assert cpu.loaded is not None
    runtime = cpu_sanitized.environment(sanitize)["LD_PRELOAD"].split()[0]
    if not Path(runtime).is_absolute():
        pytest.skip(f"the compiler has no {runtime}")
    library = cpu_sanitized.library(sanitize, cpu.loaded)
    done = start(
        sanitize, sys.executable, "-m", "pytest", "-x", "-s", "-p", "no:cacheprovider",
        "tests/test_differential.py", "-k", "random_calls and cpu-0",
        SANM_TEST_CPU_LIBRARIES=str(library.parent), OMP_NUM_THREADS="1",
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode == 0 and "1 passed" in done.stdout, said[-5000:]
    for word in ("AddressSanitizer", "runtime error", "ThreadSanitizer"):
        assert word not in said, said[-5000:]


def test_direct_calls_are_clean() -> None:
    """Of the operators, with arguments that do not fit together."""
    assert cpu.loaded is not None
    options = cpu_sanitized.environment("address")["ASAN_OPTIONS"]
    done = start(
        "address", sys.executable, "tests/direct_calls.py", "cpu", OMP_NUM_THREADS="1",
        SANM_TEST_CPU_LIBRARIES=str(cpu_sanitized.library("address", cpu.loaded).parent),
        ASAN_OPTIONS=f"{options}:allocator_may_return_null=1:max_allocation_size_mb=4000",
    )  # fmt: skip
    assert done.returncode == 0 and "mixup_views raised" in done.stdout, done.stderr[-5000:]
