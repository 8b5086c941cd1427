"""Every setting of a training run, and its validation before anything starts."""

from __future__ import annotations

import contextlib
import difflib
import functools
import math
import reprlib
import typing
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

import sanm_kernels as sk

from .extra import extra
from .files import first_line, replacing
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
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
PRESETS = Path(__file__).with_name("presets.yaml")


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
    data_root: str = setting("", "folder (or manifest) with the data set (not for digits)")
    test_root: str = setting("", "manifest: that of the test images")
    image_size: int = setting(0, "side of the images networks see; 0: the data set's own", low=0)
    max_unreadable: float = setting(
        0.05, "share of unreadable images, of a sample, above which no run starts", low=0, high=1
    )
    workers: int = setting(2, "processes that read image files; 0: the training process", low=0)
    augmentation: str = setting("", "augmentation; empty: the data set's own")
    model: str = setting("", "network; empty: the data set's own")
    pretrained: str = setting("", "file with a state dict all networks start from, as in C2D")
    noise: str = setting(
        "", f"label noise: {', '.join(KINDS)}; empty: symmetric for digits and CIFAR, else none"
    )
    noise_file: str = setting("", "noise file: a CIFAR-N label file")
    noise_set: str = setting("", "noise file: which of its label sets, e.g. worse_label")
    rate: float = setting(0.5, "share of labels redrawn, in [0, 1]", low=0, high=1)
    include_true: bool = setting(False, "symmetric noise may redraw the true class")
    seed: int = setting(0, "seed of noise, networks, order and augmentation", low=0, high=2**32 - 1)
    limit: int = setting(0, "use only the first N training samples; 0: all", low=0)
    device: str = setting("cpu", "torch device")
    threads: int = setting(1, "CPU threads; small networks gain nothing from more", low=1)
    precision: str = setting("float32", "autocast: " + ", ".join(PRECISIONS))
    channels_last: bool = setting(True, "memory format of networks and images")
    compile: bool = setting(False, "torch.compile the networks")
    sync_batchnorm: bool = setting(False, "batch statistics over all processes (GPUs only)")
    checkpoint_steps: int = setting(
        1000, "steps between checkpoints inside an epoch; 0: only at its end", low=0
    )
    tensorboard: bool = setting(False, "metrics for TensorBoard as well")
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
    lr: float = setting(0.02, "SGD learning rate", above=0)
    lr_drop: float = setting(
        0.75, "share of the epochs after which the rate is divided by ten", low=0, high=1
    )
    momentum: float = setting(0.9, "SGD momentum", low=0)
    weight_decay: float = setting(5e-4, "SGD weight decay", low=0)

    warmup: int = setting(10, "epochs of plain cross-entropy first", low=0)
    warmup_clip: float = setting(1.0, "DivideMix: clip in the warm-up", low=0)
    confidence_weight: float | None = setting(
        None, "DivideMix: ν of the warm-up; default: 1 for asymmetric noise, else 0", low=0
    )
    threshold: float = setting(
        0.5, "clean probability above which a sample counts as labelled", low=0, high=1
    )
    average_losses: bool = setting(False, "label quality from the last five epochs' mean loss")
    temperature: float = setting(0.5, "T that sharpens guessed and refined targets", above=0)
    train_guess_views: bool = setting(False, "DivideMix: train on the two guessing views too")
    weak_views: int = setting(1, "DivideMix: weak views to train on (CIFAR: 2)", low=0)
    strong_views: int = setting(1, "DivideMix: strong views to train on (CIFAR: 2)", low=0)
    unlabeled_rows: bool = setting(True, "DivideMix: train on the unlabelled samples' rows")
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
        from .augment import POLICIES
        from .datasets import DATASETS, check_root
        from .models import MODELS
        from .recipes import RECIPES

        for entry in fields(self):
            value = _typed(entry.name, getattr(self, entry.name), "settings")
            object.__setattr__(self, entry.name, value)
        if not self.noise and (self.noise_file or self.noise_set):
            object.__setattr__(self, "noise", "file")
        if not self.noise:
            clean = self.dataset in ("digits", "cifar10", "cifar100")
            object.__setattr__(self, "noise", "symmetric" if clean else "none")
        choices: dict[str, Iterable[str]] = {
            "recipe": RECIPES,
            "dataset": DATASETS,
            "model": ("", *MODELS),
            "augmentation": ("", *POLICIES),
            "noise": KINDS,
            "precision": PRECISIONS,
            "mask": MASKS,
            "views": VIEWS,
            "box": BOXES,
        }
        for name, known in choices.items():
            check_choice(name, getattr(self, name), known)
        for entry in fields(self):
            _check(entry.name, getattr(self, entry.name), **entry.metadata["limits"])
        for name in ("noise_file", "noise_set"):
            if getattr(self, name) and self.noise != "file":
                raise ConfigError(f"{name} goes with noise file, got noise {self.noise}")
        check_root(self)
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
        RECIPES[self.recipe].check(self)

    @classmethod
    def read(
        cls,
        path: str | Path | None = None,
        preset: str | None = None,
        **settings: Any,
    ) -> TrainConfig:
        """The named preset, over it the YAML file at `path`, over that `settings`.

        Raises:
            ConfigError: the file cannot be read, or a setting is unknown (the nearest is named), of
                the wrong type, or cannot be used.
        """
        layers = [({} if preset is None else read_preset(preset), "preset")]
        layers += [({} if path is None else _read_yaml(Path(path)), str(path))]
        merged: dict[str, Any] = {}
        for layer, source in [*layers, (settings, "settings")]:
            merged |= {name: _typed(name, value, source) for name, value in layer.items()}
        return cls(**merged)

    def write(self, path: str | Path) -> None:
        """Every setting as YAML, for `read`."""
        with extra():
            import yaml
        with replacing(path) as temporary:
            text = yaml.safe_dump(asdict(self), sort_keys=False, allow_unicode=True)
            temporary.write_text(text, encoding="utf-8")

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


def read_preset(name: str) -> dict[str, Any]:
    """The settings of a preset, and those of the presets it is based on."""
    presets = _read_yaml(PRESETS)
    check_choice("preset", name, presets)
    settings = dict(presets[name])
    base = settings.pop("base", None)
    return {**(read_preset(base) if base else {}), **settings}


def _read_yaml(path: Path) -> dict[str, Any]:
    with extra():
        import yaml
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except Exception as error:  # PyYAML's constructors raise what their own mistakes lead to
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"config: {path} cannot be read as YAML: {reason}") from None
    if not isinstance(found, dict):
        got = reprlib.repr(found)  # short also where aliases make it grow
        raise ConfigError(f"config: {path} must hold settings as 'name: value', got {got}")
    return found


@functools.cache
def _types() -> dict[str, Any]:
    return typing.get_type_hints(TrainConfig)


def _typed(name: str, value: Any, source: str) -> Any:
    """`value` as the type of the setting `name`; whole numbers serve as floats."""
    types = _types()
    if name not in types:
        near = difflib.get_close_matches(reprlib.repr(name), types, 1, 0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{source}: there is no setting {reprlib.repr(name)}{hint}")
    allowed = typing.get_args(types[name]) or (types[name],)
    if value is None and type(None) in allowed:
        return None
    kind = next(t for t in allowed if t is not type(None))
    # YAML 1.1 takes 1e-3, which has no dot, for a string.
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):
            value = float(value)
    if type(value) is not kind:
        raise ConfigError(
            f"{source}: {name} must be of type {kind.__name__}, got {reprlib.repr(value)}"
        )
    return value


def _check(
    name: str,
    value: Any,
    low: float | None = None,
    high: float = math.inf,
    above: float = -math.inf,
) -> None:
    if value is None:
        return
    if low is not None and not low <= value <= high:
        wanted = f"at least {low}" if high == math.inf else f"in [{low}, {high}]"
        raise ConfigError(f"{name} must be {wanted}, got {value}")
    if above > -math.inf and not value > above:
        raise ConfigError(f"{name} must be above {above}, got {value}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name} must be finite, got {value}")


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
