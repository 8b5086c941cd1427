"""Settings as frozen dataclasses, joined from parts, read in layers, and checked.

A class of settings has choices: settings whose value names something in a registry that may bring
settings of its own, and change the defaults of others. `Root(choice=…)` has those of all it names.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import math
import reprlib
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from .errors import ConfigError, check_choice, nearest
from .extra import MissingPackage, extra
from .files import first_line, replacing
from .registry import REGISTRIES

F = TypeVar("F", bound=Callable[..., Any])
S = TypeVar("S", bound="Settings")


def _cached(function: F) -> F:
    """`functools.cache`, to which mypy lets no class of a dataclass."""
    return functools.cache(function)  # type: ignore[return-value]


def setting(default: Any, help: str, choices: Iterable[str] = (), **limits: float) -> Any:
    """A field of a class of settings.

    Args:
        default: its value where none is given.
        help: the command line's.
        choices: the values that it may have; default: any of its type.
        limits: low, high, above (exclusive).
    """
    about = {"help": help, "choices": tuple(choices), "limits": limits}
    return field(default=default, metadata=about)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The base of the class of all settings, whose fields include imports and the choices."""

    choices: ClassVar[tuple[str, ...]] = ()  # the first one's defaults hold over the others'
    root: ClassVar[type[Settings]]

    def __init_subclass__(cls) -> None:
        if not hasattr(cls, "root"):
            cls.root = cls

    def __new__(cls: type[S], **settings: Any) -> S:
        if cls is cls.root:
            cls = cls.chosen(settings)
            _check_names(settings, cls, "settings")
        return object.__new__(cls)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.root, asdict(self))

    def __post_init__(self) -> None:
        for name, entry in settings_of(type(self)).items():
            value = _typed(name, getattr(self, name), "settings", type(self))
            object.__setattr__(self, name, value)
            if entry.metadata.get("choices"):
                check_choice(name, value, entry.metadata["choices"])
            _check(name, value, **entry.metadata.get("limits", {}))
        if type(self) is not self.chosen(asdict(self)):
            raise ConfigError(f"{', '.join(self.choices)} bring settings: make new settings")

    @classmethod
    def chosen(cls: type[S], settings: Mapping[str, Any]) -> type[S]:
        """The class of the choices in `settings`, after the imports have been made."""
        import_modules(_typed("imports", settings.get("imports", ()), "settings", cls.root))
        parts: list[type[Settings]] = []
        for kind in cls.choices:
            default = getattr((parts or [cls.root])[0], kind)
            name = _typed(kind, settings.get(kind, default), "settings", cls.root)
            if not name:
                raise ConfigError(f"{kind} must be named, as {parts[0].__name__} has no default")
            REGISTRIES[kind].check(name)
            parts.append(REGISTRIES[kind].configs.get(name, cls.root))
        return _joined(cls.root, tuple(dict.fromkeys(p for p in parts if p is not cls.root)))

    @classmethod
    def layers(
        cls: type[S], sources: Mapping[str, Mapping[str, Any]]
    ) -> tuple[dict[str, Mapping[str, Any]], type[S]]:
        """What `sources` say, later ones over earlier ones, and the class that they choose. They
        share their imports; of a preset, what belongs to other choices is left out."""
        names: dict[str, Any] = {"imports": ()}
        for source, layer in sources.items():
            own = ("imports", *cls.choices)
            found = {k: _typed(k, layer[k], source, cls.root) for k in own if k in layer}
            imports = dict.fromkeys((*names["imports"], *found.get("imports", ())))
            names |= found | {"imports": tuple(imports)}
        kind = cls.chosen(names)
        shared = {"imports": names["imports"]}
        kept = {s: fitting(v, kind) if s == "preset" else v for s, v in sources.items()}
        return kept | {source: {**kept[source], **shared} for source in list(kept)[-1:]}, kind

    @classmethod
    def of(cls: type[S], sources: Mapping[str, Mapping[str, Any]]) -> S:
        """The settings that `sources` say, as `layers` has them."""
        kept, kind = cls.layers(sources)
        merged: dict[str, Any] = {}
        for source, layer in kept.items():
            _check_names(layer, kind, source)
            merged |= {name: _typed(name, value, source, kind) for name, value in layer.items()}
        return kind(**merged)

    def write(self, path: str | Path) -> None:
        """Every setting as YAML."""
        with extra():
            import yaml
        with replacing(path) as temporary:
            text = yaml.safe_dump(asdict(self), sort_keys=False, allow_unicode=True)
            temporary.write_text(text, encoding="utf-8")


def _rebuild(root: type[Settings], settings: dict[str, Any]) -> Settings:
    return root(**settings)


# --- which settings there are -------------------------------------------------------------------


@_cached
def _joined(root: type[Settings], parts: tuple[type[Settings], ...]) -> Any:
    """One class of all `parts`; of defaults that several change, the first one's hold."""
    common, own = settings_of(root), {}
    whose: dict[str, type[Settings]] = {}
    for part in reversed(parts):
        for name, entry in settings_of(part).items():
            if name in common and common[name].default == entry.default:
                continue
            if name not in common and whose.setdefault(name, part) is not part:
                both = f"{whose[name].__name__} and {part.__name__}"
                raise ConfigError(f"{both} have both a setting {name}: rename one")
            again = field(default=entry.default, metadata=entry.metadata)
            own[name] = (name, _types(part)[name], again)
    bases, module = (*parts, root), {"__module__": root.__module__}
    return make_dataclass(
        root.__name__, own.values(), bases=bases, frozen=True, kw_only=True, namespace=module
    )


@_cached
def settings_of(config: type[Settings]) -> dict[str, Any]:
    """The fields of a class of settings by name. One that only changes a default keeps its help."""
    found = {}
    for entry in fields(config):
        if entry.default is MISSING:
            raise TypeError(f"{config.__name__}.{entry.name} must have a default")
        for part in config.__mro__[1:]:
            above = getattr(part, "__dataclass_fields__", {}).get(entry.name)
            if above is not None and not entry.metadata:
                entry.metadata = above.metadata
        found[entry.name] = entry
    return found


def groups(config: type[Settings]) -> Iterator[tuple[str, list[Any]]]:
    """Titles and fields of a class's settings: a group are those that one class defines first."""
    left = settings_of(config)
    for part in reversed(config.__mro__[:-1]):
        own = [left[name] for name in inspect.get_annotations(part) if name in left]
        left = {name: entry for name, entry in left.items() if entry not in own}
        if own:
            yield (part.__doc__ or part.__name__).partition("\n")[0], own


def own_settings(config: Settings, part: type[Settings]) -> dict[str, Any]:
    """What `config` says of the settings that `part` adds to those of the root."""
    added = settings_of(part).keys() - settings_of(config.root).keys()
    return {name: getattr(config, name) for name in sorted(added)}


def fitting(settings: Mapping[str, Any], config: type[Settings]) -> dict[str, Any]:
    """`settings` without those of choices that are not in `config`."""
    known = settings_of(config)
    return {k: value for k, value in settings.items() if k in known or not owners(k)}


def owners(name: str) -> list[str]:
    """The recipes, data sets and networks that have a setting `name` of their own."""
    return [
        owner
        for registry in REGISTRIES.values()
        for owner, config in registry.configs.items()
        if name in settings_of(config) and name not in settings_of(config.root)
    ]


def _check_names(settings: Mapping[str, Any], config: type[Settings], source: str) -> None:
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


# --- what they may be ---------------------------------------------------------------------------


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    with extra():
        import yaml
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except Exception as error:  # PyYAML's constructors raise what their own mistakes lead to
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"config: {path} cannot be read as YAML: {reason}") from None
    if not isinstance(found, dict):
        got = reprlib.repr(found)  # short also where aliases make it grow
        raise ConfigError(f"config: {path} must hold settings as 'name: value', got {got}")
    return found


@_cached
def _types(config: type[Settings]) -> dict[str, Any]:
    return typing.get_type_hints(config)


def _typed(name: str, value: Any, source: str, config: type[Settings]) -> Any:
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
