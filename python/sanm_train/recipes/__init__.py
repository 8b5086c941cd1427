"""Training methods. Importing this package registers the built-in ones in `RECIPES`."""

from .base import RECIPES, Recipe, register
from . import ce, dividemix  # noqa: E402,F401  (they register themselves)

__all__ = ["RECIPES", "Recipe", "register"]
