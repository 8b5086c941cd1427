"""What the processes of a training say to each other; alone, every function does the obvious.

Whoever started them: SANM, label quality and recipes serve in any loop. Each rank has a fixed shard
of the samples and their state (losses, label quality); only sums over these and, for results,
gathered values travel.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def group() -> dist.ProcessGroup | None:
    """The group of all processes, None if there is one only."""
    return dist.group.WORLD if size() > 1 else None


def total(x: Tensor) -> Tensor:
    """The sum of `x` over the ranks."""
    x = x.clone()
    if size() > 1:
        dist.all_reduce(x)
    return x


def least(x: Tensor) -> Tensor:
    """The minimum of `x` over the ranks."""
    x = x.clone()
    if size() > 1:
        dist.all_reduce(x, dist.ReduceOp.MIN)
    return x


def gather(value: Any) -> list[Any]:
    """The `value` of every rank, on all ranks; tensors must be on the CPU."""
    values = [value]
    if size() > 1:
        values = [None] * size()
        dist.all_gather_object(values, value)
    return values


def whole(x: Tensor) -> Tensor:
    """The shards x (…, N_r) of all ranks in one tensor (…, ΣN_r), on the CPU."""
    return torch.cat(gather(x.cpu()), -1)


def same_buffers(module: torch.nn.Module) -> None:
    """Give the buffers of rank 0's `module`, such as running statistics, to all ranks."""
    if size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)
