"""The functions and criteria of existing SANM and DivideMix scripts, computed by this package.

Same signatures, side effects and draws; public in `sanm_kernels.compat`.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

from sanm_kernels import validate
from sanm_kernels.backends import call
from sanm_kernels.config import MaskConfig
from sanm_kernels.losses import masked_loss
from sanm_kernels.masking import masked_forward
from sanm_kernels.results import MaskedForward

#: Up to these a row is so short that torch's own functions are slow.
FEW_CLASSES = 32
CIFAR = MaskConfig.official_cifar()
CLOTHING1M = MaskConfig.official_clothing1m()


def _python_draws(batch: int, count: int, device: torch.device) -> Tensor:
    """(batch, count) float64 from Python's `random`, sample after sample."""
    values = [[random.random() for _ in range(count)] for _ in range(batch)]
    return torch.tensor(values, dtype=torch.float64, device="cpu").view(batch, count).to(device)


@torch.no_grad()
def erase(
    images: Tensor, outputs: Tensor, gmmweight: Tensor, target_mask: Tensor, config: MaskConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`attention_erase_map` of any configuration with shared draws and both views."""
    result = _masked(images, outputs, gmmweight, target_mask, config, None)
    assert result.images_max is not None and result.images_min is not None
    assert result.targets_max is not None
    target_mask.copy_(result.targets_max)
    return result.images_max, result.images_min, target_mask


def _masked(
    images: Tensor,
    outputs: Tensor,
    gmmweight: Tensor,
    targets: Tensor,
    config: MaskConfig,
    num_classes: int | None,
) -> MaskedForward:
    validate.floating(images, "images", 4, shape="(B, Cin, H, W)")
    gmmweight = validate.quality(gmmweight, "gmmweight")
    draws = _python_draws(images.shape[0], config.num_draws(images.shape[1]), images.device)
    return masked_forward(
        outputs,
        targets,
        gmmweight,
        images=images,
        config=config,
        num_classes=num_classes,
        draws=draws,
    )


@torch.no_grad()
def attention_erase_map(
    images: Tensor, outputs: Tensor, gmmweight: Tensor, target_mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The released CIFAR function: masked views, and targets modulated in place.

    On CPU float32 and square three-channel images of 5×5 pixels and more its results equal the
    released function's to the last bit, and Python's `random` is left in the same state (eight
    draws per sample). In smaller images that function hides nothing. Other channel counts, on which
    it never returns, and other shapes, on which it swaps height and width, give what it was meant
    to compute.

    Args:
        images: (B, Cin, H, W).
        outputs: (B, C, h, w) last feature map.
        gmmweight: (B,) or (B, 1) clean probability in [0, 1].
        target_mask: (B, K) soft targets; overwritten with the modulated ones.

    Returns:
        The view with the box at the peak, the view with the box at the trough, and `target_mask`.

    Raises:
        TypeError, ValueError: as :func:`sanm_kernels.masked_forward`; nothing is changed then
            (but for the state of `random`).
    """
    return erase(images, outputs, gmmweight, target_mask, CIFAR)


@torch.no_grad()
def attention_erase_map_clothing1m(
    images: Tensor, outputs: Tensor, gmmweight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the released Clothing1M function was meant to compute.

    The released one puts every box on the bottom edge, returns areas in pixels as ratios, and adds
    γ·(1 − q) to a number of pixels. This one follows `MaskConfig.official_clothing1m()`; its draws
    come from Python's `random`, `config.num_draws(Cin)` per sample, sample after sample.

    Args:
        images: (B, Cin, H, W).
        outputs: (B, C, h, w) last feature map.
        gmmweight: (B,) or (B, 1) clean probability in [0, 1].

    Returns:
        ratio_max (B,), ratio_min (B,) in [0, 1], the view with the box at the peak, and the view
        with the box at the trough.

    Raises:
        TypeError, ValueError: as :func:`sanm_kernels.masked_forward`.
    """
    validate.is_tensor(outputs, "outputs")
    labels = torch.zeros(outputs.shape[0], dtype=torch.int64, device=outputs.device)
    result = _masked(images, outputs, gmmweight, labels, CLOTHING1M, 2)
    assert result.ratio_max is not None and result.ratio_min is not None
    assert result.images_max is not None and result.images_min is not None
    return result.ratio_max, result.ratio_min, result.images_max, result.images_min


#: λ = 1, and weights of 0 in the total, which is not used.
_SCALARS = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)


def _losses(logits: Tensor, targets: Tensor, n_x: int) -> tuple[Tensor, Tensor, Tensor]:
    """L_x, L_u and N () of plain rows (n, K), the first n_x of them labelled: `masked_loss` without
    the checks of its arguments, which take as long as these small kernels."""
    _, labeled, unlabeled, _, confidence, *_ = call(
        "masked_loss", logits.device, None, logits, targets, None, None, None, _SCALARS, n_x, True,
        -100, True,
    )  # fmt: skip
    return labeled, unlabeled, confidence


def _plain(x: Tensor) -> bool:
    """Whether :func:`_losses` may be used: on rows of logits, outside of compiled graphs."""
    return (
        x.dim() == 2
        and x.shape[1] > 1
        and x.dtype in validate.FLOATS
        and x.layout is torch.strided
        and not torch.compiler.is_compiling()
    )


def both_losses(
    x: Tensor, targets_x: Tensor, u: Tensor, targets_u: Tensor
) -> tuple[Tensor, Tensor]:
    """L_x and L_u, in one call where the halves are alike."""
    shape, kind, device = x.shape, x.dtype, x.device
    if not (
        targets_x.shape == shape
        and targets_u.shape == u.shape
        and u.shape[1:] == shape[1:]
        and kind == u.dtype == targets_x.dtype == targets_u.dtype
        and device == u.device == targets_x.device == targets_u.device
        and _plain(x)
    ):
        unlabeled = masked_loss(u, targets_u, num_labeled=0).unlabeled
        return masked_loss(x, targets_x).labeled, unlabeled
    targets = _uncut(targets_x, targets_u)
    if targets is None:
        targets = torch.cat([targets_x, targets_u])
    logits = _uncut(x, u)
    if logits is None:
        logits = torch.cat([x, u])
    return _losses(logits, targets, shape[0])[:2]


def confidence(outputs: Tensor) -> Tensor:
    """N of logits (n, K)."""
    validate.floating(outputs, "outputs", 2, shape="(n, K)")
    n = outputs.shape[0]
    labels = torch.zeros(n, dtype=torch.int64, device=outputs.device)
    if not _plain(outputs):
        return masked_loss(outputs, labels).confidence
    return _losses(outputs, labels, 0)[2]


def _uncut(first: Tensor, second: Tensor) -> Tensor | None:
    """The tensor whose rows are those of `first`, then those of `second`, if it is there."""
    whole = first._base
    if whole is None or whole is not second._base or whole.requires_grad != first.requires_grad:
        return None
    rows, stride, start = first.shape[0], whole.stride(), whole.storage_offset()
    fits = whole.shape[0] == rows + second.shape[0] and whole.shape[1:] == first.shape[1:]
    if not fits or first.stride() != stride or second.stride() != stride:
        return None
    here = first.storage_offset(), second.storage_offset()
    return whole if here == (start, start + rows * stride[0]) else None


class SemiLoss:
    """DivideMix's criterion: cross-entropy, squared error, and the ramped weight of the latter.

    Args:
        lambda_u: the weight after the ramp.
        rampup_length: epochs over which it grows from 0.
    """

    def __init__(self, lambda_u: float = 25, rampup_length: float = 16) -> None:
        self.lambda_u = validate.number(lambda_u, "lambda_u", 0)
        self.rampup_length = validate.number(rampup_length, "rampup_length", 0)

    def __call__(
        self,
        outputs_x: Tensor,
        targets_x: Tensor,
        outputs_u: Tensor,
        targets_u: Tensor,
        epoch: float,
        warm_up: float,
    ) -> tuple[Tensor, Tensor, float]:
        """Losses of logits (n, K) against soft targets (n, K), labelled x and unlabelled u.

        Returns:
            L_x, L_u and λ_u·clip((epoch − warm_up)/rampup_length, 0, 1).

        Raises:
            TypeError, ValueError: as :func:`sanm_kernels.masked_loss`.
        """
        losses = both_losses(outputs_x, targets_x, outputs_u, targets_u)
        return *losses, self._weight(epoch, warm_up)

    def _weight(self, epoch: float, warm_up: float) -> float:
        done = 1.0 if self.rampup_length == 0 else (epoch - warm_up) / self.rampup_length
        return self.lambda_u * min(max(float(done), 0.0), 1.0)


class NegEntropy:
    """The confidence penalty Σ_k p_k log p_k, averaged over the rows of logits (n, K)."""

    def __call__(self, outputs: Tensor) -> Tensor:
        """The penalty of `outputs`, a scalar tensor; differentiable."""
        return confidence(outputs)


class SampleLoss(torch.nn.CrossEntropyLoss):
    """``CrossEntropyLoss(reduction="none")`` that collects losses by `sample_loss`.

    Of float32 logits (B, K) of few classes, on the CPU and without a gradient: there it is faster.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        rows = (
            input.dim() == 2
            and target.shape == input.shape[:1]
            and 0 < input.shape[1] <= FEW_CLASSES
        )
        plain = rows and input.dtype == torch.float32 and target.dtype == torch.int64
        here = plain and input.device.type == "cpu" == target.device.type
        if here and not (input.requires_grad and torch.is_grad_enabled()):
            try:
                losses: Tensor = call("sample_loss", input.device, None, input, target)[0]
                return losses
            except ValueError:  # an ignored label, or one out of range
                pass
        return super().forward(input, target)
