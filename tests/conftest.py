"""Shared by all tests: GPU kernels that run without a GPU, and the same seed for each test."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import cuda_host
import pytest
import torch

if not torch.cuda.is_available():  # then Triton's kernels are tested in its interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if cuda_host.why_not() is None:  # and the CUDA kernels compiled for the host
        os.environ.setdefault("SANM_KERNELS_CUDA_EMULATION", str(cuda_host.path()))
if os.environ.get("SANM_TEST_CPU_LIBRARIES"):  # those of cpu_sanitized
    from sanm_kernels.backends import cpu  # which looks at the variables above

    cpu.LIBRARIES = Path(os.environ["SANM_TEST_CPU_LIBRARIES"])


def pytest_collection_finish(session: pytest.Session) -> None:
    """Build the emulated CUDA kernels if a test that is going to run names them."""
    emulated = os.environ.get("SANM_KERNELS_CUDA_EMULATION") == str(cuda_host.path())
    if not emulated or session.config.option.collectonly:
        return
    if any("cuda" in item.nodeid or "test_gpu_" in item.nodeid for item in session.items):
        from sanm_kernels import backends

        try:
            cuda_host.library()
        except subprocess.CalledProcessError:  # the compiler has said why
            pytest.exit("the emulated CUDA kernels do not compile", returncode=1)
        reason = backends.load("cuda")  # remembered from before, if a test module asked already
        if reason is not None:
            pytest.exit(f"the emulated CUDA kernels do not load: {reason}", returncode=1)


@pytest.fixture(autouse=True)
def seed() -> None:
    """A test's random numbers do not depend on which tests ran before it."""
    torch.manual_seed(0)
