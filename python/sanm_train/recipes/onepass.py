"""SANM in one forward: what is hidden are cells of the feature map, not pixels."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F

import sanm_kernels as sk

from ..config import TrainConfig
from ..errors import ConfigError
from ..models import classifier
from ..sanm import SANM, Batch
from .base import Losses, Recipe, register


@dataclass(frozen=True, kw_only=True)
class OnePassConfig(TrainConfig):
    """sanm-onepass"""

    def check(self) -> None:
        super().check()
        if self.views == "min":
            raise ConfigError("views must be both or max for sanm-onepass, which hides the peak")
        if self.box != "activation":
            raise ConfigError("box must be activation for sanm-onepass: the map itself is masked")


@register("sanm-onepass", OnePassConfig)
class OnePass(Recipe):
    """After a warm-up, the mean of two cross-entropies from one feature map.

    One is of the ordinary logits with the given labels; the other of the map without the peak's
    box, pooled, classified and scored with modulated targets in one pass of `sk.masked_forward`.

    Ratio, box, label quality and modulated targets are the paper's. Ours are: hiding cells of the
    map, so that no second forward and no decoder is needed; the max view alone; equal weights.
    A box blinds the classifier but not the convolutions before it, whose receptive fields have
    seen what it hides, so this is a weaker mask than SANM's own.
    """

    uses_quality = True

    def loss(self, network: SANM, batch: Batch, epoch: float) -> Losses:
        images = self.augment.weak(batch.images)
        if epoch < self.config.warmup:
            return {"loss": F.cross_entropy(network(images), batch.targets)}
        assert batch.clean_prob is not None  # the loop always gives the label quality
        logits, features = network.forward_features(images)
        head = classifier(network.model)
        masked = sk.masked_forward(
            features,
            batch.targets,
            batch.clean_prob,
            classifier=(head.weight, head.bias),
            size=(images.shape[2], images.shape[3]),
            config=network.mask_config.replace(views=("max",)),
            generator=self.generator,
            sample_index=batch.sample_index,
        )
        labeled = F.cross_entropy(logits, batch.targets)
        hidden = masked.loss
        if not network.modulate:
            hidden = F.cross_entropy(masked.logits, batch.targets)
        return {"loss": (labeled + hidden) / 2, "labeled": labeled, "masked": hidden}
