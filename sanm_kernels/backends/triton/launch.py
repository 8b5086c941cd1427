"""How a Triton kernel is registered, configured and launched: for all of them the same way."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from sanm_kernels.backends.triton import tune
from sanm_kernels.ops.base import library, without_autocast

#: Whether kernels run on the CPU, through Triton's interpreter (TRITON_INTERPRET=1).
INTERPRETED: bool = knobs.runtime.interpret
#: Rows that a program holds at most: what it knows of a row stands in several threads' registers.
MOST_ROWS = 32

_recorded: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] | None = None
_every_row = False


def options(backend: str) -> dict[str, Any]:
    """How every kernel is compiled for Triton's `backend`, "cuda" or "hip".

    Products and sums are not contracted. Left to itself ptxas spills a few registers to fit more
    programs; Triton's other backends refuse its limit, and with it the launch.
    """
    return {"enable_fp_fusion": False} | ({"maxnreg": 128} if backend == "cuda" else {})


@functools.cache
def _own_options() -> dict[str, Any]:
    """Those of the GPUs here: a process has one kind."""
    return options("cuda" if INTERPRETED else driver.active.get_current_target().backend)


def implements(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a launcher as the Triton kernel of operator `op`.

    It runs on the GPU of its first tensor that is on one and, as every Triton launch, on that
    device's current stream. Autocast does not reach into it.
    """

    def register(launcher: Callable[..., Any]) -> Callable[..., Any]:
        plain = without_autocast(launcher)

        @functools.wraps(launcher)
        def run(*arguments: Any) -> Any:
            with torch.cuda._DeviceGuard(_gpu(arguments)):  # a tenth of torch.cuda.device's time
                return (plain if torch.is_autocast_enabled("cuda") else launcher)(*arguments)

        library.impl(f"{op}.triton", run, "CUDA")
        if INTERPRETED:
            library.impl(f"{op}.triton", plain, "CPU")
        return launcher

    return register


def _gpu(arguments: tuple[Any, ...]) -> int:
    """The index of the first tensor's that is on a GPU; numbers may come in tensors on the CPU."""
    return next(
        t.get_device()
        for a in arguments
        for t in (a if isinstance(a, list) else (a,))
        if isinstance(t, Tensor) and t.is_cuda
    )


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **meta: Any) -> None:
    """Launch `kernel` on `grid` programs; an empty grid launches nothing.

    `meta`: constexpr arguments, num_warps and num_stages. A product and a sum are never contracted
    into one rounding unless a kernel says so (`numeric.fma`): results equal the other backends' to
    the last bit.
    """
    if 0 in grid:
        return
    if _recorded is not None:
        _recorded.append((kernel, arguments, meta))
        return
    kernel[grid](*arguments, **meta, **_own_options())


def launch_tuned(name: str, bucket: int, x: Tensor, go: Callable[[dict[str, int]], None]) -> None:
    """Launch through `go(config)` with the configuration of kernel `name` for size `bucket`.

    `name` and `bucket` as in `tune.TABLE`; `x` is a tensor on the device. `go` may be called
    several times with several configurations, so it must write outputs only.
    """
    if _recorded is not None:
        for _, config in tune.rows(name, 0):
            if _every_row or config == tune.choose(name, bucket, x, go):
                go(config)
        return
    go(tune.choose(name, bucket, x, go))


@contextlib.contextmanager
def recording(
    every_row: bool = False,
) -> Iterator[list[tuple[Any, tuple[Any, ...], dict[str, Any]]]]:
    """Collect launches (kernel, arguments, meta) instead of running them.

    With `every_row` those of every configuration, else of the one for the call's size.
    """
    global _recorded, _every_row
    _recorded, _every_row = [], every_row
    try:
        yield _recorded
    finally:
        _recorded = None


def power_of_2(n: int) -> int:
    """The smallest power of 2 that is at least n, and at least 1."""
    return triton.next_power_of_2(max(n, 1))


def row_tile(config: dict[str, int], rows: int, classes: int) -> dict[str, int]:
    """Block sizes, by a row of `tune.TABLE`, for `rows` rows of `classes` classes."""
    block = min(power_of_2(classes), config["TILE"])
    return {
        "ROWS": max(min(config["TILE"] // block, power_of_2(rows), MOST_ROWS), 1),
        "CLASSES": block,
        "num_warps": config["num_warps"],
    }


def triton_dtype(dtype: torch.dtype) -> Any:
    """Triton's name of an accumulation dtype, for a constexpr."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def run_time(numbers: Tensor) -> tuple[Tensor | None, list[float]]:
    """Run-time numbers (k,) as arguments of a launch: the tensor where it is on the device, to be
    read by `numeric.number`; else None and their values."""
    if on_host(numbers):
        return None, numbers.tolist()
    return numbers, [0.0] * len(numbers)


def on_host(numbers: Tensor) -> bool:
    """Whether run-time numbers can be read here without waiting for a device."""
    return numbers.device.type == "cpu"


def wide(*tensors: Tensor | None) -> bool:
    """Whether offsets into any of the tensors need 64 bits."""
    return any(
        x is not None
        and sum((n - 1) * abs(s) for n, s in zip(x.shape, x.stride(), strict=True)) >= 2**31 - 2**24
        for x in tensors
    )
