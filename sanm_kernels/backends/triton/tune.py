"""Launch configurations: one fixed table, and a choice among its rows by measurement, if asked.

With ``SANM_KERNELS_AUTOTUNE=1`` the first call of a kernel on a size that it has not met times
every row of the kernel's table on the device. The choice is logged (logger ``sanm_kernels``) and
kept in ``autotune.json`` under ``$SANM_KERNELS_CACHE``, by default ``~/.cache/sanm_kernels``.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

log = logging.getLogger("sanm_kernels")

Config = dict[str, int]

#: Kernel → compute capability from which the rows hold → rows (largest bucket, configuration), in
#: ascending order of the bucket. A bucket counts the elements of a row that a program works on (for
#: masked_forward: of a feature map). TILE: elements that a program holds of one operand at a time.
TABLE: dict[str, dict[int, list[tuple[float, Config]]]] = {
    "masked_forward": {
        80: [
            (8192, {"TILE": 2048, "num_warps": 4}),
            (math.inf, {"TILE": 4096, "num_warps": 8}),
        ]
    },
    # softmax rows: a bucket counts classes
    "rows": {
        80: [
            (64, {"TILE": 512, "num_warps": 4}),
            (math.inf, {"TILE": 2048, "num_warps": 8}),
        ]
    },
    # softmax rows with two rows of targets each and their modulation, which take many registers
    "masked_loss": {
        80: [
            (64, {"TILE": 256, "num_warps": 4}),
            (math.inf, {"TILE": 1024, "num_warps": 8}),
        ]
    },
    # element-wise over images: a bucket counts a sample's elements
    "pixels": {
        80: [
            (4096, {"TILE": 1024, "num_warps": 4}),
            (math.inf, {"TILE": 4096, "num_warps": 8}),
        ]
    },
}


def rows(name: str, capability: int) -> list[tuple[float, Config]]:
    """The table's rows for kernel `name` on a device of this compute capability (8.6 → 86)."""
    by_capability = TABLE[name]
    known = [c for c in by_capability if c <= capability]
    return by_capability[max(known, default=min(by_capability))]


def choose(name: str, bucket: int, x: Tensor, go: Callable[[Config], None]) -> Config:
    """The configuration of kernel `name` for size `bucket` on the device of `x`.

    `go` launches the kernel with a configuration; it is called only to time it.
    """
    capability = _capability(x.device.index) if x.is_cuda else min(TABLE[name])
    table = rows(name, capability)
    if x.is_cuda and os.environ.get("SANM_KERNELS_AUTOTUNE") == "1":
        return _measured(name, 1 << max(bucket - 1, 0).bit_length(), x, table, go)
    return next(config for limit, config in table if bucket <= limit)


@functools.cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def _measured(
    name: str,
    bucket: int,
    x: Tensor,
    table: list[tuple[float, Config]],
    go: Callable[[Config], None],
) -> Config:
    """The fastest row: the one kept on disk, or timed now and kept."""
    key = f"{torch.cuda.get_device_name(x.device)}/{name}/{x.dtype}/{bucket}"
    kept = _kept()
    candidates = [config for _, config in table]
    if kept.get(key) in candidates:
        return kept[key]
    from triton.testing import do_bench

    times = [do_bench(lambda c=c: go(c), return_mode="median") for c in candidates]
    best = candidates[times.index(min(times))]
    log.info("autotune %s: %s (%.4f ms)", key, best, min(times))
    kept[key] = best
    _keep(kept)
    return best


def _path() -> Path:
    folder = os.environ.get("SANM_KERNELS_CACHE")
    return (Path(folder) if folder else Path.home() / ".cache/sanm_kernels") / "autotune.json"


@functools.cache
def _kept() -> dict[str, Config]:
    try:
        return json.loads(_path().read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        log.warning("%s: not readable, timing anew: %s", _path(), error)
        return {}


def _keep(kept: dict[str, Config]) -> None:
    path = _path()
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".json")
    with os.fdopen(handle, "w") as file:
        json.dump(kept, file, indent=1)
    os.replace(temporary, path)
