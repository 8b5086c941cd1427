"""Training with wrong labels on `sanm_kernels`: the SANM wrapper, recipes and a command line."""

from .config import TrainConfig
from .errors import ConfigError
from .models import Decoder
from .recipes import RECIPES, Recipe, Step, register
from .sanm import SANM, Batch, SANMLosses
from .tracker import Indexed, LabelQualityTracker
from .train import Result, train

__all__ = [
    "RECIPES",
    "SANM",
    "Batch",
    "ConfigError",
    "Decoder",
    "Indexed",
    "LabelQualityTracker",
    "Recipe",
    "Result",
    "SANMLosses",
    "Step",
    "TrainConfig",
    "register",
    "train",
]
