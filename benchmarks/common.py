"""The table of shapes, what a case is, and the timer."""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import limit
from sanm_kernels import available_backends, backends, set_cpu_cache_limit

#: op → shapes, the smallest first; the arguments of `case` in bench_<op>.py.
SHAPES: dict[str, list[tuple[int, ...]]] = {
    "masked_forward": [  # B, C, h = w, H = W, K
        (128, 512, 4, 32, 10),
        (768, 512, 4, 32, 100),
        (32, 2048, 7, 224, 14),
        (64, 2048, 7, 224, 1000),
    ],
    "masked_loss": [(64, 10), (64, 100), (64, 1000)],  # B, K; 12·B rows of logits
    "fit_label_quality": [(50_000,), (1_000_000,)],  # N
    "mixup_views": [(12, 64, 3, 32, 768), (8, 32, 3, 224, 128)],  # views, B, C, H = W, rows
    "refine_targets": [(64, 10), (64, 100), (64, 1000)],  # B, K; four predictions
    "reconstruction_loss": [(128, 3, 32), (64, 3, 224)],  # B, C, H = W; two views
    "sample_loss": [(1024, 10), (1024, 100), (1024, 1000)],  # B, K
}
#: Those of them that are timed first where time is short.
HEADLINE: dict[str, list[tuple[int, ...]]] = {
    "masked_forward": SHAPES["masked_forward"][0::2],
    "masked_loss": SHAPES["masked_loss"][1:],
    "mixup_views": SHAPES["mixup_views"],
    "fit_label_quality": SHAPES["fit_label_quality"][1:],
}
OURS, COMPILED = "ours", "torch.compile"
CACHE = 2**28  # all buffer sets together hold this many bytes, several times the largest caches …
MAX_SETS = 2048  # … unless that takes more sets than this

Implementation = Callable[[Any], Sequence[Tensor]]


def serving(ops: Iterable[str], device: str) -> dict[str, str]:
    """The backend that serves each operator: what is timed as ours.

    Raises:
        RuntimeError: it is the reference for one of them, which is plain torch and no kernel.
    """
    served = {op: str(backends.select(op, torch.device(device), None)._overloadname) for op in ops}
    for op, backend in served.items():
        if backend == "reference":
            reasons = "; ".join(f"{k}: {v}" for k, v in available_backends().items() if v)
            raise RuntimeError(
                f"{op} on {device} tensors is served by the reference, which is plain torch and "
                f"not to be timed as ours. {reasons}. {backends.remedy()}"
            )
    return served


def close(a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
    """Raise AssertionError where two results differ by more than float32 rounding explains."""
    torch.testing.assert_close(list(a), list(b), rtol=1e-4, atol=1e-5, check_dtype=False)


@dataclass(frozen=True)
class Case:
    """One operator at one shape, done by us and by the baselines.

    Attributes:
        op, shape: what it is.
        make: draws one set of inputs.
        run: name → a function of one set of inputs, which is timed; `OURS` is the first.
        read, written: bytes that have to move however it is computed.
        agree: raises AssertionError where two results differ.
        less: names of baselines that do less than ours, so that their results cannot agree: they
            are run once, and only the shapes of what they return are compared.
        axis: which size varies in a series of cases, and its value.
    """

    op: str
    shape: str
    make: Callable[[], Any]
    run: dict[str, Implementation]
    read: int
    written: int
    agree: Callable[[Sequence[Tensor], Sequence[Tensor]], None] = close
    less: frozenset[str] = frozenset()
    axis: tuple[str, int] | None = None

    def sets(self, cache: int = CACHE, device: str = "cpu") -> list[Any]:
        """So many sets of inputs that none is in a cache when its turn comes again."""
        torch.manual_seed(0)
        count = -(-cache // (self.read + self.written))
        with torch.device(device):
            return [self.make() for _ in range(min(max(2, count), MAX_SETS))]

    def checked(self, inputs: Any) -> tuple[dict[str, Implementation], dict[str, str]]:
        """What may be timed, since it agrees with ours (of those in `less`: has ours' shapes); and
        why the rest can't be run here."""
        torch.compiler.reset()  # so that every case is compiled for its own shape
        expected = [x.clone() for x in self.run[OURS](inputs)]
        able, unable = {}, {}
        for name, function in self.run.items():
            try:
                result = function(inputs)
                if name in self.less:
                    shapes, wanted = ([tuple(x.shape) for x in r] for r in (result, expected))
                    assert shapes == wanted, f"shapes {shapes}, not {wanted}"
                else:
                    self.agree(expected, result)
                able[name] = function
            except ImportError as error:
                unable[name] = str(error)
            except AssertionError as error:
                raise AssertionError(f"{self.op}, {self.shape}, {name}: {error}") from error
            except RuntimeError as error:
                if name != COMPILED:
                    raise
                unable[name] = str(error).strip().partition("\n")[0]  # what the compiler said
        return able, unable


def cases(op: str, shapes: dict[str, list[tuple[int, ...]]] = SHAPES) -> Iterator[Case]:
    """The cases of ``bench_<op>.py``."""
    module = importlib.import_module(f"benchmarks.bench_{op}")
    yield from module.cases() if op not in shapes else (module.case(*s) for s in shapes[op])


def with_compiled(function: Callable[..., Any], call: Callable[..., Any]) -> dict[str, Any]:
    """Two baselines, `function` and torch.compile of it; `call(f, inputs)` runs either."""
    compiled = torch.compile(function, dynamic=False)
    return {"torch": lambda x: call(function, x), COMPILED: lambda x: call(compiled, x)}


def value_and_grad(loss: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """A loss () and its gradient at x."""
    return loss.detach(), torch.autograd.grad(loss, x)[0]


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
    sets = case.sets(cache, device)
    able, unable = case.checked(sets[0])
    copies = limit.copies(case.read, case.written, len(sets), device)
    calls = {name: (lambda i, f=f: f(sets[i])) for name, f in able.items()} | copies
    turn = 0
    clock: Any = wall_clock
    if device != "cpu":
        held = len(sets) * (case.read + case.written)
        clock = DeviceClock(held < 2 * torch.cuda.get_device_properties(0).L2_cache_size)

    def once(name: str) -> float:
        nonlocal turn
        turn = (turn + 1) % len(sets)
        return clock(name, lambda i=turn: calls[name](i))

    names = list(calls)
    first = {name: once(name) for name in names}
    for name in names:  # again, without what a first call does; not where that takes too long
        first[name] = min([first[name]] + [once(name) for _ in range(2 * (first[name] < seconds))])
    repeats = {name: min(round(max(first.values()) / first[name]), 16) for name in names}
    times: dict[str, list[list[float]]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    while len(times[OURS]) < rounds or time.perf_counter() < end:
        names.append(names.pop(0))  # so that nobody is always the first
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
            "over_ours": over(name, OURS),
            "over_limit": over(name, best),
            "allocated": peak(lambda f=able[name]: f(sets[0]), device) if name in able else None,
        }
        for name in calls
    }
    if device != "cpu":  # what the host needs to issue a call: the time of small ones in a row
        for name, result in results.items():
            result["host_seconds"] = quartiles(clock.host[name])
    keys = ("op", "shape", "axis", "read", "written")
    return {key: getattr(case, key) for key in keys} | {
        "sets": len(sets), "rounds": len(times[OURS]), "limit": best, "not_run": unable,
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
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = function()
    set_cpu_cache_limit(before)
    del result
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most
