"""The host harness sees what it is for, and sees nothing in the kernels of csrc/cuda.

kernels.cu holds a kernel with a shared buffer, a reduction, a cluster and a grid that meets, right
and with mistakes.
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from inputs import extended, more

import cuda_host

pytestmark = pytest.mark.skipif(cuda_host.why_not() is not None, reason=str(cuda_host.why_not()))
ROOT = Path(__file__).resolve().parent.parent.parent
SCHEDULERS = [("fibers", "forward"), ("fibers", "reverse"), ("threads", "forward")]


def run(
    case: str, sanitize: str | None = None, scheduler: str = "fibers", order: str = "forward"
) -> subprocess.CompletedProcess[str]:
    program = cuda_host.program(sanitize)
    return start(sanitize, [str(program), case], scheduler, order)


def start(
    sanitize: str | None, command: list[str], scheduler: str, order: str = "forward", **more: str
) -> subprocess.CompletedProcess[str]:
    if sanitize == "thread":  # its memory layout does not bear random addresses
        if shutil.which("setarch") is None:
            pytest.skip("no setarch")
        command = ["setarch", "-R", *command]
    chosen = {"SANM_CUDA_HOST_SCHEDULER": scheduler, "SANM_CUDA_HOST_ORDER": order}
    return subprocess.run(
        command,
        env=os.environ | chosen | more,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        cwd=ROOT,
    )


@extended
@pytest.mark.parametrize("scheduler, order", SCHEDULERS)
def test_a_right_kernel_passes(scheduler, order):
    done = run("correct", None, scheduler, order)
    assert (done.returncode, done.stdout) == (0, "right\n"), done.stderr


@extended
@pytest.mark.parametrize("sanitize, scheduler", [("address", "fibers"), ("thread", "threads")])
def test_a_right_kernel_is_clean_when_sanitized(sanitize, scheduler):
    done = run("correct", sanitize, scheduler)
    assert (done.returncode, done.stdout) == (0, "right\n"), done.stderr
    assert "ERROR" not in done.stderr and "ThreadSanitizer" not in done.stderr


@extended
@pytest.mark.parametrize("case", ["no_barrier", "no_cluster_barrier", "no_grid_barrier"])
def test_a_missing_barrier_shows(case):
    results = {run(case, None, "fibers", order).stdout for order in ("forward", "reverse")}
    assert "wrong\n" in results
    done = run(case, "thread", "threads")
    assert done.returncode != 0
    assert "data race" in done.stderr and "mirror_kernel" in done.stderr


@extended
def test_an_index_off_by_one_shows():
    done = run("off_by_one")
    assert done.stdout == "a write past the end of shared memory\n"
    done = run("off_by_one", "address")
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr and "mirror_kernel" in done.stderr


@extended
@pytest.mark.parametrize("scheduler, order", SCHEDULERS)
def test_a_deadlock_is_reported(scheduler, order):
    done = run("deadlock", None, scheduler, order)
    assert done.returncode == 1
    assert "deadlock" in done.stdout and "waiting in __syncthreads: 64 threads" in done.stdout
    assert "ended: 1 threads" in done.stdout


@extended
@pytest.mark.parametrize("scheduler, order", SCHEDULERS)
def test_a_lane_outside_its_mask_is_reported(scheduler, order):
    done = run("foreign_lane", None, scheduler, order)
    assert (done.returncode, done.stdout) == (
        1,
        "__syncwarp by a lane that its mask does not name\n",
    )


FILES = sorted((ROOT / "tests/ops").glob("test_gpu_*.py"))


def sanitized(file: Path) -> tuple[str, str] | None:
    """A file's `SANITIZED`: what runs under ThreadSanitizer (few and small tests, which take a
    second each, but through every kernel) and under AddressSanitizer, as pytest's -k has it."""
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "SANITIZED":
            chosen: tuple[str, str] = ast.literal_eval(node.value)
            return chosen
    return None


def test_every_file_of_kernels_is_sanitized():
    kernels = {path.stem for path in (ROOT / "csrc/cuda").glob("*.cu")}
    kernels.remove("runtime")  # it asks the driver; no kernel of an operator
    assert {f.stem.removeprefix("test_gpu_") for f in filter(sanitized, FILES)} == kernels


def run_tests(
    file: Path, chosen: str, sanitize: str | None, scheduler: str, order: str, **env: str
) -> None:
    """The tests of `file` that `chosen` names pass in a process of their own.

    There the kernels, and they alone, are instrumented as `sanitize` says.
    """
    library = cuda_host.library(sanitize)
    if sanitize is not None:
        runtime = {"address": "libasan.so", "thread": "libtsan.so"}[sanitize]
        found = subprocess.run(
            [*cuda_host.CXX, f"-print-file-name={runtime}"], capture_output=True, text=True
        ).stdout.strip()
        if not Path(found).is_absolute():
            pytest.skip(f"the compiler has no {runtime}")
        env["LD_PRELOAD"] = found
    suppressions = cuda_host.HERE / "tsan.txt"
    done = start(
        sanitize,
        [sys.executable, "-m", "pytest", "-x", "-s", "-p", "no:cacheprovider", str(file),
         "-k", chosen],
        scheduler,
        order,
        SANM_KERNELS_CUDA_EMULATION=str(library),
        ASAN_OPTIONS="detect_leaks=0",
        TSAN_OPTIONS=f"suppressions={suppressions}:report_signal_unsafe=0",
        OMP_NUM_THREADS="1",
        **env,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode == 0 and " passed" in done.stdout, said[-5000:]
    assert "ERROR: AddressSanitizer" not in said and "WARNING: ThreadSanitizer" not in said, said


@extended
@pytest.mark.parametrize("file", [*filter(sanitized, FILES)], ids=lambda file: file.stem)
@pytest.mark.parametrize("sanitize, scheduler", [("thread", "threads"), ("address", "fibers")])
def test_operators_are_clean_when_sanitized(sanitize, scheduler, file):
    """The fibers run in reverse, as they do not elsewhere."""
    threads, addresses = sanitized(file)
    chosen = threads if sanitize == "thread" else addresses
    run_tests(file, chosen, sanitize, scheduler, "reverse")


@pytest.mark.parametrize("sanitize", [None, *more("address")])
@pytest.mark.parametrize("pair", [(80, 90), *more((80, 80), (90, 90), (90, 120))], ids=str)
def test_code_for_one_architecture_runs_on_a_later_one(pair, sanitize):
    """Code for less than sm_90 takes its block for a cluster, on devices that have clusters too."""
    code, capability = pair
    run_tests(
        ROOT / "tests/ops/test_gpu_masked_forward.py",
        "cuda and (classifier and False-torch.float32 or spread and constant)",
        sanitize,
        "fibers",
        "forward",
        SANM_CUDA_HOST_CODE=str(code),
        SANM_CUDA_HOST_CAPABILITY=str(capability),
    )
