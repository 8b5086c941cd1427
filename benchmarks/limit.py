"""The copy limit: the time this machine needs to move the bytes that an operator has to move.

The faster of two loops on torch's threads: a helper, compiled here by g++, that reads as many
bytes as the operator must and writes as many, with non-temporal stores, which spare reading what is
overwritten; and torch's `copy_` of half of all these bytes, which reads half and writes half.
Without g++ or AVX only the latter is left. On a GPU it is a copy within the device's memory.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

_SOURCE = r"""
#include <immintrin.h>
#include <cstddef>
// Reads `in` and writes `out`, both cut into equally many blocks; the longer one's of 64 lines.
extern "C" void stream(const char* in, size_t in_lines, char* out, size_t out_lines, int threads) {
  const size_t lines = in_lines > out_lines ? in_lines : out_lines, blocks = (lines + 63) / 64;
  #pragma omp parallel for num_threads(threads) schedule(static)
  for (size_t b = 0; b < blocks; ++b) {
    __m256 s = _mm256_setzero_ps();
    for (size_t i = 2 * (b * in_lines / blocks); i < 2 * ((b + 1) * in_lines / blocks); ++i)
      s = _mm256_or_ps(s, _mm256_load_ps((const float*)in + 8 * i));
    asm volatile("" : : "x"(s));  // the reads are not to be optimised away
    for (size_t i = 2 * (b * out_lines / blocks); i < 2 * ((b + 1) * out_lines / blocks); ++i)
      _mm256_stream_ps((float*)out + 8 * i, s);
    _mm_sfence();
  }
}
"""


@functools.cache
def _stream() -> Callable[..., None] | None:
    """The compiled helper, or None where it cannot be had."""
    has_avx = torch.backends.cpu.get_cpu_capability().startswith("AVX")
    if not has_avx or shutil.which("g++") is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "stream.cpp"), Path(folder, "stream.so")
        source.write_text(_SOURCE)
        flags = ["-O2", "-mavx", "-fopenmp", "-shared", "-fPIC"]
        subprocess.run(["g++", *flags, source, "-o", library], check=True)
        function = ctypes.CDLL(str(library)).stream
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    function.argtypes, function.restype = (pointer, size, pointer, size, ctypes.c_int), None
    return function


def copies(
    read: int, written: int, sets: int, device: str = "cpu"
) -> dict[str, Callable[[int], object]]:
    """The loops by name; each takes the number of the buffers, of `sets`, that it works on."""
    lines = -(-read // 64), -(-written // 64)

    def buffers() -> torch.Tensor:  # (sets, bytes), each from the start of a cache line on
        size = 64 * max(lines)
        flat = torch.ones(sets * size + 64, dtype=torch.uint8, device=device)
        start = -flat.data_ptr() % 64
        return flat[start : start + sets * size].view(sets, size)

    source, target, half = buffers(), buffers(), (read + written) // 2
    loops = {"torch copy": lambda i: target[i, :half].copy_(source[i, :half])}
    if device == "cpu" and (stream := _stream()):
        threads = torch.get_num_threads()
        loops["non-temporal copy"] = lambda i: stream(
            source[i].data_ptr(), lines[0], target[i].data_ptr(), lines[1], threads
        )
    return loops
