"""Training with wrong labels on `sanm_kernels`: the SANM wrapper, recipes and a command line."""

from .config import TrainConfig
from .data import Dataset, in_memory
from .datasets import DATASETS, register_dataset
from .decoders import Decoder, LinearDecoder
from .errors import CheckpointError, ConfigError, DataError
from .models import MODELS, register_model
from .recipes import RECIPES, Recipe, Step, register
from .sanm import SANM, Batch, SANMLosses
from .settings import setting
from .tracker import Indexed, LabelQualityTracker
from .train import Result, load_run, train
from .trained import Prediction, Trained, export, load_network, predict

__all__ = [
    "DATASETS",
    "MODELS",
    "RECIPES",
    "SANM",
    "Batch",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "Dataset",
    "Decoder",
    "Indexed",
    "LabelQualityTracker",
    "LinearDecoder",
    "Prediction",
    "Recipe",
    "Result",
    "SANMLosses",
    "Step",
    "TrainConfig",
    "Trained",
    "export",
    "in_memory",
    "load_network",
    "load_run",
    "predict",
    "register",
    "register_dataset",
    "register_model",
    "setting",
    "train",
]
