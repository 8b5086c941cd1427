"""Kernels for self-supervised adversarial noisy masking (SANM): learning from noisy labels."""

from torch import serialization

from sanm_kernels.backends import available_backends, set_cpu_cache_limit, use_backend
from sanm_kernels.config import MaskConfig
from sanm_kernels.losses import MaskedLoss, masked_loss, reconstruction_loss, sample_loss
from sanm_kernels.masking import activation_stats, masked_forward
from sanm_kernels.quality import LabelQuality, fit_label_quality
from sanm_kernels.results import ActivationStats, MaskedForward
from sanm_kernels.targets import mixup_views, refine_targets

__version__ = "0.1.0"

# What a checkpoint may hold: torch.load(weights_only=True) then makes them again.
serialization.add_safe_globals(
    [MaskConfig, ActivationStats, MaskedForward, LabelQuality, MaskedLoss]
)

__all__ = [
    "ActivationStats",
    "LabelQuality",
    "MaskConfig",
    "MaskedForward",
    "MaskedLoss",
    "activation_stats",
    "available_backends",
    "fit_label_quality",
    "masked_forward",
    "masked_loss",
    "mixup_views",
    "reconstruction_loss",
    "refine_targets",
    "sample_loss",
    "set_cpu_cache_limit",
    "use_backend",
]
