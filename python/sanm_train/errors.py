"""What goes wrong before a run starts, and advice by the nearest name."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable


class ConfigError(ValueError):
    """A setting that cannot be used; the message names it, what was expected and what came."""


class DataError(ConfigError):
    """A file or folder of a data set that cannot be used; the message names it."""


class CheckpointError(OSError):
    """A checkpoint that cannot be written, read or used here."""


def nearest(name: object, known: Iterable[str]) -> str:
    """ "; did you mean …?" with the name of `known` that is most like `name`, if one is."""
    near = difflib.get_close_matches(reprlib.repr(name).strip("'\""), list(known), 1, 0.4)
    return f"; did you mean {near[0]!r}?" if near else ""


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raise a ConfigError that names the nearest choice unless `value` is one of `choices`."""
    known = list(choices)
    if value not in known:
        listed = ", ".join(k for k in known if k)
        raise ConfigError(
            f"{name} must be one of {listed}; got {reprlib.repr(value)}{nearest(value, known)}"
        )
