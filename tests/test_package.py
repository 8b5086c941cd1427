"""What is installed: versions, types, `info`, the libraries. How it is built: test_build.py."""

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
from cuda_host import libraries
from inputs import COMPILING, GPU_DEVICES

import sanm_kernels
from sanm_kernels import backends
from sanm_kernels.__main__ import info, text
from sanm_kernels.backends import cpu

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = sorted(cpu.LIBRARIES.glob("*.so"))
PROCESSOR = set(re.findall(r"\w+", Path("/proc/cpuinfo").read_text()))


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


def test_compiled_libraries_are_there_unless_said_otherwise() -> None:
    """Tests over the cpu backend are skipped without it, so its absence must not go unseen."""
    if (cpu.LIBRARIES / "not_compiled.txt").is_file():
        pytest.skip((cpu.LIBRARIES / "not_compiled.txt").read_text())
    assert sanm_kernels.available_backends()["cpu"] is None
    for operator in backends.operators:
        assert backends.serves("cpu", operator, "cpu") is None, operator


@pytest.mark.extended
@pytest.mark.skipif(libraries.why_not_compiled() is not None, reason="nothing can be compiled")
@pytest.mark.parametrize("isa", libraries.ISAS)
def test_each_instruction_set(isa: str) -> None:
    """torch's ATEN_CPU_CAPABILITY chooses the library, as it chooses torch's own kernels."""
    if not {flag[2:] for flag in libraries.ISAS[isa].split()} <= PROCESSOR:
        pytest.skip(f"this processor has no {isa}")
    target = libraries.cpu_library(ROOT / f"build/isas/cpu_{isa}.so", isa, isa)
    libraries.build(ROOT / "build/isas", isa, [target], quiet=True)
    done = run(
        sys.executable, "-m", "pytest", "-s", "-p", "no:cacheprovider",
        "tests/test_differential.py", "-k", "random_calls and cpu-0",
        SANM_TEST_CPU_LIBRARIES=str(target.output.parent),
        ATEN_CPU_CAPABILITY={"baseline": "default"}.get(isa, isa),
    )  # fmt: skip
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr


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


@pytest.mark.parametrize("broken", ["", "raise RuntimeError('no driver')"])
def test_a_triton_that_cannot_be_imported_is_a_reason(tmp_path: Path, broken: str) -> None:
    """An old one has no `knobs`."""
    (tmp_path / "triton/language").mkdir(parents=True)
    (tmp_path / "triton/__init__.py").write_text(broken)
    (tmp_path / "triton/language/__init__.py").write_text("")
    command = (sys.executable, "-m", "sanm_kernels", "info", "--json")
    done = run(*command, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert done.returncode == 0, done.stderr
    reason = json.loads(done.stdout)["backends"]["triton"]
    assert reason.startswith("triton cannot be imported: ")
    assert ("no driver" if broken else "knobs") in reason


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
