"""``pytest benchmarks/``: the same cases under pytest-benchmark, each first checked against ours."""

from __future__ import annotations

import itertools

import pytest

from benchmarks.common import SHAPES, Case
from benchmarks.run import cases

pytest.importorskip("pytest_benchmark")
ALL = [(case, name) for op in SHAPES for case in cases(op) for name in case.run]


@pytest.mark.parametrize(("case", "name"), ALL,
                         ids=[f"{case.op} {case.shape} {name}" for case, name in ALL])
def test_speed(benchmark, case: Case, name: str) -> None:
    benchmark.group = f"{case.op} {case.shape}"
    sets = case.sets()
    case = Case(**{**vars(case), "run": {key: case.run[key] for key in ("ours", name)}})
    able, unable = case.checked(sets[0])
    if name in unable:
        pytest.skip(unable[name])
    turns = itertools.cycle(sets)
    benchmark.pedantic(able[name], setup=lambda: ((next(turns),), {}), rounds=15,
                       warmup_rounds=2)
