"""Recipes, data sets, networks, augmentations by name: each is registered where it is defined."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from .errors import check_choice

T = TypeVar("T")
U = TypeVar("U")

#: All of them, by the setting that chooses from each.
REGISTRIES: dict[str, Registry] = {}  # type: ignore[type-arg]


class Registry(dict[str, T]):
    """What the setting `kind` chooses from, and the class of settings that goes with each."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.configs: dict[str, Any] = {}
        REGISTRIES[kind] = self

    def register(self, name: str, config: type | None = None) -> Callable[[U], U]:
        """Decorator: make what it decorates known by `name`.

        Args:
            config: a frozen dataclass that extends `TrainConfig` by settings of its own, or changes
                defaults.

        Raises:
            ValueError: something else has that name. (Running the same definition again, as in a
                notebook, replaces it.)
        """

        def add(entry: U) -> U:
            known = self.get(name, entry)
            if _place(known) != _place(entry):
                raise ValueError(f"register({name!r}): {_place(known)[1]} has that name already")
            self[name] = entry  # type: ignore[assignment]
            self.configs.pop(name, None)
            if config is not None:
                self.configs[name] = config
            return entry

        return add

    def names(self) -> list[str]:
        """What is known, for messages and help."""
        return list(self)

    def check(self, name: str) -> None:
        """Raise a ConfigError that names the nearest unless `name` is known."""
        check_choice(self.kind, name, self.names())

    def ready(self, name: str) -> None:
        """Raise a ConfigError if `name` is known, but cannot be used here."""


def _place(entry: object) -> tuple[str, str]:
    return (
        getattr(entry, "__module__", type(entry).__module__),
        getattr(entry, "__qualname__", repr(entry)),
    )
