"""The cases that are timed, the timer, and the look for other load on the machine."""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from sheets import COMPILED, OURS, SHEETS, Case, Implementation

from benchmarks import limit
from sanm_kernels import available_backends, backends, set_cpu_cache_limit

#: Operators that are timed, and those of them that come first where time is short.
OPS = [op for op, sheet in SHEETS.items() if sheet.case is not None]
HEADLINE = [op for op in OPS if SHEETS[op].headline]
GROWTH = "growth"
CACHE = 2**28  # all buffer sets together hold this many bytes, several times the largest caches …
MAX_SETS = 2048  # … unless that takes more sets than this
TOLERATED = 0.2  # cores that other processes may take while figures are measured
LOADED = 3  # exit status where they took more, so that figures were not written


def serving(ops: Iterable[str], device: str) -> dict[str, str]:
    """The backend that serves each operator: what is timed as ours.

    Raises:
        RuntimeError: it is the reference for one of them, which is plain torch and no kernel.
    """
    served = {op: backends.serving(op, torch.device(device), None) for op in ops}
    for op, backend in served.items():
        if backend == "reference":
            reasons = "; ".join(f"{k}: {v}" for k, v in available_backends().items() if v)
            raise RuntimeError(
                f"{op} on {device} tensors is served by the reference, which is plain torch and "
                f"not to be timed as ours. {reasons}. {backends.remedy()}"
            )
    return served


def sets(case: Case, cache: int = CACHE, device: str = "cpu") -> list[Any]:
    """So many sets of inputs that none is in a cache when its turn comes again."""
    torch.manual_seed(0)
    count = -(-cache // (case.read + case.written))
    with torch.device(device):
        return [case.make() for _ in range(min(max(2, count), MAX_SETS))]


def checked(case: Case, inputs: Any) -> tuple[dict[str, Implementation], dict[str, str]]:
    """What may be timed, since it agrees with ours (of those in `less`: has ours' shapes); and
    why the rest can't be run here."""
    torch.compiler.reset()  # so that every case is compiled for its own shape
    expected = [x.clone() for x in case.run[OURS](inputs)]
    able, unable = {}, {}
    for name, function in case.run.items():
        try:
            result = function(inputs)
            if name in case.less:
                shapes, wanted = ([tuple(x.shape) for x in r] for r in (result, expected))
                assert shapes == wanted, f"shapes {shapes}, not {wanted}"
            else:
                case.agree(expected, result)
            able[name] = function
        except ImportError as error:
            unable[name] = str(error)
        except AssertionError as error:
            raise AssertionError(f"{case.op}, {case.shape}, {name}: {error}") from error
        except RuntimeError as error:
            if name != COMPILED:
                raise
            unable[name] = str(error).strip().partition("\n")[0]  # what the compiler said
    return able, unable


def cases(op: str, headline: bool = False) -> Iterator[Case]:
    """Those of an operator, as its sheet has them; or of `GROWTH`."""
    if op == GROWTH:
        yield from growth()
    else:
        sheet = SHEETS[op]
        assert sheet.case is not None
        yield from (sheet.case(*shape) for shape in (sheet.headline if headline else sheet.shapes))


def growth() -> Iterator[Case]:
    """Our time as one size grows and the others stay; `benchmarks.plot` draws it."""
    masked, loss, quality = (
        SHEETS[op].case for op in ("masked_forward", "masked_loss", "fit_label_quality")
    )
    assert masked and loss and quality
    series = [
        *((masked(B, 512, 4, 32, 10), "B", B) for B in (32, 64, 128, 256, 512, 1024)),
        *((masked(128, C, 4, 32, 10), "C", C) for C in (64, 128, 256, 512, 1024, 2048)),
        *((masked(32, 512, 4, H, 10), "H·W", H * H) for H in (32, 64, 96, 128, 192, 256)),
        *((loss(64, K), "K", K) for K in (10, 30, 100, 300, 1000, 3000)),
        *((quality(N), "N", N) for N in (30_000, 300_000, 3_000_000)),
    ]
    for case, name, size in series:
        yield replace(case, run={OURS: case.run[OURS]}, axis=(name, size))


def wall_clock(name: str, function: Callable[[], object]) -> float:
    """Seconds that a call takes on the CPU."""
    start = time.perf_counter()
    result = function()
    elapsed = time.perf_counter() - start
    del result  # freed outside the measured time
    return elapsed


class DeviceClock:
    """Seconds that a call takes on the GPU, between two events.

    The device is kept busy while the host issues the call, so that the host's own time, noted in
    `host`, does not show; it does where the host waits for the device or needs over `LONGEST`.
    """

    LONGEST = 1e-2
    CYCLES = 2e9  # per second, at least: the idling may be too long, but not too short

    def __init__(self, flush: bool) -> None:
        """`flush`: overwrite the level-2 cache before each call, where buffer sets are too few."""
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        size = torch.cuda.get_device_properties(0).L2_cache_size
        self.buffer = torch.empty(2 * size * flush, dtype=torch.int8, device="cuda")
        self.host: dict[str, list[float]] = {}

    def __call__(self, name: str, function: Callable[[], object]) -> float:
        known = self.host.setdefault(name, [])
        expected = min(statistics.median(known), self.LONGEST) if known else self.LONGEST
        torch.cuda.synchronize()
        self.buffer.zero_()
        torch.cuda._sleep(int(self.CYCLES * (1.5 * expected + 2e-5)))
        begin = time.perf_counter()
        self.start.record()
        result = function()
        self.end.record()
        known.append(time.perf_counter() - begin)
        torch.cuda.synchronize()
        del result
        return 1e-3 * self.start.elapsed_time(self.end)


def measure(
    case: Case, seconds: float, rounds: int = 7, cache: int = CACHE, device: str = "cpu"
) -> dict[str, Any]:
    """Check the case, then time all of it in turns; a record as it goes into the JSON file.

    In each of at least `rounds` rounds every implementation runs, the faster ones up to 16 times,
    each call on the next buffer set. A ratio is the median over the rounds of the ratio of the
    medians within a round: what slows the machine for a while slows both sides of it.
    """
    given = sets(case, cache, device)
    able, unable = checked(case, given[0])
    copies = limit.copies(case.read, case.written, len(given), device)
    calls = {name: (lambda i, f=f: f(given[i])) for name, f in able.items()} | copies
    turn = 0
    clock: Any = wall_clock
    if device != "cpu":
        held = len(given) * (case.read + case.written)
        clock = DeviceClock(held < 2 * torch.cuda.get_device_properties(0).L2_cache_size)

    def once(name: str) -> float:
        nonlocal turn
        turn = (turn + 1) % len(given)
        return clock(name, lambda i=turn: calls[name](i))

    names = list(calls)
    first = {name: once(name) for name in names}
    for name in names:  # again, without what a first call does; not where that takes too long
        first[name] = min([first[name]] + [once(name) for _ in range(2 * (first[name] < seconds))])
    repeats = {name: min(round(max(first.values()) / first[name]), 16) for name in names}
    times: dict[str, list[list[float]]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    while len(times[OURS]) < rounds or time.perf_counter() < end:
        names.append(names.pop(0))  # so that none is always the first
        for name in names:
            times[name].append([once(name) for _ in range(repeats[name])])

    medians = {name: [statistics.median(r) for r in times[name]] for name in calls}
    best = min(copies, key=lambda name: statistics.median(medians[name]))

    def over(name: str, other: str) -> list[float]:
        return quartiles([a / b for a, b in zip(medians[name], medians[other], strict=True)])

    results = {
        name: {
            "seconds": quartiles([t for r in times[name] for t in r]),
            "gb_per_s": (case.read + case.written) / statistics.median(medians[name]) / 1e9,
            "samples_per_s": case.samples / statistics.median(medians[name]),
            "over_ours": over(name, OURS),
            "over_limit": over(name, best),
            "allocated": peak(lambda f=able[name]: f(given[0]), device) if name in able else None,
        }
        for name in calls
    }
    if device != "cpu":  # what the host needs to issue a call: the time of small ones in a row
        for name, result in results.items():
            result["host_seconds"] = quartiles(clock.host[name])
    keys = ("op", "shape", "axis", "read", "written", "samples")
    return {key: getattr(case, key) for key in keys} | {
        "sets": len(given), "rounds": len(times[OURS]), "limit": best, "not_run": unable,
        "less": sorted(case.less), "results": results,
    }  # fmt: skip


def quartiles(values: Sequence[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    return statistics.quantiles(values, n=4, method="inclusive")


def peak(function: Callable[[], object], device: str = "cpu") -> int:
    """Bytes that torch had allocated at most during a call, its results included."""
    if device != "cpu":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    before = set_cpu_cache_limit(0)  # torch does not see memory that is kept for the next result
    with quiet(), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = function()
    set_cpu_cache_limit(before)
    del result
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drops what is written to the process's standard error, past Python's.

    The profiler says there when it starts and stops, and that it did not see all memory.
    """
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def descendants(process: int) -> list[int]:
    """A process and all that came of it, also in other sessions, as far as its parents live."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            parent = stat.read_text().rpartition(")")[2].split()[1]
            children.setdefault(int(parent), []).append(int(stat.parent.name))
    found = [process]
    for one in found:
        found += children.get(one, [])
    return found


def cpu_seconds() -> tuple[float, float]:
    """CPU time so far: of the whole machine; of this process and its descendants."""
    user, nice, system, _, _, *others = map(int, Path("/proc/stat").read_text().split()[1:9])
    own = 0
    for process in descendants(os.getpid()):
        with contextlib.suppress(OSError):
            values = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
            own += sum(map(int, values[11:15]))  # its own, and of children that have ended
    tick = os.sysconf("SC_CLK_TCK")
    return (user + nice + system + sum(others)) / tick, own / tick


class Watch:
    """The load that other processes put on the CPU, which spoils figures.

    A second process that computes delays every parallel loop until it leaves its core.

    Attributes:
        found: what was measured under load → the cores that other processes took.
        refused: whether something was not kept because of it.
    """

    def __init__(self, despite: bool, seconds: float = 1.0) -> None:
        """Look for so many seconds; the first `keeps` says what was seen. `despite`: keep all."""
        self.despite, self.refused = despite, False
        self.found: dict[str, float] = {}
        self.last = (time.monotonic(), *cpu_seconds())
        time.sleep(seconds)

    def keeps(self, what: str) -> bool:
        """Whether to keep what was measured since the last look; says so if there was load."""
        now = (time.monotonic(), *cpu_seconds())
        elapsed, everything, own = (b - a for a, b in zip(self.last, now, strict=True))
        self.last, load = now, (everything - own) / elapsed
        if load <= TOLERATED:
            return True
        self.found[what] = round(load, 2)
        self.refused |= not self.despite
        refusal = "" if self.despite else "; not written (--despite-load writes it, marked)"
        cores = f"{load:.1f} of {os.cpu_count()} cores"
        print(f"\n{what}: other processes took {cores}{refusal}", flush=True)
        return self.despite


def add_despite_load(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--despite-load", action="store_true", help="write figures also where "
                        "other processes computed meanwhile, and mark the file")  # fmt: skip
