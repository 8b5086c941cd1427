"""What a random call is made of. Like the sheets, it runs also where pytest is not installed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

#: From this number on calls are small, for backends that are interpreted or emulated.
SMALL = 1_000_000
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INDICES = (torch.int64, torch.int32, torch.int16)
LAYOUTS = ("contiguous", "channels_last", "offset", "strided", "transposed")


def lay_out(x: Tensor, layout: str) -> Tensor:
    """A detached tensor equal to `x` whose memory is laid out as `layout` says.

    ``offset``: a slice of a larger storage that begins one element in, so that nothing is aligned;
    ``strided``: every second element of a longer last dimension; ``transposed``: the last two
    dimensions swapped in memory; ``channels_last``: for 4-D tensors (others stay contiguous).
    """
    x = x.detach()
    if layout == "contiguous" or x.dim() == 0:
        return x.contiguous().clone()
    if layout == "channels_last":
        return (
            x.contiguous(memory_format=torch.channels_last).clone(
                memory_format=torch.preserve_format
            )
            if x.dim() == 4
            else x.contiguous().clone()
        )
    if layout == "offset":
        storage = x.new_zeros(x.numel() + 1)
        result = storage[1:].view(x.shape)
    elif layout == "strided":
        result = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])[..., ::2]
    elif layout == "transposed":
        if x.dim() < 2:
            return lay_out(x, "strided")
        result = x.new_zeros(*x.shape[:-2], x.shape[-1], x.shape[-2]).transpose(-1, -2)
    else:
        raise ValueError(layout)
    result.copy_(x)
    return result


@dataclass
class Call:
    """A call of a public function.

    Attributes:
        function: its name in sanm_kernels.
        inputs: tensors by name, among them the leaves that gradients are taken for, which require
            grad; possibly in lists.
        run: (inputs, backend) → what the function returns.
        same: prefixes of the outputs that every backend gives the same bits of.
        exact: whether the call in float64 makes the same decisions, so that all outputs can be
            measured against it; otherwise the statistics alone.
        roundings: what tolerances.assert_accurate allows on top.
        narrow: everything is summed in float32, also what has gradients in float64.
        wrong: the argument that has a wrong value; then the call raises ValueError.
    """

    number: int
    function: str = ""
    inputs: dict[str, Any] = field(default_factory=dict)
    run: Callable[[dict[str, Any], str], Any] = lambda inputs, backend: None
    same: tuple[str, ...] = ()
    exact: bool = True
    roundings: float = 16.0
    narrow: bool = False
    wrong: str = ""


class Maker:
    """Random choices for one call."""

    def __init__(self, number: int) -> None:
        self.small = number >= SMALL
        self.g = torch.Generator().manual_seed(number)
        self.call = Call(number)
        self.spoiling = self.chance(0.05)

    def integer(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=self.g))

    def chance(self, probability: float) -> bool:
        return self.real(0, 1) < probability

    def real(self, low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=self.g, dtype=torch.float64))

    def choice(self, options: Sequence[Any]) -> Any:
        return options[self.integer(0, len(options) - 1)]

    def size(self, high: int, small: int) -> int:
        """From 1 on, small sizes more often."""
        high = small if self.small else high
        return max(1, round(high ** self.real(0, 1)))

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.g)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.g)

    def permutation(self, n: int) -> Tensor:
        return torch.randperm(n, generator=self.g)

    def indices(self, high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=self.g)

    def rows(self, n: int, K: int) -> Tensor:
        """Rows (n, K) that sum to 1: soft, one-hot, uniform, or with ties."""
        t = torch.softmax(self.normal(n, K) * self.choice([0.5, 2, 8]), 1)
        if self.chance(0.2):
            t = torch.nn.functional.one_hot(t.argmax(1), K).float()
        elif self.chance(0.1):
            t = torch.full_like(t, 1 / K)
        return t

    def logits(self, n: int, K: int) -> Tensor:
        z = self.normal(n, K) * self.choice([0.1, 1, 4, 12, 60])  # e⁻⁸⁷ is where float32 ends
        if self.chance(0.1):
            z = z.round()  # ties
        if n and K > 2 and self.chance(0.1):
            z[self.integer(0, n - 1), self.integer(1, K - 1)] = -math.inf
        if n and self.chance(0.05):
            z[self.integer(0, n - 1)] = self.choice([math.nan, math.inf, -math.inf])
        if n and self.chance(0.05):
            z[self.integer(0, n - 1), self.integer(0, K - 1)] = self.choice([math.nan, math.inf])
        return z

    def classes(self, high: int, small: int) -> int:
        """Rarely very many."""
        return self.integer(20_000, 200_000) if self.rare(0.01) else self.size(high, small)

    def rare(self, probability: float) -> bool:
        """What would take too long where kernels are interpreted or emulated."""
        return not self.small and self.chance(probability)

    def give(
        self,
        x: Tensor,
        dtypes: Sequence[torch.dtype] = DTYPES,
        *,
        grad: bool = False,
        layouts: Sequence[str] = LAYOUTS,
    ) -> Tensor:
        """x in one of the dtypes and layouts, possibly as a leaf."""
        x = lay_out(x.to(self.choice(dtypes)), self.choice(layouts))
        return x.requires_grad_(grad and x.is_floating_point())

    def spoil(self, x: Tensor, values: Sequence[float], name: str) -> Tensor:
        """x, in which one element may get one of these wrong values."""
        if not self.spoiling or self.call.wrong or x.numel() == 0 or self.chance(0.3):
            return x
        self.call.wrong = name
        x = x.clone()
        x.view(-1)[self.integer(0, x.numel() - 1)] = self.choice(values)
        return x


def yardstick(x: Tensor) -> float:
    """How much less exact a row's sums are, where those in float64 are all there is to compare."""
    return max(1.0, x.shape[-1] ** 0.5 / 16) if x.dtype == torch.float64 else 1.0


def identical(a: Tensor, b: Tensor) -> bool:
    """Equal to the last bit, where all NaN count as one."""
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())
