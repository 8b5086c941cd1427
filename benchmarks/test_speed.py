"""``pytest benchmarks/``: the cases under pytest-benchmark, each first checked against ours."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from benchmarks.common import OPS, OURS, Case, cases, checked, serving, sets

pytest.importorskip("pytest_benchmark")
ALL = [
    pytest.param(case, name, id=f"{op} {case.shape} {name}")
    for op in OPS
    for case in cases(op)
    for name in case.run
]


@pytest.mark.parametrize(("case", "name"), ALL)
def test_speed(benchmark, case: Case, name: str) -> None:
    serving([case.op], "cpu")
    benchmark.group = f"{case.op} {case.shape}"
    given = sets(case)
    chosen = {key: case.run[key] for key in (OURS, name)}
    able, unable = checked(replace(case, run=chosen), given[0])
    if name in unable:
        pytest.skip(unable[name])
    turns = itertools.cycle(given)
    benchmark.pedantic(able[name], setup=lambda: ((next(turns),), {}), rounds=15, warmup_rounds=2)
