"""What a function of somebody's script computes, found out by calling it beside one of ours."""

from __future__ import annotations

import contextlib
import math
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from inspect import Parameter
from typing import Any

import numpy as np
import torch
from torch import Tensor

REPLACED, KEPT, NOT_VERIFIED = "replaced", "kept", "not verified"
Arguments = tuple[Any, ...]
#: Of tensors that are the same whatever torch's defaults are.
_USUAL: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
_EXACT: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
#: How far results may be apart: relative to the largest value, and absolute.
EXACT, ROUNDING, POSTERIOR = (0.0, 0.0), (4e-6, 5e-7), (0.0, 1e-5)


@dataclass(frozen=True)
class Finding:
    """What :func:`patch` found out about one name, and did.

    Attributes:
        name: of the script's function or class.
        state: "replaced"; "kept", since it computes something else; "not verified", and so kept,
            since it cannot be called. With ``force=True`` "replaced" whatever `differences` say.
        reason: why, or as what and where else it was replaced; "" if there is nothing to say.
        differences: for every output that was compared its largest difference; infinite where it
            is of another kind, NaN where one of the two is NaN.
    """

    name: str
    state: str
    reason: str = ""
    differences: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name} {self.state}" + f": {self.reason}" * bool(self.reason)


class StandIn:
    """Takes a tensor's place in a call of which only what does not depend on it is wanted.

    Any operation gives the stand-in itself, in microseconds; none gives a number or a bool.
    """

    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> StandIn:
        return STAND_IN

    def __getattr__(self, name: str) -> StandIn:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *_: Any, **__: Any) -> StandIn:
        return self

    def __bool__(self) -> bool:
        raise TypeError("it depends on the tensors")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __matmul__ = __call__
    __truediv__ = __rtruediv__ = __pow__ = __neg__ = __getitem__ = __abs__ = __call__
    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = __call__  # type: ignore[assignment]
    __hash__, __iter__ = object.__hash__, None


STAND_IN = StandIn()


def own(original: Any, self: Any, more: Arguments, named: dict[str, Any]) -> list[Any] | None:
    """What a SemiLoss returns after its two losses, without computing these; None if in vain."""
    values = (*more, *named.values())
    if any(isinstance(x, bool) or not isinstance(x, (int, float, np.number)) for x in values):
        return None  # a mode or a tensor, on which the losses may depend
    try:
        first, second, *rest = original(self, *(STAND_IN,) * 4, *more, **named)
    except Exception:  # it looks into the tensors; or the call is wrong, and will be said to be
        return None
    alone = first is second is STAND_IN and all(x is not STAND_IN for x in rest)
    return rest if alone else None


@contextlib.contextmanager
def untouched() -> Iterator[None]:
    """Restores the states of all random generators afterwards."""
    states = random.getstate(), np.random.get_state()
    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    with torch.random.fork_rng(gpus), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def devices() -> list[str]:
    return ["cpu", "cuda"][: 1 + torch.cuda.is_available()]


def seed() -> None:
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)


def observe(function: Any, arguments: Arguments, names: Sequence[str]) -> dict[str, Any]:
    """All that a call does: results, gradients, its arguments and the random numbers afterwards."""
    given = [
        x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x
        for x in arguments
    ]
    seed()
    result = function(*given)
    results = result if isinstance(result, tuple) else (result,)
    seen = {names[i] if i < len(names) else f"result {i + 1}": r for i, r in enumerate(results)}
    leaves = {i: x for i, x in enumerate(given, 1) if isinstance(x, Tensor) and x.requires_grad}
    roots = [r for r in results if isinstance(r, Tensor) and r.requires_grad]
    if leaves and roots:
        totals = [i * r.sum() for i, r in enumerate(roots, 1)]
        gradients = torch.autograd.grad(totals, list(leaves.values()), allow_unused=True)
        seen |= {f"gradient {i}": g for i, g in zip(leaves, gradients, strict=True)}
    seen |= {f"argument {i}": x.detach() for i, x in enumerate(given, 1) if isinstance(x, Tensor)}
    drawn = random.random(), np.random.random(), torch.rand((), device="cpu").item()
    return seen | {"random state": torch.tensor(drawn, **_EXACT)}


def difference(expected: Any, got: Any, apart: tuple[float, float]) -> tuple[float, bool]:
    """The largest difference, and whether they may be so far `apart`."""
    if isinstance(expected, (int, float, np.number)) and isinstance(got, (int, float, np.number)):
        expected, got = (torch.tensor(float(x), **_EXACT) for x in (expected, got))
    if not (isinstance(expected, Tensor) and isinstance(got, Tensor)):
        same = type(expected) is type(got) and bool(expected == got)
        return (0.0 if same else math.inf), same
    if (expected.shape, expected.dtype, expected.device) != (got.shape, got.dtype, got.device):
        return math.inf, False
    if torch.equal(expected, got):
        return 0.0, True
    a, b = expected.detach().double(), got.detach().double()
    equal = (a == b) | (a.isnan() & b.isnan())
    most = torch.where(equal, 0, (a - b).abs()).flatten().cpu()
    largest = float(most.max()) if most.numel() else 0.0
    scale = float(a[a.isfinite()].abs().max()) if a.isfinite().any() else 0.0
    return largest, largest <= apart[0] * scale + apart[1]


def verify(
    name: str,
    original: Any,
    ours: Any,
    inputs: Callable[[str], Iterable[Arguments]],
    names: Sequence[str],
    apart: tuple[float, float],
) -> Finding:
    """Compare them on the CPU and, where there is one, a GPU, if the original can be called."""
    why, tried = "", False
    worst: dict[str, float] = {}
    beyond: dict[str, float] = {}
    with untouched():
        for device in devices():
            for turn, arguments in enumerate(inputs(device)):
                try:
                    expected = observe(original, arguments, names)
                except Exception as error:
                    why = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
                    if turn:  # it took a call like this one
                        return Finding(name, NOT_VERIFIED, why, worst)
                    break
                tried = True
                try:
                    got = observe(ours, arguments, names)
                except Exception as error:
                    why = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
                    return Finding(name, KEPT, f"ours refuses a call that it takes: {why}", worst)
                for key in {**expected, **got}:
                    found, fits = difference(expected.get(key), got.get(key), apart)
                    if key not in worst or not found <= worst[key]:
                        worst[key] = found
                    if not fits:
                        beyond[key] = worst[key]
    if not tried:
        return Finding(name, NOT_VERIFIED, why)
    if beyond:
        text = ", ".join(
            f"{key} is of another kind" if found == math.inf else f"{key} differs by {found:.1e}"
            for key, found in beyond.items()
        )
        return Finding(name, KEPT, text, worst)
    return Finding(name, REPLACED, "", worst)


#: Permuted and put into features of zeros and ones, they leave nothing to be rounded up to the 256
#: levels, as the sum of their squares is a power of four: all devices find the same peaks.
_ENERGIES = (0, 1, 2, 3, 3, 4, 5, 5, 6, 7, 8, 10, 11, 12, 14, 15)


def masking_inputs(device: str, column: bool, soft: bool) -> Iterator[Arguments]:
    """images, outputs, gmmweight (B, 1) if `column`, and target_mask if `soft`."""
    g = torch.Generator("cpu").manual_seed(1)
    batch = 20
    order = torch.stack([torch.randperm(16, generator=g, device="cpu") for _ in range(batch)])
    energy = torch.tensor(_ENERGIES, device="cpu")[order].view(batch, 1, 4, 4)
    maps = [(torch.arange(15, device="cpu").view(15, 1, 1) < energy).float()]
    if device == "cpu":  # elsewhere rounding may decide between neighbouring pixels
        maps.append(torch.randn(batch, 64, 4, 4, generator=g, **_USUAL).relu())
    for features in maps:
        images = torch.rand(batch, 3, 32, 32, generator=g, **_USUAL)
        quality = torch.rand(batch, 1, generator=g, **_USUAL)
        targets = torch.softmax(3 * torch.randn(batch, 10, generator=g, **_USUAL), 1)
        given = images, features, quality if column else quality[:, 0], targets
        yield tuple(x.to(device) for x in given[: 3 + soft])


def recognised(original: Any, column: bool) -> dict[str, float]:
    """γ and the range of the ratios of a masking function, found out by calling it, if they can be.

    The ratio r = a + γ·(1 − q) is what a label of 0 loses; a is linear in the sample's first draw,
    of eight.
    """

    def ratios(quality: float) -> list[float]:
        for device in devices():
            images, features, q, targets = next(masking_inputs(device, column, True))
            targets = torch.full_like(targets, -1.0)
            targets[:, 0] = 0
            seed()
            with contextlib.suppress(Exception):
                changed = original(images, features, torch.full_like(q, quality), targets)[2]
                return [-float(x) for x in changed[:, 0]]
        return []

    with untouched():
        clean, noisy = ratios(1.0), ratios(0.0)
        seed()
        draws = [random.random() for _ in range(8 * len(clean))][::8]
    if not clean or not noisy:
        return {}
    i, j = draws.index(min(draws)), draws.index(max(draws))
    span = (clean[j] - clean[i]) / (draws[j] - draws[i])
    return {
        "ratio_low": round(clean[i] - span * draws[i], 6),
        "ratio_high": round(clean[i] + span * (1 - draws[i]), 6),
        "ratio_gamma": round(noisy[0] - clean[0], 6),
    }


def number(name: str, turn: int) -> float:
    """A value for a criterion's argument, told by its name: before, in and after the ramp."""
    if "warm" in name:
        return 10
    return (4, 14.25, 290)[turn] if "epoch" in name or "current" in name else 25 * (turn + 1)


def criterion_inputs(
    device: str, more: Sequence[Parameter], semi: bool, K: int
) -> Iterator[Arguments]:
    """Logits and targets, twice, and `more`; or, if not `semi`, logits. Rows up to very certain."""
    g = torch.Generator("cpu").manual_seed(1)
    for turn, scale in enumerate((1, 8, 60)):
        tensors: list[Tensor] = []
        for rows in (5, 7)[: 1 + semi]:
            logits = torch.randn(rows, K, generator=g, **_USUAL)
            logits[:, 0] += scale
            targets = torch.softmax(3 * torch.randn(rows, K, generator=g, **_USUAL), 1)
            tensors += [logits, targets][: 1 + semi]
        extra = [
            number(p.name, turn)
            for p in more
            if p.default is p.empty or (turn and type(p.default) in (int, float))
        ]
        moved = [x.to(device).requires_grad_(i % 2 == 0) for i, x in enumerate(tensors)]
        yield (*moved, *extra)


def mixture_inputs(device: str) -> Iterator[Arguments]:
    """Normalised losses (N, 1), as the scripts and as others have them."""
    if device != "cpu":
        return
    g = np.random.RandomState(1)
    for N in (1000, 10_000):
        x = np.concatenate([g.exponential(0.05, N // 2), abs(g.normal(0.5, 0.15, N // 2))])
        x = g.permutation((x - x.min()) / (x.max() - x.min()))[:, None]
        yield (x,)
        yield (torch.from_numpy(x).float(),)
        if N == 1000:  # the more there are, the less scikit-learn's own float32 sums are worth
            yield (x.astype(np.float32),)


def mixture_results(cls: Any, losses: Any) -> Arguments:
    """What a script takes from a mixture, as tensors, and n_iter_ and converged_."""
    found = cls(n_components=2, max_iter=10, tol=1e-2, reg_covar=5e-4).fit(losses)
    arrays = [found.predict_proba(losses), found.predict(losses), found.means_]
    arrays += [found.covariances_, found.weights_]
    return *map(torch.from_numpy, arrays), found.n_iter_, found.converged_


def collection_inputs(device: str, K: int) -> Iterator[Arguments]:
    """Logits and labels of a batch, as in evaluation and as in training."""
    g = torch.Generator("cpu").manual_seed(1)
    for training in (False, True):
        logits, labels = (
            8 * torch.randn(64, K, generator=g, **_USUAL),
            torch.arange(64, device="cpu") % K,
        )
        yield logits.to(device).requires_grad_(training), labels.to(device)
