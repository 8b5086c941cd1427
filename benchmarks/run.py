"""``python -m benchmarks.run``: time everything, print a table, write a JSON file."""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.common import COMPILED, OURS, SHAPES, cases, measure
from sanm_kernels.__main__ import info

HERE = Path(__file__).resolve().parent
OPS = (*SHAPES, "growth")
PACKAGES = ("numpy", "opencv-python-headless", "scikit-learn")


def environment() -> dict[str, Any]:
    """What a figure depends on: commit, processor, threads, load, versions, backends, allocator."""

    def git(*arguments: str) -> str:
        result = subprocess.run(["git", *arguments], cwd=HERE, capture_output=True, text=True)
        return result.stdout.strip()

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    facts = info()
    cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    changed = git("status", "--porcelain", "--", "..", ":!results")
    settings = ("LD_PRELOAD", "GLIBC_TUNABLES", "MALLOC_", "OMP_", "GOMP_", "KMP_")
    return {
        "commit": (git("rev-parse", "--short", "HEAD") or "unknown") + "-changed" * bool(changed),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": cpu[1].strip() if cpu else facts["processor"]["machine"],
        "processor": facts["processor"],
        "load": os.getloadavg()[0],
        "versions": facts["versions"] | {name: version(name) for name in PACKAGES},
        "operators": facts["operators"],
        "allocator": os.confstr("CS_GNU_LIBC_VERSION"),
        "environment": {k: v for k, v in os.environ.items() if k.startswith(settings)},
    }


def table(record: dict[str, Any]) -> str:
    """One case as lines of text."""

    def text(seconds: float) -> str:
        return f"{seconds * 1e6:.1f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"

    rounds, sets = record["rounds"], record["sets"]
    lines = [f"\n{record['op']}   {record['shape']}   ({rounds} rounds, {sets} buffer sets)"]
    for name, r in record["results"].items():
        low, median, high = map(text, r["seconds"])
        row = f"  {name:18}{median:>11}  {f'[{low}, {high}]':24}{r['gb_per_s']:7.2f} GB/s"
        row += f"{r['over_limit'][1]:9.2f} × limit"
        row += f"{r['over_ours'][1]:9.2f} × ours" if name != OURS else " " * 16
        if r["allocated"] is not None:
            row += f"{r['allocated'] / 2**20:9.2f} MiB"
        lines.append(row + ("  (the limit)" if name == record["limit"] else ""))
    lines += [f"  {name:18} not run: {why}" for name, why in record["not_run"].items()]
    return "\n".join(lines)


def write(path: Path, content: dict[str, Any]) -> None:
    """Write all of the file or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    os.replace(temporary, path)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    add = parser.add_argument
    add("--ops", nargs="+", choices=OPS, default=OPS, metavar="OP", help=f"of {', '.join(OPS)}")
    add("--quick", action="store_true", help="a trial: the smallest shapes, few rounds, data "
        "partly in the caches; the figures mean little")  # fmt: skip
    add("--no-compile", action="store_true", help="leave out torch.compile")
    add("--seconds", type=float, default=8.0, help="for each case (default: 8)")
    add("--out", type=Path, metavar="FILE", help="default: benchmarks/results/DEVICE-COMMIT.json")
    options = parser.parse_args(arguments)

    facts = environment()
    device = f"{facts['device']}, {facts['processor']['threads']} threads"
    name = re.sub(r"\W+", "-", f"{device} {facts['commit']}").lower()
    out = options.out or HERE / "results" / f"{name}.json"
    print(f"{device}, load {facts['load']:.1f}; torch {facts['versions']['torch']}; "
          f"commit {facts['commit']}")  # fmt: skip
    gc.disable()  # no pauses
    records = []
    for op in options.ops:
        for case in list(cases(op))[: 1 if options.quick else None]:
            if options.no_compile:
                case.run.pop(COMPILED, None)
            effort = (0.5, 3, 2**25) if options.quick else (options.seconds,)
            records.append(measure(case, *effort))
            print(table(records[-1]), flush=True)
            write(out, {"quick": options.quick, **facts, "cases": records})
            gc.collect()
    print(f"\nwritten to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
