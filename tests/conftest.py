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
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # pytest -n: the workers share the cores, and so
    workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])  # do the processes that they start
    threads = max(1, torch.get_num_threads() // workers)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    torch.set_num_threads(threads)


def build_emulation() -> None:
    """Build and load the emulated CUDA kernels, or end the run."""
    from sanm_kernels import backends

    try:
        cuda_host.library()
    except subprocess.CalledProcessError:  # the compiler has said why
        pytest.exit("the emulated CUDA kernels do not compile", returncode=1)
    reason = backends.load("cuda")  # remembered from before, if a test module asked already
    if reason is not None:
        pytest.exit(f"the emulated CUDA kernels do not load: {reason}", returncode=1)


def emulates(config: pytest.Config) -> bool:
    """Whether the emulation is this process's to build; a worker of pytest -n finds it there."""
    named = os.environ.get("SANM_KERNELS_CUDA_EMULATION") == str(cuda_host.path())
    return named and not hasattr(config, "workerinput") and not config.option.collectonly


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """Before pytest -n starts its workers: they look for the library when they collect."""
    if emulates(session.config) and session.config.getoption("numprocesses", None):
        build_emulation()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Otherwise if a test that is going to run names it."""
    if emulates(session.config) and any(
        "cuda" in item.nodeid or "test_gpu_" in item.nodeid for item in session.items
    ):
        build_emulation()


@pytest.fixture(autouse=True)
def seed() -> None:
    """A test's random numbers do not depend on which tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def served(request: pytest.FixtureRequest) -> None:
    """An operator is tested on the backends that have a kernel for it; the others say that not.

    It is that of the test's operation (`name`), or the one that the file is named for.
    """
    from inputs import GPU_DEVICES
    from sheets import OPERATIONS

    from sanm_kernels import backends

    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    backend, operation = parameters.get("backend"), parameters.get("name")
    file = request.path.stem.removeprefix("test_").removeprefix("gpu_")
    named = [op for op in backends.operators if f"{file}_".startswith(f"{op}_")]
    op = OPERATIONS[operation].op if operation in OPERATIONS else max(named, key=len, default=None)
    if op is None or backend not in backends.BACKENDS:
        return
    device = torch.device(GPU_DEVICES.get(backend, "cpu") or "meta")
    # a backend that does not run at all is not passed over: there the test fails, or skips itself
    if backends.runs_on(backend, device) is None:
        reason = backends.serves(backend, op, device)
        if reason is not None:
            pytest.skip(f"{backend}: {reason}")
