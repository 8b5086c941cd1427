"""``python -m benchmarks.run``: time everything, print a table, write a JSON file.

``--everywhere``: once for every instruction set that is compiled, on one thread and on all, with
glibc's own thresholds and with memory that it keeps; each a process and a JSON file of its own.
"""

from __future__ import annotations

import argparse
import gc
import getpass
import importlib.metadata
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import (
    COMPILED,
    GROWTH,
    HEADLINE,
    LOADED,
    OPS,
    OURS,
    Case,
    Watch,
    add_despite_load,
    cases,
    measure,
    serving,
)
from benchmarks.tables import comparison, duration
from sanm_kernels.__main__ import info
from sanm_kernels.backends.cpu import LIBRARIES

HERE = Path(__file__).resolve().parent
#: What makes glibc keep the memory that is freed, which by default it returns from 128 KiB on. A
#: threshold for mmap cannot be above 32 MiB, less than a batch of large images.
KEPT = {"MALLOC_TRIM_THRESHOLD_": "20000000000", "MALLOC_MMAP_MAX_": "0"}
PACKAGES = ("numpy", "opencv-python-headless", "scikit-learn", "kornia", "timm")


def slug(*words: str) -> str:
    """Words as part of a file's name."""
    return re.sub(r"\W+", "-", " ".join(words)).strip("-").lower()


def gpu() -> dict[str, Any] | None:
    """The first GPU: name, driver, capability, memory, caches; None without one."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    driver = None
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True).stdout.split()
        driver = answer[0] if answer else None
    return {
        "name": properties.name,
        "count": torch.cuda.device_count(),
        "driver": driver,
        "capability": f"{properties.major}.{properties.minor}",
        "memory": properties.total_memory,
        "l2_cache": properties.L2_cache_size,
        "multiprocessors": properties.multi_processor_count,
    }


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
    settings = ("ATEN_CPU_", "LD_PRELOAD", "GLIBC_TUNABLES", "MALLOC_", "OMP_", "GOMP_", "KMP_")
    return {
        "commit": (git("rev-parse", "--short", "HEAD") or "unknown") + "-changed" * bool(changed),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": cpu[1].strip() if cpu else facts["processor"]["machine"],
        "processor": facts["processor"],
        "gpu": gpu(),
        "cuda": facts["cuda"]["version"],
        "load": os.getloadavg()[0],
        "versions": facts["versions"] | {name: version(name) for name in PACKAGES},
        "operators": facts["operators"],
        "allocator": os.confstr("CS_GNU_LIBC_VERSION"),
        "environment": {k: v for k, v in os.environ.items() if k.startswith(settings)},
    }


def table(record: dict[str, Any]) -> str:
    """One case as lines of text."""

    rounds, sets = record["rounds"], record["sets"]
    lines = [f"\n{record['op']}   {record['shape']}   ({rounds} rounds, {sets} buffer sets)"]
    for name, r in record["results"].items():
        low, median, high = (duration(s, 1) for s in r["seconds"])
        shown = f"{OURS} ({record['backend']})" if name == OURS else name
        row = f"  {shown:18}{median:>11}  {f'[{low}, {high}]':24}{r['gb_per_s']:7.2f} GB/s"
        row += f"{r['samples_per_s']:15,.0f} samples/s"
        row += f"{r['over_limit'][1]:9.2f} × limit"
        row += f"{r['over_ours'][1]:9.2f} × ours" if name != OURS else " " * 16
        if r["allocated"] is not None:
            row += f"{r['allocated'] / 2**20:9.2f} MiB"
        if "host_seconds" in r:
            row += f"   host {duration(r['host_seconds'][1], 1)}"
        row += "  (does less)" * (name in record["less"])
        lines.append(row + ("  (the limit)" if name == record["limit"] else ""))
    lines += [f"  {name:18} not run: {why}" for name, why in record["not_run"].items()]
    return "\n".join(lines)


def schedule(
    ops: Sequence[str], quick: bool, in_turns: bool, headline: bool = False
) -> Iterator[Case]:
    """The cases, one operator after the other, or the first of each, then the second of each, …"""
    listed = [list(cases(op, headline))[: 1 if quick else None] for op in ops]
    if in_turns:
        for row in itertools.zip_longest(*listed):
            yield from (case for case in row if case is not None)
    else:
        yield from itertools.chain(*listed)


def write(path: Path, content: dict[str, Any]) -> None:
    """Write all of the file or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    os.replace(temporary, path)


def everywhere() -> Iterator[tuple[str, dict[str, str]]]:
    """The settings that take effect when a process starts: a name, and its environment."""
    for isa in ("avx512", "avx2"):
        if not (LIBRARIES / f"cpu_{isa}.so").exists():
            continue
        for threads in sorted({1, torch.get_num_threads()}):
            for memory, thresholds in (("glibc", {}), ("kept", KEPT)):
                steered = {"ATEN_CPU_CAPABILITY": isa, "OMP_NUM_THREADS": str(threads)}
                others = {k: v for k, v in os.environ.items() if k not in KEPT}
                yield f"{isa}-{threads}-{memory}", others | steered | thresholds


def run_everywhere(arguments: Sequence[str], out: Path) -> int:
    """Each setting in a process; then their comparison. Returns the largest exit status."""
    status, records, began = 0, {}, time.time()
    for name, environ in everywhere():
        path = out.with_name(f"{out.stem}-{name}.json")
        command = [sys.executable, "-m", "benchmarks.run", *arguments, "--out", str(path)]
        print(f"\n{name}", flush=True)
        status = max(status, subprocess.run(command, env=environ).returncode)
        if path.exists() and path.stat().st_mtime >= began:  # not an earlier run's
            records[name] = json.loads(path.read_text())
    print(
        "\nOur time, over the copy limit of the same run; those of torch and torch.compile over it:"
    )
    print(f"\n{comparison(records)}")
    return status


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    add, every = parser.add_argument, [*OPS, GROWTH]
    add("--ops", nargs="+", choices=every, default=every, metavar="OP",
        help=f"of {', '.join(every)}")  # fmt: skip
    add("--headline", action="store_true", help="the headline shapes alone, without "
        "torch.compile")  # fmt: skip
    add("--quick", action="store_true", help="a trial: the smallest shapes, few rounds, data "
        "partly in the caches; the figures mean little")  # fmt: skip
    add("--no-compile", action="store_true", help="leave out torch.compile")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    add("--seconds", type=float, default=8.0, help="for each case (default: 8)")
    add("--rounds", type=int, default=7, help="at least this many for each case (default: 7)")
    add("--minutes", type=float, help="begin no case after this many, and go through the operators "
        "in turns, so that each gets its first")  # fmt: skip
    add("--out", type=Path, metavar="FILE", help="default: benchmarks/results/DEVICE-COMMIT.json")
    add("--everywhere", action="store_true", help="both instruction sets, one thread and all, both "
        "settings of glibc, one after the other; on the CPU")  # fmt: skip
    add_despite_load(parser)
    options = parser.parse_args(arguments)
    if options.headline:
        options.no_compile, options.ops = True, [op for op in options.ops if op in HEADLINE]

    ops = OPS if GROWTH in options.ops else options.ops
    try:
        served = serving(ops, options.device)
    except RuntimeError as error:
        parser.error(str(error))
    facts = environment()
    device = f"{facts['device']}, {facts['processor']['threads']} threads"
    if options.device == "cuda":
        if facts["gpu"] is None:
            parser.error("--device cuda: torch sees no GPU here")
        device = facts["device"] = facts["gpu"]["name"]
    out = options.out or HERE / "results" / f"{slug(device, facts['commit'])}.json"
    print(f"{device}, load {facts['load']:.1f}; torch {facts['versions']['torch']}; "
          f"commit {facts['commit']}")  # fmt: skip
    if options.everywhere:
        if options.device != "cpu":
            parser.error("--everywhere: on the CPU only")
        given = sys.argv[1:] if arguments is None else list(arguments)
        return run_everywhere([word for word in given if word != "--everywhere"], out)
    # torch.compile keeps code without regard to the number of threads, and with another it writes
    # past the ends of its buffers.
    cache = f"torchinductor_{slug(getpass.getuser(), facts['processor']['capability'])}"
    cache += f"-{facts['processor']['threads']}-threads"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / cache))
    # A GPU's own times hardly depend on the host's load: it is written down, and nothing refused.
    watch = Watch(options.despite_load or options.device == "cuda")
    if not watch.keeps("before the run"):
        return LOADED
    gc.disable()  # no pauses
    effort = (0.5, 3, 2**25) if options.quick else (options.seconds, options.rounds)
    end = math.inf if options.minutes is None else time.monotonic() + 60 * options.minutes
    records, failed, left_out = [], [], []

    def keep(**more: Any) -> None:
        content = {"quick": options.quick, **facts, "failed": failed, "under_load": watch.found}
        write(out, content | more | {"cases": records})

    for case in schedule(options.ops, options.quick, options.minutes is not None, options.headline):
        name = f"{case.op} {case.shape}"
        if time.monotonic() > end:
            left_out.append(name)
            continue
        if options.no_compile:
            case.run.pop(COMPILED, None)
        try:
            record = measure(case, *effort, device=options.device) | {"backend": served[case.op]}
        except AssertionError as error:  # a result that is wrong is not timed
            failed.append(str(error))
            print(f"\n{name}: {error}", flush=True)
        else:
            print(table(record), flush=True)
            if watch.keeps(name):
                records.append(record)
        keep()
        gc.collect()
    if left_out:
        print(f"\nNo time was left for: {'; '.join(left_out)}")
        keep(left_out=left_out)
    print(f"\nwritten to {out}")
    return 1 if failed else LOADED if watch.refused else 0


if __name__ == "__main__":
    sys.exit(main())
