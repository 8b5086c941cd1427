"""The library datasets: which splits and columns are read, and what is said of the others."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from test_open_data import LABELS, as_datasets, encoded, hub, write_shards

from sanm_train import TrainConfig
from sanm_train.cli import main
from sanm_train.datasets import DATASETS
from sanm_train.errors import ConfigError, DataError
from sanm_train.images import FORMATS, unreadable

__all__ = ["hub"]  # a fixture
DOCS = Path(__file__).resolve().parents[2] / "docs/data.md"
NUMBERS = list(range(12))


def load(root, **settings):
    config = TrainConfig(
        dataset="hf", data_root=str(root), model="small-cnn", image_size=16, workers=0, **settings
    )
    return DATASETS["hf"](config)


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    message = "dataset hf needs datasets, which is not installed: pip install datasets"
    with pytest.raises(ConfigError, match=message):
        TrainConfig(dataset="hf", data_root="a", model="small-cnn")


def test_splits(hub, tmp_path):
    whole = as_datasets(hub, NUMBERS)
    parts = {"train": whole, "validation": whole.select([3, 4]), "test": whole.select([0, 1, 2])}
    hub.DatasetDict(parts).save_to_disk(tmp_path / "disk")
    data = load(tmp_path / "disk")
    assert len(data) == 12 and data.test_labels.tolist() == LABELS[:3]
    assert data.classes == ["a", "b", "c"] and data.images.paths[5].as_py() == "5.png"
    assert load(tmp_path / "disk", test_split="validation").test_labels.tolist() == LABELS[3:5]
    assert len(load(tmp_path / "disk", train_split="test")) == 3
    with pytest.raises(ConfigError, match=r"train_split must be one of .*; did you mean 'train'"):
        load(tmp_path / "disk", train_split="trian")
    alone = load(tmp_path / "disk/train", test_root=str(tmp_path / "disk/test"))
    assert len(alone) == 12 and len(alone.test_labels) == 3


def test_columns_of_shards(hub, tmp_path):
    """Parts of structures, names, and what is known to be right."""

    def facts(number):
        known = {"right": LABELS[number]} if number % 2 else {"right": None}
        return {"json": json.dumps({"kind": "xyz"[LABELS[number]], **known}).encode()}

    data = load(write_shards(tmp_path, NUMBERS, facts), label_column="json.kind")
    assert data.labels.tolist() == LABELS[:12] and data.classes == ["x", "y", "z"]
    assert (data.true_labels == -1).all()
    true = load(str(tmp_path / "part-*.tar"), true_column="json.right").true_labels
    assert true.tolist() == [LABELS[n] if n % 2 else -1 for n in NUMBERS]
    with pytest.raises(ConfigError, match=r"part of column json must be one of kind, right"):
        load(str(tmp_path / "part-*.tar"), label_column="json.kin")


def test_true_labels_by_name(hub, tmp_path):
    names = ["abc"[LABELS[n]] for n in NUMBERS]
    table = {"image": [encoded(n) for n in NUMBERS], "label": names, "right": [*names[:-1], ""]}
    parquet.write_table(pa.table(table), tmp_path / "a.parquet")
    data = load(tmp_path / "a.parquet", true_column="right")
    assert data.true_labels.tolist() == [*LABELS[:11], -1] and data.noise_rate == 0


def test_images_are_read_by_the_project_s_own_reader(hub, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the library decodes an image")

    monkeypatch.setattr(hub.Image, "decode_example", refuse)
    files = [encoded(0), encoded(1, "EPS"), b"text", None, encoded(4)]
    table = pa.table({"image": pa.array(files, pa.binary()), "label": [0, 1, 0, 1, 0]})
    parquet.write_table(table, tmp_path / "a.parquet")
    images = load(tmp_path / "a.parquet").images
    assert unreadable(images, 10)[0] == 5
    faults = dict(unreadable(images, 10)[1])
    assert list(faults) == ["train[1]", "train[2]", "train[3]"]
    assert all("cannot identify" in fault and FORMATS[0] in fault for fault in faults.values())
    with pytest.warns(UserWarning, match=r"train\[1\] was replaced by grey"):
        found = next(images.stream([torch.arange(5)]))
    assert images.corrupt == {1, 2, 3} and found[4, 0].mean() < 0.1


@pytest.mark.parametrize(
    ("table", "settings", "message"),
    [
        ({"label": [0]}, {}, r"image_column must be one of the columns of .*: train: label"),
        ({"a": [b"x"], "b": [b"y"], "label": [0]}, {}, "image_column must be one of .*: a, b$"),
        ({"a": [b"x"], "n": [0]}, {}, r"label_column must be one of the columns of .*: a, n"),
        ({"a": [b"x"], "label": [-1]}, {}, "label must be from 0, got -1 to -1"),
        ({"a": [b"x"], "label": [None]}, {}, "row 1 has no label"),
        ({"a": [b"x"], "label": [1]}, {}, "no image is of class 0"),
        ({"a": ["x.png"], "label": [0]}, {"image_column": "a"}, "by --dataset manifest"),
        ({"a": [b"x"], "label": [0], "t": [3]}, {"true_column": "t"}, "t must be from 0 to 0"),
        ({"a": [b"x"], "label": [0]}, {"label_column": "labl"}, "did you mean 'label'"),
    ],
)
def test_tables_that_cannot_be_used(hub, tmp_path, table, settings, message):
    parquet.write_table(pa.table(table), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=message):
        load(tmp_path / "a.parquet", **settings)


def test_test_sets_have_the_same_classes(hub, tmp_path):
    other = as_datasets(hub, NUMBERS).cast_column("label", hub.ClassLabel(names=["a", "c", "b"]))
    parts = {"train": as_datasets(hub, NUMBERS), "test": other}
    hub.DatasetDict(parts).save_to_disk(tmp_path / "disk")
    with pytest.raises(DataError, match="label has other classes than the training set's labels"):
        load(tmp_path / "disk")


def test_what_is_not_there_is_one_line(hub, tmp_path, monkeypatch, capsys):
    def offline(*_, **__):
        raise ConnectionError("Couldn't reach 'someone/photos' on the Hub\nmore")

    monkeypatch.setattr(hub, "load_dataset", offline)
    broken = tmp_path / "a.txt"
    broken.touch()
    for root, message in (
        ("", "data_root must be a folder, files or a name of the hub, got ''"),
        (str(tmp_path / "no"), f"data_root: {tmp_path}/no: no such file or folder"),
        (str(broken), "must be files of .tar, .parquet, .pq"),
        ("someone/photos", "someone/photos, which is not a file or folder here, cannot be read by"),
    ):
        words = ["--dataset", "hf", "--model", "small-cnn", "--data-root", root]
        assert main(["train", *words, "--out", str(tmp_path / "run")]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    monkeypatch.undo()
    (tmp_path / "b.parquet").write_text("text")
    with pytest.raises(DataError, match=r"b\.parquet cannot be read by datasets: .*[Pp]arquet"):
        load(tmp_path / "b.parquet")


def test_commands_of_the_docs(hub, tmp_path, monkeypatch):
    lines = re.findall(r"^sanm (train .*--dataset hf.*)$", DOCS.read_text(), re.M)
    assert len(lines) == 3
    monkeypatch.chdir(tmp_path)
    hub.DatasetDict(train=as_datasets(hub, NUMBERS)).save_to_disk("photos")
    write_shards(tmp_path / "shards", NUMBERS)
    table = {"jpeg": [encoded(n) for n in NUMBERS], "kind": LABELS[:12], "checked": LABELS[:12]}
    parquet.write_table(pa.table(table), tmp_path / "a.parquet")
    monkeypatch.setattr("warnings.showwarning", lambda *_, **__: None)
    small = "--model small-cnn --image-size 16 --epochs 1 --batch-size 6 --workers 0 --recipe ce"
    for line in lines:
        words = shlex.split(line, comments=True)
        assert main([*words, *small.split(), "--quiet"]) == 0
