"""Which backend serves which GPU, and why not another: with GPUs, drivers and a torch made up.

A process sees a torch that says it has GPUs, and a cuda.so of csrc/cuda/runtime.cu alone: compiled
by g++ over a CUDA runtime that is a header below, or by nvcc over NVIDIA's, on a driver made up.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_host import CXX, libraries, why_not
from inputs import COMPILING
from torch._subclasses import FakeTensorMode

import sanm_kernels
from sanm_kernels import backends

pytest.importorskip("triton", reason="triton is not installed")

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "csrc/cuda/runtime.cu"

#: NVIDIA's runtime as far as runtime.cu uses it, with code for 9.0 and 10.0.
RUNTIME = r"""
#include <cstdlib>
#include <sstream>
#include <vector>
#define __global__
#define __CUDA_ARCH_LIST__ 900, 1000
enum cudaError_t {
  cudaSuccess = 0, cudaErrorInsufficientDriver = 35, cudaErrorNoKernelImageForDevice = 209
};
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor, cudaDevAttrComputeCapabilityMinor };
struct cudaFuncAttributes {};
inline std::vector<int> gpus() {  // their compute capabilities, times ten
  std::istringstream text(std::getenv("STUB_GPUS"));
  std::vector<int> found;
  for (int capability; text >> capability;) found.push_back(capability);
  return found;
}
inline int current = 0;
inline cudaError_t cudaDriverGetVersion(int* v) {
  *v = std::atoi(std::getenv("STUB_DRIVER"));
  return cudaSuccess;
}
inline cudaError_t cudaRuntimeGetVersion(int* v) { return *v = 13000, cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* n) {
  int driver = 0;
  cudaDriverGetVersion(&driver);
  if (driver < 13000) return cudaErrorInsufficientDriver;
  return *n = static_cast<int>(gpus().size()), cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) { return current = device, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int device) {
  const int capability = gpus().at(device);
  *value = which == cudaDevAttrComputeCapabilityMajor ? capability / 10 : capability % 10;
  return cudaSuccess;
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, void (*)()) {
  return gpus().at(current) >= 90 ? cudaSuccess : cudaErrorNoKernelImageForDevice;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no kernel image is available"; }
"""

#: A driver that says how new it is, and serves nothing else.
DRIVER = r"""
#include <stdlib.h>
#include <string.h>
int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int* version) { return *version = atoi(getenv("STUB_DRIVER")), 0; }
static int refuse(void) { return 801; }
int cuGetProcAddress_v2(const char* name, void** f, int version, unsigned long flags, int* status) {
  *f = (void*)refuse;
  if (strcmp(name, "cuInit") == 0) *f = (void*)cuInit;
  if (strcmp(name, "cuDriverGetVersion") == 0) *f = (void*)cuDriverGetVersion;
  if (strcmp(name, "cuGetProcAddress") == 0) *f = (void*)cuGetProcAddress_v2;
  if (status != NULL) *status = 0;
  return 0;
}
"""

#: Prints, per GPU, what is chosen and what forcing a backend says; what is warned of; the facts.
CHOOSE = r"""
import contextlib, json, os, sys, warnings
from pathlib import Path
import torch

capabilities = [divmod(int(c), 10) for c in os.environ["STUB_GPUS"].split()]

def not_asked():
    raise AssertionError("the current device was asked for where an index was given")

def capability(device=None):
    return capabilities[device if isinstance(device, int) else device.index]

torch.version.cuda, torch.version.hip = json.loads(os.environ["STUB_TORCH"])
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: len(capabilities)
torch.cuda.get_device_capability = capability
torch.cuda.get_device_name = lambda device: f"GPU of {capability(device)}"
torch.cuda.device = lambda index: contextlib.nullcontext()
torch.cuda.current_device = not_asked

import sanm_kernels as sk
from sanm_kernels import backends
from sanm_kernels.__main__ import info, text
from sanm_kernels.backends import cuda

cuda.LIBRARIES = Path(sys.argv[1])
library = torch.library.Library("sanm_kernels", "IMPL")
for op in backends.operators:
    library.impl(f"{op}.cuda", lambda *_: None, "CUDA")

def chosen(device, backend):
    try:
        return backends.serving("masked_loss", device, backend)
    except RuntimeError as error:
        return str(error)

result = {}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for index in range(len(capabilities)):
        device = torch.device("cuda", index)
        names = (None, "cuda", "triton")
        result[f"cuda:{index}"] = {str(name): chosen(device, name) for name in names}
        chosen(device, None)
torch.cuda.current_device = lambda: 0
facts = info()
result |= {"warned": [str(w.message) for w in caught], "facts": facts, "text": text(facts)}
print(json.dumps(result))
"""

NVIDIA, ROCM = ("13.0", None), (None, "7.0")
TOO_OLD = (
    "the NVIDIA driver serves CUDA up to {}, and the library was built with CUDA 13.0: it needs"
)
IMAGE = "it holds code for compute capability 9.0, 10.0 (CUDA 13.0), GPU {} has {}"


@pytest.fixture(scope="module")
def over_a_header(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with cuda.so over RUNTIME."""
    if why_not() is not None:
        pytest.skip(str(why_not()))
    folder = tmp_path_factory.mktemp("header")
    (folder / "cuda_runtime.h").write_text(RUNTIME)
    command = [*CXX, "-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden", "-I", folder]
    subprocess.run([*command, "-x", "c++", SOURCE, "-o", folder / "cuda.so"], check=True)
    return folder


@pytest.fixture(scope="module")
def over_nvidias(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with cuda.so over NVIDIA's runtime."""
    if libraries.find_nvcc() is None or libraries.why_not_compiled() is not None:
        pytest.skip("nvcc was not found")
    folder = tmp_path_factory.mktemp("nvidia")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SANM_CUDA_ARCHS", "90")
        target = libraries.cuda_library(folder / "cuda.so")
    target = dataclasses.replace(target, sources=[SOURCE])
    libraries.build(folder, "build", [target], quiet=True)
    return folder


def choose(
    folder: Path, gpus: str, driver: int = 13000, made_up: Any = NVIDIA, **environment: str
) -> Any:
    stub = {"STUB_GPUS": gpus, "STUB_DRIVER": str(driver), "STUB_TORCH": json.dumps(made_up)}
    clean = {k: v for k, v in COMPILING.items() if not k.startswith("SANM_KERNELS")}
    done = subprocess.run(
        [sys.executable, "-c", CHOOSE, str(folder)],
        env=clean | stub | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_gpu_that_the_library_serves(over_a_header: Path) -> None:
    got = choose(over_a_header, "90")
    assert got["cuda:0"] == {"None": "cuda", "cuda": "cuda", "triton": "triton"}
    assert got["facts"]["backends"]["cuda"] is None and not got["warned"]
    assert got["facts"]["operators"]["masked_loss"] == {"cpu": "cpu", "cuda": "cuda"}
    library = {"runtime": "13.0", "driver": "13.0", "architectures": "9.0, 10.0"}
    assert got["facts"]["cuda"]["library"] == library
    assert "built with CUDA 13.0 for compute capability 9.0, 10.0; the driver" in got["text"]


@pytest.mark.parametrize(
    "driver, reason",
    [(0, "there is no NVIDIA driver"), (12040, TOO_OLD.format("12.4"))],
    ids=["none", "too old"],
)
def test_a_driver_that_does_not_serve_the_library(
    over_a_header: Path, driver: int, reason: str
) -> None:
    got = choose(over_a_header, "90", driver)
    assert got["cuda:0"]["None"] == "triton"
    assert f"backend 'cuda' cannot run masked_loss: {reason}" in got["cuda:0"]["cuda"]
    assert reason in got["facts"]["backends"]["cuda"] and reason in got["text"]


def test_a_gpu_that_the_library_has_no_code_for(over_a_header: Path) -> None:
    got = choose(over_a_header, "86")
    assert got["cuda:0"]["None"] == got["cuda:0"]["triton"] == "triton"
    assert IMAGE.format(0, "8.6") in got["cuda:0"]["cuda"]
    assert IMAGE.format(0, "8.6") in got["facts"]["backends"]["cuda"] and not got["warned"]


def test_each_gpu_has_the_backend_that_works_there(over_a_header: Path) -> None:
    got = choose(over_a_header, "75 90 86")
    assert [got[f"cuda:{i}"]["None"] for i in range(3)] == ["reference", "cuda", "triton"]
    assert IMAGE.format(2, "8.6") in got["cuda:2"]["cuda"] and got["cuda:1"]["cuda"] == "cuda"
    assert "it needs compute capability 8.0, GPU 0 has 7.5" in got["cuda:0"]["triton"]
    (warned,) = got["warned"]
    assert "no compiled kernels for cuda:0 tensors" in warned and IMAGE.format(0, "7.5") in warned
    assert "pip install" in warned
    facts = got["facts"]
    assert facts["backends"]["cuda"] is None and facts["backends"]["triton"] is None
    assert facts["gpus"]["cuda:1"] == {"cuda": None, "triton": None}
    assert IMAGE.format(0, "7.5") in facts["gpus"]["cuda:0"]["cuda"]
    served = facts["operators"]["masked_loss"]
    assert served | {"cpu": ""} == {
        "cpu": "", "cuda:0": "reference", "cuda:1": "cuda", "cuda:2": "triton"
    }  # fmt: skip
    assert f"not on cuda:2: {IMAGE.format(2, '8.6')}" in got["text"]
    assert "not on cuda:1" not in got["text"]


def test_a_compiled_graph_names_the_backend_of_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def preferred(op: str, device: torch.device) -> str:
        return ("reference", "cuda")[device.index]

    monkeypatch.setattr(backends, "preferred", preferred)
    backends._choose.cache_clear()
    graphs: list[str] = []

    def keep(graph: Any, inputs: Any) -> Any:
        graphs.append(graph.code)
        return graph.forward

    compiled = torch.compile(sanm_kernels.sample_loss, fullgraph=True, backend=keep)
    for index in range(2):
        with FakeTensorMode():
            logits = torch.empty(2, 3, device=f"cuda:{index}")
            labels = torch.empty(2, dtype=torch.int64, device=f"cuda:{index}")
        compiled(logits, labels)
    backends._choose.cache_clear()
    assert "sample_loss.reference(" in graphs[0] and "sample_loss.cuda(" in graphs[1]


def test_rocm_gets_the_reference_and_triton_by_force(over_a_header: Path) -> None:
    got = choose(over_a_header, "94", made_up=ROCM)
    assert got["cuda:0"]["None"] == "reference" and got["cuda:0"]["triton"] == "triton"
    assert "it runs on NVIDIA's GPUs, torch" in got["cuda:0"]["cuda"]
    assert "for ROCm" in got["facts"]["backends"]["cuda"]
    (warned,) = got["warned"]
    assert "triton: it has not been run on ROCm yet" in warned
    assert "SANM_KERNELS_BACKEND=triton" in warned and "pip install" not in warned
    assert got["facts"]["operators"]["masked_loss"]["cuda"] == "reference"
    assert "ROCm          7.0" in got["text"] and "No kernel has been run on ROCm" in got["text"]
    forced = choose(over_a_header, "94", made_up=ROCM, SANM_KERNELS_BACKEND="triton")
    assert forced["cuda:0"]["None"] == "triton" and not forced["warned"]


@pytest.mark.parametrize(
    "source, driver, reason",
    [
        ("", 0, "there is no NVIDIA driver"),  # it has no function at all
        (DRIVER, 11040, "the NVIDIA driver serves CUDA up to 11.4, and the library was built"),
    ],
    ids=["none", "too old"],
)
def test_nvidias_runtime_says_so_too(
    over_nvidias: Path, tmp_path: Path, source: str, driver: int, reason: str
) -> None:
    (tmp_path / "driver.c").write_text(source)
    stub = [*CXX, "-x", "c", tmp_path / "driver.c", "-shared", "-fPIC"]
    subprocess.run([*stub, "-o", tmp_path / "libcuda.so.1"], check=True)
    got = choose(over_nvidias, "90", driver, LD_LIBRARY_PATH=str(tmp_path))
    assert got["cuda:0"]["None"] == "triton"
    assert reason in got["cuda:0"]["cuda"]
    assert got["facts"]["cuda"]["library"]["architectures"] == "9.0"
