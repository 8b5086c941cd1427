"""The CPU kernels compiled with a sanitizer, for the tests of this folder.

``python -m cpu_sanitized [SANITIZER [ISA]]`` in tests/, or :func:`library`, builds csrc/cpu/*.cpp
with the package's flags, but -O0, into a folder of its own. SANM_TEST_CPU_LIBRARIES names that
folder to tests/conftest.py, which lets the backend `cpu` load from there.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from cuda_host import CXX, ROOT, built, libraries
from libraries import Target

HERE = Path(__file__).resolve().parent
BUILD = ROOT / "build/cpu_sanitized"
#: Out-of-range vector indices end the process under either.
COMMON = "-O0 -g1 -fno-omit-frame-pointer -D_GLIBCXX_ASSERTIONS -Wno-unknown-pragmas"
SANITIZERS = {
    # What a cast from float to int cannot hold is undefined too, and not among "undefined".
    "address": "-fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all",
    "thread": "-fsanitize=thread",
}
#: torch runs parallel loops in OpenMP's threads, which ThreadSanitizer does not see; these it does.
THREADS = HERE / "parallel_for.cpp"


def environment(sanitize: str) -> dict[str, str]:
    """Variables of a process in which Python loads instrumented kernels."""
    # libstdc++: AddressSanitizer looks for what throws exceptions when the process starts
    runtimes = {"address": ("libasan.so", "libstdc++.so.6"), "thread": ("libtsan.so",)}[sanitize]
    found = [
        subprocess.run(
            [*CXX, f"-print-file-name={name}"], capture_output=True, text=True
        ).stdout.strip()
        for name in runtimes
    ]
    suppressions = ROOT / "tests/cuda_host/tsan.txt"
    return {
        "LD_PRELOAD": " ".join(found),
        # new memory holds NaN: what reads it before it is written gives another result
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=1:"
        "max_malloc_fill_size=1000000000:malloc_fill_byte=255",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": f"suppressions={suppressions}:report_signal_unsafe=0",
    }


def instrumented(sanitize: str) -> list[str]:
    """Flags of the compiler."""
    return [*COMMON.split(), *SANITIZERS[sanitize].split()]


def program(sanitize: str) -> Path:
    """mistakes.cpp as a program, without torch."""
    name = f"mistakes-{sanitize}"
    command = [*CXX, "-std=c++17", "-pthread", *instrumented(sanitize)]
    compile = [*command, *libraries.torch_headers()]
    sources = [HERE / "mistakes.cpp", THREADS]
    return built(name, Target(BUILD / name, f"{name}.build", sources, compile, command), BUILD)


def path(sanitize: str, isa: str) -> Path:
    """Where :func:`library` puts the library: alone in its folder, named as the backend has it."""
    return BUILD / f"{sanitize}-{isa}" / f"cpu_{isa}.so"


def library(sanitize: str, isa: str) -> Path:
    """The library for one instruction set, built if a source has changed.

    Args:
        sanitize: "address" (with undefined behaviour) or "thread".
        isa: one of libraries.ISAS.

    Raises:
        subprocess.CalledProcessError: it does not compile; the compiler has said why.
    """
    flags, more = instrumented(sanitize), []
    if sanitize == "thread":
        flags, more = [*flags, "-Wl,--wrap=torch_parallel_for", "-pthread"], [THREADS]
    name = f"{sanitize}-{isa}"
    target = libraries.cpu_library(path(sanitize, isa), isa, f"{name}.build", flags, more)
    return built(name, target, BUILD)
