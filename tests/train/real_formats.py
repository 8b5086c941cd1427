"""Writes tiny data sets in the formats the real ones are published in, down to the bytes."""

from __future__ import annotations

import gzip
import io
import pickle
import struct
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from pyarrow import csv, parquet


class Python2Pickler(pickle._Pickler):
    """Protocol 2 as Python 2 wrote the archives: text and bytes alike are byte strings."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_string(self, value):
        data = value if isinstance(value, bytes) else value.encode("latin1")
        self.write(pickle.BINSTRING + struct.pack("<i", len(data)) + data)
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = save_string


def python2_pickle(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    Python2Pickler(buffer, protocol=2).dump(value)
    path.write_bytes(buffer.getvalue().replace(b"cnumpy._core.", b"cnumpy.core."))


def tagged_images(start: int, count: int) -> np.ndarray:
    """Rows of (count, 3072) that say which image they are: the first pixels hold its number."""
    rows = np.random.default_rng(start).integers(0, 256, (count, 3072), np.uint8)
    rows[:, 0], rows[:, 1] = np.divmod(np.arange(start, start + count), 256)
    return rows


def number_of(images: torch.Tensor) -> torch.Tensor:
    """The number of each image (N, 3, 32, 32), uint8 or in [0, 1]."""
    pixels = images[:, 0, 0, :2]
    if images.is_floating_point():
        pixels = (pixels * 255).round()
    return pixels[:, 0].long() * 256 + pixels[:, 1].long()


def write_cifar10(root: Path, per_batch: int = 20, protocol=python2_pickle) -> torch.Tensor:
    """The archive's layout; returns the training labels."""
    folder, labels = root / "cifar-10-batches-py", []
    for i in range(6):
        name = f"data_batch_{i + 1}" if i < 5 else "test_batch"
        drawn = np.random.default_rng(100 + i).integers(0, 10, per_batch).tolist()
        batch = {
            "batch_label": f"training batch {i + 1} of 5",
            "labels": drawn,
            "data": tagged_images(i * per_batch, per_batch),
            "filenames": [f"leptodactylus_pentadactylus_s_{k:06}.png" for k in range(per_batch)],
        }
        protocol(folder / name, batch)
        labels += drawn if i < 5 else []
    names = ["airplane", "automobile", "bird", "cat", "deer"]
    names += ["dog", "frog", "horse", "ship", "truck"]
    protocol(
        folder / "batches.meta",
        {"num_cases_per_batch": per_batch, "label_names": names, "num_vis": 3072},
    )
    return torch.tensor(labels)


def write_cifar100(root: Path, count: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    """The archive's layout, class f in superclass f % 20; returns fine and coarse labels."""
    folder = root / "cifar-100-python"
    drawn = np.random.default_rng(7).permutation(np.arange(count) % 100)
    for name, fine, start in (("train", drawn, 0), ("test", drawn[:30], count)):
        batch = {
            "filenames": [f"bos_taurus_s_{k:06}.png" for k in range(len(fine))],
            "batch_label": f"{name}ing batch 1 of 1",
            "fine_labels": fine.tolist(),
            "coarse_labels": (fine % 20).tolist(),
            "data": tagged_images(start, len(fine)),
        }
        python2_pickle(folder / name, batch)
    meta = {
        "fine_label_names": [f"fine{k}" for k in range(100)],
        "coarse_label_names": [f"coarse{k}" for k in range(20)],
    }
    python2_pickle(folder / "meta", meta)
    return torch.tensor(drawn), torch.tensor(drawn % 20)


def tag(path: Path, number: int, size: tuple[int, int] = (12, 10)) -> Path:
    """Writes an image whose colour is its number, below 256, in the format of its suffix; in steps
    that JPEG's losses do not blur."""
    path.parent.mkdir(parents=True, exist_ok=True)
    red, green = divmod(number, 16)
    Image.new("RGB", size, (16 * red + 8, 16 * green + 8, 90)).save(path)
    return path


def tag_of(images: torch.Tensor) -> torch.Tensor:
    """The number of each image (N, 3, H, W) in [0, 1], as int64."""
    red, green = (images.mean((2, 3))[:, :2] * 255).long().div(16, rounding_mode="floor").T
    return 16 * red + green


def write_clothing1m(root: Path, keys: dict[str, dict[str, int]], noisy: dict[str, int]) -> None:
    """Lists in `root`/annotations. keys: split → key → clean label, −1 for none."""
    lists = root / "annotations"
    lists.mkdir(parents=True)
    for split, labels in keys.items():
        (lists / f"{split}_key_list.txt").write_text("".join(f"{key}\n" for key in labels))
    clean = {key: label for labels in keys.values() for key, label in labels.items() if label >= 0}
    for name, table in (("noisy", noisy), ("clean", clean)):
        lines = sorted((f"{key} {label}\n" for key, label in table.items()), reverse=True)
        (lists / f"{name}_label_kv.txt").write_text("".join(lines))  # not the key lists' order
    (lists / "category_names_eng.txt").write_text("\n".join(f"Garment {k}" for k in range(14)))


def write_manifest(path: Path, rows: dict[str, object]) -> Path:
    """A table of paths and labels, with another column: Parquet or CSV, by its suffix."""
    table = pa.table({"label": list(rows.values()), "width": [8] * len(rows), "path": list(rows)})
    (parquet.write_table if path.suffix == ".parquet" else csv.write_csv)(table, path)
    return path


#: Data sets of image files that `write_files` can write.
FILE_SETS = ("clothing1m", "animal10n", "folder", "manifest.csv", "manifest.parquet")


def write_files(root: Path, kind: str) -> tuple[dict[str, str], dict[int, int], dict[int, int]]:
    """A data set of 42 training and 14 test images, tagged with numbers in another order than that
    of their paths; returns settings, and number → label of both."""
    numbers = np.random.default_rng(len(kind)).permutation(56).tolist()
    labels = {number: i % (10 if kind == "animal10n" else 14) for i, number in enumerate(numbers)}
    pattern = {
        "clothing1m": "images/{label}/{i:02},7.jpg",
        "animal10n": "{split}ing/{label}_{i:02}.jpg",
        "folder": "{split}/c{label:02}/{i:02}.png",
        "manifest.csv": "images/{i:02}.bmp",
        "manifest.parquet": "images/{i:02}.webp",
    }[kind]
    parts: list[dict[str, int]] = [{}, {}]
    for i, (number, label) in enumerate(labels.items()):
        path = pattern.format(i=i, label=label, split="train" if i < 42 else "test")
        tag(root / path, number)
        parts[i >= 42][path] = label
    settings = {"dataset": kind.partition(".")[0], "data_root": str(root)}
    if kind == "clothing1m":
        unknown = dict.fromkeys(parts[0], -1)
        write_clothing1m(root, {"noisy_train": unknown, "clean_test": parts[1]}, parts[0])
    elif kind.startswith("manifest"):
        for key, part in zip(("data_root", "test_root"), parts, strict=True):
            suffix = kind.partition(".")[2]
            settings[key] = str(write_manifest(root / f"{key}.{suffix}", part))
    return settings, *(dict(list(labels.items())[cut]) for cut in (slice(42), slice(42, None)))


def touch_images(folder: Path, *names: str) -> None:
    for number, name in enumerate(names):
        tag(folder / name, number) if not name.endswith(".txt") else (folder / name).touch()


def write_idx(path, array, packed=False):
    array = np.asarray(array)
    head = b"\0\0\x08" + bytes([array.ndim]) + np.array(array.shape, ">u4").tobytes()
    data = head + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(data) if packed else data)
