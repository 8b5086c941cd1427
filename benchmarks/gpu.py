"""``python -m benchmarks.gpu``: all that needs a GPU, in one run of limited time; see `make gpu`.

Builds, looks whether every backend serves, runs the GPU tests, the error and launch tables, the
headline benchmarks, compute-sanitizer and all benchmarks, each as a process of its own with a share
of the time that the build leaves, and writes the results after each step. It needs nothing but
the interpreter's own packages. Exit status: 0; 1 if a step failed or was cut off, or nvcc or triton
is there and its kernels cannot be used; 2 if there is no GPU: then only what needs none is run.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import Watch, descendants
from benchmarks.run import HERE, environment, slug, write

ROOT = HERE.parent
OK, FAILED, NO_GPU = 0, 1, 2
FOUND_BY_SANITIZER = 99  # its exit status where it found something
BUILD = 300.0  # seconds that the build may take
LAST = 30.0  # seconds that a benchmark's last case may take
TAIL = 40  # lines of a step's output that are kept


@dataclass(frozen=True)
class Step:
    """One process.

    Attributes:
        name: also of its log file.
        command: ``{minutes}`` in it becomes the time after which to begin nothing new.
        weight: its share of the time that is left, against the weights of the steps after it:
            about the seconds that it gets where each step takes all of its time.
        environment: variables to be set.
        result: a JSON file that it writes, read when it has ended, however that was.
        left_out: why it is not run.
        limit: seconds it may take, where that is no share.
    """

    name: str
    command: Sequence[str]
    weight: float
    environment: dict[str, str] = field(default_factory=dict)
    result: Path | None = None
    left_out: str | None = None
    limit: float | None = None


def share(left: float, weights: Sequence[float]) -> float:
    """Of the seconds that are left, those of the first of some steps with these weights."""
    return max(left, 0.0) * weights[0] / sum(weights)


def running(process: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def kill(process: subprocess.Popen[bytes], grace: float = 2.0) -> None:
    """End a process and its descendants, asked first: ninja then removes what is half written."""
    found = descendants(process.pid)
    for number in (signal.SIGTERM, signal.SIGKILL):
        for one in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(one, number)
        end = time.monotonic() + grace
        while any(map(running, found)) and time.monotonic() < end:
            time.sleep(0.02)
    process.wait()


def execute(step: Step, seconds: float, log: Path) -> dict[str, Any]:
    """Run a step for at most so long, with its output going to `log`; what goes into the JSON."""
    minutes = max(seconds - LAST, seconds / 2) / 60
    command = [word.replace("{minutes}", f"{minutes:.2f}") for word in step.command]
    shown = " ".join(Path(w).name if w.startswith("/") else w for w in command)
    record: dict[str, Any] = {"name": step.name, "command": shown, "limit": seconds}
    if step.left_out is not None or seconds < 1:
        reason = step.left_out or "no time was left"
        status = "left out" if step.left_out else "out of time"
        return record | {"status": status, "reason": reason, "seconds": 0.0, "exit": None}
    paths = [str(ROOT), str(ROOT / "python"), str(ROOT / "tests")]
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    # What steers the package must not come from outside.
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SANM_KERNELS", "TRITON_INT"))}
    kept |= {"PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "200", "PYTHONUNBUFFERED": "1"}
    log.parent.mkdir(parents=True, exist_ok=True)
    if step.result is not None:
        step.result.unlink(missing_ok=True)  # an earlier run's
    start = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=kept | step.environment, stdin=subprocess.DEVNULL,
            stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            code: int | None = process.wait(seconds)
            status = "ok" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            code, status = None, "out of time"
        finally:
            if process.poll() is None:  # also where this process is told to end
                kill(process)
    lines = log.read_text(errors="replace").replace(f"{ROOT}/", "").splitlines()
    record |= {"status": status, "exit": code, "seconds": time.monotonic() - start}
    record["output"] = lines[-TAIL:]
    if "pytest" in step.command:
        record["tests"] = outcomes(lines)
    if step.result is not None and step.result.is_file():
        record["result"] = json.loads(step.result.read_text())
    return record


def outcomes(lines: Sequence[str]) -> dict[str, Any]:
    """What pytest's output says: counts, the tests that failed, why others were skipped.

    Read from the lines of single tests, so that a run that was cut off leaves what it had.
    """
    word = "(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)"
    alone = re.compile(rf"(tests/.+?::.+?) {word}\b")
    parallel = re.compile(rf"\] {word} (tests/.+)")
    results: dict[str, str] = {}
    for line in lines:
        if found := alone.match(line):
            results[found[1]] = found[2]
        elif found := parallel.search(line):
            results[found[2].strip()] = found[1]
    messages = [line for line in lines if re.match(r"(FAILED|ERROR) \S", line)]
    reasons = re.findall(r"^SKIPPED \[\d+\] \S+ (.+)$", "\n".join(lines), re.M)
    return {
        "counts": Counter(results.values()),
        "failed": sorted(name for name, how in results.items() if how in ("FAILED", "ERROR")),
        "messages": messages,
        "skipped_because": sorted(set(reasons)),
    }


def run_all(
    steps: Sequence[Step],
    end: float,
    logs: Path,
    keep: Callable[[list[dict[str, Any]]], None],
) -> list[dict[str, Any]]:
    """Run the steps until `end` on the monotonic clock; `keep` gets the records after each."""
    records: list[dict[str, Any]] = []
    for i, step in enumerate(steps):
        left = end - time.monotonic()
        seconds = share(left, [s.weight for s in steps[i:] if s.limit is None])
        if step.limit is not None:
            seconds = min(step.limit, max(left, 0.0))
        print(f"[{i + 1}/{len(steps)}] {step.name} (at most {seconds:.0f} s) …", flush=True)
        record = execute(step, seconds, logs / f"{slug(step.name)}.log")
        records.append(record)
        print(f"      {line(record)}", flush=True)
        if record["status"] in ("failed", "out of time"):
            print("\n".join(f"      | {text}" for text in record.get("output", [])), flush=True)
        keep(records)
    return records


def line(record: dict[str, Any]) -> str:
    """A record's state in one line."""
    text = f"{record['status']}, {record['seconds']:.1f} s"
    if record["exit"]:
        text += f", exit status {record['exit']}"
    if "reason" in record:
        text += f": {record['reason']}"
    if "tests" in record:
        counts = record["tests"]["counts"]
        text += "".join(f", {n} {how.lower()}" for how, n in sorted(counts.items()))
        text += "".join(f" ({why})" for why in record["tests"]["skipped_because"][:3])
    for name, rows in record.get("result", {}).items():
        if isinstance(rows, list) and name not in ("failed", "left_out"):
            text += f", {len(rows)} {name}"
    return text


def bad(records: Sequence[dict[str, Any]]) -> list[str]:
    """The steps that did not end well."""
    return [r["name"] for r in records if r["status"] not in ("ok", "left out")]


def plan(gpu: bool, rehearse: bool, work: Path, capability: str | None = None) -> list[Step]:
    """The steps: all on a GPU; all on the CPU, tiny; or those that need no GPU."""
    python = sys.executable
    device = "cuda" if gpu else "cpu"
    interpreted = {} if gpu else {"TRITON_INTERPRET": "1"}
    archs = {}
    if capability and "SANM_CUDA_ARCHS" not in os.environ:  # for this GPU alone, to save time
        archs["SANM_CUDA_ARCHS"] = capability.replace(".", "")

    def part(name: str, result: str, tiny: bool) -> tuple[list[str], Path]:
        command = [python, "tests/operations.py", name, "--device", device]
        out = work / f"{result}.json"
        return [*command, *(["--tiny"] if tiny else []), "--out", str(out)], out

    def table(name: str, title: str, weight: float, tiny: bool) -> Step:
        command, out = part(name, name, tiny)
        return Step(title, command, weight, interpreted if tiny else {}, out)

    def pytest(title: str, weight: float, *files: str, workers: int, **environment: str) -> Step:
        words = ["-vv", "--tb=short", "-rfEs", "-p", "no:cacheprovider", *files]
        if workers > 1 and importlib.util.find_spec("xdist"):
            words += ["-n", str(min(workers, os.cpu_count() or 1)), "--dist", "worksteal"]
        if importlib.util.find_spec("pytest_timeout"):
            words += ["--timeout", "200"]
        return Step(title, [python, "-m", "pytest", *words], weight, environment)

    def sanitizer(tool: str) -> Step:
        command, out = part("exercise", f"exercise-{tool}", rehearse)
        program = shutil.which("compute-sanitizer")
        missing = None if program or rehearse else "compute-sanitizer is not on the PATH"
        if program and not rehearse:
            command = [program, "--tool", tool, "--target-processes", "application-only",
                       "--error-exitcode", str(FOUND_BY_SANITIZER), "--print-limit", "20",
                       # torch asks the driver for functions that it may lack, and does without
                       "--report-api-errors", "no",
                       *command]  # fmt: skip
        # Without torch's caching allocator an overrun leaves the allocation, and is seen.
        apart = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        return Step(
            f"compute-sanitizer {tool}", command, 45, apart | interpreted, out, left_out=missing
        )

    # Not a share: half a library makes a run of half the tests. Against the CPU seconds that the
    # sources take, on one core and on sixteen, this is plenty.
    build = Step("build", [python, "setup.py", "--quiet", "build_ext", "--inplace"], 0, archs,
                 limit=BUILD)  # fmt: skip
    first = table("probe", "probe", 50, tiny=rehearse)
    gpu_tests = pytest("tests of the GPU", 90, "tests/test_gpu.py", workers=8)
    if not gpu and not rehearse:
        return [build, first, gpu_tests, table("errors", "errors against float64, on the CPU", 60,
                                              tiny=False)]  # fmt: skip
    # Compiling ahead of time needs no GPU; interpreted, the kernels' tests take minutes.
    files = (ROOT / "tests/ops").glob("test_gpu_*.py" if gpu else "test_triton_compiles.py")
    kernels = sorted(str(path.relative_to(ROOT)) for path in files)
    by_triton = {"SANM_KERNELS_BACKEND": "triton"}

    def benchmarks(title: str, weight: float, *more: str) -> Step:
        out = work / f"{title}.json"
        words = ["--device", device, "--minutes", "{minutes}", "--out", str(out), *more]
        tiny = ["--quick", "--no-compile", "--despite-load"]
        words += tiny if rehearse else ["--seconds", "1.5", "--rounds", "3"]
        return Step(title, [python, "-m", "benchmarks.run", *words], weight, {}, out)

    return [
        build,
        first,
        gpu_tests,
        pytest("tests of the GPU, Triton", 70, "tests/test_gpu.py", workers=8, **by_triton),
        pytest("tests of the kernels", 130, *kernels, workers=14),
        table("errors", "errors against float64", 35, tiny=rehearse),
        table("launches", "launches per call", 30, tiny=rehearse),
        benchmarks("headline benchmarks", 70, "--headline"),
        sanitizer("memcheck"),
        sanitizer("racecheck"),
        benchmarks("benchmarks", 90),
    ]


def for_one(archs: dict[str, str]) -> str | None:
    """What to know of the CUDA library that the build leaves behind; None if nothing."""
    library = ROOT / "sanm_kernels/lib/cuda.so"
    if not archs or not library.is_file():
        return None
    return (
        f"{library.relative_to(ROOT)} now has code for sm_{archs['SANM_CUDA_ARCHS']} alone (and "
        "PTX for GPUs that are newer). For others, build it again with SANM_CUDA_ARCHS=all."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    add = parser.add_argument
    add("--minutes", type=float, default=11.5, help="for all steps together (default: 11.5)")
    add("--out", type=Path, metavar="FOLDER", help="for the JSON file and the logs; by default "
        "benchmarks/results and build/gpu")  # fmt: skip
    add("--rehearse", action="store_true", help="every step on the CPU, tiny, Triton's kernels "
        "interpreted; needs --out; shows that this script works, and nothing else")  # fmt: skip
    options = parser.parse_args(arguments)
    if options.rehearse and options.out is None:
        parser.error("--rehearse needs --out")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    began = time.monotonic()
    facts = environment()
    del facts["operators"]  # as they were before the build; the step info has them
    gpu = facts["gpu"] is not None and not options.rehearse
    name = facts["gpu"]["name"] if gpu else f"none {facts['device']}"
    if options.rehearse:
        name = f"rehearsal {facts['device']}"
    folder = options.out or HERE / "results"
    target = None if options.out is None and not gpu else folder / f"gpu-{slug(name)}.json"
    logs = ROOT / "build/gpu" if options.out is None else folder / f"gpu-{slug(name)}-logs"
    print(f"{name}; torch {facts['versions']['torch']}, triton {facts['versions']['triton']}, "
          f"CUDA {facts['cuda']}; commit {facts['commit']}")  # fmt: skip
    if not gpu:
        print("No GPU: " + ("a rehearsal on the CPU." if options.rehearse else
              "torch sees none here. Only the steps that need none are run, and nothing is "
              "written to benchmarks/results."))  # fmt: skip
    content: dict[str, Any] = {
        **facts,
        "dirty": facts["commit"].endswith("-changed"),
        "command": " ".join([Path(sys.executable).name, "-m", "benchmarks.gpu",
                             *(sys.argv[1:] if arguments is None else arguments)]),
        "rehearsal": options.rehearse,
        "minutes": options.minutes,
    }  # fmt: skip

    watch = Watch(despite=True)  # times on the device hardly depend on the host's load
    watch.keeps("before the first step")

    def keep(records: list[dict[str, Any]]) -> None:
        content["under_load"] = watch.found
        if target is not None:
            write(target, content | {"seconds": time.monotonic() - began, "steps": records})

    def look_and_keep(records: list[dict[str, Any]]) -> None:
        watch.keeps(records[-1]["name"])
        keep(records)

    with tempfile.TemporaryDirectory() as work:
        capability = facts["gpu"]["capability"] if gpu else None
        steps = plan(gpu, options.rehearse, Path(work), capability)
        content["planned"] = [step.name for step in steps]
        records = run_all(steps, began + 60 * options.minutes, logs, look_and_keep)
        content["left_behind"] = for_one(steps[0].environment)
    wrong = bad(records)
    code = FAILED if wrong else OK if gpu or options.rehearse else NO_GPU
    content["exit"] = code
    keep(records)

    print(f"\n{'step':38}{'state':>12}{'seconds':>9}{'limit':>8}")
    for r in records:
        print(f"{r['name']:38}{r['status']:>12}{r['seconds']:>9.1f}{r['limit']:>8.0f}")
    for record in records:
        for text in record.get("tests", {}).get("messages", []):
            print(f"  {text}")
    for record in records:
        for row in record.get("result", {}).get("probe", []):
            if not row.get("ok", True):
                print(f"  {record['name']}: {row.get('reason') or row}")
    if content["left_behind"]:
        print(content["left_behind"])
    print(f"\n{time.monotonic() - began:.0f} s; output of the steps: {logs}")
    if target is not None:
        print(f"written to {target}")
    if wrong:
        print(f"FAILED: {', '.join(wrong)}")
    if not gpu and not options.rehearse:
        print("There is no GPU here: nothing was measured, and what needs one is not tested.")
    return code


if __name__ == "__main__":
    sys.exit(main())
