"""The copy limit: how fast this machine moves the bytes that an operator has to move.

Two loops are timed and the faster one counts: a helper, compiled here with g++, that reads as many
bytes as the operator must read and writes as many as it must write, with non-temporal stores (they
spare reading what is about to be overwritten) and torch's threads; and torch's `copy_` of half of
all these bytes, which reads and writes half each. Without g++ or AVX only the latter is left.
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
// Reads `in` and writes `out`, cut alike into blocks of 64 cache lines of the longer one.
extern "C" void stream(const char* in, size_t in_lines, char* out, size_t out_lines, int threads) {
  const size_t lines = in_lines > out_lines ? in_lines : out_lines, blocks = (lines + 63) / 64;
  #pragma omp parallel for num_threads(threads) schedule(static)
  for (size_t b = 0; b < blocks; ++b) {
    __m256 s = _mm256_setzero_ps(), t = s;
    for (size_t i = b * in_lines / blocks; i < (b + 1) * in_lines / blocks; ++i) {
      s = _mm256_or_ps(s, _mm256_load_ps((const float*)(in + 64 * i)));
      t = _mm256_or_ps(t, _mm256_load_ps((const float*)(in + 64 * i + 32)));
    }
    s = _mm256_or_ps(s, t);
    asm volatile("" : : "x"(s));  // the reads are not to be optimised away
    for (size_t i = b * out_lines / blocks; i < (b + 1) * out_lines / blocks; ++i) {
      _mm256_stream_ps((float*)(out + 64 * i), s);
      _mm256_stream_ps((float*)(out + 64 * i + 32), s);
    }
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
        subprocess.run(["g++", "-O2", "-mavx", "-fopenmp", "-shared", "-fPIC", source, "-o",
                        library], check=True)
        function = ctypes.CDLL(str(library)).stream
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    function.argtypes, function.restype = (pointer, size, pointer, size, ctypes.c_int), None
    return function


def limits(read: int, written: int, sets: int) -> dict[str, Callable[[int], object]]:
    """The copying loops by name; each takes the number of the buffer set, of `sets`, to work on."""
    def arena(size: int) -> torch.Tensor:  # every set its own bytes, from a cache line's start
        flat = torch.ones(sets * size + 64, dtype=torch.uint8)
        start = -flat.data_ptr() % 64
        return flat[start : start + sets * size].view(sets, size)

    lines_in, lines_out = -(-read // 64), -(-written // 64)
    source = arena(64 * max(lines_in, lines_out))
    target = arena(64 * max(lines_in, lines_out))
    half = (read + written) // 2
    loops: dict[str, Callable[[int], object]] = {
        "torch copy": lambda i: target[i, :half].copy_(source[i, :half])
    }
    stream = _stream()
    if stream is not None:
        threads = torch.get_num_threads()
        loops["non-temporal copy"] = lambda i: stream(
            source[i].data_ptr(), lines_in, target[i].data_ptr(), lines_out, threads)
    return loops
