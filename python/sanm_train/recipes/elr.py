"""Early-learning regularisation (Liu et al., NeurIPS 2020), with and without SANM."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import TrainConfig
from ..data import Dataset
from ..sanm import SANM, Batch
from ..settings import setting
from .base import Losses, Recipe, register

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

    Attributes: ensemble (N, K), the targets t of this rank's samples, by position.
    """

    config: ELRConfig
    persistent = (*Recipe.persistent, "ensemble")

    def __init__(self, config: ELRConfig, data: Dataset) -> None:
        super().__init__(config, data)
        self.ensemble = torch.zeros(len(data), data.num_classes, device=data.labels.device)

    def loss(self, network: SANM, batch: Batch, epoch: float) -> Losses:
        logits = network(self.augment.weak(batch.images))
        labeled = F.cross_entropy(logits, batch.targets)
        return self.regularize(labeled, labeled, logits, batch)

    def regularize(self, total: Tensor, labeled: Tensor, logits: Tensor, batch: Batch) -> Losses:
        """`total` plus the weighted penalty on `logits` (B, K); `labeled` is only logged."""
        assert batch.row is not None  # the engine always says which samples these are
        penalty = self.penalty(logits, batch.row)
        return {
            "loss": total + self.config.elr_weight * penalty,
            "labeled": labeled,
            "regularization": penalty,
        }

    def penalty(self, logits: Tensor, row: Tensor) -> Tensor:
        """mean log(1 − ⟨t, p⟩), after t of the samples at `row` (B,) has moved towards p."""
        predicted = logits.float().softmax(1).clamp(CLAMP, 1 - CLAMP)
        beta = self.config.elr_momentum
        with torch.no_grad():
            normalized = predicted / predicted.sum(1, keepdim=True)
            targets = beta * self.ensemble[row] + (1 - beta) * normalized
            self.ensemble[row] = targets
        return torch.log1p(-(targets * predicted).sum(1)).mean()


@register("sanm-elr", ELRConfig)
class SANMEarlyLearning(EarlyLearning):
    """After a warm-up, masked views and reconstruction, as `sanm-ce` has them.

    The penalty and its targets are the unmasked images' alone: what is hidden from a masked view
    is no belief of the network.
    """

    masking = True
    uses_quality = True

    def loss(self, network: SANM, batch: Batch, epoch: float) -> Losses:
        if epoch < self.config.warmup:
            return super().loss(network, batch, epoch)
        batch = batch._replace(images=self.augment.weak(batch.images))
        losses = network.losses(batch, self.generator)
        found = self.regularize(losses.total, losses.classification, losses.logits, batch)
        return {**found, "reconstruction": losses.reconstruction}
