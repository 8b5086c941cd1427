"""Data sets that the library `datasets` (Hugging Face) reads: by name from its hub, from folders of
`save_to_disk`, from WebDataset shards and from Parquet files with images in them.

Images are left as they are encoded. None of the library's decoders is called: `images` reads them.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import DataError, check_choice
from .extra import extra
from .files import first_line
from .libraries import installed
from .readers import Records, coded, filled, labels_of, trimmed

KINDS = {".tar": "webdataset", ".parquet": "parquet", ".pq": "parquet"}
LABELS = ("label", "labels", "cls")  # what the given labels are usually called


def library() -> Any:
    """The package `datasets`."""
    return installed("datasets", "dataset hf")


def read_splits(root: str, subset: str = "") -> dict[str, Any]:
    """The splits of a data set by name, each a `datasets.Dataset`.

    Args:
        root: what is there: a folder of `save_to_disk`; .tar or .parquet files, * in whose names
            stands for anything; a folder of such. Otherwise a name of the hub.
        subset: of a data set of the hub that has several (its configuration).
    """
    datasets = library()
    path, options = root, {}
    files = sorted(glob.glob(root, recursive=True)) if any(c in root for c in "*?[") else [root]
    if files and os.path.isfile(files[0]):
        path = KINDS.get(Path(root).suffix.lower(), "")
        options = {"data_files": {"train": files}}
        if not path:
            raise DataError(f"data_root: {root} must be files of {', '.join(KINDS)}")
    elif not os.path.exists(root) and (len(Path(root).parts) > 2 or os.path.isabs(root)):
        raise DataError(f"data_root: {root}: no such file or folder")
    saved = any(Path(root, name).is_file() for name in ("state.json", "dataset_dict.json"))
    try:
        if saved:
            found = datasets.load_from_disk(root)
        else:
            found = datasets.load_dataset(path, subset or None, **options)
    except Exception as error:  # what the library raises depends on where it ends
        where = "" if os.path.exists(root) or options else ", which is not a file or folder here,"
        while "error occurred while generating" in str(error) and error.__cause__:
            error = error.__cause__  # type: ignore[assignment]
        raise DataError(
            f"data_root: {root}{where} cannot be read by datasets: {first_line(error)}"
        ) from None
    return dict(found) if isinstance(found, dict) else {"train": found}


def choose(splits: dict[str, Any], setting: str, wanted: str, usual: Sequence[str]) -> str | None:
    """The split that is `wanted`, or if none is, the first of the `usual` ones that is there."""
    if wanted:
        check_choice(setting, wanted, splits)
        return wanted
    return next((name for name in usual if name in splits), None)


def read_split(
    data: Any,
    root: str,
    split: str,
    image_column: str = "",
    label_column: str = "",
    true_column: str = "",
    classes: Sequence[str] | None = None,
) -> Records:
    """The images and labels of a split.

    Args:
        data: a `datasets.Dataset`.
        root, split: what it is called.
        image_column: files' bytes; default: the only such column.
        label_column: classes, whole numbers or names; default: the only column of classes, or else
            label, labels or cls. A part of a structure is named as json.label.
        true_column: labels that are known to be right, empty or −1 where nothing is known.
        classes: the names of the training set's classes.

    items are paths, which the rows have or are made of their numbers. metadata: "files", what lies
    there; "true_labels" (N,); "classes".
    """
    with extra():
        import pyarrow as pa
        import pyarrow.compute as pc
    where = f"{root}: {split}"
    if not len(data):
        raise DataError(f"{where} has no image")
    image_column = image_column or _only_images(data, where)
    label_column = label_column or _only_labels(data, where, {image_column, true_column})
    cells, feature = _column(data, image_column, where)
    if not _holds_images(feature):
        raise DataError(
            f"{where}: {image_column} must hold the bytes of image files, got {feature}; tables of "
            "paths are read by --dataset manifest"
        )
    labels, classes = _labels(data, label_column, classes, where)
    metadata: dict[str, Any] = {"files": Files(data, image_column)}
    if classes is not None:
        metadata["classes"] = list(classes)
    if true_column:
        number = len(classes) if classes is not None else int(labels.max()) + 1
        metadata["true_labels"] = _true_labels(data, true_column, classes, number, where)
    named = pa.types.is_struct(cells.type) and cells.type.get_field_index("path") >= 0
    paths = pc.struct_field(cells, "path") if named else pa.nulls(len(data), pa.string())
    if paths.null_count:
        paths = pc.coalesce(paths, pa.array(f"{split}[{i}]" for i in range(len(data))))
    return Records(paths, labels, metadata)


class Files(Sequence[Any]):
    """The image files of a column: the bytes of each, or its path where there are none."""

    def __init__(self, data: Any, column: str) -> None:
        self.data, self.column = data, column  # which other processes open again, and do not copy
        lengths = [len(chunk) for chunk in data.data.column(column).chunks]
        self.ends = np.cumsum(lengths)  # Arrow would go through thousands of chunks for each row

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, row: Any) -> bytes | str:
        number = int(np.searchsorted(self.ends, row, "right"))
        chunk = self.data.data.column(self.column).chunk(number)
        cell = chunk[int(row - self.ends[number]) + len(chunk)].as_py()
        if isinstance(cell, dict):
            cell = cell.get("bytes") or cell.get("path")
        return cell or b""


def _only_images(data: Any, where: str) -> str:
    found = [name for name, feature in data.features.items() if _holds_images(feature)]
    return _only("image_column", found, data, where)


def _only_labels(data: Any, where: str, others: set[str]) -> str:
    kind = library().ClassLabel
    found = [n for n, f in data.features.items() if isinstance(f, kind) and n not in others]
    usual = [name for name in LABELS if name in data.features and name not in others]
    return _only("label_column", found if len(found) == 1 else found or usual[:1], data, where)


def _only(setting: str, found: Sequence[str], data: Any, where: str) -> str:
    if len(found) != 1:
        columns = ", ".join(found or data.features)
        raise DataError(f"{setting} must be one of the columns of {where}: {columns}")
    return found[0]


def _holds_images(feature: Any) -> bool:
    if isinstance(feature, dict):
        return "bytes" in feature
    kinds = ("binary", "large_binary")
    return isinstance(feature, library().Image) or getattr(feature, "dtype", "") in kinds


def _column(data: Any, name: str, where: str) -> tuple[Any, Any]:
    """A column as an Arrow array, and what kind of column it is."""
    with extra():
        import pyarrow.compute as pc
    first, *rest = [name] if name in data.features else name.split(".")
    check_choice(f"{where}: column", first, data.features)
    column, feature = data.data.column(first), data.features[first]
    for part in rest:
        check_choice(f"{where}: part of column {first}", part, feature)
        column, feature = pc.struct_field(column, part), feature[part]
    return column, feature


def _labels(
    data: Any, name: str, classes: Sequence[str] | None, where: str
) -> tuple[Tensor, Sequence[str] | None]:
    column, feature = _column(data, name, where)
    if isinstance(feature, library().ClassLabel):
        if classes is not None and list(classes) != feature.names:
            raise DataError(f"{where}: {name} has other classes than the training set's labels")
        values = column.fill_null(-1).to_numpy()
        return labels_of(values, len(data), len(feature.names), f"{where}: {name}"), feature.names
    return coded(filled(column, where, name), classes, where)


def _true_labels(
    data: Any, name: str, classes: Sequence[str] | None, number: int, where: str
) -> Tensor:
    """(N,), −1 where nothing is known."""
    with extra():
        import pyarrow as pa
        import pyarrow.compute as pc
    column, feature = _column(data, name, where)
    if isinstance(feature, library().ClassLabel) and list(classes or ()) != feature.names:
        raise DataError(f"{where}: {name} has other classes than the given labels")
    if pa.types.is_integer(column.type):
        values = torch.tensor(column.fill_null(-1).to_numpy()).long()
    else:
        text = trimmed(column)
        known = pc.not_equal(text, "")
        values = torch.full((len(data),), -1)
        values[known.to_numpy(zero_copy_only=False)] = coded(text.filter(known), classes, where)[0]
    if len(values) and not -1 <= int(values.min()) <= int(values.max()) < number:
        raise DataError(f"{where}: {name} must be from 0 to {number - 1}, or −1")
    return values
