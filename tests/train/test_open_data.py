"""Any data: whatever the format, label and label quality stay with their image in any order."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pandas
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from inputs import more
from PIL import Image
from pyarrow import parquet
from real_formats import tag, tag_of, write_idx, write_manifest

from sanm_train import TrainConfig, train
from sanm_train.errors import CheckpointError
from sanm_train.readers import IDX_FILES

NUMBER = 42
LABELS = [(5 * number) % 3 for number in range(NUMBER)]
HUB = ("disk", "parquet", "shards")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The library datasets, which keeps what it makes here."""
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    return datasets


def encoded(number: int, kind: str = "PNG") -> bytes:
    """An image that says which one it is, as `tag` makes them."""
    file = io.BytesIO()
    picture(number).save(file, kind)
    return file.getvalue()


def picture(number: int) -> Image.Image:
    red, green = divmod(number, 16)
    return Image.new("RGB", (20 + number % 5, 20), (16 * red + 8, 16 * green + 8, 90))


def write_shards(folder: Path, numbers, extra=lambda number: {}) -> str:
    """Two WebDataset shards, with the class in a file of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in range(2):
        with tarfile.open(folder / f"part-{part}.tar", "w") as shard:
            for i in range(part * len(numbers) // 2, (part + 1) * len(numbers) // 2):
                files = {"png": encoded(numbers[i]), "cls": b"%d" % LABELS[numbers[i]]}
                files |= extra(numbers[i])
                for name, content in files.items():
                    info = tarfile.TarInfo(f"{i:04}.{name}")
                    info.size = len(content)
                    shard.addfile(info, io.BytesIO(content))
    return str(folder / "part-*.tar")


def as_datasets(datasets, numbers, **columns):
    cells = [{"bytes": encoded(n), "path": f"{n}.png"} for n in numbers]
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])}
    features = datasets.Features({**kinds, **{name: kind for name, (kind, _) in columns.items()}})
    values = {name: found for name, (_, found) in columns.items()}
    labels = [LABELS[n] for n in numbers]
    return datasets.Dataset.from_dict({"image": cells, "label": labels, **values}, features)


class Samples(torch.utils.data.Dataset):
    def __init__(self, numbers, convert):
        self.numbers, self.convert = numbers, convert

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, i):
        return self.convert(self.numbers[i]), LABELS[self.numbers[i]]


def square(number: int) -> torch.Tensor:
    """(3, 16, 16), uint8."""
    return torch.tensor(np.asarray(picture(number).resize((16, 16)))).permute(2, 0, 1)


def prepare(kind: str, root: Path, numbers, datasets):
    """A data set of images in the order of `numbers`: settings, and what `train` is handed."""
    labels = [LABELS[n] for n in numbers]
    handed = {"dataset": "python", "model": "small-cnn"}
    if kind == "disk":
        as_datasets(datasets, numbers).save_to_disk(root / "disk")
        return {"dataset": "hf", "data_root": str(root / "disk")}, {}
    if kind == "parquet":
        names = ["abc"[label] for label in labels]
        table = pa.table({"picture": [encoded(n) for n in numbers], "label": names})
        parquet.write_table(table, root / "a.parquet")
        return {"dataset": "hf", "data_root": str(root / "a.parquet")}, {}
    if kind == "shards":
        return {"dataset": "hf", "data_root": write_shards(root / "shards", numbers)}, {}
    if kind == "csv":
        rows = {f"{i:03}.png": label for i, label in enumerate(labels)}
        for name, number in zip(rows, numbers, strict=True):
            tag(root / name, number)
        file = write_manifest(root / "a.csv", rows)
        return {"dataset": "manifest", "data_root": str(file)}, {}
    if kind == "idx":
        for split in ("train", "test"):
            images, names = (root / name for name in IDX_FILES[split])
            write_idx(images, np.array(numbers)[:, None, None] * np.ones((1, 28, 28)))
            write_idx(names, np.array(numbers) % 10)
        return {"dataset": "mnist", "data_root": str(root), "noise": "none"}, {}
    images = torch.stack([square(n) for n in numbers])
    if kind == "tensors":
        return handed, {"train_data": (images / 255, torch.tensor(labels))}
    if kind == "arrays":
        return handed, {"train_data": (images.permute(0, 2, 3, 1).numpy(), np.array(labels))}
    if kind == "samples of tensors":
        return handed, {"train_data": Samples(numbers, square)}
    if kind == "samples of pictures":
        return handed, {"train_data": Samples(numbers, picture)}
    cells = [encoded(n) for n in numbers] if kind == "frame of bytes" else map(picture, numbers)
    if kind == "frame of paths":
        cells = [str(tag(root / f"{i}.png", n)) for i, n in enumerate(numbers)]
    column = "path" if kind == "frame of paths" else "image"
    return handed, {"train_data": pandas.DataFrame({column: list(cells), "label": labels})}


def numbers_of(images: torch.Tensor) -> torch.Tensor:
    if images.shape[1] == 1:
        return (images.mean((1, 2, 3)) * 255).round().long()
    return tag_of(images)


@pytest.mark.parametrize(
    "kind",
    [
        *("disk", "csv", "arrays", "samples of pictures"),
        *more("parquet", "shards", "idx", "tensors", "samples of tensors"),
        *more("frame of paths", "frame of bytes", "frame of pictures"),
    ],
)
def test_label_quality_stays_with_its_image_in_any_order(kind, tmp_path, request):
    datasets = request.getfixturevalue("hub") if kind in HUB else None
    for turn in range(2):
        draws = torch.Generator().manual_seed(turn)
        numbers = torch.randperm(NUMBER, generator=draws).tolist()
        (tmp_path / "data").mkdir(exist_ok=True)
        settings, given = prepare(kind, tmp_path / "data", numbers, datasets)
        more_of_it = {} if kind in ("idx", "tensors", "arrays") else {"image_size": 16}
        if kind == "samples of tensors":
            more_of_it = {}
        fixed = {"recipe": "sanm-ce", "epochs": 1, "warmup": 0, "batch_size": 14, "workers": 0}
        config = TrainConfig(**{"model": "small-cnn", **fixed, **settings, **more_of_it})
        if turn:  # the rows in another order: another training set
            with pytest.raises(CheckpointError, match="is not the one that the run began with"):
                train(config, tmp_path / "run0", resume=True, **given)
        result = train(config, tmp_path / f"run{turn}", **given)
        data, network = result.data, result.recipe.networks[0]
        images = torch.cat(list(data.images.stream(torch.arange(NUMBER).split(10))))
        assert numbers_of(images).tolist() == numbers
        expected = [n % 10 if kind == "idx" else LABELS[n] for n in numbers]
        assert data.labels.tolist() == expected and data.index.tolist() == list(range(NUMBER))
        logits = network.eval()(result.recipe.augment.plain(images)).detach()
        losses = F.cross_entropy(logits, torch.tensor(expected), reduction="none")
        torch.testing.assert_close(result.losses[0], losses, rtol=1e-4, atol=1e-4)
        assert len(losses.unique()) > 20 and result.quality.shape == (1, NUMBER)
