"""``python -m benchmarks.overhead``: what a call costs that has next to nothing to compute."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

import sanm_kernels as sk
from benchmarks.common import serving


def microseconds(function: Callable[[], object], repeat: int = 5000) -> float:
    """Median time of a call."""
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times)


def main() -> None:
    """masked_forward at B = 1, (512, 4, 4) features, a 3×32×32 image, official semantics."""
    print(f"ours is {serving(['masked_forward'], 'cpu')['masked_forward']}")
    features, images = torch.randn(1, 512, 4, 4), torch.rand(1, 3, 32, 32)
    targets, clean_prob = torch.softmax(torch.randn(1, 10), 1), torch.rand(1)
    config = sk.MaskConfig.official_cifar()
    draws = torch.rand(1, config.num_draws(3), dtype=torch.float64)

    def call(out: sk.MaskedForward | None = None) -> sk.MaskedForward:
        return sk.masked_forward(
            features, targets, clean_prob, images=images, config=config, draws=draws, out=out
        )

    given = call()
    for name, function in {
        "masked_forward": call,
        "masked_forward, out=": lambda: call(given),
        "torch.empty_like": lambda: torch.empty_like(images),
    }.items():
        microseconds(function, 500)
        print(f"{name:22}{microseconds(function):8.1f} µs")


if __name__ == "__main__":
    main()
