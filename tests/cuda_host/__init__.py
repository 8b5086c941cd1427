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

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BUILD = ROOT / "build/cuda_host"
TORCH = Path(torch.__file__).resolve().parent
CXX = os.environ.get("CXX", "g++")
#: On the PATH, or beside the interpreter of an environment that is not activated.
NINJA = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
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
    if shutil.which(CXX.split()[0]) is None:
        return f"{CXX.split()[0]} was not found"
    return "ninja was not found" if NINJA is None else None


def chosen() -> list[str]:
    """The operators of SANM_CUDA_OPS."""
    return [name for name in os.environ.get("SANM_CUDA_OPS", "").split(",") if name]


def name_of(sanitize: str | None) -> str:
    return "-".join([sanitize or "plain", *chosen()])


def path(sanitize: str | None = None) -> Path:
    """Where :func:`library` puts the library."""
    return BUILD / f"cuda-{name_of(sanitize)}.so"


def compiler(sanitize: str | None) -> str:
    """The command that compiles a .cu file, without its input and output."""
    return (
        f"{CXX} {FLAGS} {SANITIZERS[sanitize]} -DTORCH_TARGET_VERSION=0x020a000000000000 "
        f"-include {HERE / 'cuda_host.h'} -I{ROOT / 'csrc'} -isystem {TORCH / 'include'} -x c++"
    )


def ninja_file(sanitize: str | None) -> str:
    sources = sorted((ROOT / "csrc/cuda").glob("*.cu"))
    if chosen():
        sources = [source for source in sources if source.stem in chosen()]
    lines = [
        f"builddir = {name_of(sanitize)}",
        "rule compile",
        f"  command = {compiler(sanitize)} -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {CXX} {FLAGS} {SANITIZERS[sanitize]} -shared $in -o $out "
        f"-L{TORCH / 'lib'} -Wl,--no-as-needed -ltorch_cpu",
    ]
    objects = [f"{name_of(sanitize)}/{source.stem}.o" for source in sources]
    for source, target in zip(sources, objects, strict=True):
        lines.append(f"build {target}: compile {source}")
    lines.append(f"build {path(sanitize)}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def ninja(name: str, text: str, target: Path, folder: Path = BUILD) -> Path:
    """`target`, built as the ninja file `text` says, which runs in `folder` as NAME.ninja."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = folder / f"{name}.ninja"
    recipe.write_text(text)
    try:
        subprocess.run([str(NINJA), "--quiet", "-C", folder, "-j2", "-f", recipe.name], check=True)
    except subprocess.CalledProcessError:
        target.unlink(missing_ok=True)  # that of an earlier build
        raise
    return target


def library(sanitize: str | None = None) -> Path:
    """The library of all kernels, built if a source has changed; "address" or "thread" sanitized.

    Raises:
        subprocess.CalledProcessError: it does not compile; the compiler has said why.
    """
    return ninja(name_of(sanitize), ninja_file(sanitize), path(sanitize))


def program(sanitize: str | None = None) -> Path:
    """kernels.cu as a program of its own, without torch: for the harness's own tests."""
    name = f"kernels-{sanitize or 'plain'}"
    target = BUILD / name
    lines = [
        f"builddir = {name}.build",
        "rule build",
        f"  command = {compiler(sanitize)} -MMD -MF $out.d $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        f"build {target}: build {HERE / 'kernels.cu'}",
    ]
    return ninja(name, "\n".join(lines) + "\n", target)
