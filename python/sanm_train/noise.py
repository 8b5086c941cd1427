"""Label noise, seeded."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

KINDS = ("none", "symmetric", "asymmetric", "file")


def add_noise(
    labels: Tensor,
    kind: str,
    rate: float,
    *,
    num_classes: int,
    seed: int = 0,
    include_true: bool = False,
    confusions: Mapping[int, int] | None = None,
) -> Tensor:
    """Labels (N,) int64 of which the share `rate` has been redrawn; the input is unchanged.

    Args:
        labels: true classes (N,).
        kind: `none`, and `file`, whose labels come with the data set: no change; `symmetric`:
            round(rate·N) samples get a class drawn uniformly; `asymmetric`: round(rate·n) of the
            n samples of each class that has an entry in `confusions` get that entry's class.
        rate: in [0, 1].
        include_true: symmetric draws may give the true class back (DivideMix's convention: the
            realised rate is then about rate·(1 − 1/K)); by default all redrawn labels are wrong.
        confusions: class → class it is mistaken for; default: the next class.
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
    return noisy
