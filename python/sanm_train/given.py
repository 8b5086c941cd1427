"""What is handed over in Python: data as arrays, tables or any torch data set, and a network.

In the settings both are called python. `handed` holds them while a run is built, since what builds
it knows settings alone.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from .config import TrainConfig
from .data import Dataset
from .datasets import DATASETS, check_seen, count_classes, from_files, held, streamed
from .errors import ConfigError, DataError
from .extra import extra
from .models import MODELS
from .readers import Records, coded, filled, labels_of
from .samples import Samples, in_range

NAME = "python"
#: What is handed over, by the setting that asks for it.
OF = {"dataset": "train_data", "model": "model"}


class Handed(NamedTuple):
    """What there is; None where there is nothing."""

    model: Any = None
    train_data: Any = None
    test_data: Any = None


NOTHING = Handed()
_HANDED: ContextVar[Handed] = ContextVar("handed", default=NOTHING)


@contextmanager
def handed(settings: Mapping[str, str], given: Handed) -> Iterator[None]:
    """Have what `settings` (of `OF`) call python be what is given.

    Raises:
        ConfigError: something is given that the settings do not ask for, or the other way round.
    """
    for setting, chosen in settings.items():
        value = getattr(given, OF[setting])
        if chosen == NAME:
            _need(setting, value)
        elif value is not None:
            raise ConfigError(f"{OF[setting]} goes with {setting}='python', got {chosen!r}")
    token = _HANDED.set(given)
    try:
        yield
    finally:
        _HANDED.reset(token)


def _need(setting: str, value: Any) -> Any:
    if value is None:
        raise ConfigError(
            f"{setting} python is handed over in Python, as {OF[setting]}, to train and to what "
            "reads the run; commands take what a module registers (--import)"
        )
    return value


@MODELS.register(NAME)
def handed_model(in_channels: int, num_classes: int) -> nn.Module:
    """What is handed over in Python as model."""
    model = _need("model", _HANDED.get().model)
    if isinstance(model, nn.Module):
        return copy.deepcopy(model)
    if not callable(model):
        raise ConfigError(f"model must be a module or a function that makes one, got {model!r}")
    made = model(in_channels=in_channels, num_classes=num_classes)
    if not isinstance(made, nn.Module):
        raise ConfigError(f"model must make a module, got {type(made).__name__}")
    return made


@dataclass(frozen=True, kw_only=True)
class PythonConfig(TrainConfig):
    model: str = NAME


@DATASETS.register(NAME, PythonConfig)
def load_handed(config: TrainConfig) -> Dataset:
    """What is handed over in Python as train_data and test_data."""
    given = _HANDED.get()
    train = _read(config, _need("dataset", given.train_data), "train_data", None)
    classes, test = train.metadata.get("classes"), None
    if given.test_data is not None:
        test = _read(config, given.test_data, "test_data", classes)
        if _kind(test) != _kind(train):
            raise DataError(f"test_data must be as train_data, {_kind(train)}, got {_kind(test)}")
    number = count_classes(train, test, "train_data", "test_data")
    images = train.items
    if isinstance(images, Samples):
        return streamed(config, train, test, number, images.seen, images.mean_std)
    if not isinstance(images, Tensor):
        return from_files(config, train, test, number)
    if test is not None:
        check_seen(train.labels, test.labels)
    data = held(config, train[:2], test and test[:2], num_classes=number, classes=classes)
    if config.noise == "none":  # what is right is not known
        data = dataclasses.replace(data, true_labels=torch.full_like(data.labels, -1))
    return data


def _kind(records: Records) -> str:
    images = records.items
    if isinstance(images, Tensor):
        return f"arrays of images {tuple(images.shape[1:])} of {images.dtype}"
    if isinstance(images, Samples):
        return f"a torch data set of images {images.shape} of {np.dtype(images.dtype)}"
    return "a table of files"


def _read(config: TrainConfig, data: Any, where: str, classes: list[str] | None) -> Records:
    if isinstance(data, TensorDataset):
        data = data.tensors
    if isinstance(data, (tuple, list)) and len(data) == 2 and hasattr(data[0], "shape"):
        images = _in_memory(data[0], where)
        return Records(images, *_labels(data[1], len(images), classes, where))
    if hasattr(data, "columns") and hasattr(data, "iloc"):
        return _table(config, data, where, classes)
    if not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        raise DataError(
            f"{where} must be a pair of arrays, a DataFrame or a torch data set with a length, "
            f"got {type(data).__name__}"
        )
    samples = Samples(config, data, where)
    return Records(samples, *_labels(samples.labels, len(samples), classes, where))


def _in_memory(images: Any, where: str) -> Tensor:
    """Images (N, C, H, W)."""
    found = torch.as_tensor(images)
    found = found[:, None] if found.ndim == 3 else found
    if found.ndim != 4 or not len(found) or found.shape[1] == found.shape[3]:
        raise DataError(
            f"{where}: images must be (N, C, H, W), (N, H, W, C) or (N, H, W) with fewer channels "
            f"than columns, got {tuple(found.shape)}"
        )
    if found.shape[3] < found.shape[1]:
        found = found.permute(0, 3, 1, 2).contiguous()
    return in_range(found, where)


def _labels(
    values: Any, number: int, classes: list[str] | None, where: str
) -> tuple[Tensor, dict[str, Any]]:
    """Labels (N,) that are whole numbers, or names by the rule of manifests; the classes' names."""
    with extra():
        import pyarrow as pa
    found = values.cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if found.shape != (number,) or (found.dtype.kind in "iu" and classes is None):
        return labels_of(found, number, None, f"{where}: labels"), {}
    text = filled(pa.chunked_array([pa.array(found, from_pandas=True)]), where, "label")
    labels, names = coded(text, classes, where)
    return labels, {} if names is None else {"classes": list(names)}


def _table(config: TrainConfig, table: Any, where: str, classes: list[str] | None) -> Records:
    """A DataFrame's label, and path or image."""
    columns = [name for name in ("path", "image") if name in table.columns]
    if len(columns) != 1 or "label" not in table.columns:
        got = ", ".join(map(str, table.columns))
        raise DataError(f"{where} must have the columns label, and path or image, got {got}")
    if not len(table):
        raise DataError(f"{where} has no image")
    cells = list(table[columns[0]])
    images: Any = cells
    files: dict[str, Any] = {}
    if columns == ["path"]:
        images = list(map(str, cells))
    elif isinstance(cells[0], (bytes, dict)):
        files["files"] = [_file(cell) for cell in cells]
        images = [f"{where}[{i}]" for i in table.index]
    else:
        images = Samples(config, list(zip(cells, table["label"], strict=True)), where)
    labels, names = _labels(table["label"], len(table), classes, where)
    return Records(images, labels, files | names)


def _file(cell: Any) -> bytes | str:
    """A file's bytes, or as the library datasets has it in tables, which may be its path."""
    return cell if isinstance(cell, bytes) else cell.get("bytes") or cell.get("path") or b""
