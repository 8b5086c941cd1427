"""Early-learning regularisation (Liu et al., NeurIPS 2020), with and without SANM."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import TrainConfig
from ..data import Dataset
from ..settings import setting
from .base import Recipe, register

CLAMP = 1e-4  # as the authors: keeps log(1 − ⟨t, p⟩) finite when the network is certain


@dataclass(frozen=True, kw_only=True)
class ELRConfig(TrainConfig):
    """early-learning regularisation"""

    elr_weight: float = setting(3.0, "λ of the penalty (CIFAR-10: 3, CIFAR-100: 7)", low=0)
    elr_momentum: float = setting(
        0.7, "β of the running targets (CIFAR-10: 0.7, CIFAR-100: 0.9)", low=0, high=1
    )


@register("elr", ELRConfig)
class EarlyLearning(Recipe):
    """Cross-entropy + λ · mean log(1 − ⟨t, p⟩), t a running mean of each sample's predictions.

    The penalty's gradient holds the prediction at what the network believed before it began to
    memorise. There is no warm-up: t starts at 0, where the penalty and its gradient vanish.
    Published are λ = 3 and β = 0.7 for CIFAR-10, 7 and 0.9 for CIFAR-100, as the presets have them.

    Attributes: ensemble (N, K), the targets t of this rank's samples, by position.
    """

    config: ELRConfig
    persistent = (*Recipe.persistent, "ensemble")

    def __init__(self, config: ELRConfig, data: Dataset) -> None:
        super().__init__(config, data)
        self.ensemble = torch.zeros(len(data), data.num_classes, device=data.labels.device)

    def criterion(self, logits: Tensor, targets: Tensor, rows: Tensor, view: str) -> Tensor:
        """Losses (B,); the images, not their masked views, move t of the samples at `rows`."""
        predicted = logits.float().softmax(1).clamp(CLAMP, 1 - CLAMP)
        if view == "image":
            beta, found = self.config.elr_momentum, predicted.detach()
            found = found / found.sum(1, keepdim=True)
            self.ensemble[rows] = beta * self.ensemble[rows] + (1 - beta) * found
        penalty = torch.log1p(-(self.ensemble[rows] * predicted).sum(1))
        cross_entropy = F.cross_entropy(logits, targets, reduction="none")
        return cross_entropy + self.config.elr_weight * penalty


@register("sanm-elr", ELRConfig)
class SANMEarlyLearning(EarlyLearning):
    """After a warm-up, masked views and reconstruction, as `sanm-ce` has them.

    The penalty is that of the masked views too, with the images' t: on cross-entropy alone they
    would teach the network the wrong labels that the penalty keeps it from.
    """

    masking = True
    uses_quality = True
