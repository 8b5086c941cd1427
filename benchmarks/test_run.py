"""`python -m benchmarks.run`: what it prints, and what it writes on a machine with other load."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from benchmarks import common, run

#: CPU seconds of the machine and of the run at each look: for 1 s, then 2 s for each of two cases.
QUIET = [(0, 0), (0.1, 0.1), (4, 4), (8, 8)]
LOADED_LATE = [(0, 0), (0.1, 0.1), (4, 4), (8, 6)]
LOADED_EARLY = [(0, 0), (1.5, 0.1), (5.4, 4), (9.4, 8)]


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """Runs two cases that are not timed, with the CPU seconds given; status, file, output."""

    def one(case, *_, device):
        figures = {"seconds": [1e-3] * 3, "gb_per_s": 1.5, "samples_per_s": case.samples / 1e-3,
                   "over_limit": [1.0] * 3, "over_ours": [1.0] * 3, "allocated": None}  # fmt: skip
        return {"op": case.op, "shape": case.shape, "rounds": 3, "sets": 2, "limit": "copy",
                "not_run": {}, "less": [], "results": {common.OURS: figures}}  # fmt: skip

    def start(seconds, *arguments):
        looks, clock = iter(seconds), iter([0.0, 1.0, 3.0, 5.0])
        monkeypatch.setattr(common, "cpu_seconds", lambda: next(looks))
        watched = SimpleNamespace(monotonic=lambda: next(clock), sleep=lambda seconds: None)
        monkeypatch.setattr(common, "time", watched)
        out = tmp_path / "figures.json"
        words = ["--ops", "sample_loss", "mixup_views", "--quick", "--no-compile"]
        status = run.main([*words, "--out", str(out), *arguments])
        return status, json.loads(out.read_text()) if out.exists() else None

    monkeypatch.setattr(run, "measure", one)
    monkeypatch.setattr(run, "serving", lambda ops, device: dict.fromkeys(ops, "cpu"))
    monkeypatch.setattr(run.gc, "disable", lambda: None)
    return start


def cases(content):
    return [case["op"] for case in content["cases"]]


def test_all_is_written_on_a_quiet_machine(measured, capsys):
    status, content = measured(QUIET)
    assert status == 0 and cases(content) == ["sample_loss", "mixup_views"]
    assert content["under_load"] == {}
    said = capsys.readouterr().out
    assert "1.50 GB/s      1,024,000 samples/s" in said and "other processes" not in said


def test_nothing_is_measured_where_others_compute(measured, capsys):
    status, content = measured(LOADED_EARLY)
    assert status == common.LOADED and content is None
    assert "before the run: other processes took 1.4 of" in capsys.readouterr().out


def test_a_case_during_which_others_computed_is_not_written(measured, capsys):
    status, content = measured(LOADED_LATE)
    assert status == common.LOADED and cases(content) == ["sample_loss"]
    (name, load), *others = content["under_load"].items()
    assert name.startswith("mixup_views ") and load == 1.0 and not others
    assert "other processes took 1.0 of" in capsys.readouterr().out


@pytest.mark.parametrize("seconds", [LOADED_EARLY, LOADED_LATE])
def test_despite_load_all_is_written_and_marked(measured, seconds):
    status, content = measured(seconds, "--despite-load")
    assert status == 0 and cases(content) == ["sample_loss", "mixup_views"]
    assert content["under_load"]


def test_own_time_counts_descendants_while_they_run_and_afterwards():
    code = "n = sum(range(10**7)); print(flush=True); input()"
    before = common.cpu_seconds()[1]
    child = subprocess.Popen(
        [sys.executable, "-S", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    child.stdout.readline()
    machine, own = common.cpu_seconds()
    assert before + 0.1 <= own <= machine
    child.communicate("\n")
    assert common.cpu_seconds()[1] >= own
