"""Every setting of a training run, and its validation before anything starts.

Recipes, data sets and networks bring settings of their own, as frozen dataclasses that extend
`TrainConfig`. `TrainConfig(recipe=…, dataset=…, model=…)` has those of the three it names.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import math
import os
import reprlib
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

import sanm_kernels as sk

from .errors import ConfigError, check_choice, nearest
from .extra import MissingPackage, extra
from .files import first_line, replacing
from .noise import KINDS
from .registry import REGISTRIES

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
CHOICES = ("dataset", "recipe", "model")  # which have settings of their own
PRESETS = Path(__file__).with_name("presets.yaml")


def setting(default: Any, help: str, choices: Iterable[str] = (), **limits: float) -> Any:
    """A dataclass field; help becomes the command line's. limits: low, high, above (exclusive)."""
    about = {"help": help, "choices": tuple(choices), "limits": limits}
    return field(default=default, metadata=about)


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """what is trained, on what"""

    recipe: str = setting("sanm-dividemix", "training method")
    dataset: str = setting("digits", "data set")
    model: str = setting("", "network")
    imports: tuple[str, ...] = setting((), "modules that register recipes, data sets or networks")
    data_root: str = setting("", "folder (or manifest) with the data set")
    image_size: int = setting(0, "side of the images networks see; 0: the data set's own", low=0)
    augmentation: str = setting("crop", "augmentation")
    pretrained: str = setting("", "file with a state dict all networks start from, as in C2D")
    limit: int = setting(0, "use only the first N training samples; 0: all", low=0)
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
    lr: float = setting(0.02, "SGD learning rate", above=0)
    lr_drop: float = setting(
        0.75, "share of the epochs after which the rate is divided by ten", low=0, high=1
    )
    momentum: float = setting(0.9, "SGD momentum", low=0)
    weight_decay: float = setting(5e-4, "SGD weight decay", low=0)


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
    ratio_gamma: float | None = setting(None, "γ: how much more is masked of doubtful labels")
    reconstruction_weight: float | None = setting(None, "weight of the reconstruction loss")
    views: str = setting("both", "masked views", VIEWS)
    box: str = setting("activation", "where to mask", BOXES)
    modulate: bool = setting(True, "soften the masked views' targets")
    reconstruct: bool = setting(True, "train on the reconstruction loss")
    feature_layer: str = setting("", "layer whose map is masked; empty: the last that gives one")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(
    MaskSettings, QualitySettings, OptimiserSettings, MachineSettings, NoiseSettings, RunSettings
):
    """Settings of one run, those of its recipe, data set and network among them.

    Raises:
        ConfigError: a setting is unknown (the nearest is named), of the wrong type, or cannot be
            used.
    """

    if TYPE_CHECKING:  # who else knows which settings there are

        def __init__(self, **settings: Any) -> None: ...

    def __new__(cls, **settings: Any) -> TrainConfig:
        if cls is TrainConfig:
            cls = chosen(settings)
            _check_names(settings, cls, "settings")
        return object.__new__(cls)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (asdict(self),)

    def __post_init__(self) -> None:
        for name, entry in settings_of(type(self)).items():
            value = _typed(name, getattr(self, name), "settings", type(self))
            object.__setattr__(self, name, value)
            if entry.metadata.get("choices"):
                check_choice(name, value, entry.metadata["choices"])
            _check(name, value, **entry.metadata.get("limits", {}))
        if self.device == "auto":
            object.__setattr__(self, "device", _device())
        if not self.threads:
            object.__setattr__(self, "threads", _threads())
        if type(self) is not chosen(asdict(self)):
            raise ConfigError("recipe, dataset and model bring settings: make a new TrainConfig")
        REGISTRIES["augmentation"].check(self.augmentation)
        self.check()
        REGISTRIES["model"].ready(self.model)

    def check(self) -> None:
        """Raise a ConfigError for settings that cannot be used together; called before a run. Own
        settings override it, and call `super().check()`."""
        if self.noise == "file" and not hasattr(self, "noise_file"):
            those = " and ".join(owners("noise_file"))
            raise ConfigError(f"noise file is for {those}, not for {self.dataset}")
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
        layers, kind = read_layers(path, preset, settings)
        merged: dict[str, Any] = {}
        for source, layer in layers.items():
            _check_names(layer, kind, source)
            merged |= {name: _typed(name, value, source, kind) for name, value in layer.items()}
        return kind(**merged)

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


F = TypeVar("F", bound=Callable[..., Any])


def _cached(function: F) -> F:
    """`functools.cache`, to which mypy lets no class of a dataclass."""
    return functools.cache(function)  # type: ignore[return-value]


# --- which settings there are -------------------------------------------------------------------


def read_layers(
    path: str | Path | None, preset: str | None, settings: Mapping[str, Any]
) -> tuple[dict[str, Mapping[str, Any]], type[TrainConfig]]:
    """What is said by preset, file and settings, by source, and the class of what they choose."""
    layers: dict[str, Mapping[str, Any]] = {
        "preset": {} if preset is None else read_preset(preset),
        str(path): {} if path is None else _read_yaml(Path(path)),
        "settings": settings,
    }
    names: dict[str, Any] = {"imports": ()}
    for source, layer in layers.items():
        imports = _typed("imports", layer.get("imports", ()), source, TrainConfig)
        names |= {k: _typed(k, layer[k], source, TrainConfig) for k in CHOICES if k in layer}
        names["imports"] = (*names["imports"], *imports)  # a file's and an option's
    names["imports"] = tuple(dict.fromkeys(names["imports"]))
    kind = chosen(names)
    layers["preset"] = fitting(layers["preset"], kind)
    layers["settings"] = {**settings, "imports": names["imports"]}
    return layers, kind


def chosen(settings: Mapping[str, Any]) -> type[TrainConfig]:
    """`TrainConfig` with the settings of the recipe, data set and network that `settings` name,
    after the imports have been made. Data sets may change defaults of all others."""
    import_modules(_typed("imports", settings.get("imports", ()), "settings", TrainConfig))
    parts: list[type[TrainConfig]] = []
    for kind in CHOICES:
        # The default network is the data set's.
        default = getattr((parts or [TrainConfig])[0], kind)
        name = _typed(kind, settings.get(kind, default), "settings", TrainConfig)
        if not name:
            raise ConfigError(f"{kind} must be named, as the data set has no default")
        REGISTRIES[kind].check(name)
        parts.append(REGISTRIES[kind].configs.get(name, TrainConfig))
    return _joined(tuple(dict.fromkeys(part for part in parts if part is not TrainConfig)))


@_cached
def _joined(parts: tuple[type[TrainConfig], ...]) -> type[TrainConfig]:
    """One class of all `parts`; of defaults that several change, the first one's hold."""
    own: dict[str, tuple[str, Any, Any]] = {}
    for part in reversed(parts):
        for name, entry in settings_of(part).items():
            common = settings_of(TrainConfig).get(name)
            if common is not None and common.default == entry.default:
                continue
            if name in own and common is None:
                raise ConfigError(f"{name} is a setting of both, {own[name][1]} and {part}")
            again = field(default=entry.default, metadata=entry.metadata)
            own[name] = (name, _types(part)[name], again)
    return make_dataclass(
        "TrainConfig",
        own.values(),
        bases=(*parts, TrainConfig),
        frozen=True,
        kw_only=True,
        namespace={"__module__": __name__},
    )


@_cached
def settings_of(config: type[TrainConfig]) -> dict[str, Any]:
    """The fields of a class of settings by name. One that only changes a default keeps its help."""
    found = {}
    for entry in fields(config):
        for part in config.__mro__[1:]:
            above = getattr(part, "__dataclass_fields__", {}).get(entry.name)
            if above is not None and not entry.metadata:
                entry.metadata = above.metadata
        found[entry.name] = entry
    return found


def groups(config: type[TrainConfig]) -> Iterator[tuple[str, list[Any]]]:
    """Titles and fields of a class's settings: a group are those that one class defines first."""
    left = settings_of(config)
    for part in reversed(config.__mro__[:-1]):
        own = [left[name] for name in inspect.get_annotations(part) if name in left]
        left = {name: entry for name, entry in left.items() if entry not in own}
        if own:
            yield (part.__doc__ or part.__name__).partition("\n")[0], own


def own_settings(config: TrainConfig, part: type[TrainConfig]) -> dict[str, Any]:
    """What `config` says of the settings that `part` adds to those of all runs."""
    added = settings_of(part).keys() - settings_of(TrainConfig).keys()
    return {name: getattr(config, name) for name in sorted(added)}


def fitting(settings: Mapping[str, Any], config: type[TrainConfig]) -> dict[str, Any]:
    """`settings` without those of recipes, data sets and networks that are not in `config`."""
    return {
        name: value
        for name, value in settings.items()
        if name in settings_of(config) or not owners(name)
    }


def owners(name: str) -> list[str]:
    """The recipes, data sets and networks that have a setting `name` of their own."""
    return [
        owner
        for registry in REGISTRIES.values()
        for owner, config in registry.configs.items()
        if name in settings_of(config) and name not in settings_of(TrainConfig)
    ]


def _check_names(settings: Mapping[str, Any], config: type[TrainConfig], source: str) -> None:
    known = settings_of(config)
    for name in settings:
        if name in known:
            continue
        if whose := owners(name):
            raise ConfigError(f"{source}: {name} is a setting of {', '.join(whose)} only")
        raise ConfigError(
            f"{source}: there is no setting {reprlib.repr(name)}{nearest(name, known)}"
        )


def import_modules(names: Iterable[str]) -> None:
    """Import modules of a user's, which register what they define."""
    for name in names:
        try:
            importlib.import_module(name)
        except MissingPackage:
            raise
        except Exception as error:  # whatever the module does
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise ConfigError(f"imports: {name!r} cannot be imported: {reason}") from error


def _device() -> str:
    try:
        return "cuda" if torch.cuda.is_available() and torch.zeros(1, device="cuda") == 0 else "cpu"
    except RuntimeError:  # it is there, but no kernel runs
        return "cpu"


def _threads() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (cores or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _rebuild(settings: dict[str, Any]) -> TrainConfig:
    return TrainConfig(**settings)


# --- what they may be ---------------------------------------------------------------------------


def preset_names() -> list[str]:
    """The presets that there are."""
    return list(_read_yaml(PRESETS))


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


@_cached
def _types(config: type[TrainConfig]) -> dict[str, Any]:
    return typing.get_type_hints(config)


def _typed(name: str, value: Any, source: str, config: type[TrainConfig]) -> Any:
    """`value` as the type of the setting `name`; whole numbers serve as floats, lists as tuples."""
    kind = _types(config)[name]
    if typing.get_origin(kind) is tuple:
        if isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value):
            return tuple(value)
        raise ConfigError(f"{source}: {name} must be a list of names, got {reprlib.repr(value)}")
    allowed = typing.get_args(kind) or (kind,)
    if value is None and type(None) in allowed:
        return None
    kind = next(t for t in allowed if t is not type(None))
    # YAML 1.1 takes 1e-3, which has no dot, for a string.
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
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
