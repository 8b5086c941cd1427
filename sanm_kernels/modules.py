"""Thin modules that hold hyper-parameters and call the functions of the same purpose."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sanm_kernels.config import MaskConfig
from sanm_kernels.functional import masked_forward
from sanm_kernels.losses import MaskedLoss, masked_loss, reconstruction_loss
from sanm_kernels.results import MaskedForward

__all__ = ["AdversarialMasking", "MaskedCriterion", "ReconstructionCriterion"]


class AdversarialMasking(nn.Module):
    """:func:`sanm_kernels.masked_forward` under one configuration.

    Args:
        config: the semantics. Default: the paper's.
    """

    def __init__(self, config: MaskConfig | None = None) -> None:
        super().__init__()
        self.config = MaskConfig.paper() if config is None else config

    def forward(
        self, features: Tensor, targets: Tensor, clean_prob: Tensor, **options: Any
    ) -> MaskedForward:
        """As :func:`sanm_kernels.masked_forward`; `options` are its keyword arguments."""
        return masked_forward(features, targets, clean_prob, config=self.config, **options)

    def extra_repr(self) -> str:
        return repr(self.config)


class MaskedCriterion(nn.Module):
    """:func:`sanm_kernels.masked_loss` with fixed weights.

    Args:
        prior_weight, confidence_weight: ρ and ν.
        drop: ``"clamped"`` or ``"unclamped"``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
    """

    def __init__(
        self,
        prior_weight: float = 0.0,
        confidence_weight: float = 0.0,
        drop: str = "clamped",
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        self.prior_weight = prior_weight
        self.confidence_weight = confidence_weight
        self.drop = drop
        self.reduction = reduction

    def forward(self, logits: Tensor, targets: Tensor, **options: Any) -> MaskedLoss:
        """As :func:`sanm_kernels.masked_loss`; `options` are its other keyword arguments."""
        return masked_loss(
            logits,
            targets,
            prior_weight=self.prior_weight,
            confidence_weight=self.confidence_weight,
            drop=self.drop,
            reduction=self.reduction,
            **options,
        )

    def extra_repr(self) -> str:
        return (
            f"prior_weight={self.prior_weight}, confidence_weight={self.confidence_weight}, "
            f"drop={self.drop!r}, reduction={self.reduction!r}"
        )


class ReconstructionCriterion(nn.Module):
    """:func:`sanm_kernels.reconstruction_loss` over one region.

    Args:
        region: ``"image"``, the whole image, or ``"masked"``, the hidden boxes only.
    """

    def __init__(self, region: str = "image") -> None:
        super().__init__()
        self.region = region

    def forward(self, reconstruction: Tensor, images: Tensor, **options: Any) -> Tensor:
        """As :func:`sanm_kernels.reconstruction_loss`; `options` are its keyword arguments."""
        return reconstruction_loss(reconstruction, images, region=self.region, **options)

    def extra_repr(self) -> str:
        return f"region={self.region!r}"
