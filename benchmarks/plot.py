"""``python -m benchmarks.plot RESULTS.json``: time and GB/s against size, next to the copy limit."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument("results", type=Path, help="written by benchmarks.run, with the op growth")
    path = parser.parse_args().results
    content = json.loads(path.read_text())
    series: dict[tuple[str, str], list[dict]] = {}
    for record in content["cases"]:
        if record["axis"]:
            series.setdefault((record["op"], record["axis"][0]), []).append(record)
    for (op, axis), records in series.items():
        sizes = [r["axis"][1] for r in records]
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
        for label, names in (("ours", ["ours"] * len(records)),
                             ("copy limit", [r["limit"] for r in records])):
            results = [r["results"][name] for r, name in zip(records, names, strict=True)]
            left.loglog(sizes, [1e3 * r["seconds"][1] for r in results], "o-", label=label)
            right.semilogx(sizes, [r["gb_per_s"] for r in results], "o-", label=label)
        left.set(xlabel=axis, ylabel="time (ms)")
        right.set(xlabel=axis, ylabel="GB/s of the bytes that must move", ylim=(0, None))
        left.legend()
        figure.suptitle(f"{op}: {content['device']}, commit {content['commit']}", fontsize=10)
        name = axis.replace("·", "")
        target = path.with_name(f"{path.stem}-{op}-{name}.png")
        figure.savefig(target, dpi=120)
        print(target)


if __name__ == "__main__":
    main()
