"""The processes of a run, as `torchrun` starts them; alone, every function does the obvious.

Each rank has a fixed shard of the samples and their state (losses, label quality); only sums over
these and, for results, gathered values travel. Objects travel by gloo, gradients by NCCL on GPUs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@contextmanager
def processes(device: str) -> Iterator[torch.device]:
    """The device of this process, inside a process group if `torchrun` started several.

    A group that is there already is used and left as it is.
    """
    own = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized()
    chosen = torch.device(device)
    if chosen.type == "cuda":
        chosen = torch.device("cuda", chosen.index or int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(chosen)
    if own:
        dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield chosen
    finally:
        if own:
            dist.destroy_process_group()
            # Gloo's threads may still let go of the last call's tensors, for which they need the
            # interpreter: one that ends meanwhile takes the process down with it.
            time.sleep(0.3)


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
