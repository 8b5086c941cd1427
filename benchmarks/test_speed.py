"""``pytest benchmarks/``: the cases under pytest-benchmark, each first checked against ours."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from benchmarks.common import OURS, SHAPES, Case, cases, serving

pytest.importorskip("pytest_benchmark")
ALL = [
    pytest.param(case, name, id=f"{op} {case.shape} {name}")
    for op in SHAPES
    for case in cases(op)
    for name in case.run
]


@pytest.mark.parametrize(("case", "name"), ALL)
def test_speed(benchmark, case: Case, name: str) -> None:
    serving([case.op], "cpu")
    benchmark.group = f"{case.op} {case.shape}"
    sets = case.sets()
    chosen = {key: case.run[key] for key in (OURS, name)}
    able, unable = replace(case, run=chosen).checked(sets[0])
    if name in unable:
        pytest.skip(unable[name])
    turns = itertools.cycle(sets)
    benchmark.pedantic(able[name], setup=lambda: ((next(turns),), {}), rounds=15, warmup_rounds=2)
