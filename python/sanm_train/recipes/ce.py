"""One network: plain cross-entropy, and cross-entropy with SANM."""

from __future__ import annotations

from .base import Recipe, register


@register("ce")
class CrossEntropy(Recipe):
    """Cross-entropy on weakly augmented images: what one does when the labels are trusted."""


@register("sanm-ce")
class SANMCrossEntropy(Recipe):
    """After a warm-up, masked views and reconstruction; quality from the network's own losses."""

    masking = True
    uses_quality = True
