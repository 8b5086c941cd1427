"""DivideMix (Li et al., 2020), with and without SANM: section 7 of the method on two networks."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

import sanm_kernels as sk

from .. import distributed
from ..config import TrainConfig
from ..data import Dataset, endless
from ..sanm import SANM, Batch, masked_views
from ..settings import setting
from .base import Losses, Recipe, Step, register


@dataclass(frozen=True, kw_only=True)
class DivideMixConfig(TrainConfig):
    """DivideMix"""

    warmup_clip: float = setting(1.0, "clip in the warm-up", low=0)
    confidence_weight: float | None = setting(
        None, "ν of the warm-up; default: 1 for asymmetric noise, else 0", low=0
    )
    train_guess_views: bool = setting(False, "train on the two guessing views too")
    weak_views: int = setting(1, "weak views to train on (CIFAR: 2)", low=0)
    strong_views: int = setting(1, "strong views to train on (CIFAR: 2)", low=0)
    unlabeled_rows: bool = setting(True, "train on the unlabelled samples' rows")
    alpha: float = setting(4.0, "mixup: λ ~ Beta(alpha, alpha)", above=0)
    unlabeled_weight: float = setting(25.0, "λ_u of the unlabelled loss", low=0)
    ramp: float = setting(16.0, "epochs over which λ_u grows from 0 after the warm-up", low=0)
    prior_weight: float = setting(1.0, "ρ of the prior penalty", low=0)


@register("dividemix", DivideMixConfig)
class DivideMix(Recipe):
    """Two networks, each split into labelled and unlabelled samples by the other's losses.

    Per step and sample: two views for guessing, then further auto- and strongly augmented ones for
    training, mixed with one another; SANM adds the masked views of the first guessing view.
    """

    config: DivideMixConfig
    num_networks = 2
    uses_quality = True

    def __init__(self, config: DivideMixConfig, data: Dataset) -> None:
        super().__init__(config, data)
        # Whether each network's epoch is a divided one; otherwise it is plain cross-entropy.
        self.divided = [False] * self.num_networks
        self.beta = torch.distributions.Beta(config.alpha, config.alpha, validate_args=False)

    def plan(self, epoch: int) -> list[Step]:
        """Labelled half and unlabelled half of each batch, as long as the labelled samples last."""
        steps, half = [], self.share // 2
        for k in range(self.num_networks):
            split = divide(self.clean_prob(k), self.config.threshold)
            least = distributed.least(torch.tensor([len(part) for part in split])).tolist()
            self.divided[k] = epoch >= self.config.warmup and min(least) > 0
            if not self.divided[k]:
                if epoch >= self.config.warmup:
                    empty = "unlabelled" if least[0] else "labelled"
                    warnings.warn(
                        f"epoch {epoch}, network {k + 1}: no sample is {empty} at threshold "
                        f"{self.config.threshold}; plain cross-entropy on all of them in this "
                        "epoch",
                        stacklevel=2,
                    )
                steps += self.steps_over_all(k)
                continue
            takes = [endless(part.cpu(), half, self.order) for part in split]
            number = self.passes(int(self._total(len(split[0]))), self.config.batch_size // 2)
            rows = [torch.cat([next(take) for take in takes]) for _ in range(number)]
            steps += self.steps(k, rows)
        return steps

    def clean_prob(self, k: int) -> Tensor:
        return self.quality[1 - k]

    def clip(self, epoch: int) -> float:
        return self.config.warmup_clip if epoch < self.config.warmup else self.config.clip

    def loss(self, network: SANM, batch: Batch, epoch: float) -> Losses:
        k = self.networks.index(network)
        return self.divided_loss(k, batch, epoch) if self.divided[k] else self.warmup_loss(k, batch)

    def warmup_loss(self, k: int, batch: Batch) -> Losses:
        """Cross-entropy; asymmetric noise adds the confidence penalty."""
        logits = self.networks[k](self.augment.warmup(batch.images))
        weight = self.config.confidence_weight
        if weight is None:
            weight = float(self.config.noise == "asymmetric")
        return {"loss": sk.masked_loss(logits, batch.targets, confidence_weight=weight).total}

    def divided_loss(self, k: int, batch: Batch, epoch: float) -> Losses:
        """The loss of section 7 for network k; the labelled half of `batch` (2B) comes first."""
        config, augment, network = self.config, self.augment, self.networks[k]
        images, half = batch.images, len(batch.images) // 2
        quality = batch.clean_prob
        assert quality is not None  # the loop always gives the label quality
        self.networks[1 - k].eval()
        first, second = augment.auto(images), augment.auto(images)
        targets, features = self.guess(k, first, second, batch.targets, quality)

        kinds = [first, second] if config.train_guess_views else []
        kinds += [augment.auto(images) for _ in range(config.weak_views)]
        kinds += [augment.strong(images) for _ in range(config.strong_views)]
        ratios = [torch.zeros_like(quality)] * len(kinds)
        reconstruction = quality.new_zeros(())
        if self.masking and self.plain_views:
            kinds += [augment.auto(images) for _ in range(self.plain_views)]
            ratios += [torch.zeros_like(quality)] * self.plain_views
        elif self.masking:
            masked = network.mask(
                first,
                targets,
                quality,
                features=features,
                generator=self.generator,
                sample_index=batch.sample_index,
            )
            kinds += masked_views(masked)
            ratios += network.view_ratios(masked)
            if config.reconstruct:
                reconstruction, _ = network.reconstruction_loss(masked, first)

        # Rows: all kinds of view of the labelled half, then all of the unlabelled half.
        views = [kind[:half] for kind in kinds] + [kind[half:] for kind in kinds]
        ratio = torch.cat([r[:half] for r in ratios] + [r[half:] for r in ratios])
        soft = targets.view(2, 1, half, -1).expand(2, len(kinds), half, -1)  # no copy per kind
        lam = float(self.beta.sample())
        lam = max(lam, 1 - lam)
        permutation = torch.randperm(len(ratio), generator=self.generator)
        permutation = permutation.to(ratio.device, non_blocking=True)
        labeled = len(kinds) * half
        rows = len(ratio) if config.unlabeled_rows else labeled
        ramp = min(max((epoch - config.warmup) / config.ramp, 0.0), 1.0) if config.ramp else 1.0
        losses = sk.masked_loss(
            network(sk.mixup_views(views, lam, permutation, rows=rows)),
            soft,
            ratio=ratio,
            mix=(lam, permutation),
            num_labeled=labeled,
            unlabeled_weight=config.unlabeled_weight * ramp,
            prior_weight=config.prior_weight,
            drop=network.mask_config.drop,
        )
        return {
            "loss": losses.total + network.mask_config.reconstruction_weight * reconstruction,
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
        # Each half and view in a pass of its own: batch norm takes its statistics from it.
        unlabeled, features = network.forward_features(first[half:])
        guesses = [unlabeled, network(second[half:]), other(first[half:]), other(second[half:])]
        labeled, labeled_features = network.forward_features(first[:half])
        temperature = self.config.temperature
        refined = sk.refine_targets(
            [labeled, network(second[:half])],
            labels=labels[:half],
            clean_prob=quality[:half],
            temperature=temperature,
        )
        guessed = sk.refine_targets(guesses, temperature=temperature)
        return torch.cat([refined, guessed]), torch.cat([labeled_features, features])


@register("sanm-dividemix", DivideMixConfig)
class SANMDivideMix(DivideMix):
    """DivideMix with masked views, modulated targets and reconstruction."""

    masking = True


def divide(quality: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Positions of the labelled (quality above `threshold`) and of the unlabelled samples."""
    labeled = quality > threshold
    return labeled.nonzero()[:, 0], (~labeled).nonzero()[:, 0]
