"""Samples spread over the processes of a torch.distributed group, and agreement between these."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from sanm_kernels.reference.ranks import Ranks

T = TypeVar("T")

#: Samples that a pass takes at a time on the CPU, where what it makes of them stays in the cache.
BLOCK = 65536
#: Steps of a loop between two looks at whether it is done, where a look synchronises.
LOOK_EVERY = 16


class GroupRanks(Ranks):
    """This process's samples among those of a process group: `sizes` of them on the ranks."""

    def __init__(self, group: dist.ProcessGroup, sizes: list[int]) -> None:
        rank = dist.get_rank(group)
        super().__init__(sum(sizes), rank, sum(sizes[:rank]))
        self.group = group

    def gather(self, numbers: Tensor) -> list[Tensor]:
        parts = list(numbers.new_empty(dist.get_world_size(self.group), numbers.numel()))
        dist.all_gather(parts, numbers.flatten(), group=self.group)
        return [part.view(numbers.shape) for part in parts]

    def blocks(self, x: Tensor) -> Iterable[Tensor]:
        return x.split(BLOCK) if x.device.type == "cpu" else (x,)

    def stop(self, done: Tensor, steps: int) -> bool:
        return (done.device.type == "cpu" or steps % LOOK_EVERY == 0) and bool(done)


def is_group(x: Any, name: str) -> dist.ProcessGroup:
    """`x` is a process group that this process is in."""
    if not dist.is_available() or not isinstance(x, dist.ProcessGroup):
        raise TypeError(
            f"{name}: expected a torch.distributed.ProcessGroup with this process in it, "
            f"got {type(x).__name__}"
        )
    return x


def agree(
    group: dist.ProcessGroup, prepare: Callable[[], tuple[T, dict[str, Any]]]
) -> tuple[T, list[dict[str, Any]]]:
    """Runs `prepare` on every rank: its first result here, and the second ones of all ranks.

    What it raises on one rank is raised on all, so that none waits for another that has given up.
    """
    own: T | None = None
    try:
        own, shared = prepare()
        outcome: object = shared
    except Exception as error:  # any: the other ranks wait
        kind = next((k for k in (TypeError, ValueError) if isinstance(error, k)), RuntimeError)
        outcome = kind(str(error))
    outcomes: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(outcomes, outcome, group=group)
    for rank, result in enumerate(outcomes):
        if isinstance(result, Exception):
            raise type(result)(f"{result} (on rank {rank} of the process group)")
    return own, outcomes  # type: ignore[return-value]  # prepare has returned on this rank too


def same(name: str, what: str, values: list[Any]) -> None:
    """The ranks' `values` are alike."""
    for rank, value in enumerate(values):
        if value != values[0]:
            raise ValueError(
                f"{name}: expected the same {what} on all ranks of the process group, "
                f"got {values[0]} on rank 0 and {value} on rank {rank}"
            )
