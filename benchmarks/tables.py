"""``python -m benchmarks.tables glibc|kept|headline|growth``: tables of the docs and README, from
the files that ``benchmarks.run --everywhere --out benchmarks/results/cpu.json`` wrote; growth from
those of ``--ops growth --out benchmarks/results/cpu-avx512-2-growth.json`` and so on."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from math import log
from pathlib import Path
from typing import Any

from benchmarks.common import COMPILED, OURS

RESULTS = Path(__file__).resolve().parent / "results"
SETTINGS = {
    "avx512-1": "AVX-512, one thread",
    "avx512-2": "AVX-512, two threads",
    "avx2-1": "AVX2, one thread",
    "avx2-2": "AVX2, two threads",
}
README_ROWS = (
    "masked_forward B=128 C=512 h=4 H=32 K=10",
    "masked_forward B=64 C=2048 h=7 H=224 K=1000",
    "masked_loss n=768 K=10",
    "masked_loss n=768 K=1000",
    "fit_label_quality N=50000",
    "mixup_views 12 × (64, 3, 32, 32) → 768 rows",
    "mixup_views 8 × (32, 3, 224, 224) → 128 rows",
    "refine_targets 4 × (64, 100)",
    "reconstruction_loss 2 × (128, 3, 32, 32)",
    "reconstruction_loss 2 × (64, 3, 224, 224)",
    "sample_loss B=1024 K=10",
    "sample_loss B=1024 K=1000",
)
Record = Mapping[str, Any]


def duration(seconds: float, decimals: int = 0) -> str:
    """In µs with so many decimals, from 1 ms on in ms with two."""
    return f"{1e6 * seconds:.{decimals}f} µs" if seconds < 1e-3 else f"{1e3 * seconds:.2f} ms"


def ratio(value: float) -> str:
    return f"{value:.2f}" if value < 2 else f"{value:.1f}" if value < 10 else f"{value:.0f}"


def over(result: Record, *names: str, limit: bool = False) -> str:
    """The median ratio of the first of these that was timed, to our time or to the copy limit."""
    key = "over_limit" if limit else "over_ours"
    timed = [result[name][key][1] for name in names if name in result]
    return ratio(timed[0]) if timed else "–"


def rows(records: Mapping[str, Record]) -> dict[str, dict[str, Record]]:
    """Operator and shape → setting → the results of all implementations."""
    found: dict[str, dict[str, Record]] = {}
    for setting, record in records.items():
        for case in record["cases"]:
            if not case["axis"]:
                found.setdefault(f"{case['op']} {case['shape']}", {})[setting] = case["results"]
    return found


def lines(head: Sequence[str], body: Mapping[str, Sequence[str]]) -> str:
    """Markdown of a table whose rows have an operator and a shape as their name."""
    table = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, cells in body.items():
        op, _, shape = name.partition(" ")
        table.append(f"| `{op}` {shape} | {' | '.join(cells)} |")
    return "\n".join(table)


def comparison(records: Mapping[str, Record]) -> str:
    """A column for each setting: our time; its multiple of the copy limit; the times of torch and
    of torch.compile over ours."""

    def cell(result: Record | None) -> str:
        if result is None:
            return "–"
        ours = duration(result[OURS]["seconds"][1])
        others = over(result, "torch"), over(result, COMPILED)
        return " · ".join([ours, over(result, OURS, limit=True), *others])

    body = {name: [cell(row.get(s)) for s in records] for name, row in rows(records).items()}
    return lines(["operator, shape", *(SETTINGS.get(s, s) for s in records)], body)


def headline(default: Mapping[str, Record], kept: Mapping[str, Record]) -> str:
    """The times of others over ours, with glibc's default thresholds and where it keeps memory; in
    each cell the settings of `default`."""
    columns = {
        "OpenCV per sample, scikit-learn": (default, ("OpenCV", "scikit-learn")),
        "torch": (default, ("torch",)),
        "torch, memory kept": (kept, ("torch",)),
        "torch.compile": (default, (COMPILED,)),
        "torch.compile, memory kept": (kept, (COMPILED,)),
        "ours over a copy of the same bytes": (default, (OURS,)),
    }
    body: dict[str, list[str]] = {name: [] for name in README_ROWS}
    for records, timed in columns.values():
        found = rows(records)
        for name, cells in body.items():
            ratios = [over(found[name][s], *timed, limit=timed == (OURS,)) for s in records]
            cells.append("–" if set(ratios) == {"–"} else " · ".join(ratios))
    return lines(["time of … over ours", *columns], body)


def series(record: Record) -> dict[tuple[str, str], list[Record]]:
    """Operator and the size that grows → its cases, by that size."""
    found: dict[tuple[str, str], list[Record]] = {}
    for case in record["cases"]:
        if case["axis"]:
            found.setdefault((case["op"], case["axis"][0]), []).append(case)
    return found


def exponent(sizes: Sequence[float], times: Sequence[float]) -> float:
    """That of the time between the last two sizes; 0 for one size."""
    return log(times[-1] / times[-2]) / log(sizes[-1] / sizes[-2]) if times[1:] else 0


def growth(records: Mapping[str, Record]) -> str:
    """The exponent of the time between the two largest sizes, for each setting."""
    body: dict[str, list[str]] = {}
    for record in records.values():
        for (op, axis), cases in series(record).items():
            sizes = [case["axis"][1] for case in cases]
            last = exponent(sizes, [case["results"][OURS]["seconds"][1] for case in cases])
            name = f"{op} {axis}: {sizes[-2]:,} to {sizes[-1]:,}"
            body.setdefault(name, []).append(f"{last:.2f}")
    return lines(["size", *(SETTINGS[s] for s in records)], body)


def read(memory: str, settings: Sequence[str] = tuple(SETTINGS)) -> dict[str, Record]:
    return {s: json.loads((RESULTS / f"cpu-{s}-{memory}.json").read_text()) for s in settings}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__)
    parser.add_argument("table", choices=("glibc", "kept", "headline", "growth"))
    table = parser.parse_args().table
    ends = ("avx512-2", "avx2-1")
    if table == "headline":
        print(headline(read("glibc", ends), read("kept", ends)))
    elif table == "growth":
        print(growth(read(table, ends)))
    else:
        print(comparison(read(table)))


if __name__ == "__main__":
    main()
