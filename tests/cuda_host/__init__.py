"""The CUDA kernels compiled by g++ against a made-up CUDA, for machines without a GPU.

``python -m cuda_host`` in tests/, or :func:`library`, builds csrc/cuda/*.cu into a shared library
that registers its kernels for CPU tensors; SANM_KERNELS_CUDA_EMULATION names it to the backend.
What the environment may say when kernels run: schedule.h and cuda_host.h. SANM_CUDA_OPS="a,b"
leaves all files but a.cu and b.cu out of the library, which then has its own name and build folder.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.append(str(ROOT / "csrc"))

import libraries  # noqa: E402
from libraries import CXX, Target  # noqa: E402

BUILD = ROOT / "build/cuda_host"
FLAGS = (
    "-std=c++17 -O2 -g1 -fPIC -fvisibility=hidden -ffp-contract=off -fno-strict-aliasing "
    "-Wall -Wno-psabi -Wno-unknown-pragmas -pthread"
)
SANITIZERS = {
    None: "",
    "address": "-fsanitize=address -fno-omit-frame-pointer",
    "thread": "-fsanitize=thread",
}


def why_not() -> str | None:
    """None if the kernels can be emulated here, else the reason."""
    if shutil.which(CXX[0]) is None:
        return f"{CXX[0]} was not found"
    return "ninja was not found" if libraries.find_ninja() is None else None


def chosen() -> list[str]:
    """The operators of SANM_CUDA_OPS."""
    return [name for name in os.environ.get("SANM_CUDA_OPS", "").split(",") if name]


def name_of(sanitize: str | None) -> str:
    return "-".join([sanitize or "plain", *chosen()])


def path(sanitize: str | None = None) -> Path:
    """Where :func:`library` puts the library."""
    return BUILD / f"cuda-{name_of(sanitize)}.so"


def command(sanitize: str | None) -> list[str]:
    return [*CXX, *FLAGS.split(), *SANITIZERS[sanitize].split()]


def compiler(sanitize: str | None) -> list[str | Path]:
    """The command that compiles a .cu file, without its input and output."""
    made_up: list[str | Path] = ["-include", HERE / "cuda_host.h", "-x", "c++"]
    return [*command(sanitize), *libraries.torch_headers(), *made_up]


def library(sanitize: str | None = None) -> Path:
    """The library of all kernels, built if a source has changed; "address" or "thread" sanitized.

    What its kernels then call, at each access, is not inside: ThreadSanitizer, or :func:`tally`.

    Raises:
        subprocess.CalledProcessError: it does not compile; the compiler has said why.
    """
    sources = sorted((ROOT / "csrc/cuda").glob("*.cu"))
    if chosen():
        sources = [source for source in sources if source.stem in chosen()]
    target = Target(
        path(sanitize), name_of(sanitize), sources, compiler(sanitize),
        [*command(None), "-shared"], libraries.torch_libraries(),
    )  # fmt: skip
    return built(name_of(sanitize), target)


def tally() -> Path:
    """tally.cpp as a library, which counts the accesses of those that are "thread" sanitized."""
    torch = [*libraries.torch_libraries(), "-lc10"]
    headers = ["-I", HERE, *libraries.torch_headers()[1:]]  # torch's own C++, not its stable part
    compile_it = [*command(None), *headers]
    target = Target(
        BUILD / "tally.so", "tally.build", [HERE / "tally.cpp"], compile_it,
        [*command(None), "-shared"], torch,
    )  # fmt: skip
    return built("tally", target)


def program(sanitize: str | None = None) -> Path:
    """kernels.cu as a program of its own, without torch: for the harness's own tests."""
    name = f"kernels-{sanitize or 'plain'}"
    target = Target(
        BUILD / name, f"{name}.build", [HERE / "kernels.cu"], compiler(sanitize), command(sanitize)
    )  # fmt: skip
    return built(name, target)


def built(name: str, target: Target, folder: Path = BUILD) -> Path:
    """The output of `target`, which is built in `folder`."""
    try:
        libraries.build(folder, name, [target], quiet=True)
    except subprocess.CalledProcessError:
        target.output.unlink(missing_ok=True)  # that of an earlier build
        raise
    return target.output
