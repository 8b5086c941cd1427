"""Launches of every Triton kernel on NVIDIA and AMD, up to where a GPU would be needed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from inputs import COMPILING
from torch._subclasses import FakeTensorMode

ROOT = Path(__file__).resolve().parent.parent
pytest.importorskip("triton", reason="triton is not installed")

#: Launches what the ahead-of-time compiler's calls launch, with a driver and a compiler of one's
#: own making; prints the kernels and the options that Triton's backend for the target understood.
LAUNCH = """
import json, sys, torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from benchmarks import triton_kernels
from sanm_kernels.backends.triton import launch

class Driver:
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def get_current_target(self): return GPUTarget(*TARGET)

class Compiled:
    function, packed_metadata = None, ()
    def launch_metadata(self, *_): return None
    def run(self, *_): pass

options = {}

def do_compile(self, key, signature, device, constants, given, *_):
    options[self.__name__] = {k: getattr(given, k, None) for k in ("maxnreg", "enable_fp_fusion")}
    return Compiled()

TARGET = json.loads(sys.argv[1])
driver.set_active(Driver())
JITFunction._do_compile = do_compile
with launch.recording() as recorded:
    for call in triton_kernels.calls().values():
        call(torch.float32)
for kernel, arguments, meta in recorded:
    launch.launch(kernel, (1,), *arguments, **meta)
print(json.dumps(options))
"""


@pytest.mark.parametrize(
    "target, registers", [(("cuda", 90, 32), 128), (("hip", "gfx942", 64), None)]
)
def test_every_kernel_is_launched_with_options_that_the_target_knows(target, registers):
    run = subprocess.run(
        [sys.executable, "-c", LAUNCH, json.dumps(target)],
        env=COMPILING,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    launched = json.loads(run.stdout)
    assert len(launched) > 20
    for name, options in launched.items():
        assert options == {"maxnreg": registers, "enable_fp_fusion": False}, name


@pytest.mark.parametrize("autocast", [False, True])
def test_an_operator_runs_on_its_tensors_gpu_and_out_of_autocast(monkeypatch, autocast):
    from sanm_kernels.backends.triton import launch
    from sanm_kernels.ops import internals

    registered, entered = {}, []

    class Library:
        def impl(self, name, function, key):
            registered[key] = function

    class Guard:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            entered.append(self.index)

        def __exit__(self, *_):
            entered.append("left")

    monkeypatch.setattr(launch, "library", Library())
    monkeypatch.setattr(launch, "launchers", {})
    monkeypatch.setattr(internals, "device_guard", Guard)
    launch.implements("op")(lambda *_: (torch.is_autocast_enabled("cuda"), list(entered)))
    with FakeTensorMode():
        there = torch.empty(2, device="cuda:1")
    torch.set_autocast_enabled("cuda", autocast)
    try:
        for arguments in ((there, None), ([there], torch.empty(2)), (None, 2.0, there)):
            assert registered["CUDA"](*arguments) == (False, [1])
            assert entered == [1, "left"] and torch.is_autocast_enabled("cuda") == autocast
            entered.clear()
    finally:
        torch.set_autocast_enabled("cuda", False)
