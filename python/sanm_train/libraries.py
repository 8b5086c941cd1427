"""Networks by the names that other libraries give them, and by any function's."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import nn

from .errors import ConfigError, nearest
from .files import first_line
from .registry import Registry


class Library(NamedTuple):
    """package is what Python and pip call it. names lists its networks; build makes one of a name,
    the images' channels, the number of classes and the images' sides, with fresh weights."""

    package: str
    names: Callable[[Any], Iterable[str]]
    build: Callable[[Any, str, int, int, tuple[int, int]], nn.Module]


def _timm(
    timm: Any, name: str, channels: int, classes: int, image_size: tuple[int, int]
) -> nn.Module:
    about = timm.get_pretrained_cfg(name)
    size = {"img_size": image_size} if getattr(about, "fixed_input_size", False) else {}
    return timm.create_model(name, pretrained=False, in_chans=channels, num_classes=classes, **size)


def _torchvision(
    torchvision: Any, name: str, channels: int, classes: int, image_size: tuple[int, int]
) -> nn.Module:
    if channels != 3:
        raise ConfigError(f"model: torchvision's networks take 3 channels, images have {channels}")
    size = {"image_size": image_size[0]} if name.startswith("vit_") else {}
    return torchvision.models.get_model(name, weights=None, num_classes=classes, **size)


def _hugging_face(
    transformers: Any, name: str, channels: int, classes: int, image_size: tuple[int, int]
) -> nn.Module:
    about = {"num_labels": classes, "num_channels": channels}
    if _is_folder(name):
        read = transformers.AutoConfig.from_pretrained
        config = read(name, local_files_only=True, **about)
    else:
        config = transformers.AutoConfig.for_model(name, **about)
    if hasattr(config, "image_size"):
        config.image_size = image_size[0]
    return transformers.AutoModelForImageClassification.from_config(config)


def _is_folder(name: str) -> bool:
    return os.path.isfile(os.path.join(name, "config.json"))


def _kinds(transformers: Any) -> list[str]:
    known = transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
    return sorted(config.model_type for config in known)


def installed(package: str, what: str, advice: str = "") -> Any:
    """A package that is in no extra of `train`, or a ConfigError that says how to get it."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ConfigError(
            f"{what} needs {package}, which is not installed: pip install {package}{advice}"
        ) from None


LIBRARIES = {
    "timm": Library("timm", lambda timm: timm.list_models(), _timm),
    "torchvision": Library("torchvision", lambda tv: tv.models.list_models(), _torchvision),
    "hf": Library("transformers", _kinds, _hugging_face),
}
FORMS = ("timm:NAME", "torchvision:NAME", "hf:NAME", "package.module:function")


class Networks(Registry[Callable[..., nn.Module]]):
    """Those that are registered, and all that LIBRARIES have.

    `timm:NAME` and `torchvision:NAME` are those libraries' own names; `hf:NAME` is a type of model
    of transformers, as resnet, with its configuration as published, or a folder with a
    config.json; `package.module:function` is called with in_channels and num_classes.
    """

    def names(self) -> list[str]:
        return [*self, *FORMS]

    def check(self, name: str) -> None:
        if ":" not in name:  # the others are `ready` or not
            super().check(name)

    def ready(self, name: str) -> None:
        """Raise a ConfigError if the network's library is not installed, or does not know it."""
        prefix, _, own = name.partition(":")
        if name in self:
            return
        if prefix not in LIBRARIES:
            _function(name)
            return
        library = LIBRARIES[prefix]
        module = installed(
            library.package, f"model {name}", "; or name another --model, as timm:resnet50 of timm"
        )
        known = library.names(module)
        if own not in known and not (prefix == "hf" and _is_folder(own)):
            raise ConfigError(f"model: {library.package} has no {own!r}{nearest(own, known)}")

    def build(
        self, name: str, channels: int, classes: int, image_size: tuple[int, int], **own: Any
    ) -> nn.Module:
        """The named network with a fresh initialisation; `own` are its own settings."""
        self.ready(name)
        prefix, _, rest = name.partition(":")
        if name not in self and prefix in LIBRARIES:
            library = LIBRARIES[prefix]
            module = importlib.import_module(library.package)
            return library.build(module, rest, channels, classes, image_size)
        make = self[name] if name in self else _function(name)
        return make(in_channels=channels, num_classes=classes, **own)


def _function(name: str) -> Callable[..., nn.Module]:
    module, _, function = name.partition(":")
    try:
        made = getattr(importlib.import_module(module), function)
    except Exception as error:  # whatever the module does
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ConfigError(f"model: {name} cannot be imported: {reason}") from error
    if not callable(made):
        raise ConfigError(f"model: {name} must be a function, got {type(made).__name__}")
    return made
