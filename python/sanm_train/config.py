"""Every setting of a training run, and its validation before anything starts."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

import sanm_kernels as sk

from .noise import KINDS

MASKS = {
    # On 8×8 pixels the paper's ratios hide one to six of them, so Clothing1M's larger ones serve.
    "small-images": lambda: sk.MaskConfig.paper().replace(
        ratio_low=0.06, ratio_high=0.13, ratio_gamma=0.1
    ),
    "paper": sk.MaskConfig.paper,
    "official-cifar": sk.MaskConfig.official_cifar,
    "official-clothing1m": sk.MaskConfig.official_clothing1m,
}
VIEWS = {"both": ("max", "min"), "max": ("max",), "min": ("min",)}
BOXES = ("activation", "random")


class ConfigError(ValueError):
    """A setting that cannot be used; the message names it, what was expected and what came."""


def setting(default: Any, help: str, **limits: float) -> Any:
    """A dataclass field; help becomes the command line's. limits: low, high, above (exclusive)."""
    return field(default=default, metadata={"help": help, "limits": limits})


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one run; the defaults suit the 8×8 digits, CIFAR's are in docs."""

    recipe: str = setting("sanm-dividemix", "training method")
    dataset: str = setting("digits", "data set")
    data_root: str = setting("", "folder with the data set's unpacked archive (not for digits)")
    model: str = setting("", "network; empty: the data set's own")
    pretrained: str = setting("", "file with a state dict all networks start from, as in C2D")
    noise: str = setting("symmetric", "label noise: " + ", ".join(KINDS))
    rate: float = setting(0.5, "share of labels redrawn, in [0, 1]", low=0, high=1)
    include_true: bool = setting(False, "symmetric noise may redraw the true class")
    seed: int = setting(0, "seed of noise, networks, order and augmentation", low=0)
    limit: int = setting(0, "use only the first N training samples; 0: all", low=0)
    device: str = setting("cpu", "torch device")
    threads: int = setting(1, "CPU threads; small networks gain nothing from more", low=1)
    epochs: int = setting(60, "passes over the training set", low=1)
    batch_size: int = setting(
        64, "samples a step; DivideMix: half labelled, half unlabelled", low=2
    )
    lr: float = setting(0.02, "SGD learning rate", above=0)
    lr_drop: float = setting(
        0.75, "share of the epochs after which the rate is divided by ten", low=0, high=1
    )
    momentum: float = setting(0.9, "SGD momentum", low=0)
    weight_decay: float = setting(5e-4, "SGD weight decay", low=0)

    warmup: int = setting(10, "epochs of plain cross-entropy first", low=0)
    warmup_clip: float = setting(1.0, "DivideMix: gradient norm allowed in the warm-up", above=0)
    threshold: float = setting(
        0.5, "clean probability above which a sample counts as labelled", low=0, high=1
    )
    average_losses: bool = setting(False, "label quality from the last five epochs' mean loss")
    temperature: float = setting(0.5, "T that sharpens guessed and refined targets", above=0)
    weak_views: int = setting(1, "DivideMix: weakly augmented views to train on (CIFAR: 2)", low=1)
    strong_views: int = setting(
        1, "DivideMix: strongly augmented views to train on (CIFAR: 2)", low=0
    )
    alpha: float = setting(4.0, "mixup: λ ~ Beta(alpha, alpha)", above=0)
    unlabeled_weight: float = setting(25.0, "λ_u of the unlabelled loss", low=0)
    ramp: float = setting(16.0, "epochs over which λ_u grows from 0 after the warm-up", low=0)
    prior_weight: float = setting(1.0, "ρ of the prior penalty", low=0)
    elr_weight: float = setting(3.0, "ELR: λ of the penalty (CIFAR-10: 3, CIFAR-100: 7)", low=0)
    elr_momentum: float = setting(
        0.7, "ELR: β of the running targets (CIFAR-10: 0.7, CIFAR-100: 0.9)", low=0, high=1
    )

    mask: str = setting("small-images", "masking, where not set below: " + ", ".join(MASKS))
    ratio_low: float | None = setting(None, "lo of the masking ratio")
    ratio_high: float | None = setting(None, "hi of the masking ratio")
    ratio_gamma: float | None = setting(None, "γ: how much more is masked of doubtful labels")
    reconstruction_weight: float | None = setting(None, "weight of the reconstruction loss")
    views: str = setting("both", "masked views: " + ", ".join(VIEWS))
    box: str = setting("activation", "where to mask: " + ", ".join(BOXES))
    modulate: bool = setting(True, "soften the masked views' targets")
    reconstruct: bool = setting(True, "train on the reconstruction loss")

    def __post_init__(self) -> None:
        from .data import DATASETS, check_root
        from .models import MODELS
        from .recipes import RECIPES

        choices: dict[str, Iterable[str]] = {
            "recipe": RECIPES,
            "dataset": DATASETS,
            "model": ("", *MODELS),
            "noise": KINDS,
            "mask": MASKS,
            "views": VIEWS,
            "box": BOXES,
        }
        for name, known in choices.items():
            check_choice(name, getattr(self, name), known)
        for entry in fields(self):
            _check(entry.name, getattr(self, entry.name), **entry.metadata["limits"])
        check_root(self.dataset, self.data_root)
        if self.pretrained and not Path(self.pretrained).is_file():
            raise ConfigError(f"pretrained must be a file, got {self.pretrained!r}")
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"device must be usable, got {self.device!r}: {reason}") from None
        try:
            self.mask_config  # noqa: B018  (validates the masking)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        RECIPES[self.recipe].check(self)

    @property
    def mask_config(self) -> sk.MaskConfig:
        """The named masking with this run's own ratios, weight and views."""
        names = ("ratio_low", "ratio_high", "ratio_gamma", "reconstruction_weight")
        changes = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if not self.reconstruct:
            changes["reconstruction_weight"] = 0.0
        return MASKS[self.mask]().replace(views=VIEWS[self.views], **changes)


def _check(
    name: str,
    value: Any,
    low: float | None = None,
    high: float = math.inf,
    above: float = -math.inf,
) -> None:
    if low is not None and not low <= value <= high:
        wanted = f"at least {low}" if high == math.inf else f"in [{low}, {high}]"
        raise ConfigError(f"{name} must be {wanted}, got {value}")
    if above > -math.inf and not value > above:
        raise ConfigError(f"{name} must be above {above}, got {value}")


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raise a ConfigError that names the nearest choice unless `value` is one of `choices`."""
    known = list(choices)
    if value in known:
        return
    near = difflib.get_close_matches(value, known, 1, 0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ConfigError(
        f"{name} must be one of {', '.join(k for k in known if k)}; got {value!r}{hint}"
    )
