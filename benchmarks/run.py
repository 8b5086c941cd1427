"""``python -m benchmarks.run``: time everything, print a table, write a JSON file."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.common import OURS, SHAPES, Case, measure
from sanm_kernels.__main__ import info

HERE = Path(__file__).resolve().parent
OPS = (*SHAPES, "growth")
COMPILED = "torch.compile"


def cases(op: str) -> Iterator[Case]:
    """The cases of ``bench_<op>.py``."""
    yield from importlib.import_module(f"benchmarks.bench_{op}").cases()


def environment() -> dict[str, Any]:
    """What a figure depends on: commit, processor, threads, versions, backends, allocator."""
    def git(*arguments: str) -> str:
        result = subprocess.run(["git", *arguments], cwd=HERE, capture_output=True, text=True)
        return result.stdout.strip()

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    facts = info()
    cpu = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    # The package without what every benchmark run changes itself.
    changed = bool(git("status", "--porcelain", "--", "..", ":!results"))
    packages = ("numpy", "opencv-python-headless", "scikit-learn")
    allocator = {k: v for k, v in os.environ.items()
                 if k in ("LD_PRELOAD", "GLIBC_TUNABLES") or k.startswith("MALLOC_")}
    return {
        "commit": (git("rev-parse", "--short", "HEAD") or "unknown") + "-changed" * changed,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": cpu[1].strip() if cpu else facts["processor"]["machine"],
        "processor": facts["processor"],
        "load": os.getloadavg(),  # above 0.1 or so, somebody else was at work: mistrust the figures
        "versions": facts["versions"] | {name: version(name) for name in packages},
        "operators": facts["operators"],
        "allocator": {"libc": " ".join(os.confstr("CS_GNU_LIBC_VERSION").split()), **allocator},
    }


def table(record: dict[str, Any]) -> str:
    """One case as lines of text."""
    def text(seconds: float) -> str:
        return f"{seconds * 1e6:.1f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"

    lines = [f"{record['op']}  {record['shape']}  ({record['rounds']} rounds, {record['sets']} sets)"]
    for name, r in record["results"].items():
        low, median, high = r["seconds"]
        over = "" if name == OURS else f"{r['over_ours'][1]:8.2f} × ours"
        memory = "" if r["allocated"] is None else f"{r['allocated'] / 2**20:9.2f} MiB"
        mark = "  = limit" if name == record["limit"] else ""
        lines.append(f"  {name:18}{text(median):>11}  [{text(low)}, {text(high)}]".ljust(58)
                     + f"{r['gb_per_s']:8.2f} GB/s{r['over_limit'][1]:8.2f} × limit{memory:>14}"
                     + f"{over:>16}{mark}")
    lines += [f"  {name:18}not run: {why}" for name, why in record["not_run"].items()]
    return "\n".join(lines)


def write(path: Path, content: dict[str, Any]) -> None:
    """All of the file or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    os.replace(temporary, path)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--ops", nargs="+", choices=OPS, default=OPS, metavar="OP",
                        help=f"only these of {', '.join(OPS)}")
    parser.add_argument("--quick", action="store_true",
                        help="a trial: the smallest shape of each operator, few rounds, data "
                             "partly in the caches; the figures mean little")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--seconds", type=float, default=8.0, help="per case (default: 8)")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/DEVICE-COMMIT.json")
    options = parser.parse_args(arguments)

    facts = environment()
    name = re.sub(r"\W+", "-", f"{facts['device']}-{facts['processor']['threads']}t").lower()
    out = options.out or HERE / "results" / f"{name}-{facts['commit']}.json"
    print(f"{facts['device']}, {facts['processor']['threads']} threads, load {facts['load'][0]:.1f}, "
          f"torch {facts['versions']['torch']}, commit {facts['commit']}", flush=True)
    records = []
    for op in options.ops:
        for case in list(cases(op))[: 1 if options.quick else None]:
            if options.no_compile:
                case.run.pop(COMPILED, None)
            effort = (0.5, 3, 2**25) if options.quick else (options.seconds,)
            records.append(measure(case, *effort))
            print(f"\n{table(records[-1])}", flush=True)
            write(out, {"quick": options.quick, **facts, "cases": records})
    print(f"\nwritten to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
