"""Label modulation (section 4 of the method), step by step as every backend rounds it."""

from __future__ import annotations

import torch
from torch import Tensor


def modulate(targets: Tensor, ratio: Tensor, clamp: bool) -> Tensor:
    """Take d from each row's largest target and give d/(K−1) to each of the others.

    d = ratio, or min(ratio, t[j*]) with `clamp`, so that no target becomes negative; j* is the
    first index with the largest target. Computed in float32 (float64 for float64 targets), every
    step rounded once: the quotient d/(K−1), then one addition or subtraction per element.

    targets (M, K) with K ≥ 2; ratio (M,) → (M, K) in the dtype of `targets`, which stay unchanged.
    """
    t = targets if targets.dtype == torch.float64 else targets.float()
    top = t.argmax(1, keepdim=True)
    best = t.gather(1, top)
    d = ratio.to(t.dtype)[:, None]
    if clamp:
        d = torch.minimum(d, best)
    moved = (t + d / (t.shape[1] - 1)).scatter(1, top, best - d)
    return moved.to(targets.dtype)
