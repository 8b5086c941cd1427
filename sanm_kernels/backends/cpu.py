"""Adapter of the compiled CPU library: one shared library per instruction set."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import torch

LIBRARIES = Path(__file__).resolve().parent.parent / "lib"
#: torch's name of the processor's capability → instruction sets that run on it, best first.
RUNS = {
    "AVX512": ("avx512", "avx2", "baseline"),
    "AVX2": ("avx2", "baseline"),
}

loaded: str | None = None  # the instruction set in use


def load() -> str | None:
    """Load the best library for this processor (honours torch's ATEN_CPU_CAPABILITY).

    Returns None, or why no library was loaded.
    """
    global loaded
    kept = os.environ.get("SANM_KERNELS_CPU_CACHE", "")
    if kept and not kept.isdecimal():
        raise ValueError(f"SANM_KERNELS_CPU_CACHE: expected a number of MiB, got {kept!r}")
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
            if kept:
                set_cache_limit(int(kept))
            return None
    return f"built for {', '.join(found)}, but this processor offers only {capability}"


def set_cache_limit(mebibytes: int) -> int:
    """What :func:`sanm_kernels.set_cpu_cache_limit` does; returns the bytes that are kept now."""
    limit = ctypes.CDLL(str(LIBRARIES / f"cpu_{loaded}.so")).sanm_cpu_cache_limit
    limit.argtypes, limit.restype = [ctypes.c_uint64], ctypes.c_uint64
    return int(limit(mebibytes << 20))
