"""What masked_forward and activation_stats return, with the types that checkers see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, TypedDict

import torch
from torch import Tensor
from typing_extensions import NamedTuple, TypeVar  # torch's own dependency; generic, with defaults

from sanm_kernels.config import MaskConfig

#: Tensor where `images=` was given, None where not; either for a plain `MaskedForward`.
Images = TypeVar("Images", covariant=True, default=Tensor | None)
#: The same of `classifier=`.
Logits = TypeVar("Logits", covariant=True, default=Tensor | None)


class ActivationStats(NamedTuple):
    """Per-sample statistics of the energy map E = Σ_c F² in which clean and mislabelled differ.

    Attributes:
        max, min, mean, std, entropy: (B,) float32 (float64 for float64 features). `std` is the
            population's; `entropy` is normalised: 0 for one spike, 1 for a flat map.
        peak, trough: (B, 2) int32, the row and column in image pixels where the upsampled map is
            largest and smallest.
    """

    max: Tensor
    min: Tensor
    mean: Tensor
    std: Tensor
    entropy: Tensor
    peak: Tensor
    trough: Tensor


class MaskedForward(NamedTuple, Generic[Images, Logits]):
    """What :func:`masked_forward` returns; None where a thing was not asked for.

    To type checkers it is ``MaskedForward[Tensor, None]`` with ``images=``,
    ``MaskedForward[None, Tensor]`` with ``classifier=``; as an annotation, ``MaskedForward`` alone
    is any of them.

    Attributes:
        stats: the activation statistics.
        ratio_max, ratio_min: (B,) float32, the mask ratio r of each view. The same tensor twice
            where the configuration shares the draw between the views.
        box_max, box_min: (B, 4) int32 y0, x0, y1, x1, half open.
        targets_max, targets_min: (B, K) modulated targets, in the dtype of soft targets, float32
            for class indices. The same tensor twice where the draw is shared.
        images_max, images_min: (B, Cin, H, W) masked views in the images' dtype and memory format.
        images_masked: (V·B, Cin, H, W), the memory of which the views are slices: what a network
            takes to see all views in one forward.
        logits: (B, K) of the one-pass mode, float32 (float64 for float64 features).
        loss: () its cross-entropy against `targets_max`.
        buffers: the tensors that all of the above are slices of; what `out=` writes to.
    """

    stats: ActivationStats
    # `| Any`: None where the configuration lacks the view, which no type says
    ratio_max: Tensor | Any
    ratio_min: Tensor | Any
    box_max: Tensor | Any
    box_min: Tensor | Any
    targets_max: Tensor | Any
    targets_min: Tensor | Any
    images_max: Images | Any
    images_min: Images | Any
    images_masked: Images
    logits: Logits
    loss: Logits
    buffers: tuple[Tensor, ...]


class Options(TypedDict, total=False):
    """The arguments of masked_forward that its result's type does not depend on."""

    size: Sequence[int] | None
    config: MaskConfig | None
    num_classes: int | None
    draws: Tensor | None
    generator: torch.Generator | int | Tensor | None
    sample_index: Tensor | None
    out: MaskedForward | None
    backend: str | None
