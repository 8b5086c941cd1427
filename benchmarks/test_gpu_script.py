"""The logic of `make gpu`, with stand-ins for its steps: time limits, kept results, file names."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path

import operations
import pytest

from benchmarks import gpu
from benchmarks.common import HEADLINE
from benchmarks.run import schedule, slug, write


def python(name: str, code: str, weight: float = 1.0, **more: object) -> gpu.Step:
    return gpu.Step(name, [sys.executable, "-S", "-c", code], weight, **more)


def alive(process: int) -> bool:
    """Whether it runs; a zombie does not."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc")
@pytest.mark.parametrize("session", [False, True])
def test_a_step_over_its_limit_is_killed_with_its_children(tmp_path, session):
    pids = tmp_path / "pids"
    code = (
        "import os, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(60)'],"
        f" start_new_session={session})\n"
        f"open({str(pids)!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}')\n"
        "print('begun', flush=True)\n"
        "time.sleep(60)"
    )
    start = time.monotonic()
    record = gpu.execute(python("endless", code), 1.5, tmp_path / "log")
    assert time.monotonic() - start < 5
    assert record["status"] == "out of time" and record["exit"] is None
    assert record["output"] == ["begun"]
    time.sleep(0.1)
    assert not any(alive(int(pid)) for pid in pids.read_text().split())


def test_the_next_step_goes_on_and_each_is_kept(tmp_path):
    result = tmp_path / "result.json"
    steps = [
        python("endless", "import time; time.sleep(60)", 2.0),
        python("fails", "print('why'); raise SystemExit(3)", 4.0),
        python("writes", f"open({str(result)!r}, 'w').write('{{\"rows\": [1, 2]}}')", 4.0,
               result=result),
        gpu.Step("missing", ["no such program"], 1.0, left_out="it is not here"),
    ]  # fmt: skip
    kept: list[list[str]] = []
    end = time.monotonic() + 4
    records = gpu.run_all(
        steps, end, tmp_path, lambda records: kept.append([r["status"] for r in records])
    )
    states = ["out of time", "failed", "ok", "left out"]
    assert kept == [states[: i + 1] for i in range(4)]
    assert records[1]["exit"] == 3 and records[1]["output"] == ["why"]
    assert records[2]["result"] == {"rows": [1, 2]}
    assert records[3]["reason"] == "it is not here"
    assert gpu.bad(records) == ["endless", "fails"]
    json.dumps(records)


def test_without_time_nothing_is_started(tmp_path):
    record = gpu.execute(python("late", "raise SystemExit(1)"), 0.0, tmp_path / "log")
    assert record["status"] == "out of time" and record["reason"] == "no time was left"


def test_an_old_result_is_not_taken_for_a_new_one(tmp_path):
    result = tmp_path / "result.json"
    result.write_text("{}")
    assert "result" not in gpu.execute(python("a", "", result=result), 5.0, tmp_path / "log")


def test_the_build_takes_no_share(tmp_path):
    """It may take its own limit; what it leaves of the whole is shared by the others."""
    steps = [python("build", "import time; time.sleep(1)", 0.0, limit=30.0), python("a", ""),
             python("b", "")]  # fmt: skip
    build, a, b = gpu.run_all(steps, time.monotonic() + 8, tmp_path, lambda _: None)
    assert build["status"] == "ok" and 7 < build["limit"] <= 8
    assert 2.5 < a["limit"] <= 3.5 < b["limit"] <= 7
    planned, *others = gpu.plan(True, False, tmp_path)
    assert planned.name == "build" and planned.limit == 300
    assert all(step.limit is None for step in others)


def test_the_order_of_the_steps_and_their_seconds(tmp_path):
    steps = gpu.plan(True, False, tmp_path)
    assert [step.name for step in steps] == [
        "build", "probe", "tests of the GPU", "tests of the GPU, Triton", "tests of the kernels",
        "errors against float64", "launches per call", "headline benchmarks",
        "compute-sanitizer memcheck", "compute-sanitizer racecheck", "benchmarks",
    ]  # fmt: skip
    assert "--headline" in steps[7].command and "--headline" not in steps[10].command
    assert sum(step.weight for step in steps) <= 60 * 12 - 60  # a minute for the build


@pytest.mark.parametrize(
    ("backend", "nvcc", "environment", "wrong"),
    [
        ("cuda", Path("/bin/nvcc"), {}, "nvcc is there (/bin/nvcc), but the CUDA library cannot"),
        ("cuda", Path("/bin/nvcc"), {"SANM_CUDA": "0"}, None),
        ("cuda", None, {}, None),
        ("triton", None, {}, "triton is installed, but its kernels cannot be used"),
        ("cpu", None, {}, None),
    ],
)
def test_a_backend_that_should_serve_and_does_not_fails_the_run(
    backend, nvcc, environment, wrong, tmp_path, monkeypatch
):
    monkeypatch.delenv("SANM_CUDA", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(operations.libraries, "find_nvcc", lambda: nvcc)
    monkeypatch.setattr(operations.torch.version, "cuda", "13.0")
    monkeypatch.setattr(operations.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(
        operations.backends, "runs_on", lambda name, device: "the driver is too old"
    )
    found = operations.lacking(backend)
    assert (found or "").startswith(wrong or "") and (found is None) == (wrong is None)
    assert wrong is None or found.endswith("the driver is too old")
    monkeypatch.setattr(operations.backends, "runs_on", lambda name, device: None)
    assert operations.lacking(backend) is None


def test_the_probe_calls_every_function_on_every_backend_and_goes_on(tmp_path, monkeypatch, capsys):
    broken = dataclasses.replace(operations.OPERATIONS["sample_loss"], run=lambda x, **_: 1 / 0)
    some = {"broken": broken, "good": operations.OPERATIONS["refine_targets"]}
    monkeypatch.setattr(operations, "OPERATIONS", some)
    monkeypatch.setattr(operations, "served_by", lambda *_: ["cpu"])
    out = tmp_path / "probe.json"
    assert operations.main(["probe", "--device", "cpu", "--out", str(out)]) == 1
    known, *rows = json.loads(out.read_text())["probe"]
    assert known["device"] == "cpu" and "Backends" in capsys.readouterr().out
    assert {row["backend"] for row in rows} == {"reference", "cpu", "triton", "cuda"}
    bad, good = rows[-2:]
    assert not bad["ok"] and bad["error"] == "ZeroDivisionError: division by zero" and good["ok"]
    del some["broken"]
    assert operations.main(["probe", "--device", "cpu", "--out", str(out)]) == 0


def test_a_library_for_one_gpu_is_spoken_of(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    assert gpu.for_one({"SANM_CUDA_ARCHS": "90"}) is None
    (tmp_path / "sanm_kernels/lib").mkdir(parents=True)
    (tmp_path / "sanm_kernels/lib/cuda.so").touch()
    assert gpu.for_one({}) is None
    said = gpu.for_one({"SANM_CUDA_ARCHS": "90"})
    assert "has code for sm_90 alone" in said and "SANM_CUDA_ARCHS=all" in said


def test_time_that_a_step_leaves_goes_to_the_next():
    assert gpu.share(540, [60, 30, 90]) == 180
    assert gpu.share(520, [30, 90]) == 130
    assert gpu.share(400, [90]) == 400
    assert gpu.share(-5, [1, 1]) == 0


def test_the_package_is_imported_from_the_checkout(tmp_path, monkeypatch):
    monkeypatch.setenv("SANM_KERNELS_BACKEND", "reference")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    code = (
        "import os, importlib.util as u\n"
        "print(*(u.find_spec(n).origin for n in ('sanm_kernels', 'sanm_train')), sep='\\n')\n"
        "print(os.environ.get('SANM_KERNELS_BACKEND'), os.environ.get('TRITON_INTERPRET'))"
    )
    record = gpu.execute(python("paths", code), 5, tmp_path / "log")
    # relative to the checkout: no path of this machine goes into the results
    assert record["output"] == [
        "sanm_kernels/__init__.py",
        "python/sanm_train/__init__.py",
        "None None",
    ]
    assert str(gpu.ROOT) not in record["command"] and sys.executable not in record["command"]


def test_outcomes_are_read_from_single_and_parallel_runs():
    lines = [
        "tests/test_a.py::test_one[a b] PASSED                      [ 25%]",
        "tests/test_a.py::test_two SKIPPED (needs a CUDA GPU)       [ 50%]",
        "[gw0] [ 75%] FAILED tests/test_a.py::test_three[x-1] ",
        "[gw1] [ 80%] PASSED tests/test_a.py::test_four ",
        "SKIPPED [1] tests/test_a.py:3: needs a CUDA GPU",
        "FAILED tests/test_a.py::test_three[x-1] - assert 1 == 2",
    ]
    found = gpu.outcomes(lines)
    assert found["counts"] == {"PASSED": 2, "SKIPPED": 1, "FAILED": 1}
    assert found["failed"] == ["tests/test_a.py::test_three[x-1]"]
    assert found["messages"] == lines[-1:] and found["skipped_because"] == ["needs a CUDA GPU"]


def test_files_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "folder/gpu.json"
    write(path, {"a": 1})
    with pytest.raises(TypeError):
        write(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(path.parent.iterdir()) == [path]


def test_names_of_devices_become_names_of_files():
    assert slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert slug("A (R) GPU@2.0", "1 thread") == "a-r-gpu-2-0-1-thread"


def test_operators_take_turns_where_time_is_limited():
    ops = ("sample_loss", "masked_loss")
    in_turns = [case.op for case in schedule(ops, False, True)]
    assert in_turns == ["sample_loss", "masked_loss"] * 3
    assert [case.op for case in schedule(ops, True, False)] == list(ops)
    few = schedule(HEADLINE, False, True, True)
    headline = [f"{case.op} {case.shape}" for case in few]
    assert headline == [
        "masked_forward B=128 C=512 h=4 H=32 K=10", "masked_loss n=768 K=100",
        "mixup_views 12 × (64, 3, 32, 32) → 768 rows", "fit_label_quality N=1000000",
        "masked_forward B=32 C=2048 h=7 H=224 K=14", "masked_loss n=768 K=1000",
        "mixup_views 8 × (32, 3, 224, 224) → 128 rows",
    ]  # fmt: skip


def test_the_plan_leaves_out_what_has_no_tool_and_needs_no_gpu_without_one(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    steps = {step.name: step for step in gpu.plan(True, False, tmp_path)}
    assert steps["compute-sanitizer memcheck"].left_out == "compute-sanitizer is not on the PATH"
    assert "cuda" in steps["benchmarks"].command
    files = {Path(w).name for w in steps["tests of the kernels"].command}
    assert "test_gpu_masked_forward.py" in files and "test_triton_compiles.py" not in files
    monkeypatch.setattr(gpu.shutil, "which", lambda name: f"/bin/{name}")
    steps = {step.name: step for step in gpu.plan(True, False, tmp_path)}
    command = steps["compute-sanitizer memcheck"].command
    assert list(command[:3]) == ["/bin/compute-sanitizer", "--tool", "memcheck"]
    monkeypatch.delenv("SANM_CUDA_ARCHS", raising=False)
    assert gpu.plan(True, False, tmp_path, "9.0")[0].environment == {"SANM_CUDA_ARCHS": "90"}
    assert steps["tests of the GPU, Triton"].environment == {"SANM_KERNELS_BACKEND": "triton"}
    for step in gpu.plan(False, False, tmp_path):
        assert "cuda" not in step.command


def test_a_run_on_a_gpu_writes_one_file_named_after_it(tmp_path, monkeypatch, capsys):
    facts = {"gpu": {"name": "NVIDIA H100 80GB", "capability": "9.0"}, "cuda": "13.0",
             "device": "a CPU", "commit": "abc-changed", "operators": {},
             "versions": {"torch": "2", "triton": "3"}}  # fmt: skip
    monkeypatch.setattr(gpu, "environment", lambda: dict(facts))
    monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)  # this process keeps its own
    steps = [python("good", ""), python("bad", "raise SystemExit(1)")]
    monkeypatch.setattr(gpu, "plan", lambda *_: steps)
    assert gpu.main(["--out", str(tmp_path), "--minutes", "0.2"]) == gpu.FAILED
    content = json.loads((tmp_path / "gpu-nvidia-h100-80gb.json").read_text())
    assert [step["status"] for step in content["steps"]] == ["ok", "failed"]
    assert content["left_behind"] is None  # these steps build nothing
    assert content["exit"] == 1 and content["dirty"] and content["commit"] == "abc-changed"
    assert "FAILED: bad" in capsys.readouterr().out
    steps.pop()
    assert gpu.main(["--out", str(tmp_path), "--minutes", "0.2"]) == gpu.OK
    monkeypatch.setattr(gpu, "environment", lambda: facts | {"gpu": None})
    monkeypatch.setattr(gpu, "HERE", tmp_path / "none")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    assert gpu.main(["--minutes", "0.2"]) == gpu.NO_GPU
    assert not (tmp_path / "none").exists()
    assert "There is no GPU here" in capsys.readouterr().out
