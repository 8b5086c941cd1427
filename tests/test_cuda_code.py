"""What nvcc makes of csrc/cuda, for one architecture: no GPU and no CUDA of torch is needed.

`python -m benchmarks.kernels build/cuda-90/cuda.so` prints all that is counted here.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_host import libraries
from inputs import extended
from test_docs import made_table

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [
    extended,
    pytest.mark.skipif(libraries.find_nvcc() is None, reason="nvcc was not found"),
]
#: Outside loops a division or two tell a thread where it begins.
MOST = {"LDL": 0, "STL": 0, "LD": 0, "ST": 0, "in loops": 0, "outside loops": 2}
CLUSTER = "shared memory of other blocks of the cluster"
EITHER = "the same code serves a buffer in shared memory and, where that is too small, in global"
#: Kernel → what it has more of than MOST, at most in a variant, and why.
EXCEPTIONS = {
    "masked_forward_kernel": ({"LD": 8}, CLUSTER),
    "refine_targets_kernel": ({"LD": 112, "ST": 88}, EITHER),
    "masked_loss_kernel": ({"LD": 32}, CLUSTER),
}
#: Kernels of images, maps or rows of logits that have no 128-bit loads or stores …
NARROW = {
    ("features_backward_kernel", "LDG"): "one gradient per map, of which it writes every cell",
    ("pool_kernel", "STG"): "a mean per channel of a sample",
    ("squares_kernel", "STG"): "a sum per block",
    ("fit_kernel", "STG"): "a posterior per thread, and sums per block",
    ("masked_loss_kernel", "STG"): "numbers per row, and sums over rows",
    ("logits_backward_kernel", "LDG"): "rows of any strides, class by class",
    ("logits_backward_kernel", "STG"): "rows of any strides, class by class",
}
#: … and those of single numbers: per sample, class or block.
SINGLE = {
    *("average_kernel", "finish_kernel", "invert_kernel", "probe_kernel", "range_kernel"),
    *("bias_backward_kernel", "cross_entropy_kernel", "mean_kernel", "mean_fill_backward_kernel"),
    "masked_loss_finish_kernel",
}


def build() -> Path:
    """cuda.so for sm_90, compiled if a source has changed."""
    folder = ROOT / "build/cuda-90"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SANM_CUDA_ARCHS", "90")
        libraries.build(folder, "build", [libraries.cuda_library(folder / "cuda.so")])
    return folder / "cuda.so"


@pytest.mark.parametrize("arch", ["80", "100", "120"])  # 90: below
@pytest.mark.parametrize("name", ["fit_label_quality", "masked_forward"])
def test_no_local_memory(name: str, arch: str, monkeypatch, tmp_path) -> None:
    """Of the kernels that come closest to it, for every architecture."""
    monkeypatch.setenv("SANM_CUDA_ARCHS", arch)
    target = libraries.cuda_library(tmp_path / "cuda.so")
    (source,) = (source for source in target.sources if source.stem == name)
    command = [*target.compile, "-Xptxas", "-v", "-c", source, "-o", tmp_path / "object.o"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    none = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"
    used = re.findall(r"Function properties for (\w+)\s+(.* bytes stack frame, .*)", done.stderr)
    assert len(used) >= 8, done.stderr
    assert {function: use for function, use in used if use.strip() != none} == {}


def test_the_library_needs_no_other_cuda() -> None:
    dynamic = ["readelf", "--dynamic", "--wide", str(build())]
    needed = subprocess.run(dynamic, capture_output=True, text=True, check=True).stdout
    assert "libtorch_cpu.so" in needed and "cudart" not in needed and "torch_cuda" not in needed


def test_machine_code() -> None:
    """No local memory, no generic access, no division in loops, 128 bits at a time, or a reason."""
    command = [sys.executable, "-m", "benchmarks.kernels", "--json", str(build())]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if "not found" in done.stderr:
        pytest.skip(done.stderr.splitlines()[-1])
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    faults = []
    for kernel in sorted({row["kernel"] for row in rows}):
        variants = [row for row in rows if row["kernel"] == kernel]
        for row in variants:
            row["outside loops"] = row["divisions"] - row["in loops"]
        allowed, why = EXCEPTIONS.get(kernel, ({}, "none"))
        for what, most in (MOST | allowed).items():
            found = max(row[what] for row in variants)
            if found > most:
                faults.append(f"{kernel}: {what} {found}, at most {most} expected")
            if what in allowed and found <= MOST[what]:
                faults.append(f"{kernel}: the exception for {what} is no longer needed: {why}")
        # by what is stored, apart from the vector's length and the places' type
        types: dict[str, list[dict[str, int]]] = {}
        for row in variants:
            kind = re.sub(r"[\d, ]+(true|false)?|unsigned (int|long)", " ", row["variant"])
            types.setdefault(kind.strip(), []).append(row)
        for what in ("LDG", "STG"):
            wide = all(max(row[f"{what} bits"] for row in of) >= 128 for of in types.values())
            excused = kernel in SINGLE or (kernel, what) in NARROW
            if not wide and not excused:
                faults.append(f"{kernel}: a type has no 128-bit {what}")
            if wide and (kernel, what) in NARROW:
                faults.append(f"{kernel}: the exception for narrow {what} is no longer needed")
    kernels = {row["kernel"] for row in rows}
    gone = {*EXCEPTIONS, *SINGLE, *(kernel for kernel, _ in NARROW)} - kernels
    faults += [f"{kernel}: no such kernel" for kernel in sorted(gone)]
    assert len(rows) > 50 and not faults, "\n".join(faults)
    for kernel, variants, *shown in made_table("benchmarks.kernels"):
        own = [row for row in rows if row["kernel"] == kernel]
        assert len(own) == int(variants), kernel
        if "release 13.0" in nvcc_version():
            found = sorted({row["registers"] for row in own})
            assert shown[0] == "–".join(str(n) for n in found[:1] + found[1:][-1:]), kernel


def nvcc_version() -> str:
    return subprocess.run(
        [str(libraries.find_nvcc()), "--version"], capture_output=True, text=True, check=True
    ).stdout
