"""Every setting of a training run, and its validation before anything starts.

Recipes, data sets, networks and optimisers bring settings of their own, as frozen dataclasses that
extend `TrainConfig`. `TrainConfig(recipe=…, dataset=…, model=…)` has those of the ones it names.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import sanm_kernels as sk

from .decoders import DECODERS
from .errors import ConfigError, check_choice
from .files import first_line
from .noise import KINDS
from .registry import REGISTRIES
from .settings import Settings, owners, read_yaml, setting

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
BOXES = ("activation", "random", "none")
SCHEDULES = ("step", "cosine")
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
PRESETS = Path(__file__).with_name("presets.yaml")


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """what is trained, on what"""

    recipe: str = setting("sanm-dividemix", "training method")
    dataset: str = setting("digits", "data set")
    model: str = setting("", "network")
    imports: tuple[str, ...] = setting((), "modules that register recipes, data sets or networks")
    data_root: str = setting("", "folder, file or name of the data set")
    image_size: int = setting(0, "side of the images networks see; 0: the data set's own", low=0)
    augmentation: str = setting("crop", "augmentation")
    pretrained: str = setting("", "file with a state dict all networks start from, as in C2D")
    limit: int = setting(0, "use only the first N training samples; 0: all", low=0)
    validation: float = setting(
        0.0,
        "share of the training set, with its noisy labels, to validate on instead of the test set",
        low=0,
        high=0.5,
    )
    folds: int = setting(
        0,
        "a run for each of so many parts of the training set, on all the others: each label is "
        "judged by networks that have not seen it; 0: one run on all",
        low=0,
    )
    fold: int = setting(0, "of the folds: the part left out, from 1; 0: each in turn", low=0)
    max_unreadable: float = setting(
        0.05, "share of unreadable images, of a sample, above which no run starts", low=0, high=1
    )
    workers: int = setting(2, "processes that read image files; 0: the training process", low=0)
    seed: int = setting(0, "seed of noise, networks, order and augmentation", low=0, high=2**32 - 1)


@dataclass(frozen=True, kw_only=True)
class NoiseSettings:
    """label noise that is added"""

    noise: str = setting("none", "label noise", KINDS)
    rate: float = setting(0.5, "share of labels redrawn, in [0, 1]", low=0, high=1)
    include_true: bool = setting(False, "symmetric noise may redraw the true class")


@dataclass(frozen=True, kw_only=True)
class MachineSettings:
    """the machine"""

    device: str = setting("auto", "torch device; auto: a GPU if one can be used, else the CPU")
    threads: int = setting(0, "CPU threads of a process; 0: its share of the machine's", low=0)
    precision: str = setting("float32", "autocast", PRECISIONS)
    channels_last: bool = setting(True, "memory format of networks and images")
    compile: bool = setting(False, "torch.compile the networks")
    sync_batchnorm: bool = setting(False, "batch statistics over all processes (GPUs only)")
    checkpoint_steps: int = setting(
        1000, "steps between checkpoints inside an epoch; 0: only at its end", low=0
    )
    tensorboard: bool = setting(False, "metrics for TensorBoard as well")


@dataclass(frozen=True, kw_only=True)
class OptimiserSettings:
    """epochs, batches, optimiser"""

    epochs: int = setting(60, "passes over the training set", low=1)
    batch_size: int = setting(
        64,
        "samples a step, of all processes; DivideMix: half labelled, half unlabelled",
        low=2,
    )
    eval_batch_size: int = setting(
        0, "samples at a time without gradients; 0: 1024 held in memory, 128 from files", low=0
    )
    accumulate: int = setting(1, "backward passes that a step is divided into", low=1)
    clip: float = setting(0.0, "gradient norm allowed; 0: any", low=0)
    optimizer: str = setting("sgd", "optimiser")
    lr: float = setting(0.02, "learning rate", above=0)
    weight_decay: float = setting(5e-4, "weight decay, of all weights", low=0)
    schedule: str = setting(
        "step",
        "how the rate falls; step: divided by ten once, between two epochs; cosine: at every step, "
        "to 0 at the end",
        SCHEDULES,
    )
    lr_drop: float = setting(
        0.75, "step: share of the epochs after which the rate is divided by ten", low=0, high=1
    )
    lr_warmup_epochs: float = setting(
        0.0, "epochs, or a part of one, in which the rate rises at every step, from 1 %", low=0
    )
    ema: float = setting(
        0.0,
        "decay, per step, of running averages of the weights, as 0.999; tests, predictions and "
        "exports take the averages, training and label quality do not; 0: none",
        low=0,
        high=0.99999,
    )


@dataclass(frozen=True, kw_only=True)
class QualitySettings:
    """label quality"""

    warmup: int = setting(10, "epochs of plain cross-entropy first", low=0)
    threshold: float = setting(
        0.5, "clean probability above which a sample counts as labelled", low=0, high=1
    )
    average_losses: bool = setting(False, "label quality from the last five epochs' mean loss")
    temperature: float = setting(0.5, "T that sharpens guessed and refined targets", above=0)


@dataclass(frozen=True, kw_only=True)
class MaskSettings:
    """masking, of the recipes with SANM"""

    mask: str = setting("paper", "masking, where not set below", MASKS)
    ratio_low: float | None = setting(None, "lo of the masking ratio")
    ratio_high: float | None = setting(None, "hi of the masking ratio")
    ratio_gamma: float | None = setting(None, "γ: how much more is masked at a doubtful label")
    reconstruction_weight: float | None = setting(None, "weight of the reconstruction loss")
    views: str = setting("both", "masked views", VIEWS)
    box: str = setting(
        "activation", "where to mask; none: as many plain views instead, as a control", BOXES
    )
    decoder: str = setting("resize", "what rebuilds the images", DECODERS)
    modulate: bool = setting(True, "soften the masked views' targets")
    reconstruct: bool = setting(True, "train on the reconstruction loss")
    feature_layer: str = setting("", "layer whose map is masked; empty: the last that gives one")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(
    MaskSettings,
    QualitySettings,
    OptimiserSettings,
    MachineSettings,
    NoiseSettings,
    RunSettings,
    Settings,
):
    """Settings of one run, those of its recipe, data set, network and optimiser among them.

    Raises:
        ConfigError: a setting is unknown (the nearest is named), of the wrong type, or cannot be
            used.
    """

    choices = ("dataset", "recipe", "model", "optimizer")

    if TYPE_CHECKING:  # which settings there are depends on the choices

        def __init__(self, **settings: Any) -> None: ...

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.device == "auto":
            object.__setattr__(self, "device", _device())
        if not self.threads:
            object.__setattr__(self, "threads", _threads())
        REGISTRIES["augmentation"].check(self.augmentation)
        self.check()
        REGISTRIES["model"].ready(self.model)

    def check(self) -> None:
        """Raise a ConfigError for settings that cannot be used together; called before a run. Own
        settings override it, and call `super().check()`."""
        if self.noise == "file" and not hasattr(self, "noise_file"):
            those = " and ".join(owners("noise_file"))
            raise ConfigError(f"noise file is for {those}, not for {self.dataset}")
        if self.folds == 1:
            raise ConfigError("folds must be 0 or at least 2, got 1")
        if self.folds and self.validation:
            raise ConfigError("validation and folds exclude each other")
        if self.fold > self.folds:
            raise ConfigError(f"fold must be from 1 to folds, {self.folds}, got {self.fold}")
        if self.lr_warmup_epochs >= self.epochs:
            raise ConfigError(
                f"lr_warmup_epochs must be less than epochs, {self.epochs}, got "
                f"{self.lr_warmup_epochs:g}"
            )
        if self.pretrained and not Path(self.pretrained).is_file():
            raise ConfigError(f"pretrained must be a file, got {self.pretrained!r}")
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            reason = first_line(error)
            raise ConfigError(f"device must be usable, got {self.device!r}: {reason}") from None
        if self.sync_batchnorm and torch.device(self.device).type != "cuda":
            raise ConfigError(f"sync_batchnorm needs a CUDA device, got {self.device!r}")
        try:
            self.mask_config  # noqa: B018  (validates the masking)
        except ValueError as error:
            raise ConfigError(str(error)) from None

    @classmethod
    def read(
        cls,
        path: str | Path | None = None,
        preset: str | None = None,
        **settings: Any,
    ) -> TrainConfig:
        """The named preset, over it the YAML file at `path`, over that `settings`. What a preset
        says of other recipes, data sets and networks than the chosen ones is left out.

        Raises:
            ConfigError: as `TrainConfig`, or the file cannot be read.
        """
        return cls.of(sources(path, preset, settings))

    def autocast(self) -> torch.autocast:
        """The context in which networks are run."""
        dtype = PRECISIONS[self.precision]
        return torch.autocast(torch.device(self.device).type, dtype, enabled=dtype is not None)

    @property
    def mask_config(self) -> sk.MaskConfig:
        """The named masking with this run's own ratios, weight and views."""
        names = ("ratio_low", "ratio_high", "ratio_gamma", "reconstruction_weight")
        changes = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if not self.reconstruct:
            changes["reconstruction_weight"] = 0.0
        return MASKS[self.mask]().replace(views=VIEWS[self.views], **changes)


def sources(
    path: str | Path | None, preset: str | None, settings: Mapping[str, Any]
) -> dict[str, Mapping[str, Any]]:
    """What is said by preset, file and settings, in that order."""
    return {
        "preset": {} if preset is None else read_preset(preset),
        str(path): {} if path is None else read_yaml(path),
        "settings": settings,
    }


def preset_names() -> list[str]:
    """The presets that there are."""
    return list(read_yaml(PRESETS))


def read_preset(name: str) -> dict[str, Any]:
    """The settings of a preset, and those of the presets it is based on."""
    presets = read_yaml(PRESETS)
    check_choice("preset", name, presets)
    settings = dict(presets[name])
    base = settings.pop("base", None)
    return {**(read_preset(base) if base else {}), **settings}


def _device() -> str:
    try:
        return "cuda" if torch.cuda.is_available() and torch.zeros(1, device="cuda") == 0 else "cpu"
    except RuntimeError:  # it is there, but no kernel runs
        return "cpu"


def _threads() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (cores or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
