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
import sys
from collections.abc import Callable
from types import ModuleType, TracebackType
from typing import Any

import torch
from torch import Tensor

from sanm_kernels import dropin, mixture, trials
from sanm_kernels.dropin import (
    CIFAR,
    FEW_CLASSES,
    NegEntropy,
    SampleLoss,
    SemiLoss,
    attention_erase_map,
    attention_erase_map_clothing1m,
    both_losses,
    erase,
)
from sanm_kernels.rewriting import with_losses
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

#: What :func:`patch` looks for, beside objects ``CrossEntropyLoss(reduction="none")``.
NAMES = (
    "attention_erase_map",
    "attention_erase_map_clothing1m",
    "SemiLoss",
    "NegEntropy",
    "GaussianMixture",
)


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


def _losses(x: Tensor, targets_x: Tensor, u: Tensor, targets_u: Tensor) -> tuple[Tensor, Tensor]:
    """L_x and L_u as scripts have them: a mean of nothing is NaN.

    Where many classes would have to be copied together first, torch is as fast on the CPU.
    """
    whole = x._base is not None and x._base is u._base
    ours = whole or x.device.type != "cpu" or x.shape[-1] <= FEW_CLASSES
    if ours and x.shape[0] and u.shape[0]:
        return both_losses(x, targets_x, u, targets_u)
    labeled = -torch.mean(torch.sum(torch.log_softmax(x, 1) * targets_x, 1))
    return labeled, torch.mean((torch.softmax(u, 1) - targets_u) ** 2)


def _semi_loss(original: Any) -> Any:
    """A SemiLoss's own call with the losses from the kernels; the weight is what it says itself."""
    names = _parameters(original)[1:5]

    @functools.wraps(original)
    def call(self: Any, *given: Any, **named: Any) -> Any:
        given += tuple(named.pop(name) for name in names[len(given) :] if name in named)
        own = trials.own(original, self, given[4:], named) if len(given) >= 4 else None
        return original(self, *given, **named) if own is None else (*_losses(*given[:4]), *own)

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
            config = CIFAR
            with contextlib.suppress(ValueError):  # areas in pixels, perhaps
                config = CIFAR.replace(**trials.recognised(original, column))
            text = f"γ = {config.ratio_gamma}, a in [{config.ratio_low}, {config.ratio_high}]"
            half, whole = (config.replace(area_scale=scale) for scale in (0.5, 1.0))
            candidates = [
                (functools.partial(erase, config=half), text),
                (functools.partial(erase, config=whole), f"{text}, areas not halved"),
            ]
        for function, text in candidates:
            ours = _masking(original, function)
            inputs = functools.partial(trials.masking_inputs, column=column, soft=count == 4)
            finding = trials.verify(name, original, ours, inputs, names, trials.EXACT)
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
    rewritten = with_losses(original, _losses) if semi else None
    if rewritten is not None:
        ours = functools.wraps(original)(rewritten)
    else:
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
    inputs = functools.partial(trials.criterion_inputs, more=more, semi=semi, K=_classes(module))
    names = ["L_x", "L_u", "weight"] if semi else ["penalty"]
    theirs, tried = (functools.partial(function, self) for function in (original, ours))
    finding = trials.verify(name, theirs, tried, inputs, names, trials.ROUNDING)
    if semi and rewritten is None and finding.state == REPLACED:
        extra = next(iter(inputs("cpu")))[4:]
        if trials.own(original, self, extra, {}) is None:
            text = "what it returns beside its losses cannot be had without them"
            finding = dataclasses.replace(finding, state=KEPT, reason=text)
    return ours, finding


def _try_mixture(name: str, cls: Any) -> tuple[Any, Finding]:
    """A subclass of scikit-learn's class, and what came of the comparison."""
    if not isinstance(cls, type) or not cls.__module__.startswith("sklearn."):
        return None, Finding(name, NOT_VERIFIED, "it is not scikit-learn's")
    try:
        ours = mixture.served(cls)
    except Exception as error:
        return None, Finding(name, NOT_VERIFIED, f"{type(error).__name__}: {error}")
    theirs, tried = (functools.partial(trials.mixture_results, x) for x in (cls, ours))
    names = ["posterior", "component", "means_", "covariances_", "weights_", "n_iter_"]
    return ours, trials.verify(
        name, theirs, tried, trials.mixture_inputs, [*names, "converged_"], trials.POSTERIOR
    )


def _collects(value: Any) -> bool:
    """Whether it is a plain ``CrossEntropyLoss(reduction="none")``."""
    return (
        type(value) is torch.nn.CrossEntropyLoss
        and value.reduction == "none"
        and value.weight is None
        and (value.ignore_index, value.label_smoothing) == (-100, 0)
    )


def _try_collection(name: str, original: Any, classes: int) -> tuple[Any, Finding]:
    """The class that serves in place of the object's own, and what came of the comparison."""
    if classes > FEW_CLASSES:
        return SampleLoss, Finding(name, KEPT, f"it is as fast for more than {FEW_CLASSES} classes")
    tried = copy.copy(original)
    tried.__class__ = SampleLoss
    inputs = functools.partial(trials.collection_inputs, K=classes)
    finding = trials.verify(name, original, tried, inputs, ["losses"], trials.ROUNDING)
    return SampleLoss, finding


def _classes(module: ModuleType) -> int:
    """How many the script has, if it says so where scripts do."""
    classes = getattr(getattr(module, "args", None), "num_class", None)
    return classes if isinstance(classes, int) and classes > 1 else 10


def _method(cls: type) -> str:
    return "forward" if issubclass(cls, torch.nn.Module) else "__call__"


def _is_ours(original: Any) -> bool:
    served = getattr(original, _method(original), None) if isinstance(original, type) else original
    own = dropin.__name__ in (getattr(original, "__module__", None), type(original).__module__)
    return own or hasattr(served, "_sanm_kernels") or hasattr(original, "_sanm_kernels")


def _put(done: Patch, name: str, original: Any, ours: Any) -> list[str]:
    """Put `ours` in the original's place in every module; returns the names of other modules.

    In a class it takes the place of the method: objects of the class that were made before, and
    other names of it, have it too.
    """
    done.replaced[name] = original
    if ours is SampleLoss:
        done._undo.append(functools.partial(setattr, original, "__class__", type(original)))
        original.__class__ = ours
        return []
    if name == "GaussianMixture":  # scikit-learn's class is not the script's alone
        done._undo.append(functools.partial(setattr, done.module, name, original))
        setattr(done.module, name, ours)
        return []
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
    """Let a script compute with this package where that does not change its results.

    It looks at `attention_erase_map`, `attention_erase_map_clothing1m`, `SemiLoss`, `NegEntropy`
    and `GaussianMixture`, where `module` has them, and its objects that are
    ``CrossEntropyLoss(reduction="none")``. Each is called on small random inputs and compared with
    ours: views, boxes, targets and the random numbers drawn to the last bit, losses and their
    gradients to float32 rounding, scikit-learn's mixtures to 1e-5. What agrees is replaced. The
    weight that a `SemiLoss` returns is still its own, whatever its arguments are; a
    masking function may have its own γ and range of ratios. A function is replaced in all loaded
    modules that hold it, a class and an object in place, so that objects made before compute with
    ours too, and scikit-learn's class in `module` alone; what was put elsewhere before, such as a
    functools.partial of a function, stays as it is. Random states are left as they were.

    Args:
        module: the module whose names are looked at, for instance an imported training script.
        force: replace also what differs or cannot be compared.
        verbose: print what was found.

    Returns:
        A Patch, which holds the findings and undoes the replacement.

    Raises:
        TypeError: `module` is not a module.
        ValueError: it has none of the names.
    """
    if not isinstance(module, ModuleType):
        raise TypeError(f"module: expected a module, got {type(module).__name__}")
    present = {name: getattr(module, name) for name in NAMES if hasattr(module, name)}
    present |= {name: value for name, value in vars(module).items() if _collects(value)}
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
        elif name == "GaussianMixture":
            ours, finding = _try_mixture(name, original)
        elif _collects(original):
            ours, finding = _try_collection(name, original, _classes(module))
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
