"""Argument checks shared by the public functions: kinds, shapes, dtypes, devices.

Values are checked where the data is read (`reference.checks` and its C++ twin).
"""

from __future__ import annotations

import functools
import inspect
import operator
import struct
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import numpy
import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
#: How many kinds of calls a check remembers.
MOST_KINDS = 256
#: In the message of a RuntimeError of compiled kernels: there is no memory.
MEMORY_MARK = "[sanm_kernels:memory] "


def public(function: Callable[P, R]) -> Callable[P, R]:
    """A function of the public interface, which `sanm_kernels.__all__` has to list.

    Where there is no memory it raises OutOfMemoryError, which says what the call was given.
    """

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except (RuntimeError, MemoryError) as error:
            _, memory, message = str(error).partition(MEMORY_MARK)
            if not memory and not isinstance(error, MemoryError):
                raise
            asked = message.splitlines()[0] if memory else "no memory for what is kept on the way"
            given = inspect.signature(function).bind(*args, **kwargs).arguments
            sizes = ", ".join(_sized(*item) for item in given.items())
            raise torch.OutOfMemoryError(f"{function.__name__}: {asked}, with {sizes}") from None

    return wrapper


def by_kinds(*constants: type) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """For a check that sees no values or strides of tensors: it is run once for calls alike.

    Later ones get what it returned for the first, at the price of a look into a dictionary. Alike
    are calls whose tensors have the same shapes, dtypes, devices and layouts, and whose other
    arguments are equal numbers, strings or None, sequences of these, or equal instances of
    `constants`, which never change. With any other argument the check is run each time.
    """
    plain_types: tuple[type, ...] = (int, float, str, type(None), *constants)
    exactly = frozenset(plain_types)  # what most are, and quicker to tell

    def kind(x: Any) -> Any:
        if type(x) in exactly:
            return type(x), x
        if isinstance(x, Tensor):
            return x.shape, x.dtype, x.device, x.layout
        if isinstance(x, plain_types):
            return type(x), x
        if isinstance(x, (tuple, list)):
            return type(x), *map(kind, x)
        raise TypeError

    def decorate(check: Callable[..., R]) -> Callable[..., R]:
        passed: dict[Any, R] = {}

        @functools.wraps(check)
        def checked(*arguments: Any) -> R:
            if torch.compiler.is_compiling():
                return check(*arguments)
            try:
                kinds = tuple([None if x is None else kind(x) for x in arguments])
                return passed[kinds]
            except KeyError:
                pass
            except TypeError:  # an argument without a kind, or with a symbolic one
                kinds = None
            result = check(*arguments)
            if kinds is not None:
                if len(passed) >= MOST_KINDS:
                    passed.clear()
                passed[kinds] = result
            return result

        return checked

    return decorate


def _sized(name: str, x: object) -> str:
    """An argument as a message about memory has it."""
    if isinstance(x, Tensor):
        return f"{name} {list(x.shape)}"
    if isinstance(x, (list, tuple)) and any(isinstance(item, Tensor) for item in x):
        return f"{name} ({', '.join(_sized('', item).strip() for item in x)})"
    return f"{name} {x!r}"


def is_tensor(x: Any, name: str) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    if x.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense torch.Tensor, got one of layout {x.layout}")
    return x


def tensors(x: object, name: str, what: str) -> list[Tensor]:
    """A tensor or a non-empty sequence of tensors, as a list."""
    if isinstance(x, Tensor):
        return [x]
    if not isinstance(x, Sequence) or isinstance(x, str):
        raise TypeError(f"{name}: expected {what}, got {type(x).__name__}")
    if not x:
        raise ValueError(f"{name}: expected at least one tensor, got none")
    return [is_tensor(item, f"{name}[{i}]") for i, item in enumerate(x)]


def floating(x: Any, name: str, dims: int | None = None, *, shape: str = "") -> Tensor:
    """`x` is a floating-point tensor of `dims` dimensions; `shape` spells them in the message."""
    x = is_tensor(x, name)
    if x.dtype not in FLOATS:
        raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {x.dtype}")
    if dims is not None and x.dim() != dims:
        raise ValueError(f"{name}: expected shape {shape}, got {list(x.shape)}")
    return x


def quality(x: Any, name: str = "clean_prob") -> Tensor:
    """`x` is a floating-point tensor (B,) or, as scripts have it, (B, 1); returned as (B,)."""
    x = floating(x, name)
    if x.dim() == 2 and x.shape[1] == 1:
        return row(x)
    return floating(x, name, 1, shape="(B,) or (B, 1)")


def row(x: Tensor) -> Tensor:
    """(B,), or (B, 1) as (B,)."""
    return x if x.dim() == 1 else x.select(1, 0)


def integer(x: Any, name: str, dims: int = 1, *, shape: str = "(B,)") -> Tensor:
    """`x` is an integer tensor of `dims` dimensions; returned as int64."""
    x = is_tensor(x, name)
    if x.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise TypeError(f"{name}: expected an integer dtype such as torch.int64, got {x.dtype}")
    if x.dim() != dims:
        raise ValueError(f"{name}: expected shape {shape}, got {list(x.shape)}")
    return int64(x)


def of_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in `dtype`; `to` takes time even where there is nothing to do."""
    return x if x.dtype is dtype else x.to(dtype)


def int64(x: Tensor) -> Tensor:
    return of_dtype(x, torch.int64)


def detached(x: Tensor) -> Tensor:
    """`x` without its gradient; so does `detach`."""
    return x.detach() if x.requires_grad else x


def same_device(x: Tensor, name: str, device: torch.device, other: str) -> None:
    if x.device != device:
        raise ValueError(
            f"{name}: expected a tensor on {device}, where {other} is, got one on {x.device}"
        )


def length(x: Tensor, name: str, expected: int, what: str) -> None:
    """The first dimension of `x` is `expected`, which is `what`."""
    if x.shape[0] != expected:
        raise ValueError(f"{name}: expected {expected} rows ({what}), got {x.shape[0]}")


def plain(x: Any) -> Any:
    """A NumPy scalar as Python's number; all else as it is."""
    return x.item() if isinstance(x, (numpy.integer, numpy.floating)) else x


def number(x: Any, name: str, low: float | None = None, high: float | None = None) -> float:
    """`x` as a float in [low, high]; a number or a 0-d CPU tensor."""
    if isinstance(x, Tensor) and x.dim() == 0:
        if x.device.type != "cpu":
            raise ValueError(
                f"{name}: expected a number or a tensor on the CPU or where the other tensors are, "
                f"got one on {x.device}"
            )
        x = x.item()
    x = plain(x)
    if isinstance(x, bool) or not isinstance(x, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name}: expected a number, got {type(x).__name__}")
    if (low is not None and not x >= low) or (high is not None and not x <= high) or x != x:
        bounds = f"[{'-inf' if low is None else low}, {'inf' if high is None else high}]"
        raise ValueError(f"{name}: expected a number in {bounds}, got {x}")
    return x  # type: ignore[return-value]


def scheduled(
    x: Any, name: str, device: torch.device, low: float | None = None, high: float | None = None
) -> float | Tensor:
    """A number in [low, high] that may change from call to call.

    A 0-d tensor on `device`, or any while torch.compile traces, stays a tensor, its value unchecked
    and without its gradient: reading it would synchronise, or break the graph.
    """
    if type(x) is float and x == x and (low is None or x >= low) and (high is None or x <= high):
        return x  # at once
    if torch.compiler.is_compiling() and isinstance(x, (numpy.ndarray, numpy.generic)):
        x = torch.as_tensor(x)  # which is how a trace sees NumPy's numbers
    if isinstance(x, Tensor) and x.dim() == 0 and x.dtype != torch.bool and not x.is_complex():
        traced = torch.compiler.is_compiling() and x.device.type == "cpu"
        if traced or (x.device == device and device.type != "cpu"):
            return x.detach()
    return number(x, name, low, high)


def scalars(on: Tensor, *values: float | Tensor) -> Tensor:
    """Run-time numbers as a float64 tensor: as float arguments they'd be compiled in as constants.

    Python numbers stay on the CPU: kernels get them as arguments of the launch. Where one is a
    tensor on the device of `on`, and in a trace, all are there: kernels read them when they run,
    and so do those of a CUDA graph each time it is replayed.
    """
    if torch.compiler.is_compiling():
        one = torch.ones((), dtype=torch.float64, device="cpu")
        parts = [x if isinstance(x, Tensor) else one * x for x in values]
        if any(x.device.type != "cpu" for x in parts):
            parts = [x.to(on.device, non_blocking=True) for x in parts]
        return torch.stack([x.to(torch.float64) for x in parts]).to(on.device, non_blocking=True)
    if not _NUMBERS.issuperset(map(type, values)):
        options: dict[str, Any] = {"dtype": torch.float64, "device": on.device}
        return torch.stack(
            [x.to(torch.float64) if isinstance(x, Tensor) else torch.full((), x, **options)
             for x in values]
        )  # fmt: skip
    if type(on) is not Tensor or torch.is_inference_mode_enabled():
        # one for FakeTensorMode, one for inference alone
        return torch.tensor(values, dtype=torch.float64, device="cpu")
    return _float64(_bits(len(values)).pack(*values))


_NUMBERS = frozenset((float, int))
_bits = functools.lru_cache(lambda count: struct.Struct(f"{count}d"))


@functools.lru_cache(maxsize=MOST_KINDS)
def _float64(bits: bytes) -> Tensor:
    """A tensor of these numbers, kept as making it is slow; nothing writes to it."""
    return torch.frombuffer(bytearray(bits), dtype=torch.float64)


def whole(x: Any, name: str, low: int = -(2**63), high: int = 2**63) -> int:
    """`x` as an int in [low, high)."""
    x = plain(x)
    if isinstance(x, bool) or not isinstance(x, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an int, got {type(x).__name__}")
    if not low <= x < high:
        expected = f"in [{low}, {high})" if high < 2**63 else f"of 64 bits, at least {low}"
        raise ValueError(f"{name}: expected an int {expected}, got {x}")
    return operator.index(x)  # a plain int also where torch.compile traces a symbolic one


def count(x: Any, name: str, most: int) -> int:
    """`x` as an int in [0, most], symbolic where torch.compile traces one; kernels check it too."""
    x = plain(x)
    if isinstance(x, bool) or not isinstance(x, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an int, got {type(x).__name__}")
    if known(x < 0) or known(x > most):
        raise ValueError(f"{name}: expected a number in [0, {most}], got {x}")
    return x  # type: ignore[return-value]


def known(condition: Any) -> bool:
    """Whether `condition`, of sizes, holds; in a trace, whether it does for all that they may be.

    In a trace a plain comparison would specialise symbolic sizes on its present outcome.
    """
    if not torch.compiler.is_compiling():
        return bool(condition)
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # slow to import

    return bool(statically_known_true(condition))


def one_of(x: Any, name: str, allowed: tuple[str, ...]) -> str:
    if x not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {x!r}")
    return str(x)


def permutation(x: Any, name: str, rows: int, device: torch.device, other: str) -> None:
    """Integers (≥ rows,) on `device`."""
    x = integer(x, name, shape="(at least one entry per row,)")
    same_device(x, name, device, other)
    if known(x.shape[0] < rows):
        raise ValueError(f"{name}: expected at least {rows} entries, got {x.shape[0]}")
