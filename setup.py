"""Builds the compiled libraries, for CPUs and for NVIDIA GPUs, beside the pure-Python package.

The libraries use the LibTorch Stable ABI and no Python C API: plain shared objects, loaded with
`torch.ops.load_library`, that serve every Python and every torch from the targeted release on.
Where torch or a compiler is missing, the pure-Python package is built, says so, and records why;
so is the package without the CUDA library where torch has no CUDA or nvcc is missing. No GPU is
needed. What is compiled and how is in csrc/libraries.py; docs/backends.md has the variables.
"""

from __future__ import annotations

import atexit
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, ClassVar

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.command.editable_wheel import editable_wheel
from setuptools.extension import Extension

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))

import libraries  # noqa: E402
from libraries import why_no_cuda, why_not_compiled  # noqa: E402

#: Where objects go: one folder for all builds, so that each reuses the last. Read-only sources are
#: built elsewhere, their metadata too.
BUILD = ROOT / "build"
OPTIONS: dict[str, dict[str, str]] = {}
if "$" in sys.prefix:  # setuptools takes it for a variable; nothing is installed there by this
    OPTIONS["install"] = {"prefix": "/usr"}
if not os.access(ROOT, os.W_OK):
    BUILD = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, BUILD, ignore_errors=True)
    OPTIONS |= {"build": {"build_base": str(BUILD)}, "egg_info": {"egg_base": str(BUILD)}}


class Build(build):
    """Runs build_ext always, also where it only has to say why there is nothing to compile."""

    sub_commands: ClassVar = [("build_py", None), ("build_ext", None)]

    def finalize_options(self) -> None:
        self.is_default = self.build_lib is None
        super().finalize_options()

    def run(self) -> None:
        if self.is_default:  # a module that was deleted since the last build is not to be shipped
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class BuildLibraries(build_ext):
    """Builds the libraries into the package, or writes down why there are none."""

    @property
    def destination(self) -> Path:
        return (ROOT if self.inplace else Path(self.build_lib).resolve()) / "sanm_kernels/lib"

    def run(self) -> None:
        self.destination.mkdir(parents=True, exist_ok=True)
        kept = {Path(output).name for output in self.get_outputs()}
        for old in self.destination.iterdir():  # a library that is no longer built is out of date
            if old.name not in kept:
                old.unlink()
        if why_not_compiled() is not None:
            self.note("not_compiled.txt", "compiled kernels", why_not_compiled())
            return
        targets = [
            libraries.cpu_library(self.destination / f"cpu_{isa}.so", isa, isa)
            for isa in self.isas()
        ]
        if why_no_cuda() is None:
            targets.append(libraries.cuda_library(self.destination / "cuda.so"))
        else:
            self.note("cuda_not_compiled.txt", "CUDA kernels", why_no_cuda())
        libraries.build(BUILD / "libraries", "build", targets)

    def isas(self) -> list[str]:
        return libraries.cpu_isas(native=bool(self.inplace))

    def note(self, name: str, what: str, reason: str | None) -> None:
        print(f"sanm_kernels: building without {what}: {reason}", flush=True)
        (self.destination / name).write_text(f"{reason}\n")

    def get_outputs(self) -> list[str]:
        """The libraries, or the notes that say why there are none."""
        names = ["not_compiled.txt"]
        if why_not_compiled() is None:
            cuda = "cuda.so" if why_no_cuda() is None else "cuda_not_compiled.txt"
            names = [*(f"cpu_{isa}.so" for isa in self.isas()), cuda]
        return [str(self.destination / name) for name in names]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class SourcePaths:
    """How an editable install finds the packages: a .pth file, which type checkers read too."""

    def __call__(self, wheel: Any, files: list[str], mapping: dict[str, str]) -> None:
        wheel.writestr("__editable__.sanm_kernels.pth", f"{ROOT}\n{ROOT / 'python'}\n")

    def __enter__(self) -> SourcePaths:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class EditableWheel(editable_wheel):
    def _select_strategy(self, *_: object) -> SourcePaths:  # else an import hook is installed
        return SourcePaths()


class LibraryWheel(bdist_wheel):
    """One wheel for every Python: the libraries do not use the Python C API."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def repository() -> str | None:
    """The project's address: SANM_REPOSITORY, or where the checkout was cloned from on the web."""
    if os.environ.get("SANM_REPOSITORY"):
        return os.environ["SANM_REPOSITORY"]
    command = ["git", "-C", str(ROOT), "config", "--get", "remote.origin.url"]
    try:
        found = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git
        return None
    return found.removesuffix(".git") if found.startswith("https://") else None


def readme(address: str | None) -> str:
    """README.md for an index's page, where a relative link leads nowhere."""

    def absolute(link: re.Match[str]) -> str:
        image, text, path = link.groups()
        if address is None:
            return "" if image else text
        return f"{image}[{text}]({address}/{'raw' if image else 'blob'}/HEAD/{path})"

    return re.sub(r"(!?)\[([^]]*)\]\((?!https?:)([^)]*)\)", absolute, README.read_text("utf-8"))


README = ROOT / "README.md"
ADDRESS = repository()
URLS = {"Repository": "", "Documentation": "/blob/HEAD/docs/index.md", "Issues": "/issues",
        "Changelog": "/blob/HEAD/CHANGELOG.md"}  # fmt: skip
setup(
    long_description=readme(ADDRESS),
    long_description_content_type="text/markdown",
    project_urls={name: ADDRESS + path for name, path in URLS.items()} if ADDRESS else {},
    # What makes the package platform-dependent; BuildLibraries knows the real sources.
    ext_modules=[Extension("sanm_kernels.lib", [])] if why_not_compiled() is None else [],
    cmdclass={
        "build": Build,
        "build_ext": BuildLibraries,
        "bdist_wheel": LibraryWheel,
        "editable_wheel": EditableWheel,
    },
    options=OPTIONS,
)
