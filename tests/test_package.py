"""What is installed: versions, types, `info`, compiled libraries, the build without a compiler."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from inputs import COMPILING, GPU_DEVICES

import sanm_kernels
from sanm_kernels import backends
from sanm_kernels.__main__ import info, text
from sanm_kernels.backends import cpu

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = sorted(cpu.LIBRARIES.glob("*.so"))


def run(*command: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SANM_KERNELS")}
    return subprocess.run(
        command, cwd=cwd, env=clean | environment, capture_output=True, text=True, timeout=300
    )


def test_versions_agree() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{sanm_kernels.__version__}"' in pyproject
    assert f"## [{sanm_kernels.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_is_typed() -> None:
    for package in (ROOT / "sanm_kernels", ROOT / "python/sanm_train"):
        assert (package / "py.typed").is_file()


def test_info_names_every_operator_and_backend() -> None:
    facts = info()
    assert set(facts["backends"]) == {"reference", "cpu", "triton", "cuda"}
    assert facts["backends"]["reference"] is None
    assert set(facts["operators"]) == set(backends.operators)
    for served in facts["operators"].values():
        assert served["cpu"] in ("cpu", "reference")
    printed = text(facts)
    for word in [torch.__version__, *facts["operators"], *facts["backends"]]:
        assert word in printed
    for reason in filter(None, facts["backends"].values()):
        assert reason in printed
    assert json.loads(json.dumps(facts)) == facts


@pytest.mark.parametrize("arguments", [["info"], ["info", "--json"]])
def test_info_command(arguments: list[str]) -> None:
    done = run(sys.executable, "-m", "sanm_kernels", *arguments)
    assert done.returncode == 0, done.stderr
    assert torch.__version__ in done.stdout
    if "--json" in arguments:
        assert json.loads(done.stdout)["versions"]["torch"] == torch.__version__


def test_info_says_what_is_forced() -> None:
    command = (sys.executable, "-m", "sanm_kernels", "info", "--json")
    assert (
        json.loads(run(*command, SANM_KERNELS_BACKEND="reference").stdout)["forced"] == "reference"
    )
    wrong = run(*command, SANM_KERNELS_BACKEND="gpu")
    assert wrong.returncode != 0
    assert "SANM_KERNELS_BACKEND: expected one of 'reference'" in wrong.stderr


@pytest.fixture(scope="module")
def without_libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package as it is built where there is no compiler."""
    folder = tmp_path_factory.mktemp("pure")
    for name in ("sanm_kernels", "csrc", "python"):
        ignore = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def test_build_without_compiler(without_libraries: Path) -> None:
    build = (sys.executable, "setup.py", "build", "--build-lib", "out")
    done = run(*build, cwd=without_libraries, CXX="/nonexistent/g++")
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if "without compiled kernels" in line]
    assert len(said) == 1 and "no C++ compiler (/nonexistent/g++)" in said[0]
    package = without_libraries / "out/sanm_kernels"
    assert not list(package.rglob("*.so"))

    command = (sys.executable, "-m", "sanm_kernels", "info", "--json")
    done = run(*command, cwd=package.parent, PYTHONPATH="")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert Path(facts["package"]) == package.resolve()
    assert "no C++ compiler (/nonexistent/g++) was found" in facts["backends"]["cpu"]
    assert {served["cpu"] for served in facts["operators"].values()} == {"reference"}

    code = (
        "import torch, sanm_kernels as sk\n"
        "print(sk.sample_loss(torch.zeros(2, 4), torch.tensor([0, 3])).exp().tolist())\n"
        "sk.sample_loss(torch.zeros(2, 4), torch.tensor([0, 3]), backend='cpu')"
    )
    done = run(sys.executable, "-c", code, cwd=package.parent, PYTHONPATH="")
    assert done.stdout.strip() == "[4.0, 4.0]"
    assert "RuntimeError: backend 'cpu' cannot run sample_loss" in done.stderr


def test_source_distribution_holds_the_kernels(without_libraries: Path) -> None:
    shutil.copy(ROOT / "MANIFEST.in", without_libraries)
    done = run(
        sys.executable, "setup.py", "--quiet", "sdist", "--formats", "tar", cwd=without_libraries
    )
    assert done.returncode == 0, done.stderr
    (archive,) = (without_libraries / "dist").glob("*.tar")
    names = run("tar", "tf", str(archive)).stdout
    for source in (without_libraries / "csrc").rglob("*.*"):
        assert f"/{source.relative_to(without_libraries)}\n" in names
    assert "/sanm_kernels/functional.py\n" in names and "/sanm_train/cli.py\n" in names


def test_compiled_libraries_are_there_unless_said_otherwise() -> None:
    """Tests over the cpu backend are skipped without it, so its absence must not go unseen."""
    if (cpu.LIBRARIES / "not_compiled.txt").is_file():
        pytest.skip((cpu.LIBRARIES / "not_compiled.txt").read_text())
    assert sanm_kernels.available_backends()["cpu"] is None
    for operator in backends.operators:
        assert backends.serves("cpu", operator, "cpu") is None, operator


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_each_instruction_set(capability: str) -> None:
    """torch's ATEN_CPU_CAPABILITY chooses the library, as it chooses torch's own kernels."""
    if not LIBRARIES:
        pytest.skip("no compiled library")
    flag = {"default": "", "avx2": "avx2", "avx512": "avx512bw"}[capability]
    if flag not in Path("/proc/cpuinfo").read_text():
        pytest.skip(f"this processor has no {capability}")
    code = (
        "import torch, sanm_kernels as sk\n"
        "from sanm_kernels.backends import cpu\n"
        "x, y = torch.randn(37, 11), torch.arange(37) % 11\n"
        "a, b = (sk.sample_loss(x, y, backend=n) for n in ('cpu', 'reference'))\n"
        "print(cpu.loaded, (a - b).abs().max().item() < 1e-5)"
    )
    done = run(sys.executable, "-c", code, ATEN_CPU_CAPABILITY=capability)
    name = {"default": "baseline"}.get(capability, capability)
    assert done.stdout.split() == [name, "True"], done.stderr


@pytest.mark.skipif(not LIBRARIES, reason="no compiled library")
def test_overloads_looked_up_before_the_library_is_loaded() -> None:
    code = (
        "import torch, sanm_kernels as sk\n"
        "from sanm_kernels.ops.base import Overloads\n"
        "ops, arguments = Overloads('cpu'), (torch.randn(3, 4), torch.arange(3))\n"
        "try: ops.sample_loss(*arguments)\n"
        "except NotImplementedError: print('not loaded')\n"
        "expected = sk.sample_loss(*arguments)\n"
        "print(torch.equal(ops.sample_loss(*arguments)[0], expected), 'sample_loss' in vars(ops))"
    )
    done = run(sys.executable, "-c", code)
    assert done.stdout.splitlines() == ["not loaded", "True True"], done.stderr


@pytest.mark.skipif(not shutil.which("nm"), reason="no nm")
@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.stem)
def test_libraries_need_the_stable_interface_only(library: Path) -> None:
    """One build serves every torch: no symbol of torch but its C shims, none of Python."""
    output = run("nm", "--dynamic", "--undefined-only", str(library)).stdout
    # Symbols with a version (name@GLIBC_2.29) belong to the C and C++ runtimes.
    needed = [line.split()[-1] for line in output.splitlines() if "@" not in line]
    foreign = [n for n in needed if not re.match(r"aoti_torch_|torch_|_ITM_|__gmon_start__$", n)]
    assert any(name.startswith("aoti_torch_") for name in needed)
    assert not foreign


def test_no_cuda_kernel_spills_registers() -> None:
    """ptxas's word on every kernel and architecture of the last build, which needs no GPU."""
    logs = [path.read_text() for path in (ROOT / "build/libraries/cuda").glob("*.log")]
    if not logs or not (cpu.LIBRARIES / "cuda.so").is_file():
        pytest.skip("no CUDA library was built here")
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", "\n".join(logs))
    assert len(spills) > 100
    assert set(spills) == {("0", "0")}


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_forced_gpu_backend_says_why_it_cannot_run(backend: str) -> None:
    code = (
        "import torch, sanm_kernels as sk\n"
        f"try: sk.refine_targets(torch.zeros(1, 2), backend='{backend}')\n"
        "except RuntimeError as error: print(error)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], env=COMPILING, capture_output=True, text=True, check=True
    )
    assert f"backend '{backend}' cannot run refine_targets: it runs on cuda tensors" in run.stdout
    reason = subprocess.run(
        [sys.executable, "-m", "sanm_kernels", "info"],
        env=COMPILING,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    if not torch.cuda.is_available():
        assert f"{backend:<12}not available: " in reason


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_backends_that_cannot_report_a_value_are_checked_for(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On devices other than the CPU only if asked; here the asking is what is on trial."""
    if GPU_DEVICES[backend] is None:
        pytest.skip(f"{backend} runs nowhere here")
    device = GPU_DEVICES[backend]
    monkeypatch.setenv("SANM_KERNELS_CHECK", "1")
    z, quality = torch.zeros(2, 3, device=device), torch.tensor([0.5, 2.0], device=device)
    labels = torch.tensor([0, 3], device=device)
    with pytest.raises(ValueError, match=r"clean_prob: expected values in \[0, 1\], got 2\.0"):
        sanm_kernels.refine_targets(z, labels=labels % 3, clean_prob=quality, backend=backend)
    with pytest.raises(ValueError, match=r"labels: expected indices in \[0, 3\), got 3"):
        sanm_kernels.refine_targets(z, labels=labels, clean_prob=quality / 4, backend=backend)
