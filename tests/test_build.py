"""The build: what is compiled and why not, odd folders, what packages hold, what is said after."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import cuda_host
import pytest
from cuda_host import libraries

ROOT = Path(__file__).resolve().parent.parent
CALL = "import torch, sanm_kernels as sk\nsk.sample_loss(torch.zeros(2, 4), torch.tensor([0, 3]))\n"


def run(*command: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SANM_", "PYTHONPATH"))}
    words = [str(word) for word in command]
    return subprocess.run(
        words, cwd=cwd, env=kept | environment, capture_output=True, text=True, timeout=300
    )


# ---- What is to be compiled.


@pytest.fixture
def torch_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for a torch of one's own making, which libraries.py then finds."""
    cached = (libraries.why_not_compiled, libraries.find_nvcc, libraries.why_no_cuda)
    for name in ("SANM_CUDA", "SANM_CUDA_ARCHS", "SANM_CPU_ISAS", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(libraries, "find_torch", lambda: tmp_path)
    for function in cached:
        function.cache_clear()
    yield tmp_path
    for function in cached:
        function.cache_clear()


def version_file(folder: Path, version: str, cuda: str | None, hip: str | None = None) -> None:
    lines = [f"__version__ = '{version}'", f"cuda: Optional[str] = {cuda!r}"]
    (folder / "version.py").write_text("\n".join([*lines, f"hip: Optional[str] = {hip!r}", ""]))


@pytest.mark.parametrize(
    "version, cuda, hip, asked, expected",
    [
        ("2.13.0+cpu", None, None, "", "torch 2.13.0+cpu, which it was built against, had no CUDA"),
        (
            "2.13.0+rocm7",
            None,
            "7.0",
            "",
            "torch 2.13.0+rocm7, which it was built against, was for ROCm",
        ),
        ("2.13.0+cu130", "13.0", None, "", None),
        ("2.13.0+cu130", "13.0", None, "0", "SANM_CUDA=0"),
        ("2.13.0+cpu", None, None, "1", None),
        ("2.9.1", "12.8", None, "", "torch 2.9.1 is older than 2.10"),
    ],
)
def test_cuda_is_built_where_torch_has_it_or_on_request(
    torch_of: Path, monkeypatch: pytest.MonkeyPatch,
    version: str, cuda: str | None, hip: str | None, asked: str, expected: str | None,
) -> None:  # fmt: skip
    version_file(torch_of, version, cuda, hip)
    monkeypatch.setenv("SANM_CUDA", asked)
    monkeypatch.setattr(libraries, "find_nvcc", lambda: Path("/somewhere/bin/nvcc"))
    reason = libraries.why_no_cuda()
    assert reason is None if expected is None else expected in reason


def test_cuda_that_is_asked_for_and_cannot_be_built_ends_the_build(
    torch_of: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version_file(torch_of, "2.13.0", "13.0")
    monkeypatch.setattr(libraries, "find_nvcc", lambda: None)
    assert "nvcc was not found" in libraries.why_no_cuda()
    libraries.why_no_cuda.cache_clear()
    monkeypatch.setenv("SANM_CUDA", "1")
    with pytest.raises(SystemExit, match="SANM_CUDA=1: the CUDA library can't be built: nvcc"):
        libraries.why_no_cuda()
    monkeypatch.setenv("SANM_CUDA", "yes")
    with pytest.raises(SystemExit, match="SANM_CUDA: expected 0 or 1, got 'yes'"):
        libraries.why_no_cuda()


@pytest.mark.parametrize(
    "asked, gpus, expected",
    [
        (None, None, ["80", "86", "89", "90", "100"]),  # those that nvcc knows
        (None, "9.0\n8.6\n9.0\n", ["86", "90"]),
        (None, "7.5\n", ["80", "86", "89", "90", "100"]),  # too old for any
        ("all", "9.0\n", ["80", "86", "89", "90", "100"]),
        ("80 90", "8.6\n", ["80", "90"]),
    ],
)
def test_cuda_architectures(
    torch_of: Path, monkeypatch: pytest.MonkeyPatch,
    asked: str | None, gpus: str | None, expected: list[str],
) -> None:  # fmt: skip
    def program(name: str, says: str) -> Path:
        path = torch_of / name
        path.write_text(f"#!/bin/sh\nprintf '{says}'\n")
        path.chmod(0o755)
        return path

    nvcc = program("nvcc", "sm_75\\nsm_80\\nsm_86\\nsm_89\\nsm_90\\nsm_100\\n")
    monkeypatch.setattr(libraries, "find_nvcc", lambda: nvcc)
    if gpus is not None:
        program("nvidia-smi", gpus.replace("\n", "\\n"))
    monkeypatch.setenv("PATH", f"{torch_of}:/usr/bin:/bin")
    if gpus is None and shutil.which("nvidia-smi"):
        pytest.skip("this machine has an nvidia-smi of its own")
    if asked is not None:
        monkeypatch.setenv("SANM_CUDA_ARCHS", asked)
    assert libraries.cuda_archs() == expected


def test_cpu_instruction_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SANM_CPU_ISAS", raising=False)
    every = list(libraries.ISAS)
    (native,) = libraries.cpu_isas(native=True)
    assert native in every and libraries.cpu_isas(native=False) == every
    for flag in libraries.ISAS[native].split():
        assert re.search(rf"\b{flag[2:]}\b", Path("/proc/cpuinfo").read_text())
    for asked, expected in {"all": every, "native": [native], "baseline": ["baseline"]}.items():
        monkeypatch.setenv("SANM_CPU_ISAS", asked)
        assert libraries.cpu_isas(native=True) == libraries.cpu_isas(native=False) == expected
    monkeypatch.setenv("SANM_CPU_ISAS", "avx3")
    with pytest.raises(SystemExit, match="SANM_CPU_ISAS: expected all, native or some of"):
        libraries.cpu_isas(native=True)


# ---- ninja.


@pytest.mark.skipif(cuda_host.why_not() is not None, reason=str(cuda_host.why_not()))
def test_builds_in_a_folder_with_any_name(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "my $dir: 'x' & \"y\""
    (folder / "sources").mkdir(parents=True)
    header, source = folder / "sources/said.h", folder / "sources/a $b.cpp"
    header.write_text('#define SAID "one"\n')
    source.write_text("#include <said.h>\n#include <cstdio>\nint main() { puts(SAID); }\n")
    target = libraries.Target(
        folder / "out $put", "objects", [source],
        [*libraries.CXX, "-I", folder / "sources"], libraries.CXX,
    )  # fmt: skip
    for text, count in (("one", "[2/2, "), ("one", "no work to do"), ("two", "[2/2, ")):
        header.write_text(f'#define SAID "{text}"\n') if text == "two" else None
        libraries.build(folder / "build", "build", [target])
        assert count in capfd.readouterr().out
        done = run(target.output, cwd=tmp_path)
        assert done.stdout == f"{text}\n"


# ---- What a package holds.


@pytest.fixture(scope="module")
def pure(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout that has never been built."""
    folder = tmp_path_factory.mktemp("pure")
    for name in ("sanm_kernels", "csrc", "python"):
        ignore = shutil.ignore_patterns("*.so", "__pycache__", "*compiled.txt", "*.egg-info")
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def test_build_without_compiler(pure: Path) -> None:
    build = (sys.executable, "setup.py", "build", "--build-lib", "out")
    done = run(*build, cwd=pure, CXX="/nonexistent/g++")
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if "without compiled kernels" in line]
    assert len(said) == 1 and "no C++ compiler (/nonexistent/g++)" in said[0]
    package = pure / "out/sanm_kernels"
    assert not list(package.rglob("*.so"))

    command = (sys.executable, "-m", "sanm_kernels", "info", "--json")
    done = run(*command, cwd=package.parent, PYTHONPATH="")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert Path(facts["package"]) == package.resolve()
    assert "no C++ compiler (/nonexistent/g++) was found" in facts["backends"]["cpu"]
    assert {served["cpu"] for served in facts["operators"].values()} == {"reference"}

    code = f"{CALL}sk.sample_loss(torch.zeros(2, 4), torch.tensor([0, 3]), backend='cpu')"
    done = run(sys.executable, "-W", "ignore", "-c", code, cwd=package.parent, PYTHONPATH="")
    assert "RuntimeError: backend 'cpu' cannot run sample_loss" in done.stderr


def test_a_module_that_was_deleted_is_not_shipped(pure: Path) -> None:
    extra = pure / "sanm_kernels/extra.py"
    for there in (True, False):
        extra.write_text("") if there else extra.unlink()
        done = run(sys.executable, "setup.py", "-q", "build", cwd=pure, CXX="/nonexistent/g++")
        assert done.returncode == 0, done.stderr
        (built,) = (pure / "build").glob("lib*/sanm_kernels")
        assert (built / "masking.py").is_file() and (built / "extra.py").is_file() == there


def test_a_library_that_is_no_longer_built_goes(pure: Path) -> None:
    old = pure / "out/sanm_kernels/lib/cpu_avx2.so"
    old.parent.mkdir(parents=True, exist_ok=True)
    old.write_bytes(b"")
    build = (sys.executable, "setup.py", "-q", "build", "--build-lib", "out")
    assert run(*build, cwd=pure, CXX="/nonexistent/g++").returncode == 0
    assert [path.name for path in old.parent.iterdir()] == ["not_compiled.txt"]


def test_source_distribution_holds_the_kernels(pure: Path) -> None:
    done = run(sys.executable, "setup.py", "--quiet", "sdist", "--formats", "tar", cwd=pure)
    assert done.returncode == 0, done.stderr
    (archive,) = (pure / "dist").glob("*.tar")
    names = run("tar", "tf", archive, cwd=pure).stdout
    for source in (pure / "csrc").rglob("*.*"):
        if "__pycache__" not in source.parts:
            assert f"/{source.relative_to(pure)}\n" in names
    assert "/sanm_kernels/masking.py\n" in names and "/sanm_train/cli.py\n" in names


@pytest.mark.parametrize("address", ["https://example.org/sanm", ""])
def test_links_of_the_description_lead_somewhere(pure: Path, address: str) -> None:
    """On an index's page there is no file beside the README."""
    command = (sys.executable, "setup.py", "-q", "egg_info", "--egg-base", "out")
    (pure / "out").mkdir(exist_ok=True)
    done = run(*command, cwd=pure, SANM_REPOSITORY=address)
    assert done.returncode == 0, done.stderr
    text = (pure / "out/sanm_kernels.egg-info/PKG-INFO").read_text()
    links = re.findall(r"\]\(([^)]*)\)", text)
    assert links and all(link.startswith("https://") for link in links)
    assert ("![Images" in text) == bool(address)
    assert (f"{address}/raw/HEAD/docs/demo.png" in text) == bool(address)
    assert (f"Project-URL: Changelog, {address}/" in text) == bool(address)


# ---- What is said where the kernels are not compiled.


def test_the_reference_speaks_up_once(pure: Path) -> None:
    done = run(sys.executable, "-c", CALL + CALL, cwd=pure)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("RuntimeWarning: sanm_kernels has no compiled kernels for cpu") == 1
    assert "it was never built" in done.stderr
    assert f"pip install -v -e {pure}" in done.stderr


@pytest.mark.parametrize("how", ["environment", "block", "argument", "another system"])
def test_the_reference_is_silent_where_it_is_meant(pure: Path, how: str) -> None:
    call = {
        "block": f"with sk.use_backend('reference'):\n  {CALL.splitlines()[1]}",
        "argument": CALL.splitlines()[1].replace("]))", "]), backend='reference')"),
        "another system": f"import sys; sys.platform = 'darwin'\n{CALL}",
    }.get(how, CALL)
    forced = {"SANM_KERNELS_BACKEND": "reference"} if how == "environment" else {}
    done = run(sys.executable, "-c", f"{CALL.splitlines()[0]}\n{call}", cwd=pure, **forced)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_compiled_copy_that_is_hidden_is_named(pure: Path, tmp_path: Path) -> None:
    installed = tmp_path / "sanm_kernels"
    (installed / "lib").mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    (installed / "lib/cpu_baseline.so").write_bytes(b"")
    command = (sys.executable, "-m", "sanm_kernels", "info")
    said = run(*command, cwd=pure, PYTHONPATH=str(tmp_path)).stdout
    assert f"hides the copy in {installed}" in said
    assert f"{installed} is a compiled copy, which {pure / 'sanm_kernels'} hides" in said
    facts = json.loads(run(*command, "--json", cwd=pure, PYTHONPATH=str(tmp_path)).stdout)
    assert str(installed) in facts["shadowed"] and "hides" in facts["remedy"]


def test_benchmarks_do_not_time_the_reference_as_ours(tmp_path: Path) -> None:
    command = (sys.executable, "-m", "benchmarks.run", "--quick", "--ops", "sample_loss")
    out = ("--out", tmp_path / "figures.json")
    done = run(*command, *out, cwd=ROOT, SANM_KERNELS_BACKEND="reference")
    assert done.returncode == 2 and not (tmp_path / "figures.json").exists()
    assert "sample_loss on cpu tensors is served by the reference" in done.stderr


def test_what_the_profiler_writes_does_not_reach_the_terminal() -> None:
    code = (
        "import torch; from benchmarks.common import peak; held = [torch.ones(1000)]; "
        "print(peak(lambda: [held.clear(), torch.ones(1000)]))"
    )
    done = run(sys.executable, "-c", code, cwd=ROOT)
    assert (done.stdout, done.stderr) == ("4000\n", "")


def test_benchmarks_run_in_every_setting(tmp_path: Path) -> None:
    code = """
import pathlib, sys, torch
from benchmarks import run
for isa in ("avx512", "avx2", "baseline"):
    pathlib.Path(sys.argv[1], f"cpu_{isa}.so").touch()
run.LIBRARIES = pathlib.Path(sys.argv[1])
torch.set_num_threads(3)
for name, environ in run.everywhere():
    steered = ("ATEN_CPU_CAPABILITY", "OMP_NUM_THREADS", *run.KEPT)
    print(name, *(environ.get(k, "-") for k in steered))
"""
    done = run(sys.executable, "-c", code, tmp_path, cwd=ROOT, MALLOC_TRIM_THRESHOLD_="1")
    expected = [
        f"{isa}-{threads}-{memory} {isa} {threads} {'20000000000 0' if memory == 'kept' else '- -'}"
        for isa in ("avx512", "avx2")
        for threads in (1, 3)
        for memory in ("glibc", "kept")
    ]
    assert done.stdout.splitlines() == expected, done.stderr
