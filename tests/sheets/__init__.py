"""One sheet an operator: what tests and benchmarks have to know of it.

A module of this package says so in its `SHEET`. All that is done with every operator is done with
`SHEETS`, which finds the modules.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from maker import Maker
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Inputs = dict[str, Tensor]
Implementation = Callable[[Any], Sequence[Tensor]]
OURS, COMPILED = "ours", "torch.compile"


@dataclass(frozen=True)
class Operation:
    """A public function as a call on named tensors.

    Attributes:
        op: the operator that serves it.
        make: sizes → inputs, float32.
        run: inputs, options such as `backend` → floating-point outputs by name.
        wrt: the inputs that the outputs are differentiable in.
        cast: the inputs that take the dtype under test; the others keep theirs.
        sizes: keyword arguments of `make` for a usual call; without them it is small and odd.
    """

    op: str
    make: Callable[..., Inputs]
    run: Callable[..., Inputs]
    wrt: tuple[str, ...]
    cast: tuple[str, ...]
    sizes: dict[str, int]


def close(a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
    """Raise AssertionError where two results differ by more than float32 rounding explains."""
    torch.testing.assert_close(list(a), list(b), rtol=1e-4, atol=1e-5, check_dtype=False)


@dataclass(frozen=True)
class Case:
    """An operator at one shape, for the benchmarks: done by us and by the baselines.

    Attributes:
        op, shape: what it is.
        make: draws one set of inputs.
        run: name → a function of one set of inputs, which is timed; `OURS` is the first.
        read, written: bytes that have to move however it is computed.
        samples: rows that a call is done for: images, predictions or losses.
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
    samples: int
    agree: Callable[[Sequence[Tensor], Sequence[Tensor]], None] = close
    less: frozenset[str] = frozenset()
    axis: tuple[str, int] | None = None


def with_compiled(function: Callable[..., Any], call: Callable[..., Any]) -> dict[str, Any]:
    """Two baselines, `function` and torch.compile of it; `call(f, inputs)` runs either."""
    compiled = torch.compile(function, dynamic=False)
    return {"torch": lambda x: call(function, x), COMPILED: lambda x: call(compiled, x)}


def value_and_grad(loss: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """A loss () and its gradient at x."""
    return loss.detach(), torch.autograd.grad(loss, x)[0]


@dataclass(frozen=True)
class Sheet:
    """Of one operator.

    Attributes:
        operations: its calls by name, for the tests of all backends and the tables of `make gpu`.
        random: fills in a random call, see maker.py.
        share: how many of about a hundred random calls are its.
        variants: calls that reach further branches of its kernels; with the others they are what
            direct_calls.py spoils and what is compiled for every GPU.
        compiled: sizes that Triton's kernels are compiled for; `compiled_large`: for the first of
            the operations alone.
        case: a shape → what is timed; `shapes`, the smallest first, and those of them that are
            timed first where time is short, in `headline`.
    """

    operations: dict[str, Operation]
    random: Callable[[Maker], None]
    share: int
    variants: dict[str, Operation] = field(default_factory=dict)
    compiled: Sequence[dict[str, int]] = ()
    compiled_large: Sequence[dict[str, int]] = ()
    case: Callable[..., Case] | None = None
    shapes: Sequence[tuple[int, ...]] = ()
    headline: Sequence[tuple[int, ...]] = ()


def inputs_of(
    operation: Operation, device: str, dtype: torch.dtype, seed: int = 0, **sizes: int
) -> Inputs:
    """The operation's inputs on a device, with those under test rounded to `dtype`."""
    torch.manual_seed(seed)
    made = operation.make(**sizes)
    return {
        name: (x.to(dtype) if name in operation.cast else x).to(device) for name, x in made.items()
    }


def wider(operation: Operation, x: Inputs) -> Inputs:
    """The same values in float64 on the CPU."""
    wide = {*operation.cast, *operation.wrt}
    return {name: v.cpu().double() if name in wide else v.cpu() for name, v in x.items()}


def slopes(out: Tensor) -> Tensor:
    """An upstream gradient that differs between the elements."""
    flat = torch.arange(out.numel(), device=out.device).remainder(7).sub(2.5)
    return flat.to(out.dtype).view(out.shape)


def with_gradients(
    operation: Operation, x: Inputs, run: Callable[..., Inputs] | None = None, **options: Any
) -> Inputs:
    """Outputs, and gradients as "d NAME", where each output arrives with its own slope."""
    x = dict(x)
    for name in operation.wrt:
        x[name] = x[name].detach().requires_grad_()
    outputs = (run or operation.run)(x, **options)
    results = {name: out.detach() for name, out in outputs.items()}
    if operation.wrt:
        total = sum((out * slopes(out)).sum() for out in outputs.values())
        gradients = torch.autograd.grad(total, [x[name] for name in operation.wrt])
        results |= {f"d {n}": g for n, g in zip(operation.wrt, gradients, strict=True)}
    return results


class Recorder(TorchDispatchMode):
    """Keeps the calls of this package's operators, with their names: those of backward too."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "sanm_kernels":
            self.calls.append((op.name().split("::")[1].partition(".")[0], op, args))
        return op(*args, **(kwargs or {}))


_found: dict[str, Sheet] = {
    module.name: importlib.import_module(f"{__name__}.{module.name}").SHEET
    for module in pkgutil.iter_modules(__path__)
}
#: Public function → its sheet, those with the most shares first; and all operations by name.
SHEETS = dict(sorted(_found.items(), key=lambda item: -item[1].share))
OPERATIONS = {name: o for sheet in SHEETS.values() for name, o in sheet.operations.items()}
VARIANTS = {name: o for sheet in SHEETS.values() for name, o in sheet.variants.items()}
