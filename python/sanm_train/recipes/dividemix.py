"""DivideMix (Li et al., 2020), with and without SANM: method.md section 7 on two networks."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

import sanm_kernels as sk

from ..data import endless
from ..sanm import SANM, Batch, masked_views
from .base import Losses, Recipe, register


@register("dividemix")
class DivideMix(Recipe):
    """Two networks, each split into labelled and unlabelled samples by the other's losses.

    Per step and sample: two weak views for guessing, then further weak and strong ones for
    training, mixed with one another; SANM adds the masked views of the first guessing view.
    """

    num_networks = 2
    uses_quality = True

    def train_epoch(self, epoch: int) -> Iterator[Losses]:
        config = self.config
        if epoch < config.warmup:
            for k in range(2):
                yield from self.train_all(k, self.warmup_loss, config.warmup_clip)
            return
        self.fit_quality()
        for k in range(2):
            quality = self.quality[1 - k]
            labeled, unlabeled = split(quality, config.threshold)
            if not (len(labeled) and len(unlabeled)):
                empty = "unlabelled" if len(labeled) else "labelled"
                warnings.warn(
                    f"epoch {epoch}, network {k + 1}: no sample is {empty} at threshold "
                    f"{config.threshold}; plain cross-entropy on all of them in this epoch",
                    stacklevel=2,
                )
                yield from self.train_all(k, self.warmup_loss)
                continue
            half = config.batch_size // 2
            take_x = endless(labeled, half, self.generator)
            take_u = endless(unlabeled, half, self.generator)
            steps = max(1, round(len(labeled) / half))
            for i in range(steps):
                self.networks[k].train()
                self.networks[1 - k].eval()
                index = torch.cat([next(take_x), next(take_u)])
                yield self.step(k, self.divided_loss(k, index, quality, epoch + i / steps))

    def warmup_loss(self, network: SANM, batch: Batch) -> Losses:
        """Cross-entropy; asymmetric noise adds the confidence penalty."""
        logits = network(self.augment.weak(batch.images))
        confidence = float(self.config.noise == "asymmetric")
        return {"loss": sk.masked_loss(logits, batch.targets, confidence_weight=confidence).total}

    def divided_loss(self, k: int, index: Tensor, quality: Tensor, epoch: float) -> Losses:
        """The loss of section 7 for network k.

        Args:
            index: samples (2B,), the labelled half first.
            quality: clean probability (N,) of all samples.
            epoch: fractional.
        """
        config, augment, network = self.config, self.augment, self.networks[k]
        images, labels = self.data.images[index], self.data.labels[index]
        quality, half = quality[index], len(index) // 2
        first, second = augment.weak(images), augment.weak(images)
        targets, features = self.guess(k, first, second, labels, quality)

        kinds = [augment.weak(images) for _ in range(config.weak_views)]
        kinds += [augment.strong(images) for _ in range(config.strong_views)]
        ratios = [torch.zeros_like(quality)] * len(kinds)
        reconstruction = quality.new_zeros(())
        if self.masking:
            masked = network.mask(
                first,
                targets,
                quality,
                features=features,
                generator=self.generator,
                sample_index=index,
            )
            kinds += masked_views(masked)
            ratios += network.view_ratios(masked)
            if config.reconstruct:
                reconstruction, _ = network.reconstruction_loss(masked, first)

        # Rows: all kinds of view of the labelled half, then all of the unlabelled half.
        views = [kind[:half] for kind in kinds] + [kind[half:] for kind in kinds]
        ratio = torch.cat([r[:half] for r in ratios] + [r[half:] for r in ratios])
        soft = targets.view(2, 1, half, -1).expand(2, len(kinds), half, -1)  # no copy per kind
        beta = float(np.random.beta(config.alpha, config.alpha))
        lam = max(beta, 1 - beta)
        permutation = torch.randperm(len(ratio), generator=self.generator).to(ratio.device)
        ramp = min(max((epoch - config.warmup) / config.ramp, 0.0), 1.0) if config.ramp else 1.0
        losses = sk.masked_loss(
            network(sk.mixup_views(views, lam, permutation)),
            soft,
            ratio=ratio,
            mix=(lam, permutation),
            num_labeled=len(kinds) * half,
            unlabeled_weight=config.unlabeled_weight * ramp,
            prior_weight=config.prior_weight,
            drop=network.config.drop,
        )
        return {
            "loss": losses.total + network.config.reconstruction_weight * reconstruction,
            "labeled": losses.labeled,
            "unlabeled": losses.unlabeled,
            "prior": losses.prior,
            "reconstruction": reconstruction,
        }

    @torch.no_grad()
    def guess(
        self, k: int, first: Tensor, second: Tensor, labels: Tensor, quality: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Targets (2B, K), refined for the labelled and guessed for the unlabelled half, and the
        feature map (2B, C, h, w) of the first view. labels and quality are (2B,)."""
        network, other, half = self.networks[k], self.networks[1 - k], len(first) // 2
        logits, features = network.forward_features(first)
        own = [logits, network(second)]
        others = [other(first[half:]), other(second[half:])]
        temperature = self.config.temperature
        refined = sk.refine_targets(
            [z[:half] for z in own],
            labels=labels[:half],
            clean_prob=quality[:half],
            temperature=temperature,
        )
        guessed = sk.refine_targets([z[half:] for z in own] + others, temperature=temperature)
        return torch.cat([refined, guessed]), features


@register("sanm-dividemix")
class SANMDivideMix(DivideMix):
    """DivideMix with masked views, modulated targets and reconstruction."""

    masking = True


def split(quality: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Positions of the labelled (quality above `threshold`) and of the unlabelled samples."""
    labeled = quality > threshold
    return labeled.nonzero()[:, 0], (~labeled).nonzero()[:, 0]
