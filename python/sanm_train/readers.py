"""Readers of data sets in the formats they are published in: what there is and how it is labelled.

Every reader returns `Records`: nothing is decoded that lies in image files, so a million rows cost
a list of paths. CIFAR, which comes as arrays, is returned as images. The order is that of the
format and the same at every call; position i of every field belongs to the same image.
"""

from __future__ import annotations

import gzip
import math
import os
import pickle
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .errors import DataError, check_choice
from .extra import extra
from .files import first_line, shown

CIFAR10_FILES = tuple(
    f"cifar-10-batches-py/{name}"
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
)
CIFAR100_FILES = ("cifar-100-python/train", "cifar-100-python/test")
IDX_FILES = {  # images and labels, each as it is or with .gz
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
MOST_BYTES = 2**33  # of one IDX file, which is read at once
IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm")
ANIMALS = (
    "cat", "lynx", "wolf", "coyote", "cheetah",
    "jaguar", "chimpanzee", "orangutan", "hamster", "guinea pig",
)  # fmt: skip


class Records(NamedTuple):
    """What a reader found.

    items: paths of image files, a list or an Arrow array of strings, or images (N, C, H, W) uint8.
    labels: the given labels (N,) int64.
    metadata: "classes", the classes' names by label (where the format has them), and what else the
        format knows, named by its reader; per-sample values are tensors (N,).
    """

    items: Any
    labels: Tensor
    metadata: dict[str, Any]


def read_cifar10(root: str | Path, split: str = "train") -> Records:
    """`root`/cifar-10-batches-py: images (N, 3, 32, 32), the `split` "train" or "test"."""
    check_choice("split", split, ("train", "test"))
    files = CIFAR10_FILES[:5] if split == "train" else CIFAR10_FILES[5:]
    parts = [_cifar_file(Path(root) / name, "labels", 10) for name in files]
    images, labels = (torch.cat([part[key] for part in parts]) for key in ("data", "labels"))
    names = _cifar_names(Path(root) / "cifar-10-batches-py/batches.meta", "label_names")
    return Records(images, labels, names)


def read_cifar100(root: str | Path, split: str = "train") -> Records:
    """`root`/cifar-100-python: images (N, 3, 32, 32) with the 100 fine labels; metadata has the
    superclasses as "coarse_labels"."""
    check_choice("split", split, ("train", "test"))
    path = Path(root) / f"cifar-100-python/{split}"
    part = _cifar_file(path, "fine_labels", 100)
    names = _cifar_names(path.with_name("meta"), "fine_label_names")
    coarse = labels_of(part.get("coarse_labels"), len(part["data"]), 20, f"{path}: coarse_labels")
    return Records(part["data"], part["fine_labels"], {**names, "coarse_labels": coarse})


def read_idx(root: str | Path, split: str = "train") -> Records:
    """`root` with the files of MNIST, Fashion-MNIST or KMNIST: images (N, 1, 28, 28) of 10
    classes."""
    check_choice("split", split, IDX_FILES)
    images, labels = (_idx(Path(root) / name) for name in IDX_FILES[split])
    if images.ndim != 3 or len(images) != len(labels):
        shapes = f"{tuple(images.shape)} and {tuple(labels.shape)}"
        raise DataError(f"{root}: {split} must have images (N, H, W) and labels (N,), got {shapes}")
    where = f"{root}: {IDX_FILES[split][1]}"
    return Records(images[:, None], labels_of(labels, len(images), 10, where), {})


def _idx(path: Path) -> Tensor:
    """An IDX file of bytes: two zeros, the type 8, the number of dimensions, their sizes as
    big-endian 32-bit numbers, the bytes."""
    packed = path.with_name(f"{path.name}.gz")
    path, opened = (packed, gzip.open) if packed.exists() else (path, open)
    try:
        with opened(path, "rb") as file:
            magic = file.read(4)
            if magic[:3] != b"\0\0\x08" or not 1 <= magic[3] <= 3:
                raise DataError(f"{path} must be an IDX file of bytes, got {magic!r} at its start")
            sizes = file.read(4 * magic[3])
            if len(sizes) < 4 * magic[3]:
                raise DataError(f"{path} ends within its header")
            shape = np.frombuffer(sizes, ">u4").astype(np.int64).tolist()
            if (expected := math.prod(shape)) > MOST_BYTES:
                raise DataError(f"{path} must hold at most {MOST_BYTES} bytes, got {shape}")
            found = file.read(expected + 1)  # no more, however much is packed
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {first_line(error)}") from None
    if len(found) != expected:
        more = "or more" if len(found) > expected else "bytes"
        raise DataError(f"{path} must hold {expected} bytes for {shape}, got {len(found)} {more}")
    return torch.frombuffer(bytearray(found), dtype=torch.uint8).view(shape)


def read_cifar_n(path: str | Path) -> dict[str, Tensor]:
    """The label sets of a CIFAR-N file (CIFAR-10_human.pt, CIFAR-100_human.pt) by name.

    Each is (N,) int64 in the order of the training images that `read_cifar10` and `read_cifar100`
    return: "clean_label" equals their labels. CIFAR-10: "aggre_label", "worse_label",
    "random_label1" to 3; CIFAR-100: "noisy_label", and both coarse sets.
    """
    known: list[Any] = [
        (stand_in, ".".join(name))
        for name, stand_in in array_parts().items()
        if name[0] != "_codecs"
    ]
    known += [part for part, _ in known if isinstance(part, type)]
    try:
        with torch.serialization.safe_globals(known):
            found = torch.load(path, map_location="cpu", weights_only=True)
        found = {k: _array(v) for k, v in found.items()} if isinstance(found, Mapping) else found
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except Exception as error:  # what a broken file raises depends on where it breaks
        raise DataError(f"{path} cannot be loaded: {first_line(error)}") from None
    if not isinstance(found, Mapping) or "clean_label" not in found:
        raise DataError(f"{path} must hold a dictionary of labels with clean_label")
    size = len(found["clean_label"])
    return {
        str(name): labels_of(value, size, None, f"{path}: {name}") for name, value in found.items()
    }


def read_clothing1m(root: str | Path, split: str = "noisy_train") -> Records:
    """Clothing1M by its lists, which lie in `root` or in `root`/annotations.

    Args:
        split: "noisy_train" with the labels of noisy_label_kv.txt, or "clean_train", "clean_val"
            or "clean_test" with those of clean_label_kv.txt.

    The lists' keys are paths below `root`. metadata: "true_labels" (N,), −1 where not known.
    """
    with extra():
        import pyarrow.compute as pc
    check_choice("split", split, ("noisy_train", "clean_train", "clean_val", "clean_test"))
    lists = clothing1m_lists(root)
    keys = _table(lists / f"{split}_key_list.txt", ("path",), " ")["path"]

    def labels_of(kind: str) -> Tensor:
        table = _table(lists / f"{kind}_label_kv.txt", ("path", "label"), " ")
        labels = _integers(table["label"], 14, f"{lists}/{kind}_label_kv.txt: label")
        place = pc.index_in(keys, value_set=table["path"]).fill_null(-1).to_numpy()
        return torch.cat([labels, torch.tensor([-1])])[torch.tensor(place)]

    true = labels_of("clean")
    labels = labels_of("noisy") if split == "noisy_train" else true
    if (labels < 0).any():
        key = keys[int((labels < 0).nonzero()[0])]
        raise DataError(f"{lists / split}_key_list.txt: '{key}' has no label")
    metadata: dict[str, Any] = {"true_labels": true}
    names = lists / "category_names_eng.txt"
    if names.is_file():
        lines = names.read_text(encoding="utf-8").splitlines()
        metadata["classes"] = [line.strip() for line in lines if line.strip()]
    return Records(_below(root, keys), labels, metadata)


def clothing1m_lists(root: str | Path) -> Path:
    """Where Clothing1M's lists lie: `root`/annotations if that exists, else `root`."""
    inner = Path(root) / "annotations"
    return inner if inner.is_dir() else Path(root)


def read_animal10n(root: str | Path, split: str = "training") -> Records:
    """Animal-10N: `root`/training or `root`/testing with files named label_id.jpg, by name."""
    check_choice("split", split, ("training", "testing"))
    folder = Path(root) / split
    paths = [path for path in images_below(folder) if os.path.dirname(path) == str(folder)]
    labels = []
    for path in paths:
        label = os.path.basename(path).partition("_")[0]
        if not (label.isdecimal() and int(label) < len(ANIMALS)):
            raise DataError(f"{path}: the name must begin with a label from 0 to 9 and _")
        labels.append(int(label))
    if not paths:
        raise DataError(f"{folder} holds no image (looked for {', '.join(IMAGES)})")
    return Records(paths, torch.tensor(labels), {"classes": list(ANIMALS)})


def read_folder(root: str | Path) -> Records:
    """Any folder with one sub-folder per class, in the order of their names, images below them.

    Hidden files and folders, and macOS's `__MACOSX`, do not count, at any depth. A class without an
    image is an error: the network would have an output that never occurs.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder")
    classes = sorted(e.name for e in os.scandir(root) if e.is_dir() and not _hidden(e.name))
    if not classes:
        raise DataError(f"{root} holds no sub-folder; one is needed for each class")
    found = [list(images_below(root / name)) for name in classes]
    for name, paths in zip(classes, found, strict=True):
        if not paths:
            raise DataError(
                f"class {name!r}: {root / name} holds no image (looked for {', '.join(IMAGES)})"
            )
    labels = torch.arange(len(classes)).repeat_interleave(torch.tensor([len(p) for p in found]))
    names = [shown(name) for name in classes]
    return Records([path for paths in found for path in paths], labels, {"classes": names})


def read_manifest(
    path: str | Path, root: str | Path | None = None, classes: Sequence[str] | None = None
) -> Records:
    """A table of images with the columns path and label: CSV, or Parquet (.parquet, .pq).

    Args:
        root: what the paths are relative to; default: the manifest's folder.
        classes: the names that labels may have, in the order of their indices; default: labels are
            class indices if all are whole numbers (also written as 3.0), otherwise names, whose
            classes are in the order of their names. A missing value (nan, NA, N/A, null, none)
            among whole numbers is an error.

    Other columns are ignored. Whether the images exist is not checked. items is an Arrow array.
    """
    path = Path(path)
    table = _table(path)
    paths, given = _below(path.parent if root is None else root, table["path"]), table["label"]
    labels, classes = coded(given, classes, path)
    return Records(paths, labels, {} if classes is None else {"classes": list(classes)})


def coded(
    given: Any, classes: Sequence[str] | None, where: object
) -> tuple[Tensor, Sequence[str] | None]:
    """Labels (N,) of an Arrow array of strings, by the rule of `read_manifest`, and the classes'
    names, if labels are names."""
    with extra():
        import pyarrow.compute as pc
    if classes is None:
        numbers = pc.match_substring_regex(given, r"^-?[0-9]+(\.0*)?$")
        absent = pc.match_substring_regex(given, r"(?i)^(nan|na|n/a|<na>|null|none)$")
        if pc.all(numbers).as_py():
            whole = pc.replace_substring_regex(given, r"\.0*$", "")
            return _integers(whole, None, f"{where}: label"), None
        if pc.all(pc.or_(numbers, absent)).as_py():
            row = pc.index(absent, True).as_py()
            raise DataError(f"{where}: row {row + 1} has no label, got {given[row].as_py()!r}")
    encoded = given.dictionary_encode()
    found = encoded.dictionary.to_pylist()
    names = sorted(found) if classes is None else list(classes)
    unknown = sorted(set(found) - set(names))
    if unknown:
        raise DataError(
            f"{where}: label {unknown[0]!r} is not one of the {len(names)} known classes"
        )
    index = {name: label for label, name in enumerate(names)}
    order = torch.tensor([index[name] for name in found], dtype=torch.int64)
    return order[torch.tensor(encoded.indices.to_numpy())], names


def filled(column: Any, where: object, name: str) -> Any:
    """A column of a table as an Arrow array of trimmed strings, none of them empty."""
    with extra():
        import pyarrow.compute as pc
    text = trimmed(column)
    empty = pc.index(text, "").as_py()
    if empty >= 0:
        raise DataError(f"{where}: row {empty + 1} has no {name}")
    return text


def trimmed(column: Any) -> Any:
    """A column of a table as an Arrow array of trimmed strings, empty where there is nothing."""
    with extra():
        import pyarrow as pa
        import pyarrow.compute as pc
    return pc.utf8_trim_whitespace(column.cast(pa.large_string()).fill_null("").combine_chunks())


def array_parts() -> dict[tuple[str, str], Any]:
    """What pickled arrays call, by module and name, replaced by what can only make plain arrays.

    NumPy's own functions crash on invalid arguments. These keep shape, dtype and bytes for `_array`
    to check. Each file gets its own, since it can change them.
    """

    class DType:
        def __init__(self, kind: Any, *_: Any) -> None:
            self.kind, self.order = kind, "="

        def __setstate__(self, state: Any) -> None:
            self.order = state[1]

    class Array(_Array):
        def __init__(self, *_: Any) -> None:
            self.shape, self.dtype, self.fortran, self.data = (), None, False, b""

        def __setstate__(self, state: Any) -> None:
            _, self.shape, self.dtype, self.fortran, self.data = state

    class NDArray:  # named by what makes an array, and never called
        def __new__(cls, *_: Any) -> NDArray:
            raise pickle.UnpicklingError("it calls numpy.ndarray, which is not allowed")

    return {
        # NumPy 1 and NumPy 2
        ("numpy.core.multiarray", "_reconstruct"): Array,
        ("numpy._core.multiarray", "_reconstruct"): Array,
        ("numpy", "ndarray"): NDArray,
        ("numpy", "dtype"): DType,
        # How Python 3 writes bytes in the archives' protocol.
        ("_codecs", "encode"): lambda text, encoding: text.encode("latin1"),
    }


class _Array:
    """Shape, dtype and bytes of an array, as a file has them."""

    shape: Any
    dtype: Any
    fortran: Any
    data: Any


def _array(value: Any) -> Any:
    """An array of whole or floating-point numbers from its parts; other values as they are."""
    if not isinstance(value, _Array):
        return value
    kind, shape, data = value.dtype.kind, value.shape, value.data
    if not (isinstance(kind, str) and re.fullmatch("[biuf][1248]", kind)):
        raise ValueError(f"an array of numbers was expected, got one of dtype {kind!r:.40}")
    dtype = np.dtype(kind).newbyteorder(">" if value.dtype.order == ">" else "<")
    if isinstance(data, str):  # Python 2's bytes
        data = data.encode("latin1")
    sizes = isinstance(shape, tuple) and all(type(n) is int and n >= 0 for n in shape)
    if not (sizes and isinstance(data, bytes) and math.prod(shape) * dtype.itemsize == len(data)):
        raise ValueError(f"an array of shape {shape!r:.40} does not have as many bytes as it needs")
    array = np.frombuffer(data, dtype).reshape(shape, order="F" if value.fortran else "C")
    return array.astype(dtype.newbyteorder("="))


class _ArraysOnly(pickle.Unpickler):
    """Loads pickles of arrays and builtin containers; any other name in the file is refused.

    A pickle can name any function to be called while it is loaded; the archives' need only these.
    """

    def __init__(self, file: Any) -> None:
        super().__init__(file, encoding="latin1")
        self.parts = array_parts()

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.parts:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not allowed")
        return self.parts[module, name]


def _unpickle(path: Path) -> dict[str, Any]:
    """A pickled dictionary with its keys as strings, as Python 2 or 3 wrote it."""
    try:
        with path.open("rb") as file:
            found = _ArraysOnly(file).load()
        if isinstance(found, dict):
            found = {key: _array(value) for key, value in found.items()}
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except Exception as error:  # what a broken pickle raises depends on where it breaks
        raise DataError(
            f"{path} cannot be read as a pickle of arrays: {first_line(error)}"
        ) from None
    if not isinstance(found, dict):
        raise DataError(f"{path} must hold a dictionary, got {type(found).__name__}")
    return {k.decode("latin1") if isinstance(k, bytes) else str(k): v for k, v in found.items()}


def _cifar_file(path: Path, key: str, num_classes: int) -> dict[str, Any]:
    """One batch file: its entries, with data as images (N, 3, 32, 32) and `key` as labels (N,)."""
    found = _unpickle(path)
    data = found.get("data")
    if not (isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.shape[1:] == (3072,)):
        got = f"{data.dtype} {data.shape}" if isinstance(data, np.ndarray) else type(data).__name__
        raise DataError(f"{path}: data must be a uint8 array (N, 3072), got {got}")
    images = torch.from_numpy(data.reshape(-1, 3, 32, 32).copy())
    labels = labels_of(found.get(key), len(images), num_classes, f"{path}: {key}")
    return {**found, "data": images, key: labels}


def _cifar_names(path: Path, key: str) -> dict[str, Any]:
    """The classes' names, if the archive's file of names is there."""
    names = _unpickle(path).get(key) if path.is_file() else None
    return {"classes": list(names)} if names else {}


def labels_of(values: Any, size: int, num_classes: int | None, what: str) -> Tensor:
    """`values` as (size,) int64, checked to be whole numbers in [0, num_classes)."""
    try:
        array = np.asarray(values)
    except ValueError:  # lists of unequal length
        array = np.empty(0, object)
    if array.dtype.kind not in "iu" or array.shape != (size,):
        raise DataError(f"{what} must be {size} whole numbers, got {array.dtype} {array.shape}")
    labels = torch.as_tensor(array.astype(np.int64))
    if size and (labels.min() < 0 or (num_classes is not None and labels.max() >= num_classes)):
        top = "" if num_classes is None else f" to {num_classes - 1}"
        raise DataError(
            f"{what} must be from 0{top}, got {labels.min().item()} to {labels.max().item()}"
        )
    return labels


def images_below(folder: Path) -> Iterator[str]:
    """Paths of the images in `folder` and below it, in the order of their names."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not _hidden(name))
        for name in sorted(names):
            if name.lower().endswith(IMAGES) and not _hidden(name):
                yield os.path.join(where, name)


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _integers(column: Any, num_classes: int | None, what: str) -> Tensor:
    """An Arrow array of strings as labels (N,), checked as `labels_of` does."""
    try:
        values = column.cast("int64").to_numpy()
    except ValueError as error:
        raise DataError(f"{what} must be whole numbers: {first_line(error)}") from None
    return labels_of(values, len(column), num_classes, what)


def _below(root: str | Path, paths: Any) -> Any:
    """An Arrow array of paths, of which the relative ones are below `root`."""
    with extra():
        import pyarrow as pa
        import pyarrow.compute as pc
    folder, separator = (pa.scalar(text, paths.type) for text in (str(root), "/"))
    joined = pc.binary_join_element_wise(folder, paths, separator)
    return pc.if_else(pc.starts_with(paths, "/"), paths, joined)


def _table(
    path: Path, names: tuple[str, ...] | None = None, delimiter: str = ","
) -> dict[str, Any]:
    """Columns of a table as Arrow arrays of trimmed strings, none of them empty.

    names: of the columns of a file without a header; default: path and label, wherever they are.
    """
    with extra():
        import pyarrow as pa
        from pyarrow import csv, dataset
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    wanted, text = names or ("path", "label"), pa.large_string()
    as_csv = dataset.CsvFileFormat(
        csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=csv.ConvertOptions(column_types=dict.fromkeys(wanted, text)),
        read_options=csv.ReadOptions(column_names=names),
    )
    parquet = path.suffix.lower() in (".parquet", ".pq")
    try:
        found = dataset.dataset(path, format="parquet" if parquet else as_csv)
        for name in wanted:
            if name not in found.schema.names:
                columns = ", ".join(found.schema.names)
                raise DataError(f"{path} has no column {name!r}; its columns: {columns}")
        table = found.to_table(columns=list(wanted))
        if not len(table):
            raise DataError(f"{path} lists no image")
        result = {}
        for name in wanted:
            result[name] = filled(table[name], path, name)
    except pa.ArrowException as error:  # the last part of its message says what is wrong
        raise DataError(f"{path} cannot be read: {str(error).split('Invalid: ')[-1]}") from None
    return result
