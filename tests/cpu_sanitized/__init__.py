"""The CPU kernels compiled with a sanitizer, for the tests of this folder.

``python -m cpu_sanitized [SANITIZER [ISA]]`` in tests/, or :func:`library`, builds csrc/cpu/*.cpp
with setup.py's flags, but -O0, into a folder of its own. SANM_TEST_CPU_LIBRARIES names that folder
to tests/conftest.py, which lets the backend `cpu` load from there.
"""

from __future__ import annotations

import runpy
import subprocess
from pathlib import Path

from cuda_host import CXX, ROOT, TORCH, ninja

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
            [*CXX.split(), f"-print-file-name={name}"], capture_output=True, text=True
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


def program(sanitize: str) -> Path:
    """mistakes.cpp as a program, without torch."""
    target = BUILD / f"mistakes-{sanitize}"
    lines = [
        "rule build",
        f"  command = {CXX} -std=c++17 -pthread {COMMON} {SANITIZERS[sanitize]} "
        f"-isystem {TORCH / 'include'} $in -o $out",
        f"build {target}: build {HERE / 'mistakes.cpp'} {THREADS}",
    ]
    return ninja(target.name, "\n".join(lines) + "\n", target, BUILD)


def ninja_file(sanitize: str, isa: str) -> str:
    setup = runpy.run_path(str(ROOT / "setup.py"))  # FLAGS, ISAS, TARGET
    sources = sorted((ROOT / "csrc/cpu").glob("*.cpp"))
    link = ""
    if sanitize == "thread":
        sources.append(THREADS)
        link = "-Wl,--wrap=torch_parallel_for -pthread"
    name = f"{sanitize}-{isa}"
    lines = [
        f"builddir = {name}.build",
        f"flags = {setup['FLAGS']} {COMMON} {SANITIZERS[sanitize]} {setup['ISAS'][isa]} "
        f"-DTORCH_TARGET_VERSION={setup['TARGET']} -I{ROOT / 'csrc'} -isystem {TORCH / 'include'}",
        "rule compile",
        f"  command = {CXX} $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {CXX} $flags -shared {link} $in -o $out "
        f"-L{TORCH / 'lib'} -Wl,--no-as-needed -ltorch_cpu",
    ]
    objects = [f"{name}.build/{source.stem}.o" for source in sources]
    for source, target in zip(sources, objects, strict=True):
        lines.append(f"build {target}: compile {source}")
    lines.append(f"build {path(sanitize, isa)}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def path(sanitize: str, isa: str) -> Path:
    """Where :func:`library` puts the library: alone in its folder, named as the backend has it."""
    return BUILD / f"{sanitize}-{isa}" / f"cpu_{isa}.so"


def library(sanitize: str, isa: str) -> Path:
    """The library for one instruction set, built if a source has changed.

    Args:
        sanitize: "address" (with undefined behaviour) or "thread".
        isa: one of setup.py's ISAS.

    Raises:
        subprocess.CalledProcessError: it does not compile; the compiler has said why.
    """
    return ninja(f"{sanitize}-{isa}", ninja_file(sanitize, isa), path(sanitize, isa), BUILD)
