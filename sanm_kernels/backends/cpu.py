"""Adapter of the compiled CPU library: one shared library per instruction set."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch

LIBRARIES = Path(__file__).resolve().parent.parent / "lib"
#: torch's name of the processor's capability → instruction sets that run on it, best first.
RUNS = {
    "AVX512": ("avx512", "avx2", "baseline"),
    "AVX2": ("avx2", "baseline"),
}

#: What may be the limit of the memory that is kept, in MiB, and how messages call it.
LIMITS, IN_LIMITS = range(2**40), "an integer in [0, 2⁴⁰), in MiB"

loaded: str | None = None  # the instruction set in use


def load() -> str | None:
    """Load the best library for this processor (honours torch's ATEN_CPU_CAPABILITY).

    Returns None, or why no library was loaded.
    """
    global loaded
    limit = os.environ.get("SANM_KERNELS_CPU_CACHE", "")
    if limit and not (re.fullmatch("[0-9]{1,13}", limit) and int(limit) in LIMITS):
        raise ValueError(f"SANM_KERNELS_CPU_CACHE: expected {IN_LIMITS}, got {limit!r}")
    found = sorted(p.stem.removeprefix("cpu_") for p in LIBRARIES.glob("cpu_*.so"))
    if not found:
        note = LIBRARIES / "not_compiled.txt"  # written by the build
        reason = note.read_text().strip() if note.is_file() else "it was never built"
        return f"the compiled library is not in {LIBRARIES}: {reason}"
    capability = torch.backends.cpu.get_cpu_capability()
    for isa in RUNS.get(capability, ("baseline",)):
        if isa in found:
            try:
                torch.ops.load_library(LIBRARIES / f"cpu_{isa}.so")
            except (OSError, RuntimeError) as error:
                cause = error.__cause__ or error
                return f"cpu_{isa}.so does not load with torch {torch.__version__}: {cause}"
            loaded = isa
            if limit:
                set_cache_limit(int(limit))
            return None
    return f"built for {', '.join(found)}, but this processor offers only {capability}"


def set_cache_limit(mebibytes: int) -> int:
    """What :func:`sanm_kernels.set_cpu_cache_limit` does, of the library that is loaded."""
    return _function("sanm_cpu_cache_limit", ctypes.c_uint64)(mebibytes << 20) >> 20


def kept_bytes() -> int:
    """How much memory is kept now."""
    return _function("sanm_cpu_cache_kept")()


def _function(name: str, *arguments: Any) -> Callable[..., int]:
    """A function of the loaded library that returns a number of bytes."""
    function = getattr(ctypes.CDLL(str(LIBRARIES / f"cpu_{loaded}.so")), name)
    function.argtypes, function.restype = arguments, ctypes.c_uint64
    return cast(Callable[..., int], function)
