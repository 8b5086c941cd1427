"""``python -m benchmarks.overhead``: what a call costs that has next to nothing to compute.

On one core, in CPU time: the median over rounds in which the functions take turns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

import sanm_kernels as sk
from benchmarks.common import serving

ROUNDS, CALLS = 30, 500
#: What is compared with torch's own function.
OVER = {
    "masked_loss + backward": "F.cross_entropy + backward",
    "sample_loss": "F.cross_entropy, none",
}


def microseconds(functions: dict[str, Callable[[], object]]) -> dict[str, float]:
    """CPU time of a call of each function."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(ROUNDS):
        for name, function in functions.items():
            start = time.process_time_ns()
            for _ in range(CALLS):
                function()
            times[name].append((time.process_time_ns() - start) / CALLS)
    return {name: statistics.median(some) / 1000 for name, some in times.items()}


def functions() -> dict[str, Callable[[], object]]:
    """masked_forward at B = 1, (512, 4, 4) features, a 3×32×32 image, official semantics.

    Losses and targets of 4 rows and 10 classes, mixing of two views (4, 8).
    """
    features, images = torch.randn(1, 512, 4, 4), torch.rand(1, 3, 32, 32)
    soft, clean_prob = torch.softmax(torch.randn(1, 10), 1), torch.rand(1)
    config = sk.MaskConfig.official_cifar()
    draws = torch.rand(1, config.num_draws(3), dtype=torch.float64)

    def masked_forward(out: sk.MaskedForward | None = None) -> sk.MaskedForward:
        return sk.masked_forward(
            features, soft, clean_prob, images=images, config=config, draws=draws, out=out
        )

    given = masked_forward()
    logits = torch.randn(4, 10, requires_grad=True)
    constant = logits.detach()
    labels, targets = torch.tensor([1, 7, 0, 3]), torch.softmax(torch.randn(4, 10), 1)
    views, permutation = [torch.rand(4, 8), torch.rand(4, 8)], torch.randperm(8)
    partner = torch.randperm(4)
    image, reconstruction = torch.rand(1, 3, 8, 8), torch.rand(2, 3, 8, 8, requires_grad=True)
    weights = {"num_labeled": 2, "unlabeled_weight": 0.5, "prior_weight": 1.0}

    def backward(loss: Callable[[], Tensor], *leaves: Tensor) -> Callable[[], None]:
        def run() -> None:
            for leaf in leaves:
                leaf.grad = None
            loss().backward()

        return run

    return {
        "masked_forward": masked_forward,
        "masked_forward, out=": lambda: masked_forward(given),
        "masked_loss": lambda: sk.masked_loss(constant, targets),
        "masked_loss, mixed": lambda: sk.masked_loss(
            constant, targets, mix=(0.3, partner), **weights
        ),
        "masked_loss + backward": backward(lambda: sk.masked_loss(logits, targets).total, logits),
        "F.cross_entropy + backward": backward(lambda: F.cross_entropy(logits, targets), logits),
        "sample_loss": lambda: sk.sample_loss(constant, labels),
        "F.cross_entropy, none": lambda: F.cross_entropy(constant, labels, reduction="none"),
        "mixup_views": lambda: sk.mixup_views(views, 0.3, permutation),
        "refine_targets": lambda: sk.refine_targets([constant, targets]),
        "reconstruction_loss + backward": backward(
            lambda: sk.reconstruction_loss(reconstruction, image), reconstruction
        ),
        "activation_stats": lambda: sk.activation_stats(features, (32, 32)),
        "torch.empty_like": lambda: torch.empty_like(images),
    }


def main() -> None:
    print(f"ours is {serving(['masked_forward'], 'cpu')['masked_forward']}")
    torch.set_num_threads(1)
    cases = functions()
    microseconds(cases)  # first what is done once
    times = microseconds(cases)
    for name, time_of_one in times.items():
        other = OVER.get(name)
        ratio = f", {time_of_one / times[other]:.2f} × {other}" if other else ""
        print(f"{name:32}{time_of_one:8.1f} µs{ratio}")


if __name__ == "__main__":
    main()
