"""The table of shapes, a case to be timed, and the timer."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.limit import limits

OURS = "ours"
#: op → shapes, the smallest first.
SHAPES: dict[str, list[tuple[int, ...]]] = {
    "masked_forward": [  # B, C, h = w, H = W, K
        (128, 512, 4, 32, 10),
        (768, 512, 4, 32, 100),
        (32, 2048, 7, 224, 14),
        (64, 2048, 7, 224, 1000),
    ],
    "masked_loss": [(64, 10), (64, 100), (64, 1000)],  # B, K: 12·B rows of logits
    "fit_label_quality": [(50_000,), (1_000_000,)],  # N
    "mixup_views": [(12, 64, 3, 32, 768), (8, 32, 3, 224, 128)],  # views, B, C, H = W, rows mixed
    "refine_targets": [(64, 10), (64, 100), (64, 1000)],  # B, K, of four predictions
    "reconstruction_loss": [(128, 3, 32), (64, 3, 224)],  # B, C, H = W, of two views
    "sample_loss": [(1024, 10), (1024, 100), (1024, 1000)],  # B, K
}
CACHE = 2**28  # the buffer sets hold at least this many bytes, several times the largest caches …
MAX_SETS = 2048  # … unless they'd be more than this


@dataclass(frozen=True)
class Case:
    """One operator at one shape, done by us and by the baselines.

    Attributes:
        op, shape: what it is.
        make: makes one set of inputs, from a number.
        run: name → what is timed: a function of one set of inputs that returns tensors. `OURS` is
            the first, the rest have to agree with it.
        read, written: bytes that have to move however it is computed.
        agree: raises AssertionError where two results differ.
        axis: which size varies in a series of cases, and its value.
    """

    op: str
    shape: str
    make: Callable[[int], Any]
    run: Mapping[str, Callable[[Any], Sequence[Tensor]]]
    read: int
    written: int
    agree: Callable[[Sequence[Tensor], Sequence[Tensor]], None] = field(
        default=lambda a, b: torch.testing.assert_close(list(a), list(b), rtol=1e-4, atol=1e-5))
    axis: tuple[str, int] | None = None

    def sets(self, cache: int = CACHE) -> list[Any]:
        """So many sets of inputs that none is in a cache when its turn comes again."""
        count = min(max(2, -(-cache // (self.read + self.written))), MAX_SETS)
        return [self.make(i) for i in range(count)]

    def checked(self, inputs: Any) -> tuple[dict[str, Callable[[Any], Any]], dict[str, str]]:
        """What agrees with ours and so may be timed; and what can't be run here, with the reason."""
        torch.compiler.reset()  # one shape per compiled function
        expected = [x.clone() for x in self.run[OURS](inputs)]
        able, unable = {}, {}
        for name, function in self.run.items():
            try:
                result = function(inputs)
            except ImportError as error:
                unable[name] = str(error)
                continue
            try:
                self.agree(expected, result)
            except AssertionError as error:
                raise AssertionError(f"{self.op} {self.shape}: {name}: {error}") from error
            able[name] = function
        return able, unable


def with_compiled(function: Callable[..., Any],
                  call: Callable[[Callable[..., Any], Any], Sequence[Tensor]]) -> dict[str, Any]:
    """The baselines "torch" and "torch.compile" out of a function and how it is called on inputs."""
    compiled = torch.compile(function, dynamic=False)
    return {"torch": lambda x: call(function, x), "torch.compile": lambda x: call(compiled, x)}


def value_and_grad(loss: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """A loss () and its gradient at x."""
    return loss.detach(), torch.autograd.grad(loss, x)[0]


def measure(case: Case, seconds: float, min_rounds: int = 7,
            cache: int = CACHE) -> dict[str, Any]:
    """Check the case, then time all of it in turns; a record as it goes into the JSON file.

    In each round every implementation runs (the faster, the more often, up to 16 times), each call
    on the next buffer set. A ratio is the median over the rounds of the medians' ratio within a
    round, so that what slows the machine for a while slows both sides of it.
    """
    sets = case.sets(cache)
    able, unable = case.checked(sets[0])
    copies = limits(case.read, case.written, len(sets))
    turn = 0

    def once(name: str) -> float:
        nonlocal turn
        turn = (turn + 1) % len(sets)
        function, argument = (able[name], sets[turn]) if name in able else (copies[name], turn)
        start = time.perf_counter()
        result = function(argument)
        elapsed = time.perf_counter() - start
        del result  # freed outside the measured time
        return elapsed

    names = [*able, *copies]
    first = {name: min(once(name) for _ in range(3)) for name in names}
    slowest = max(first.values())
    repeats = {name: min(max(1, round(slowest / first[name])), 16) for name in names}
    times: dict[str, list[list[float]]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < min_rounds or time.perf_counter() < end:
        rounds += 1
        for k in range(len(names)):
            name = names[(k + rounds) % len(names)]  # nobody always follows the same other
            times[name].append([once(name) for _ in range(repeats[name])])
    gc.enable()

    medians = {name: [statistics.median(r) for r in times[name]] for name in names}
    limit = min(copies, key=lambda name: statistics.median(medians[name]))
    bytes_moved = case.read + case.written
    return {
        "op": case.op, "shape": case.shape, "axis": case.axis, "sets": len(sets),
        "rounds": rounds, "read": case.read, "written": case.written, "limit": limit,
        "not_run": unable,
        "results": {
            name: {
                "seconds": _quartiles([t for r in times[name] for t in r]),
                "gb_per_s": bytes_moved / statistics.median(medians[name]) / 1e9,
                "over_ours": _ratio(medians[name], medians[OURS]),
                "over_limit": _ratio(medians[name], medians[limit]),
                "allocated": peak(lambda f=able[name]: f(sets[0])) if name in able else None,
            }
            for name in names
        },
    }


def _quartiles(values: Sequence[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    return statistics.quantiles(values, n=4, method="inclusive")


def _ratio(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    return _quartiles([a / b for a, b in zip(numerators, denominators, strict=True)])


def peak(function: Callable[[], object]) -> int:
    """Bytes that torch had allocated at most during a call, its results included."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = function()
    del result
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most
