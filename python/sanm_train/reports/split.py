"""Which labels of a run are suspected, and how far that is to be trusted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import sanm_kernels as sk

from ..recipes.base import mixture_of
from ..train import Result

Array = np.ndarray[Any, Any]
#: Share of the labels on the wrong side of a split from which on it is not to be trusted. Of digits
#: with 20 and 50 % wrong labels it is 0.23 to 0.29 after two epochs, 0.05 once most that is
#: suspected is wrong.
TRUSTED = 0.1
#: A class is unlearnt if so many of its labels are suspected, and so few samples, as a share of its
#: labels, are predicted to be of it.
MOSTLY, HARDLY = 0.85, 0.1
FEWEST = 20  # labels of a class that a mixture of its own is fitted to


@dataclass(frozen=True)
class Split:
    """Suspected labels.

    Attributes:
        suspect: (N,) bool. None is of an unlearnt class: of these labels the run says nothing.
        unlearnt: (K,) bool.
        overlap: expected share of labels on the wrong side, by the mixture itself; None without.
        overlaps: (K,) the same by class, NaN where a class has no mixture of its own; or None.
        warnings: why it is not to be trusted, in sentences; may be empty.
    """

    suspect: Array
    unlearnt: Array
    overlap: float | None
    overlaps: Array | None
    warnings: list[str]

    @property
    def overlap_in_words(self) -> str:
        if self.overlap is None:
            return "–"
        words = "hardly any" if self.overlap < 0.02 else "some"
        return f"{self.overlap:.1%} ({words if self.overlap < TRUSTED else 'too many'})"


def split(result: Result, columns: dict[str, Array], overlaps: Array | None) -> Split:
    """The split by the `columns` of `inspection.sample_table`; `overlaps` as in `Split`."""
    config, size = result.config, result.data.num_classes
    given, proposed, quality = (
        columns[name] for name in ("given_label", "proposed_label", "clean_prob")
    )
    fitted = not np.isnan(quality).all()
    suspect = quality <= config.threshold if fitted else given != proposed
    labels, predicted = (np.bincount(x, minlength=size) for x in (given, proposed))
    suspected = np.bincount(given[suspect], minlength=size)
    unlearnt = (labels > 0) & (suspected >= MOSTLY * labels) & (predicted <= HARDLY * labels)
    overlap, warnings = None, []
    if fitted:
        common = np.mean([overlap_of(mixture) for mixture in result.recipe.mixtures])
        each = np.full(size, common)
        if overlaps is not None:
            each = np.where(np.isnan(overlaps), common, overlaps)
        overlap = float((each * labels).sum() / labels.sum())
        if overlap >= TRUSTED:
            warnings.append(
                f"The split is not to be trusted: the losses do not fall into two groups. By the "
                f"fitted mixture itself about {overlap:.0%} of the labels are on the wrong side."
            )
        if result.recipe.uses_quality and len(result.history) <= config.warmup:
            warnings.append(
                f"The run has not left its warm-up ({len(result.history)} of {config.warmup} "
                "epochs): train longer before labels are judged."
            )
    if unlearnt.any():
        names = [
            str((result.data.classes or range(size))[k]) for k in unlearnt.nonzero()[0].tolist()
        ]
        listed = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if names[10:] else "")
        warnings.append(
            f"Not learnt: {listed}. Nearly all of these labels would be suspected, and hardly any "
            "image is predicted to be of them, so they are not counted as suspected: the networks "
            "do not know what such an image looks like."
        )
    return Split(suspect & ~unlearnt[given], unlearnt, overlap, overlaps, warnings)


def overlap_of(mixture: Tensor) -> float:
    """The area below both of two weighted Gaussians, `mixture` (3, 2) their means, variances and
    weights: the share of what they produce that is on the wrong side of where they cross."""
    means, variances, weights = mixture.double().cpu().numpy()
    spread = np.sqrt(np.maximum(variances, 1e-12))
    at = np.sort((means + spread * np.linspace(-9, 9, 3001)[:, None]).ravel())
    density = weights * np.exp(-(((at[:, None] - means) / spread) ** 2) / 2)
    lower = (density / (spread * np.sqrt(2 * np.pi))).min(1)
    return float((np.diff(at) * (lower[1:] + lower[:-1])).sum() / 2)


def quality_by_class(result: Result) -> tuple[Tensor, Array]:
    """The clean probabilities (networks, N) by a mixture for each class of given labels, and the
    mixtures' overlaps (K,), NaN for classes that keep the common one: those of few labels, or whose
    losses do not fall into two groups."""
    recipe, labels = result.recipe, result.data.labels.cpu()
    past = recipe.history[:-1].cpu()[..., recipe.data.index.cpu().argsort()]
    quality, overlaps = result.quality.clone(), np.full(result.data.num_classes, np.nan)
    for k in range(result.data.num_classes):
        rows = (labels == k).nonzero()[:, 0]
        if len(rows) < FEWEST:
            continue
        fits = [
            sk.fit_label_quality(
                losses[rows],
                seed=result.config.seed,
                history=past[:, n, rows] if len(past) else None,
                backend="reference",
            )
            for n, losses in enumerate(result.losses.cpu())
        ]
        if any(bool(fit.degenerate) for fit in fits):
            continue
        quality[:, rows] = torch.stack([fit.clean_prob for fit in fits]).to(quality)
        overlaps[k] = np.mean([overlap_of(mixture_of(fit)) for fit in fits])
    return quality, overlaps
