"""Drop-in replacements for the functions of existing SANM and DivideMix scripts.

Same signatures, side effects and draws; :func:`patch` puts them into a script's modules, where they
compute what the script's own functions do. The ``official`` semantics and what is wrong with the
released functions: docs/switching.md.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import inspect
import random
import sys
from collections.abc import Callable
from types import ModuleType, TracebackType
from typing import Any

import torch
from torch import Tensor

from sanm_kernels import trials, validate
from sanm_kernels.config import MaskConfig
from sanm_kernels.functional import masked_forward
from sanm_kernels.losses import masked_loss
from sanm_kernels.results import MaskedForward
from sanm_kernels.trials import KEPT, NOT_VERIFIED, REPLACED, Finding

__all__ = [
    "Finding",
    "NegEntropy",
    "Patch",
    "SemiLoss",
    "attention_erase_map",
    "attention_erase_map_clothing1m",
    "patch",
]

#: What :func:`patch` looks for.
NAMES = ("attention_erase_map", "attention_erase_map_clothing1m", "SemiLoss", "NegEntropy")
_CIFAR = MaskConfig.official_cifar()
_CLOTHING1M = MaskConfig.official_clothing1m()


def _python_draws(batch: int, count: int, device: torch.device) -> Tensor:
    """(batch, count) float64 from Python's `random`, sample after sample."""
    values = [[random.random() for _ in range(count)] for _ in range(batch)]
    return torch.tensor(values, dtype=torch.float64).view(batch, count).to(device)


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
    return erase(images, outputs, gmmweight, target_mask, _CIFAR)


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


def _both_losses(
    x: Tensor, targets_x: Tensor, u: Tensor, targets_u: Tensor
) -> tuple[Tensor, Tensor]:
    """L_x and L_u, in one call where the logits are what one tensor was cut into."""
    logits = _uncut(x, u)
    if logits is None or (targets_x.shape, targets_u.shape) != (x.shape, u.shape):
        unlabeled = masked_loss(u, targets_u, num_labeled=0).unlabeled
        return masked_loss(x, targets_x).labeled, unlabeled
    targets = _uncut(targets_x, targets_u)
    if targets is None:
        targets = torch.cat([targets_x, targets_u])
    result = masked_loss(logits, targets, num_labeled=x.shape[0])
    return result.labeled, result.unlabeled


def _uncut(first: Tensor, second: Tensor) -> Tensor | None:
    """The tensor whose rows are those of `first`, then those of `second`, if it is there."""
    whole = first._base
    if whole is None or whole is not second._base or whole.requires_grad != first.requires_grad:
        return None
    rows = first.shape[0]
    same = whole.stride() == first.stride() == second.stride()
    shape = torch.Size((rows + second.shape[0], *first.shape[1:]))
    starts = [x.storage_offset() - whole.storage_offset() for x in (first, second)]
    if same and whole.shape == shape and starts == [0, rows * whole.stride(0)]:
        return whole
    return None


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
        losses = _both_losses(outputs_x, targets_x, outputs_u, targets_u)
        return *losses, self._weight(epoch, warm_up)

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


# ---- patch: what a script's own functions do is found out by calling them.


class Patch:
    """What :func:`patch` did. Undone by :meth:`undo`, or at the end of a ``with`` block.

    Attributes:
        module: the module whose names were looked at.
        findings: by name, what was found out about it.
        replaced: the originals that were replaced, by name; empty once undone.
    """

    def __init__(self, module: ModuleType) -> None:
        self.module = module
        self.findings: dict[str, Finding] = {}
        self.replaced: dict[str, Any] = {}
        self._undo: list[Callable[[], object]] = []

    def undo(self) -> None:
        """Put the originals back."""
        while self._undo:
            self._undo.pop()()
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
        lines = "".join(f"\n  {finding}" for finding in self.findings.values())
        return f"<sanm_kernels in {self.module.__name__}:{lines}>"


def _semi_loss(original: Any) -> Any:
    """A SemiLoss's own call with the losses from the kernels; the weight is what it says itself."""
    names = _parameters(original)[1:5]

    @functools.wraps(original)
    def call(self: Any, *given: Any, **named: Any) -> Any:
        given += tuple(named.pop(name) for name in names[len(given) :] if name in named)
        own = trials.own(original, self, given[4:], named) if len(given) >= 4 else None
        if own is None or not (len(given[0]) and len(given[2])):  # a mean of nothing is NaN
            return original(self, *given, **named)
        return *_both_losses(*given[:4]), *own

    return call


def _neg_entropy(original: Any) -> Any:
    penalty = NegEntropy()

    @functools.wraps(original)
    def call(self: Any, *given: Any, **named: Any) -> Any:
        if len(given) != 1 or named or not len(given[0]):
            return original(self, *given, **named)
        return penalty(given[0])

    return call


def _masking(original: Any, ours: Any) -> Any:
    """`ours` for images like those that were tried: square, of three channels and float32.

    And of 5×5 pixels and more: in smaller ones the released function hides nothing.
    """
    names = _parameters(original)

    @functools.wraps(original)
    def call(*given: Any, **named: Any) -> Any:
        given += tuple(named.pop(name) for name in names[len(given) :] if name in named)
        alike = all(isinstance(x, Tensor) and x.dtype == torch.float32 for x in given)
        if alike and not named and given:
            _, channels, height, width = given[0].shape
            if channels == 3 and height == width > 4:
                return ours(*given)
        return original(*given, **named)

    return call


def _parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def _try_masking(name: str, original: Any) -> tuple[Any, Finding]:
    """The function that serves in place of `original`, and what came of the comparison."""
    count = len(_parameters(original))
    if count not in (3, 4):
        return None, Finding(name, NOT_VERIFIED, f"it takes {count} arguments, not 3 or 4")
    best: tuple[Any, Finding] | None = None
    for column in (True, False):  # of qualities, as the scripts have them
        if count == 3:
            names = ["ratio_max", "ratio_min", "view at the peak", "view at the trough"]
            candidates: list[tuple[Any, str]] = [(attention_erase_map_clothing1m, "")]
        else:
            names = ["view at the peak", "view at the trough", "returned targets"]
            config = _CIFAR
            with contextlib.suppress(ValueError):  # areas in pixels, perhaps
                config = _CIFAR.replace(**trials.recognised(original, column))
            text = f"γ = {config.ratio_gamma}, a in [{config.ratio_low}, {config.ratio_high}]"
            half, whole = (config.replace(area_scale=scale) for scale in (0.5, 1.0))
            candidates = [
                (functools.partial(erase, config=half), text),
                (functools.partial(erase, config=whole), f"{text}, areas not halved"),
            ]
        for function, text in candidates:
            ours = _masking(original, function)
            inputs = functools.partial(trials.masking_inputs, column=column, soft=count == 4)
            finding = trials.verify(name, original, ours, inputs, names, exact=True)
            if finding.state == REPLACED:
                return ours, dataclasses.replace(finding, reason=text)
            if best is None or best[1].state == NOT_VERIFIED != finding.state:
                best = ours, finding
        if best is not None and best[1].state != NOT_VERIFIED:
            break
    assert best is not None
    return best


def _try_criterion(name: str, cls: type, module: ModuleType) -> tuple[Any, Finding]:
    """The method that serves in place of the class's own, and what came of the comparison."""
    original = getattr(cls, _method(cls), None)
    if not inspect.isfunction(original):
        return None, Finding(name, NOT_VERIFIED, f"it has no {_method(cls)} of its own")
    semi = name == "SemiLoss"
    ours = (_semi_loss if semi else _neg_entropy)(original)
    held = vars(module)
    try:
        self = next((copy.copy(x) for x in held.values() if type(x) is cls), None) or cls(
            *(
                held.get(p.name, trials.number(p.name, 0))
                for p in inspect.signature(cls).parameters.values()
                if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
            )
        )
    except Exception as error:
        return ours, Finding(name, NOT_VERIFIED, f"no object can be made of it: {error}")
    more = list(inspect.signature(original).parameters.values())[5 if semi else 2 :]
    classes = getattr(held.get("args"), "num_class", None)
    classes = classes if isinstance(classes, int) and classes > 1 else 10
    inputs = functools.partial(trials.criterion_inputs, more=more, semi=semi, K=classes)
    names = ["L_x", "L_u", "weight"] if semi else ["penalty"]
    theirs, tried = (functools.partial(function, self) for function in (original, ours))
    finding = trials.verify(name, theirs, tried, inputs, names, exact=False)
    if semi and finding.state == REPLACED:
        extra = next(iter(inputs("cpu")))[4:]
        if trials.own(original, self, extra, {}) is None:
            text = "what it returns beside its losses cannot be had without them"
            finding = dataclasses.replace(finding, state=KEPT, reason=text)
    return ours, finding


def _method(cls: type) -> str:
    return "forward" if issubclass(cls, torch.nn.Module) else "__call__"


def _is_ours(original: Any) -> bool:
    served = getattr(original, _method(original), None) if isinstance(original, type) else original
    return getattr(original, "__module__", None) == __name__ or hasattr(served, "_sanm_kernels")


def _put(done: Patch, name: str, original: Any, ours: Any) -> list[str]:
    """Put `ours` in the original's place, wherever a module holds it; names of other modules.

    In a class it takes the place of the method: objects of the class that were made before, and
    other names of it, have it too.
    """
    done.replaced[name] = original
    ours._sanm_kernels = True
    if isinstance(original, type):
        method = _method(original)
        if method in vars(original):
            done._undo.append(functools.partial(setattr, original, method, vars(original)[method]))
        else:
            done._undo.append(functools.partial(delattr, original, method))
        setattr(original, method, ours)
        return []
    elsewhere = []
    for module in {id(m): m for m in (done.module, *sys.modules.values())}.values():
        held = getattr(module, "__dict__", {})
        for key in [key for key, value in list(held.items()) if value is original]:
            held[key] = ours
            done._undo.append(functools.partial(held.__setitem__, key, original))
            if module is not done.module:
                elsewhere.append(module.__name__)
    return elsewhere


def patch(module: ModuleType, *, force: bool = False, verbose: bool = True) -> Patch:
    """Let a script compute with this package, where that changes none of its results.

    Looked at are `attention_erase_map`, `attention_erase_map_clothing1m`, `SemiLoss` and
    `NegEntropy`, where `module` has them. Each is called on small random inputs and compared with
    ours: views, boxes, targets and the random numbers drawn to the last bit, losses and their
    gradients to float32 rounding. What agrees is replaced. The weight that a `SemiLoss` returns
    goes on coming from itself, whatever its arguments are; a masking function may have its own γ
    and range of ratios. A function is replaced in all loaded modules that hold it, a class in
    place, so that objects made before compute with ours too; what was put elsewhere before, such as
    a functools.partial of a function, stays as it is. Random states are left as they were.

    Args:
        module: the module whose names are looked at, for instance an imported training script.
        force: replace also what differs or cannot be compared.
        verbose: print what was found.

    Returns:
        A Patch, which holds the findings and undoes the replacement.

    Raises:
        TypeError: `module` is no module.
        ValueError: it has none of the names.
    """
    if not isinstance(module, ModuleType):
        raise TypeError(f"module: expected a module, got {type(module).__name__}")
    present = {name: getattr(module, name) for name in NAMES if hasattr(module, name)}
    if not present:
        raise ValueError(
            f"module: expected one with some of {', '.join(NAMES)}, "
            f"got {module.__name__}, which has none"
        )
    done = Patch(module)
    for name, original in present.items():
        ours = None
        if _is_ours(original):
            finding = Finding(name, KEPT, "it is this package's already")
        elif name in ("SemiLoss", "NegEntropy") and isinstance(original, type):
            ours, finding = _try_criterion(name, original, module)
        elif name in ("SemiLoss", "NegEntropy") or not inspect.isfunction(original):
            finding = Finding(name, NOT_VERIFIED, f"it is a {type(original).__name__}")
        else:
            ours, finding = _try_masking(name, original)
        if ours is not None and (force or finding.state == REPLACED):
            if finding.state != REPLACED:
                finding = dataclasses.replace(
                    finding, state=REPLACED, reason=f"forced, {finding.state}: {finding.reason}"
                )
            also = _put(done, name, original, ours)
            if also:
                reason = "; ".join(filter(None, [finding.reason, f"also in {', '.join(also)}"]))
                finding = dataclasses.replace(finding, reason=reason)
        done.findings[name] = finding
    if verbose:
        print(done)
    return done
