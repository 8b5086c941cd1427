"""Builds the compiled libraries, for CPUs and for NVIDIA GPUs, beside the pure-Python package.

The libraries use the LibTorch Stable ABI and no Python C API: plain shared objects, loaded with
`torch.ops.load_library`, that serve every Python and every torch from the targeted release on.
Where torch or a compiler is missing, the pure-Python package is built, says so, and records why;
so is the package without the CUDA library where nvcc is missing. No GPU is needed or looked for.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import ClassVar

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.extension import Extension

ROOT = Path(__file__).resolve().parent
TARGET = "0x020a000000000000"  # torch 2.10
CXX = os.environ.get("CXX", "g++")

#: Instruction set → flags. The names are those of sanm_kernels/backends/cpu.py.
X86 = {
    "avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mf16c",
    "avx2": "-mavx2 -mfma -mf16c",
    "baseline": "",
}
ISAS = X86 if platform.machine() in ("x86_64", "AMD64") else {"baseline": ""}
# No contraction (results equal to the last bit need it), no errno or traps around libm calls.
FLAGS = (
    "-std=c++17 -O3 -fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno "
    "-fno-trapping-math -fopenmp-simd -Wno-psabi"
)

#: Architectures of the CUDA library: those of SANM_CUDA_ARCHS ("90", "80 90"), else all of these
#: that nvcc knows. The last is also stored as PTX, for GPUs that are newer.
CUDA_ARCHS = ("80", "86", "89", "90", "100", "120")
# -fmad=false is what -ffp-contract=off is for the host.
NVCC_FLAGS = (
    "-std=c++17 -O3 -fmad=false --threads 2 -Xfatbin -compress-all -Xptxas -v "
    "-Xcompiler -fPIC,-fvisibility=hidden,-ffp-contract=off,-Wno-psabi"
)


def find_torch() -> Path | None:
    """The torch to compile against; nothing of it is imported, only headers and a name are used.

    It is the one that this interpreter imports, or, where build isolation hides that, the one in
    the environment that the package is being installed into.
    """
    spec = importlib.util.find_spec("torch")
    installed = Path(sysconfig.get_path("purelib"), "torch")
    folder = Path(spec.origin).parent if spec and spec.origin else installed
    return folder if (folder / "version.py").is_file() else None


def find_ninja() -> str | None:
    """ninja on the PATH, or beside the interpreter of an environment that is not activated."""
    return shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))


@functools.cache
def why_not_compiled() -> str | None:
    """None if the CPU libraries can be built here, else the reason."""
    if sys.platform != "linux":
        return f"compiled kernels are built on Linux only, this is {sys.platform}"
    torch = find_torch()
    if torch is None:
        return "torch was not found in the build environment"
    version = re.search(r"__version__ = '((\d+)\.(\d+).*?)'", (torch / "version.py").read_text())
    if version is None or (int(version[2]), int(version[3])) < (2, 10):
        return f"torch {version[1] if version else '(unknown)'} is older than 2.10"
    if shutil.which(shlex.split(CXX)[0]) is None:
        return f"no C++ compiler ({CXX}) was found"
    if find_ninja() is None:
        return "ninja was not found"
    return None


@functools.cache
def find_nvcc() -> Path | None:
    """nvcc on the PATH, in CUDA_HOME or CUDA_PATH, where CUDA is usually put, or in pip's packages.

    pip's are nvidia-cuda-nvcc of CUDA 13 and nvidia-cuda-nvcc-cu12.
    """
    on_path = shutil.which("nvcc")
    roots = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    roots.append(Path("/usr/local/cuda"))
    for site in [*sys.path, sysconfig.get_path("purelib")]:
        roots += [Path(site, "nvidia/cu13"), Path(site, "nvidia/cuda_nvcc")]
    found = [Path(on_path)] if on_path else []
    found += [root / "bin/nvcc" for root in roots if os.access(root / "bin/nvcc", os.X_OK)]
    return found[0] if found else None


@functools.cache
def why_no_cuda() -> str | None:
    """None if the CUDA library can be built here, else the reason."""
    reason = why_not_compiled()
    if reason is None and find_nvcc() is None:
        reason = "nvcc was not found on the PATH, in CUDA_HOME or in pip's packages"
    elif reason is None:
        for header in ("cuda_runtime.h", "nv/target"):  # of two more packages of pip's
            folders = cuda_folders("include")
            if folders and not any((folder / header).is_file() for folder in folders):
                reason = f"pip's nvcc lacks {header} (nvidia-cuda-runtime, nvidia-cuda-cccl)"
    return reason


def cuda_folders(kind: str) -> list[Path]:
    """What pip's nvcc does not look into by itself: "include" or "lib" of pip's runtime."""
    root = find_nvcc().parent.parent
    folders = (root / kind, root.parent / "cuda_runtime" / kind)
    return [p for p in folders if root.parent.name == "nvidia" and p.is_dir()]


def gencode() -> str:
    """nvcc's options for the architectures."""
    known = subprocess.run(
        [find_nvcc(), "--list-gpu-code"], capture_output=True, text=True, check=True
    ).stdout.split()
    archs = os.environ.get("SANM_CUDA_ARCHS", "").split()
    archs = archs or [arch for arch in CUDA_ARCHS if f"sm_{arch}" in known]
    code = {arch: f"sm_{arch}" for arch in archs}
    code[archs[-1]] = f"[sm_{archs[-1]},compute_{archs[-1]}]"
    return " ".join(f"-gencode arch=compute_{arch},code={code[arch]}" for arch in archs)


class Build(build):
    """Runs build_ext always, also where it only has to say why there is nothing to compile."""

    sub_commands: ClassVar = [("build_py", None), ("build_ext", None)]


class BuildLibraries(build_ext):
    """Writes one ninja file for all libraries and runs it."""

    @property
    def destination(self) -> Path:
        return (ROOT if self.inplace else Path(self.build_lib).resolve()) / "sanm_kernels/lib"

    def run(self) -> None:
        reason = why_not_compiled()
        self.destination.mkdir(parents=True, exist_ok=True)
        note = self.destination / "not_compiled.txt"
        if reason is not None:
            print(
                f"sanm_kernels: building without compiled kernels: {reason}; "
                "the reference serves every operator"
            )
            for old in self.destination.glob("*.so"):
                old.unlink()
            note.write_text(reason + "\n")
            return
        note.unlink(missing_ok=True)
        cuda_note = self.destination / "cuda_not_compiled.txt"
        cuda_note.unlink(missing_ok=True)
        if why_no_cuda() is not None:
            print(f"sanm_kernels: building without CUDA kernels: {why_no_cuda()}")
            (self.destination / "cuda.so").unlink(missing_ok=True)
            cuda_note.write_text(why_no_cuda() + "\n")
        work = ROOT / "build/libraries"  # one folder for all builds, so that each reuses the last
        work.mkdir(parents=True, exist_ok=True)
        (work / "build.ninja").write_text(self.ninja_file())
        subprocess.run([str(find_ninja()), "-C", str(work)], check=True)

    def get_outputs(self) -> list[str]:
        """The libraries, or the note that says why there are none."""
        if why_not_compiled() is not None:
            return [str(self.destination / "not_compiled.txt")]
        cuda = "cuda.so" if why_no_cuda() is None else "cuda_not_compiled.txt"
        return [str(self.destination / name) for name in (*(f"cpu_{isa}.so" for isa in ISAS), cuda)]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def ninja_file(self) -> str:
        base = find_torch()
        sources = sorted((ROOT / "csrc/cpu").glob("*.cpp"))
        lines = [
            f"cxx = {CXX}",
            f"flags = {FLAGS} -DTORCH_TARGET_VERSION={TARGET} -I{ROOT / 'csrc'} "
            f"-isystem {base / 'include'} {os.environ.get('CXXFLAGS', '')}",
            "rule compile",
            "  command = $cxx $flags $isa -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compile $out",
            # By name only, no rpath: the process that loads the library has libtorch_cpu loaded.
            "rule link",
            f"  command = $cxx -shared {os.environ.get('LDFLAGS', '')} $in -o $out "
            f"-L{base / 'lib'} -Wl,--no-as-needed -ltorch_cpu -Wl,--as-needed",
            "  description = link $out",
        ]
        for isa, flags in ISAS.items():
            objects = []
            for source in sources:
                objects.append(f"{isa}/{source.stem}.o")
                lines += [f"build {objects[-1]}: compile {source}", f"  isa = {flags}"]
            lines.append(f"build {self.destination / f'cpu_{isa}.so'}: link {' '.join(objects)}")
        if why_no_cuda() is None:
            lines += self.cuda_lines(base)
        return "\n".join(lines) + "\n"

    def cuda_lines(self, torch: Path) -> list[str]:
        """The ninja file's part about cuda.so; benchmarks/ptxas.py reads the files $out.log."""
        includes = " ".join(f"-isystem {p}" for p in [torch / "include", *cuda_folders("include")])
        folders = " ".join(f"-L{path}" for path in [torch / "lib", *cuda_folders("lib")])
        lines = [
            f"nvcc = {find_nvcc()} -ccbin {shlex.split(CXX)[0]}",
            f"nvcc_flags = {NVCC_FLAGS} {gencode()} -DTORCH_TARGET_VERSION={TARGET} "
            f"-I{ROOT / 'csrc'} {includes}",
            "rule compile_cuda",
            "  command = $nvcc $nvcc_flags -MMD -MF $out.d -c $in -o $out > $out.log 2>&1 "
            "|| { cat $out.log; exit 1; }; grep -A 3 warning $out.log || true",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compile $out",
            # cudart is inside, none of its symbols visible; the CUDA parts of torch are not named.
            "rule link_cuda",
            f"  command = $nvcc -shared -cudart static $in -o $out {folders} "
            "-Xlinker --exclude-libs,ALL -Xlinker --no-as-needed -ltorch_cpu -Xlinker --as-needed",
            "  description = link $out",
        ]
        objects = []
        for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
            objects.append(f"cuda/{source.stem}.o")
            lines.append(f"build {objects[-1]}: compile_cuda {source}")
        return [*lines, f"build {self.destination / 'cuda.so'}: link_cuda {' '.join(objects)}"]


class LibraryWheel(bdist_wheel):
    """One wheel for every Python: the libraries do not use the Python C API."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


if __name__ == "__main__":  # tests/cpu_sanitized takes the flags from here
    setup(
        # What makes the package platform-dependent; BuildLibraries knows the real sources.
        ext_modules=[Extension("sanm_kernels.lib", [])] if why_not_compiled() is None else [],
        cmdclass={"build": Build, "build_ext": BuildLibraries, "bdist_wheel": LibraryWheel},
    )
