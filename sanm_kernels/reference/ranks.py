"""Passes over samples that may be spread over processes, the ranks: here one process has them all.

A pass gives a few numbers on each rank. What is derived from the joined numbers by elementwise
arithmetic, which is rounded alike everywhere, has the same bits on every rank: so have decisions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor


class Ranks:
    """One process with all samples; a subclass has the samples of one rank among others.

    Attributes:
        n: number of samples on all ranks.
        rank: number of this rank.
        start: number of samples on the ranks before it.
    """

    def __init__(self, n: int, rank: int = 0, start: int = 0) -> None:
        self.n, self.rank, self.start = n, rank, start

    def gather(self, numbers: Tensor) -> list[Tensor]:
        """The `numbers` of every rank, in the order of the ranks."""
        return [numbers]

    def blocks(self, x: Tensor) -> Iterable[Tensor]:
        """x (n,) in the portions that a pass takes at a time; at least one."""
        return (x,)

    def stop(self, done: Tensor, steps: int) -> bool:
        """Whether a loop may end after `steps` steps; once `done` (), further ones change nothing.

        A look at `done` synchronises where it is not on the CPU: there the loop runs to its end.
        """
        return done.device.type == "cpu" and bool(done)

    def total(self, numbers: Tensor) -> Tensor:
        """The sum of the ranks' `numbers`, added in the order of the ranks."""
        return functools.reduce(torch.add, self.gather(numbers))

    def sum(self, x: Tensor, numbers: Callable[..., Tensor], *settings: object) -> Tensor:
        """Σ numbers(block of x, *settings) over the blocks of x (n,) and the ranks."""
        parts = (numbers(block, *settings) for block in self.blocks(x))
        return self.total(functools.reduce(torch.add, parts))

    def extremes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Least and greatest of x (…, n) over the samples of all ranks: (…) each."""
        if x.shape[-1]:
            low, high = x.aminmax(dim=-1)
        else:
            low, high = (x.new_full(x.shape[:-1], value) for value in (torch.inf, -torch.inf))
        lows, highs = zip(*self.gather(torch.stack([low, high])), strict=True)
        return functools.reduce(torch.minimum, lows), functools.reduce(torch.maximum, highs)
