"""Every setting of a training run, and its validation before anything starts."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

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


def setting(default: Any, help: str) -> Any:
    """A dataclass field whose help becomes the command line's."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one run; the defaults suit the 8×8 digits, CIFAR's are in docs."""

    recipe: str = setting("sanm-dividemix", "training method")
    dataset: str = setting("digits", "data set")
    model: str = setting("", "network; empty: the data set's own")
    noise: str = setting("symmetric", "label noise: " + ", ".join(KINDS))
    rate: float = setting(0.5, "share of labels redrawn, in [0, 1]")
    include_true: bool = setting(False, "symmetric noise may redraw the true class")
    seed: int = setting(0, "seed of noise, networks, order and augmentation")
    limit: int = setting(0, "use only the first N training samples; 0: all")
    device: str = setting("cpu", "torch device")
    threads: int = setting(1, "CPU threads; small networks gain nothing from more")
    epochs: int = setting(60, "passes over the training set")
    batch_size: int = setting(64, "samples a step; DivideMix: half labelled, half unlabelled")
    lr: float = setting(0.02, "SGD learning rate")
    lr_drop: float = setting(0.75, "share of the epochs after which the rate is divided by ten")
    momentum: float = setting(0.9, "SGD momentum")
    weight_decay: float = setting(5e-4, "SGD weight decay")

    warmup: int = setting(10, "epochs of plain cross-entropy first")
    warmup_clip: float = setting(1.0, "DivideMix: gradient norm allowed in the warm-up")
    threshold: float = setting(0.5, "clean probability above which a sample counts as labelled")
    average_losses: bool = setting(False, "fit the label quality to the last five epochs' mean loss")
    temperature: float = setting(0.5, "T that sharpens guessed and refined targets")
    weak_views: int = setting(1, "DivideMix: weakly augmented views to train on (CIFAR: 2)")
    strong_views: int = setting(1, "DivideMix: strongly augmented views to train on (CIFAR: 2)")
    alpha: float = setting(4.0, "mixup: λ ~ Beta(alpha, alpha)")
    unlabeled_weight: float = setting(25.0, "λ_u of the unlabelled loss")
    ramp: float = setting(16.0, "epochs over which λ_u grows from 0 after the warm-up")
    prior_weight: float = setting(1.0, "ρ of the prior penalty")

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
        from .data import DATASETS
        from .models import MODELS
        from .recipes import RECIPES

        for name, choices in {
            "recipe": RECIPES,
            "dataset": DATASETS,
            "model": ("", *MODELS),
            "noise": KINDS,
            "mask": MASKS,
            "views": VIEWS,
            "box": BOXES,
        }.items():
            check_choice(name, getattr(self, name), choices)
        for name in ("rate", "lr_drop", "threshold"):
            self._check(name, 0, 1)
        for name in ("epochs", "threads", "weak_views"):
            self._check(name, 1)
        for name in ("limit", "warmup", "seed", "strong_views"):
            self._check(name, 0)
        self._check("batch_size", 2)
        for name in ("momentum", "weight_decay", "ramp", "unlabeled_weight", "prior_weight"):
            self._check(name, 0)
        for name in ("lr", "warmup_clip", "temperature", "alpha"):
            self._check(name, 0, exclusive=True)
        try:
            self.mask_config  # noqa: B018  (validates the masking)
        except ValueError as error:
            raise ConfigError(str(error)) from None

    def _check(
        self, name: str, low: float, high: float = float("inf"), exclusive: bool = False
    ) -> None:
        value = getattr(self, name)
        if not low <= value <= high or (exclusive and value == low):
            wanted = f"in [{low}, {high}]" if high < float("inf") else f"at least {low}"
            raise ConfigError(f"{name} must be {f'above {low}' if exclusive else wanted}, got {value}")

    @property
    def mask_config(self) -> sk.MaskConfig:
        """The named masking with this run's own ratios, weight and views."""
        names = ("ratio_low", "ratio_high", "ratio_gamma", "reconstruction_weight")
        changes = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if not self.reconstruct:
            changes["reconstruction_weight"] = 0.0
        return MASKS[self.mask]().replace(views=VIEWS[self.views], **changes)


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
