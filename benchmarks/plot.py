"""``python -m benchmarks.plot FILE``: time and GB/s against size, next to the copy limit."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.tables import exponent, series


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument("file", type=Path, help="what benchmarks.run wrote, with the op growth")
    path = parser.parse_args().file
    content = json.loads(path.read_text())
    for (op, axis), records in series(content).items():
        sizes = [r["axis"][1] for r in records]
        figure = Figure(figsize=(9, 3.5), layout="constrained")
        left, right = figure.subplots(1, 2)
        for label, pick in (("ours", lambda _: "ours"), ("copy limit", lambda r: r["limit"])):
            results = [r["results"][pick(r)] for r in records]
            times = [1e3 * r["seconds"][1] for r in results]
            slope = f"{exponent(sizes, times):.2f}"
            left.loglog(sizes, times, "o-", label=f"{label}, at last ∝ {axis}^{slope}")
            right.semilogx(sizes, [r["gb_per_s"] for r in results], "o-", label=label)
        left.set(xlabel=axis, ylabel="time (ms)")
        left.legend()
        right.set(xlabel=axis, ylabel="GB/s of the bytes that must move", ylim=(0, None))
        figure.suptitle(f"{op}: {content['device']}, commit {content['commit']}", fontsize=10)
        target = path.with_name(f"{path.stem}-{op}-{axis.replace('·', '')}.png")
        figure.savefig(target, dpi=120)
        print(target)


if __name__ == "__main__":
    main()
