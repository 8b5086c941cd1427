"""One network: plain cross-entropy, and cross-entropy with SANM."""

from __future__ import annotations

import torch.nn.functional as F

from ..sanm import SANM, Batch
from .base import Losses, Recipe, register


@register("ce")
class CrossEntropy(Recipe):
    """Cross-entropy on weakly augmented images: what one does when the labels are trusted."""

    def loss(self, network: SANM, batch: Batch, epoch: float) -> Losses:
        logits = network(self.augment.weak(batch.images))
        return {"loss": F.cross_entropy(logits, batch.targets)}


@register("sanm-ce")
class SANMCrossEntropy(CrossEntropy):
    """After a warm-up, masked views and reconstruction; quality from the network's own losses."""

    masking = True
    uses_quality = True

    def loss(self, network: SANM, batch: Batch, epoch: float) -> Losses:
        if epoch < self.config.warmup:
            return super().loss(network, batch, epoch)
        losses = network.losses(
            batch._replace(images=self.augment.weak(batch.images)), self.generator
        )
        return {
            "loss": losses.total,
            "labeled": losses.classification,
            "reconstruction": losses.reconstruction,
        }
