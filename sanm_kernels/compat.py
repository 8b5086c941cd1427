"""Drop-in replacements for the functions of existing SANM and DivideMix scripts.

Same signatures, side effects and draws; :func:`patch` puts them into a script's module. The
``official`` semantics and what is wrong with the released functions: docs/switching.md.
"""

from __future__ import annotations

import inspect
import random
from types import ModuleType, TracebackType
from typing import Any

import torch
from torch import Tensor

from sanm_kernels import validate
from sanm_kernels.config import MaskConfig
from sanm_kernels.functional import masked_forward
from sanm_kernels.losses import masked_loss
from sanm_kernels.results import MaskedForward

__all__ = [
    "NegEntropy",
    "Patch",
    "SemiLoss",
    "attention_erase_map",
    "attention_erase_map_clothing1m",
    "patch",
]

_CIFAR = MaskConfig.official_cifar()
_CLOTHING1M = MaskConfig.official_clothing1m()


def _python_draws(batch: int, count: int, device: torch.device) -> Tensor:
    """(batch, count) float64 from Python's `random`, sample after sample."""
    values = [[random.random() for _ in range(count)] for _ in range(batch)]
    return torch.tensor(values, dtype=torch.float64).view(batch, count).to(device)


def _masked(
    images: Tensor,
    outputs: Tensor,
    gmmweight: Tensor,
    targets: Tensor,
    config: MaskConfig,
    num_classes: int | None,
) -> MaskedForward:
    validate.floating(images, "images", 4, shape="(B, Cin, H, W)")
    validate.floating(gmmweight, "gmmweight")
    draws = _python_draws(images.shape[0], config.num_draws(images.shape[1]), images.device)
    return masked_forward(
        outputs,
        targets,
        gmmweight.reshape(-1),
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

    On CPU float32 and square three-channel images its results equal the released function's to the
    last bit, and Python's `random` is left in the same state (eight draws per sample). Other
    channel counts, on which that function never returns, and other shapes, on which it swaps height
    and width, give what it was meant to compute.

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
    result = _masked(images, outputs, gmmweight, target_mask, _CIFAR, None)
    assert result.images_max is not None and result.images_min is not None
    assert result.targets_max is not None
    target_mask.copy_(result.targets_max)
    return result.images_max, result.images_min, target_mask


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
    result = _masked(images, outputs, gmmweight, labels, _CLOTHING1M, 2)
    assert result.ratio_max is not None and result.ratio_min is not None
    assert result.images_max is not None and result.images_min is not None
    return result.ratio_max, result.ratio_min, result.images_max, result.images_min


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
        labeled = masked_loss(outputs_x, targets_x).labeled
        unlabeled = masked_loss(outputs_u, targets_u, num_labeled=0).unlabeled
        return labeled, unlabeled, self._weight(epoch, warm_up)

    def _weight(self, epoch: float, warm_up: float) -> float:
        done = 1.0 if self.rampup_length == 0 else (epoch - warm_up) / self.rampup_length
        return self.lambda_u * min(max(float(done), 0.0), 1.0)


class NegEntropy:
    """The confidence penalty Σ_k p_k log p_k, averaged over the rows of logits (n, K)."""

    def __call__(self, outputs: Tensor) -> Tensor:
        """The penalty of `outputs`, a scalar tensor; differentiable."""
        validate.floating(outputs, "outputs", 2, shape="(n, K)")
        labels = torch.zeros(outputs.shape[0], dtype=torch.int64, device=outputs.device)
        return masked_loss(outputs, labels).confidence


class Patch:
    """What :func:`patch` replaced. Undone by :meth:`undo`, or at the end of a ``with`` block.

    Attributes:
        module: the module that was changed.
        replaced: the originals by name; empty once undone.
    """

    def __init__(self, module: ModuleType, replaced: dict[str, Any]) -> None:
        self.module = module
        self.replaced = replaced

    def undo(self) -> None:
        """Put the originals back."""
        for name, original in self.replaced.items():
            setattr(self.module, name, original)
        self.replaced = {}

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.undo()

    def __repr__(self) -> str:
        names = ", ".join(self.replaced) or "nothing"
        return f"<sanm_kernels replaced {names} in {self.module.__name__}>"


def _erase_for(original: Any) -> Any:
    """Which of the two functions of one name `original` is, told by its arguments."""
    try:
        count = len(inspect.signature(original).parameters)
    except (TypeError, ValueError):
        return attention_erase_map
    return attention_erase_map_clothing1m if count == 3 else attention_erase_map


def _semi_loss_for(module: ModuleType) -> type[SemiLoss]:
    """SemiLoss with the weight of the module's own: its constructor's, or its `linear_rampup`'s."""
    original = getattr(module, "SemiLoss", None)
    if original is None or "lambda_u" in inspect.signature(original).parameters:
        return SemiLoss
    if not callable(getattr(module, "linear_rampup", None)):
        raise ValueError(
            "module: expected a SemiLoss(lambda_u=…) or a linear_rampup(epoch, warm_up), for the "
            f"weight of the unlabelled loss, got {module.__name__}, which has neither"
        )

    class RampedSemiLoss(SemiLoss):
        """SemiLoss whose weight is what the script's `linear_rampup` returns."""

        def _weight(self, epoch: float, warm_up: float) -> float:
            weight: float = module.linear_rampup(epoch, warm_up)
            return weight

    return RampedSemiLoss


def patch(module: ModuleType, *, verbose: bool = True) -> Patch:
    """Put this module's functions in place of the same names in `module`.

    Replaced are, where they exist, `attention_erase_map` (by the Clothing1M variant if it takes
    three arguments), `attention_erase_map_clothing1m`, `SemiLoss` and `NegEntropy`. Where the
    module's own `SemiLoss` takes no `lambda_u`, the weight goes on coming from its `linear_rampup`.
    Objects made from the old classes before the call stay what they are.

    Args:
        module: the module whose globals are changed, for instance an imported training script.
        verbose: print what was replaced.

    Returns:
        A Patch, which undoes the replacement.

    Raises:
        TypeError: `module` is no module.
        ValueError: it has none of the names, or a `SemiLoss` whose weight cannot be known; nothing
            is replaced then.
    """
    if not isinstance(module, ModuleType):
        raise TypeError(f"module: expected a module, got {type(module).__name__}")
    ours = {
        "attention_erase_map": _erase_for(getattr(module, "attention_erase_map", None)),
        "attention_erase_map_clothing1m": attention_erase_map_clothing1m,
        "SemiLoss": _semi_loss_for(module),
        "NegEntropy": NegEntropy,
    }
    present = {name: getattr(module, name) for name in ours if hasattr(module, name)}
    if not present:
        raise ValueError(
            f"module: expected one with some of {', '.join(ours)}, "
            f"got {module.__name__}, which has none"
        )
    for name in present:
        setattr(module, name, ours[name])
    done = Patch(module, present)
    if verbose:
        print(done)
    return done
