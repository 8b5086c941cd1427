"""Label noise, seeded."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

KINDS = ("none", "symmetric", "asymmetric", "instance", "file")


def add_noise(
    labels: Tensor,
    kind: str,
    rate: float,
    *,
    num_classes: int,
    seed: int = 0,
    include_true: bool = False,
    confusions: Mapping[int, int] | None = None,
    images: Tensor | None = None,
) -> Tensor:
    """Labels (N,) int64 of which the share `rate` has been redrawn; the input is unchanged.

    Args:
        labels: true classes (N,).
        kind: `none`, and `file`, whose labels come with the data set: no change; `symmetric`:
            round(rate·N) samples get a class drawn uniformly; `asymmetric`: round(rate·n) of the
            n samples of each class that has an entry in `confusions` get that entry's class;
            `instance`: the wrong class depends on the image, and so does how often there is one
            (below).
        rate: in [0, 1].
        include_true: symmetric draws may give the true class back (DivideMix's convention: the
            realised rate is then about rate·(1 − 1/K)); by default all redrawn labels are wrong.
        confusions: class → class it is mistaken for; default: the next class.
        images: `instance`: (N, …), uint8 or in [0, 1].

    Instance-dependent noise is that of Xia et al. (NeurIPS 2020): a sample x of class y becomes
    class k ≠ y with probability q · softmax(x·W_y)_k over these k, with q from N(rate, 0.1²) within
    [0, 1] for each sample and W_y (pixels, K) from N(0, 1) for each class. (Nearer to 0 and 1 than
    0.2, where cutting that off would change its mean, the deviation is half the distance.)
    """
    if kind not in KINDS:
        raise ValueError(f"noise must be one of {', '.join(KINDS)}, got {kind!r}")
    if not 0.0 <= rate <= 1.0:
        raise ValueError(f"rate must be in [0, 1], got {rate}")
    generator = torch.Generator().manual_seed(seed)
    noisy = labels.clone()
    if kind == "symmetric":
        chosen = torch.randperm(len(labels), generator=generator)[: round(rate * len(labels))]
        if include_true:
            drawn = torch.randint(num_classes, (len(chosen),), generator=generator)
        else:
            shift = torch.randint(1, num_classes, (len(chosen),), generator=generator)
            drawn = (labels[chosen] + shift) % num_classes
        noisy[chosen] = drawn
    elif kind == "asymmetric":
        if confusions is None:
            confusions = {k: (k + 1) % num_classes for k in range(num_classes)}
        for true, mistaken in confusions.items():
            members = (labels == true).nonzero()[:, 0]
            order = torch.randperm(len(members), generator=generator)
            noisy[members[order[: round(rate * len(members))]]] = mistaken
    elif kind == "instance":
        if images is None:
            raise ValueError("images must be given for instance noise, got None")
        pixels = images.flatten(1).cpu()
        spread = math.sqrt(2) * max(min(0.1, rate / 2, (1 - rate) / 2), 1e-9)
        low, high = torch.erf((torch.tensor([0.0, 1.0]) - rate) / spread)
        uniform = torch.rand(len(labels), generator=generator)
        share = rate + spread * torch.erfinv(low + (high - low) * uniform)
        wrong = torch.rand(len(labels), generator=generator) < share
        for true in range(num_classes):
            weight = torch.randn(pixels.shape[1], num_classes, generator=generator)
            members = ((labels.cpu() == true) & wrong).nonzero()[:, 0]
            if len(members):
                found = pixels[members]
                scale = 255.0 if found.dtype == torch.uint8 else 1.0
                logits = found.float() / scale @ weight
                logits[:, true] = float("-inf")
                drawn = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
                noisy[members.to(labels.device)] = drawn.to(labels)
    return noisy
