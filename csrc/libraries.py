"""How the libraries are built: sources, tools, flags, and the ninja files.

setup.py builds the package's libraries with it; tests/ build the same sources with sanitizers, and
the CUDA kernels for the host. It imports the standard library only.
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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

CSRC = Path(__file__).resolve().parent
CXX = shlex.split(os.environ.get("CXX", "g++"))
TARGET_VERSION = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # torch 2.10

#: Instruction set → flags, best first. The names are those of sanm_kernels/backends/cpu.py, the
#: flags' -m… those of /proc/cpuinfo.
X86 = {
    "avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mf16c",
    "avx2": "-mavx2 -mfma -mf16c",
    "baseline": "",
}
ISAS = X86 if platform.machine() in ("x86_64", "AMD64") else {"baseline": ""}
# No contraction (backends agree bit for bit), no errno or floating-point traps.
FLAGS = (
    "-std=c++17 -O3 -fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno "
    "-fno-trapping-math -fopenmp-simd -Wno-psabi"
)

#: Architectures of a CUDA library that runs anywhere. The last one compiled is also stored as PTX,
#: for newer GPUs.
CUDA_ARCHS = ("80", "86", "89", "90", "100", "120")
# -fmad=false is what -ffp-contract=off is for the host.
NVCC_FLAGS = (
    "-std=c++17 -O3 -fmad=false --threads 2 -Xfatbin -compress-all "
    "-Xcompiler -fPIC,-fvisibility=hidden,-ffp-contract=off,-Wno-psabi"
)

Words = Sequence["str | Path"]  # of a command; paths are made relative to its working directory


# ---- Tools, and reasons why something can't be built.


@functools.cache
def find_torch() -> Path | None:
    """The folder of the torch to compile against, which is not imported.

    It is the one that this interpreter imports, or, where build isolation hides that, the one in
    the environment that the package is being installed into.
    """
    spec = importlib.util.find_spec("torch")
    installed = Path(sysconfig.get_path("purelib"), "torch")
    folder = Path(spec.origin).parent if spec and spec.origin else installed
    return folder.resolve() if (folder / "version.py").is_file() else None


def torch_version(name: str = "__version__") -> str | None:
    """The value of `name` in torch/version.py: "__version__", "cuda" or "hip"."""
    folder = find_torch()
    text = (folder / "version.py").read_text() if folder else ""
    found = re.search(rf"^{name}\b[^=\n]*= *'(.*?)'", text, re.MULTILINE)
    return found[1] if found else None


def find_ninja() -> str | None:
    """ninja on the PATH, or next to the interpreter (an environment that is not activated)."""
    return shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))


@functools.cache
def why_not_compiled() -> str | None:
    """None if the CPU libraries can be built here, else the reason."""
    if sys.platform != "linux":
        return f"compiled kernels are built on Linux only, this is {sys.platform}"
    if find_torch() is None:
        return (
            "torch was not found in the build environment; install it first, and build with "
            "--no-build-isolation if it is still not found"
        )
    version = torch_version() or "(unknown)"
    number = re.match(r"(\d+)\.(\d+)", version)
    if number is None or (int(number[1]), int(number[2])) < (2, 10):
        return f"torch {version} is older than 2.10"
    if shutil.which(CXX[0]) is None:
        return f"no C++ compiler ({CXX[0]}) was found; install one, or name it in CXX"
    if find_ninja() is None:
        return "ninja was not found; pip install ninja"
    return None


@functools.cache
def find_nvcc() -> Path | None:
    """nvcc on the PATH, in CUDA_HOME or CUDA_PATH, in /usr/local/cuda, or in pip's packages.

    pip's packages are nvidia-cuda-nvcc (CUDA 13) and nvidia-cuda-nvcc-cu12.
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
    """None if the CUDA library is to be built here, else the reason.

    By default it is built where torch has CUDA; SANM_CUDA=1 always builds it, SANM_CUDA=0 never.

    Raises:
        SystemExit: SANM_CUDA=1 where it can't be built, or SANM_CUDA is neither 0 nor 1.
    """
    asked = os.environ.get("SANM_CUDA", "")
    if asked not in ("", "0", "1"):
        raise SystemExit(f"SANM_CUDA: expected 0 or 1, got {asked!r}")
    if asked == "0":
        return "SANM_CUDA=0 left it out of the build"
    reason = why_not_compiled()
    if reason is None and asked == "" and torch_version("cuda") is None:
        made = "was for ROCm" if torch_version("hip") else "had no CUDA"
        return (
            f"torch {torch_version()}, which it was built against, {made}; SANM_CUDA=1 in the "
            "environment of the build compiles it all the same"
        )
    if reason is None and find_nvcc() is None:
        reason = (
            "nvcc was not found on the PATH, in CUDA_HOME or in pip's packages; install the CUDA "
            "toolkit and build again"
        )
    elif reason is None:
        for header in ("cuda_runtime.h", "nv/target"):  # each in a pip package of its own
            folders = cuda_folders("include")
            if folders and not any((folder / header).is_file() for folder in folders):
                reason = f"pip's nvcc lacks {header} (nvidia-cuda-runtime, nvidia-cuda-cccl)"
    if asked == "1" and reason is not None:
        raise SystemExit(f"SANM_CUDA=1: the CUDA library can't be built: {reason}")
    return reason


def cuda_folders(kind: str) -> list[Path]:
    """Folders of pip's CUDA packages that its nvcc does not search: "include" or "lib"."""
    nvcc = find_nvcc()
    assert nvcc is not None
    root = nvcc.parent.parent
    folders = (root / kind, root.parent / "cuda_runtime" / kind)
    return [p for p in folders if root.parent.name == "nvidia" and p.is_dir()]


# ---- What to build for.


def cpu_isas(native: bool) -> list[str]:
    """The instruction sets of SANM_CPU_ISAS ("avx2 baseline", "native" or "all").

    If it is not set: this machine's if `native`, else all.
    """
    asked = os.environ.get("SANM_CPU_ISAS", "").split() or ["native" if native else "all"]
    if asked == ["all"]:
        return list(ISAS)
    if asked == ["native"]:
        info = Path("/proc/cpuinfo")
        here = set(re.findall(r"\w+", info.read_text())) if info.is_file() else set()
        return [next(i for i, f in ISAS.items() if {w[2:] for w in f.split()} <= here)]
    if not set(asked) <= set(ISAS):
        raise SystemExit(
            f"SANM_CPU_ISAS: expected all, native or some of {' '.join(ISAS)}, got {asked}"
        )
    return [isa for isa in ISAS if isa in asked]


def cuda_archs() -> list[str]:
    """The architectures of SANM_CUDA_ARCHS ("90", "80 90" or "all"); else those of the GPUs here.

    Without a GPU, and for "all": those of CUDA_ARCHS that nvcc supports.
    """
    asked = os.environ.get("SANM_CUDA_ARCHS", "").split()
    if asked not in ([], ["all"]):
        return asked
    codes = subprocess.run(
        [str(find_nvcc()), "--list-gpu-code"], capture_output=True, text=True, check=True
    ).stdout
    known = [arch for arch in CUDA_ARCHS if f"sm_{arch}" in codes.split()]
    here: list[str] = []
    if asked == [] and shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        said = subprocess.run(query, capture_output=True, text=True).stdout
        found = {line.strip().replace(".", "") for line in said.splitlines()}
        here = [a for a in sorted(found, key=lambda a: a.zfill(3)) if f"sm_{a}" in codes.split()]
        here = [arch for arch in here if int(arch) >= int(CUDA_ARCHS[0])]
    return here or known


# ---- The targets of a build.


@dataclass(frozen=True)
class Target:
    """A library or program.

    Attributes:
        output: its path.
        objects: the folder of its object files, relative to that of the ninja file.
        sources: the source files, one object file each.
        compile: the compile command, without -c SOURCE -o OBJECT.
        link: the link command, up to -o OUTPUT OBJECTS …
        libraries: … and what follows the objects.
    """

    output: Path
    objects: str
    sources: Iterable[Path]
    compile: Words
    link: Words
    libraries: Words = ()


def torch_headers() -> list[str | Path]:
    return [TARGET_VERSION, "-I", CSRC, "-isystem", torch_folder() / "include"]


def torch_libraries() -> list[str | Path]:
    """Without an rpath: the process that loads the library has already loaded libtorch_cpu."""
    return ["-L", torch_folder() / "lib", "-Wl,--no-as-needed", "-ltorch_cpu", "-Wl,--as-needed"]


def torch_folder() -> Path:
    folder = find_torch()
    if folder is None:
        raise RuntimeError("torch was not found")
    return folder


def cpu_library(
    output: Path, isa: str, objects: str, flags: Sequence[str] = (), more: Sequence[Path] = ()
) -> Target:
    """csrc/cpu for one instruction set; `flags` follow FLAGS, `more` are additional sources."""
    flags = [*FLAGS.split(), *flags, *ISAS[isa].split()]
    return Target(
        output, objects, [*sorted((CSRC / "cpu").glob("*.cpp")), *more],
        [*CXX, *flags, *torch_headers(), *shlex.split(os.environ.get("CXXFLAGS", ""))],
        [*CXX, *flags, "-shared", *shlex.split(os.environ.get("LDFLAGS", ""))],
        torch_libraries(),
    )  # fmt: skip


def cuda_library(output: Path) -> Target:
    """csrc/cuda for the architectures of :func:`cuda_archs`.

    cudart is linked statically, its symbols hidden; torch's CUDA libraries are not linked.
    """
    archs = cuda_archs()
    code = {arch: f"sm_{arch}" for arch in archs}
    code[archs[-1]] = f"[sm_{archs[-1]},compute_{archs[-1]}]"
    gencode = [w for a in archs for w in ("-gencode", f"arch=compute_{a},code={code[a]}")]
    nvcc: Words = [str(find_nvcc()), "-ccbin", CXX[0]]
    headers = [w for folder in cuda_folders("include") for w in ("-isystem", folder)]
    folders = [w for f in [torch_folder() / "lib", *cuda_folders("lib")] for w in ("-L", f)]
    linker = ["--exclude-libs,ALL", "--no-as-needed", "-ltorch_cpu", "--as-needed"]
    libraries = [w for word in linker for w in (["-Xlinker"] * word.startswith("--") + [word])]
    return Target(
        output, "cuda", sorted((CSRC / "cuda").glob("*.cu")),
        [*nvcc, *NVCC_FLAGS.split(), *gencode, *torch_headers(), *headers],
        [*nvcc, "-shared", "-cudart", "static"], [*folders, *libraries],
    )  # fmt: skip


# ---- ninja.


def build(folder: Path, name: str, targets: Iterable[Target], quiet: bool = False) -> None:
    """Build what has changed of `targets`, by the ninja file NAME.ninja in `folder`.

    ninja prints progress; MAX_JOBS limits how many commands run at once. A file lock lets one
    process at a time build in a folder.

    Raises:
        subprocess.CalledProcessError: a command failed; the compiler has printed its message.
    """
    import fcntl  # not on Windows, where nothing is compiled

    folder.mkdir(parents=True, exist_ok=True)
    command = [str(find_ninja()), "-C", str(folder), "-f", f"{name}.ninja"]
    command += ["--quiet"] * quiet
    command += ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    status = {"NINJA_STATUS": "[%f/%t, %e s] "}
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released on close
        (folder / f"{name}.ninja").write_text(ninja_file(folder.resolve(), name, targets))
        subprocess.run(command, check=True, env=status | os.environ)


def ninja_file(folder: Path, name: str, targets: Iterable[Target]) -> str:
    """The text of a ninja file that runs in `folder`.

    Its paths are relative: nvcc rejects some characters that the name of a folder may contain.
    """

    def relative(path: Path) -> str:
        return os.path.relpath(path.resolve(), folder)

    def command(words: Words) -> str:
        plain = [relative(word) if isinstance(word, Path) else word for word in words]
        return " ".join(shlex.quote(word) for word in plain).replace("$", "$$")

    def escaped(path: str) -> str:
        return re.sub(r"([$ :])", r"$\1", path)

    lines = [f"builddir = .{name}"]  # a log per file: ninja drops the entries of other files
    for number, target in enumerate(targets):
        lines += [
            f"rule compile{number}",
            f"  command = {command(target.compile)} -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compile $out",
            f"rule link{number}",
            f"  command = {command(target.link)} -o $out $in {command(target.libraries)}",
            f"  description = link {escaped(target.output.name)}",
        ]
        objects = []
        for source in target.sources:
            objects.append(escaped(f"{target.objects}/{source.stem}.o"))
            lines.append(f"build {objects[-1]}: compile{number} {escaped(relative(source))}")
        output = escaped(relative(target.output))
        lines.append(f"build {output}: link{number} {' '.join(objects)}")
    return "\n".join(lines) + "\n"
