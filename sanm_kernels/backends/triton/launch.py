"""How Triton kernels are registered, configured and launched."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from sanm_kernels.ops import internals
from sanm_kernels.ops.base import check_order, library, operators, tensors, without_autocast

#: Whether kernels run on the CPU, through Triton's interpreter (TRITON_INTERPRET=1).
INTERPRETED: bool = knobs.runtime.interpret
#: Most rows per program: per-row values are replicated in the registers of several threads.
MOST_ROWS = 32

Configuration = dict[str, int]

#: Kernel → rows (largest bucket, configuration), in ascending order of the bucket. A bucket counts
#: the elements of a row that a program processes. TILE: elements per tile of one operand.
CONFIGURATIONS: dict[str, list[tuple[float, Configuration]]] = {
    # a bucket counts the elements of a sample's feature map
    "masked_forward": [
        (8192, {"TILE": 2048, "num_warps": 4}),
        (math.inf, {"TILE": 4096, "num_warps": 8}),
    ],
    # softmax rows: a bucket counts classes
    "rows": [
        (64, {"TILE": 512, "num_warps": 4}),
        (math.inf, {"TILE": 2048, "num_warps": 8}),
    ],
    # softmax rows with two modulated rows of targets each, which need many registers
    "masked_loss": [
        (64, {"TILE": 256, "num_warps": 4}),
        (math.inf, {"TILE": 1024, "num_warps": 8}),
    ],
    # element-wise over images: a bucket counts a sample's elements
    "pixels": [
        (4096, {"TILE": 1024, "num_warps": 4}),
        (math.inf, {"TILE": 4096, "num_warps": 8}),
    ],
}

#: Operator → its launcher.
launchers: dict[str, Callable[..., Any]] = {}

_recorded: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] | None = None


def options(backend: str) -> dict[str, Any]:
    """Compile options of every kernel for Triton's `backend`, "cuda" or "hip".

    Products and sums are not contracted. Without maxnreg, ptxas spills a few registers for a higher
    occupancy; Triton's other backends reject that option.
    """
    return {"enable_fp_fusion": False} | ({"maxnreg": 128} if backend == "cuda" else {})


@functools.cache
def _own_options() -> dict[str, Any]:
    """The options for this process's GPUs, which are all of one backend."""
    return options("cuda" if INTERPRETED else driver.active.get_current_target().backend)


def implements(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a launcher as the Triton kernel of operator `op`.

    It runs on the GPU of the first tensor that is on one and, as every Triton launch, on that
    device's current stream. Autocast is disabled in it.
    """

    def register(launcher: Callable[..., Any]) -> Callable[..., Any]:
        if op in operators:
            check_order(op, operators[op], launcher)
        plain = without_autocast(launcher)

        @functools.wraps(launcher)
        def run(*arguments: Any) -> Any:
            with internals.device_guard(_gpu(arguments)):
                return (plain if torch.is_autocast_enabled("cuda") else launcher)(*arguments)

        launchers[op] = launcher
        library.impl(f"{op}.triton", run, "CUDA")
        if INTERPRETED:
            library.impl(f"{op}.triton", plain, "CPU")
        return launcher

    return register


def _gpu(arguments: tuple[Any, ...]) -> int:
    """The GPU of the first tensor that is on one; run-time numbers may be tensors on the CPU."""
    return next(x.get_device() for x in tensors(arguments) if x.is_cuda)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **meta: Any) -> None:
    """Launch `kernel` on `grid` programs; an empty grid launches nothing.

    `meta`: constexpr arguments, num_warps and num_stages. A product and a sum are not contracted
    unless explicitly fused (`numeric.fma`): results are bitwise equal to the other backends'.
    """
    if 0 in grid:
        return
    if _recorded is not None:
        _recorded.append((kernel, arguments, meta))
        return
    kernel[grid](*arguments, **meta, **_own_options())


def configuration(name: str, bucket: int) -> Configuration:
    """The row of `CONFIGURATIONS` for kernel `name` and a call of size `bucket`."""
    return next(config for most, config in CONFIGURATIONS[name] if bucket <= most)


@contextlib.contextmanager
def recording() -> Iterator[list[tuple[Any, tuple[Any, ...], dict[str, Any]]]]:
    """Collect launches (kernel, arguments, meta) instead of running them."""
    global _recorded
    _recorded = []
    try:
        yield _recorded
    finally:
        _recorded = None


def power_of_2(n: int) -> int:
    """The smallest power of 2 that is at least n, and at least 1."""
    return 1 << (max(n, 1) - 1).bit_length()  # triton.next_power_of_2 takes 10 µs


def row_tile(config: Configuration, rows: int, classes: int) -> dict[str, int]:
    """Block sizes, by a row of `CONFIGURATIONS`, for `rows` rows of `classes` classes."""
    block = min(power_of_2(classes), config["TILE"])
    return {
        "ROWS": max(min(config["TILE"] // block, power_of_2(rows), MOST_ROWS), 1),
        "CLASSES": block,
        "num_warps": config["num_warps"],
    }


def triton_dtype(dtype: torch.dtype) -> Any:
    """Triton's dtype for an accumulation dtype, for a constexpr."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def run_time(numbers: Tensor) -> tuple[Tensor | None, list[float]]:
    """Run-time numbers (k,) as kernel arguments: the tensor if it is on the device, to be read by
    `numeric.number`; else None and their values."""
    if on_host(numbers):
        return None, numbers.tolist()
    return numbers, [0.0] * len(numbers)


def on_host(numbers: Tensor) -> bool:
    """Whether run-time numbers can be read without synchronising with a device."""
    return numbers.device.type == "cpu"


def wide(*tensors: Tensor | None) -> bool:
    """Whether offsets into any of the tensors need 64 bits."""
    return any(
        x is not None
        and sum((n - 1) * abs(s) for n, s in zip(x.shape, x.stride(), strict=True)) >= 2**31 - 2**24
        for x in tensors
    )
