"""Readers on tiny data sets in their real formats."""

from __future__ import annotations

import gzip
import pickle
import re

import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet
from real_formats import (
    number_of,
    python2_pickle,
    tagged_images,
    touch_images,
    write_cifar10,
    write_cifar100,
    write_clothing1m,
    write_idx,
)

from sanm_train import readers
from sanm_train.errors import ConfigError, DataError


def paths_of(records) -> list[str]:
    return [str(path) for path in records.items]


def python3_pickle(path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps({k.encode(): v for k, v in value.items()}, protocol=2))


@pytest.mark.parametrize("writer", [python2_pickle, python3_pickle])
def test_cifar10(tmp_path, writer):
    labels = write_cifar10(tmp_path, protocol=writer)
    records = readers.read_cifar10(tmp_path)
    assert records.items.shape == (100, 3, 32, 32) and records.items.dtype == torch.uint8
    assert torch.equal(records.labels, labels)
    assert torch.equal(number_of(records.items), torch.arange(100))
    rows = tagged_images(20, 20)  # the second batch: channels first, then rows
    assert np.array_equal(records.items[20:40].reshape(20, 3072).numpy(), rows)
    assert records.metadata["classes"][9] == "truck"
    assert len(readers.read_cifar10(tmp_path, "test").labels) == 20


def test_cifar100(tmp_path):
    fine, coarse = write_cifar100(tmp_path)
    records = readers.read_cifar100(tmp_path)
    assert torch.equal(records.labels, fine)
    assert torch.equal(records.metadata["coarse_labels"], coarse)
    assert records.metadata["classes"][:2] == ["fine0", "fine1"]
    assert len(readers.read_cifar100(tmp_path, "test").items) == 30


class Evil:
    """What a prepared pickle does: it names a function to be called while it is loaded."""

    def __reduce__(self):
        return (print, ("called",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps({"data": Evil()}), "not allowed"),
        (b"<html>not found</html>", "cannot be read as a pickle"),
        (pickle.dumps([1], 2), "must hold a dictionary, got list"),
        (pickle.dumps({"labels": [1]}, 2), "data must be a uint8 array .* got NoneType"),
        (pickle.dumps({"data": tagged_images(0, 2)[:, :9]}, 2), r"got uint8 \(2, 9\)"),
        (pickle.dumps({"data": tagged_images(0, 2), "fine_labels": [1]}, 2), "2 whole numbers"),
        (pickle.dumps({"data": tagged_images(0, 2), "fine_labels": [1, 100]}, 2), "from 0 to 99"),
    ],
    ids=range(7),
)
def test_bad_pickles_are_named_and_run_nothing(tmp_path, capsys, content, message):
    path = tmp_path / "cifar-100-python/train"
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        readers.read_cifar100(tmp_path)
    assert str(path) in str(error.value) and capsys.readouterr().out == ""


def old_numpy(path) -> None:
    """Renames what NumPy 2 wrote to what NumPy 1 did, inside the zip, which is not compressed."""
    import zipfile

    with zipfile.ZipFile(path) as old:
        content = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as new:
        for name, data in content.items():
            new.writestr(name, data.replace(b"cnumpy._core.", b"cnumpy.core."))


@pytest.mark.parametrize("era", ["numpy 1", "numpy 2"])
def test_cifar_n(tmp_path, era):
    clean = write_cifar10(tmp_path)
    worse = np.random.default_rng(0).integers(0, 10, 100)
    sets = {"clean_label": clean.numpy(), "worse_label": worse, "random_label1": worse.tolist()}
    path = tmp_path / "CIFAR-10_human.pt"
    torch.save(sets, path)
    if era == "numpy 1":
        old_numpy(path)
    found = readers.read_cifar_n(path)
    assert torch.equal(found["clean_label"], readers.read_cifar10(tmp_path).labels)
    assert torch.equal(found["worse_label"], torch.tensor(worse))
    assert torch.equal(found["random_label1"], torch.tensor(worse))


def test_bad_cifar_n(tmp_path):
    path = tmp_path / "CIFAR-10_human.pt"
    with pytest.raises(DataError, match="no such file"):
        readers.read_cifar_n(path)
    torch.save({"clean_label": Evil()}, path)
    with pytest.raises(DataError, match="cannot be loaded: it names what is not a tensor"):
        readers.read_cifar_n(path)
    torch.save({"labels": [1]}, path)
    with pytest.raises(DataError, match="dictionary of labels with clean_label"):
        readers.read_cifar_n(path)
    torch.save({"clean_label": [1, 2], "worse_label": [1]}, path)
    with pytest.raises(DataError, match=r"worse_label must be 2 whole numbers, got int64 \(1,\)"):
        readers.read_cifar_n(path)


def test_clothing1m(tmp_path):
    """Labels come by key: the label files are in another order than the key lists."""
    keys = [f"images/{k % 10}/{k:02}/{k},{k * 7}.jpg" for k in range(12)]
    noisy = {key: (k * 5) % 14 for k, key in enumerate(keys)}
    clean = {key: (k % 14 if k in (2, 3) else -1) for k, key in enumerate(keys)}
    held_out = {"images/0/99/1.jpg": 13}
    write_clothing1m(tmp_path, {"noisy_train": clean, "clean_test": held_out}, noisy)
    records = readers.read_clothing1m(tmp_path)
    assert paths_of(records) == [str(tmp_path / key) for key in keys]
    assert records.labels.tolist() == [(k * 5) % 14 for k in range(12)]
    assert records.metadata["true_labels"].tolist() == [-1, -1, 2, 3, *[-1] * 8]
    assert records.metadata["classes"][13] == "Garment 13"
    assert readers.read_clothing1m(tmp_path, "clean_test").labels.tolist() == [13]

    lists = tmp_path / "annotations"
    with pytest.raises(DataError, match=r"clean_val_key_list\.txt: no such file"):
        readers.read_clothing1m(tmp_path, "clean_val")
    with pytest.raises(ConfigError, match="did you mean 'clean_train'"):
        readers.read_clothing1m(tmp_path, "clean_trian")
    (lists / "clean_test_key_list.txt").write_text("images/0/98/2.jpg\n")
    with pytest.raises(DataError, match=r"'images/0/98/2.jpg' has no label"):
        readers.read_clothing1m(tmp_path, "clean_test")
    (lists / "clean_label_kv.txt").write_text("a.jpg 3\nb.jpg 14\n")
    with pytest.raises(DataError, match=r"clean_label_kv\.txt: label must be from 0 to 13.* 14$"):
        readers.read_clothing1m(tmp_path)


def test_animal10n(tmp_path):
    touch_images(tmp_path, "training/9_12.jpg", "training/0_3.jpg", "training/0_25.jpg")
    touch_images(tmp_path, "testing/4_1.jpg")
    records = readers.read_animal10n(tmp_path)
    assert [path.rsplit("/", 1)[1] for path in records.items] == ["0_25.jpg", "0_3.jpg", "9_12.jpg"]
    assert records.labels.tolist() == [0, 0, 9] and records.metadata["classes"][9] == "guinea pig"
    assert readers.read_animal10n(tmp_path, "testing").labels.tolist() == [4]
    touch_images(tmp_path, "testing/cat.jpg")
    with pytest.raises(DataError, match=r"cat\.jpg: the name must begin with a label from 0 to 9"):
        readers.read_animal10n(tmp_path, "testing")
    with pytest.raises(DataError, match="training: no such folder"):
        readers.read_animal10n(tmp_path / "testing")
    (tmp_path / "empty/training").mkdir(parents=True)
    with pytest.raises(DataError, match="holds no image"):
        readers.read_animal10n(tmp_path / "empty")


def test_image_folder(tmp_path):
    touch_images(
        tmp_path, "zebra/b.PNG", "ant/x/2.jpg", "ant/1.jpeg", "ant/notes.txt", ".git/a.png"
    )
    records = readers.read_folder(tmp_path)
    assert records.items == [
        str(tmp_path / p) for p in ("ant/1.jpeg", "ant/x/2.jpg", "zebra/b.PNG")
    ]
    assert records.labels.tolist() == [0, 0, 1] and records.metadata["classes"] == ["ant", "zebra"]
    (tmp_path / "bee").mkdir()
    (tmp_path / "bee/notes.txt").touch()
    with pytest.raises(DataError, match=r"class 'bee': .*bee holds no image \(looked for \.jpg"):
        readers.read_folder(tmp_path)
    with pytest.raises(DataError, match="holds no sub-folder"):
        readers.read_folder(tmp_path / "zebra")
    with pytest.raises(DataError, match="nowhere: no such folder"):
        readers.read_folder(tmp_path / "nowhere")


def test_csv_manifest(tmp_path):
    path = tmp_path / "list.csv"
    path.write_text(
        '\ufefflabel,source,path\nfox,web,"a, b.jpg"\ncat,web,/data/2.jpg\nfox,,3.jpg\n'
    )
    records = readers.read_manifest(path)
    assert paths_of(records) == [str(tmp_path / "a, b.jpg"), "/data/2.jpg", str(tmp_path / "3.jpg")]
    assert records.labels.tolist() == [1, 0, 1] and records.metadata["classes"] == ["cat", "fox"]
    path.write_text("path,label\na.jpg,12\nb.jpg,3\n")
    records = readers.read_manifest(path, root="images")
    assert paths_of(records) == ["images/a.jpg", "images/b.jpg"] and records.metadata == {}
    assert records.labels.tolist() == [12, 3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\n", "has no column 'path'; its columns: file, label"),
        ("path,label\n", "lists no image"),
        ("", "Empty CSV file"),
        ("path,label\na.jpg,1\nb.jpg\n", "Row #3: Expected 2 columns, got 1: b.jpg"),
        ("path,label\na.jpg,1\nb.jpg, \n", "row 2 has no label"),
        ("path,label\n,1\n", "row 1 has no path"),
        ("path,label\na.jpg,0\nb.jpg,-1\n", "label must be from 0, got -1 to 0"),
        (f"path,label\na.jpg,{10**30}\n", "label must be whole numbers"),
    ],
)
def test_bad_manifests(tmp_path, text, message):
    path = tmp_path / "list.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=re.escape(str(path)) + ".*" + message):
        readers.read_manifest(path)


def test_parquet_manifest(tmp_path):
    path = tmp_path / "list.parquet"
    columns = {"label": [7, 0, 2], "width": [1, 2, 3], "path": ["a.jpg", "b.jpg", "c.jpg"]}
    parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    records = readers.read_manifest(path)
    assert paths_of(records) == [str(tmp_path / name) for name in columns["path"]]
    assert records.labels.tolist() == [7, 0, 2]
    parquet.write_table(pyarrow.table({"path": ["a.jpg"], "label": [None]}), path)
    with pytest.raises(DataError, match="row 1 has no label"):
        readers.read_manifest(path)
    parquet.write_table(pyarrow.table({"path": ["a.jpg"]}), path)
    with pytest.raises(DataError, match="has no column 'label'; its columns: path"):
        readers.read_manifest(path)
    path.write_bytes(b"PAR1, but then something else")
    with pytest.raises(DataError, match=rf"{path} cannot be read"):
        readers.read_manifest(path)


def test_labels_of_other_types(tmp_path):
    """Categories, and whole numbers that a missing value elsewhere turned into floats."""
    path = tmp_path / "list.parquet"
    names = pyarrow.array(["b", "a", "b"]).dictionary_encode()
    parquet.write_table(pyarrow.table({"path": ["1", "2", "3"], "label": names}), path)
    assert readers.read_manifest(path).labels.tolist() == [1, 0, 1]
    parquet.write_table(pyarrow.table({"path": ["1", "2"], "label": [3.0, 0.0]}), path)
    records = readers.read_manifest(path)
    assert records.labels.tolist() == [3, 0] and records.metadata == {}


def test_manifest_with_given_classes(tmp_path):
    """A test manifest counts classes as that of the training images does."""
    path = tmp_path / "list.csv"
    path.write_text("path,label\na.jpg,fox\nb.jpg,7\n")
    records = readers.read_manifest(path, classes=["7", "cat", "fox"])
    assert records.labels.tolist() == [2, 0] and records.metadata["classes"] == ["7", "cat", "fox"]
    with pytest.raises(DataError, match=r"list\.csv: label '7' is not one of the 2 known classes"):
        readers.read_manifest(path, classes=["cat", "fox"])


def test_readers_open_no_image(tmp_path):
    """A file that is no image is found, not opened: whether it can be is the loader's business."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a/broken.jpg").write_bytes(b"")
    assert len(readers.read_folder(tmp_path).items) == 1


@pytest.mark.parametrize("packed", [False, True])
def test_idx(tmp_path, packed):
    images = np.arange(4 * 5 * 3).reshape(4, 5, 3)
    names = readers.IDX_FILES["train"]
    for name, array in zip(names, (images, [3, 0, 2, 9]), strict=True):
        write_idx(tmp_path / (name + ".gz" * packed), array, packed)
    records = readers.read_idx(tmp_path)
    assert records.labels.tolist() == [3, 0, 2, 9] and records.items.dtype == torch.uint8
    assert torch.equal(records.items[:, 0].long(), torch.arange(60).view(4, 5, 3))
    with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte cannot be read"):
        readers.read_idx(tmp_path, "test")
    whole = tmp_path / names[1]
    for content, message in (
        (b"", r"must be an IDX file of bytes, got b'' at its start"),
        (b"\0\0\x0d\x01\0\0\0\x04abcd", "must be an IDX file of bytes"),
        (b"\0\0\x08\x01\0\0\0\x05abcd", r"must hold 5 bytes for \[5\], got 4 bytes"),
        (b"\0\0\x08\x01\0\0\0\x04abcde", r"must hold 4 bytes for \[4\], got 5 or more"),
        (b"\0\0\x08\x02\0\0\0\x04\0\0", "ends within its header"),
        (b"\0\0\x08\x03" + b"\xff" * 12, "must hold at most 8589934592 bytes"),
        (b"\0\0\x08\x01\0\0\0\x03abc", r"got \(4, 5, 3\) and \(3,\)"),
    ):
        (tmp_path / f"{names[1]}.gz").unlink(missing_ok=True)
        whole.write_bytes(content)
        with pytest.raises(DataError, match=message):
            readers.read_idx(tmp_path)
    (tmp_path / f"{names[1]}.gz").write_bytes(gzip.compress(bytes(99))[:-9])
    with pytest.raises(DataError, match=r"gz must be an IDX file|gz cannot be read"):
        readers.read_idx(tmp_path)
