"""Training methods. Importing this package registers the built-in ones in `RECIPES`."""

from . import ce, dividemix, elr, onepass  # noqa: F401  (they register themselves)
from .base import RECIPES, Recipe, Step, register

__all__ = ["RECIPES", "Recipe", "Step", "register"]
