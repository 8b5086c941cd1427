"""Files and folders that a run must not trust: what it says to each, and that nothing is lost."""

from __future__ import annotations

import errno
import itertools
import os
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from real_formats import tag

from sanm_train import Recipe, TrainConfig, checkpoint, predict, readers, train
from sanm_train.cli import main
from sanm_train.errors import CheckpointError, ConfigError, DataError
from sanm_train.files import locked, replacing, reserve, write_csv
from sanm_train.images import read_image
from sanm_train.train import CONFIG, METRICS, load_run


class Call:
    """A pickle that calls `function`, and then sets the state of what it gave."""

    def __init__(self, function, *arguments, state=None):
        self.parts = (function, arguments, state)

    def __reduce__(self):
        return self.parts if self.parts[2] is not None else self.parts[:2]


RECONSTRUCT = np.empty(0).__reduce__()[0]
EMPTY = (np.ndarray, (0,), b"b")


def array(*state):
    return Call(RECONSTRUCT, *EMPTY, state=state)


#: What crashed the process, or would run code, or lies about its size.
PICKLES = {
    "ndarray called": Call(np.ndarray, (1 << 20,), "O"),
    "objects from bytes": array(1, (1,), np.dtype("O"), False, b"AAAAAAAA"),
    "too few bytes": array(1, (1 << 40, 3072), np.dtype("u1"), False, b"AAAA"),
    "negative sizes": array(1, (-1, -4), np.dtype("u1"), False, b"AAAA"),
    "sizes that are not numbers": array(1, ("a", 2), np.dtype("u1"), False, b"AAAA"),
    "a state of another length": array(1, (4,)),
    "a dtype of a text": array(1, (1,), np.dtype("U1"), False, b"AAAA"),
    "dates": array(1, (1,), np.dtype("M8[s]"), False, b"AAAAAAAA"),
    "a program": Call(os.system, "echo called"),
    "an import": Call(__import__, "this"),
}


@pytest.mark.parametrize("kind", PICKLES)
@pytest.mark.parametrize("archive", ["cifar", "labels"])
def test_pickles_give_plain_arrays_or_are_refused(tmp_path, archive, kind, capfd):
    if archive == "cifar":
        path = tmp_path / "cifar-100-python/train"
        path.parent.mkdir()
        path.write_bytes(pickle.dumps({"data": PICKLES[kind], "fine_labels": [0]}, 2))
        read, where = readers.read_cifar100, tmp_path
    else:
        path = tmp_path / "CIFAR-10_human.pt"
        torch.save({"clean_label": PICKLES[kind]}, path)
        read, where = readers.read_cifar_n, path
    with pytest.raises(DataError) as error:
        read(where)
    message = str(error.value)
    assert str(path) in message and "\n" not in message and "weights_only" not in message
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("dtype", ["u1", "<i8", ">i4", "<i2"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_come_back_as_they_were(tmp_path, dtype, order):
    path = tmp_path / "CIFAR-10_human.pt"
    values = np.asarray(np.arange(7), dtype, order=order)
    torch.save({"clean_label": values, "worse_label": values[::-1]}, path)
    found = readers.read_cifar_n(path)
    assert found["clean_label"].tolist() == list(range(7))
    assert found["worse_label"].tolist() == list(range(7))[::-1]


def test_images_of_two_dimensions_in_fortran_order(tmp_path):
    images = np.asfortranarray(np.random.default_rng(0).integers(0, 256, (3, 3072), np.uint8))
    path = tmp_path / "cifar-100-python/train"
    path.parent.mkdir()
    parts = {"data": images, "fine_labels": [0, 1, 2], "coarse_labels": [0, 1, 2]}
    path.write_bytes(pickle.dumps(parts, 2))
    found = readers.read_cifar100(tmp_path).items
    assert torch.equal(found.flatten(1), torch.tensor(np.ascontiguousarray(images)))


# --- images -----------------------------------------------------------------------------------


def read(tmp_path, name, image, **options):
    image.save(tmp_path / name, **options)
    return read_image(str(tmp_path / name), 8)


@pytest.mark.parametrize(
    ("values", "name", "expected"),
    [
        (np.full((9, 9), 100 * 257, np.uint16), "a.png", 100),
        (np.full((9, 9), 100 * 257, np.uint16), "a.tif", 100),
        (np.full((9, 9), 200, np.uint16), "dark.tif", 0),  # of 16 bits: always by 2⁸
        (np.full((9, 9), 100, np.int32), "a.tif", 100),
        (np.full((9, 9), 100 << 8, np.int32), "b.tif", 100),
        (np.full((9, 9), 100 << 24, np.int32), "c.tif", 100),
        (np.full((9, 9), 0.4, np.float32), "a.tif", 102),
        (np.full((9, 9), 102.0, np.float32), "b.tif", 102),
        (np.full((9, 9), 102.0 * 256, np.float32), "c.tif", 102),
    ],
)
def test_deep_greys_are_scaled_by_their_range(tmp_path, values, name, expected):
    assert (read(tmp_path, name, Image.fromarray(values)) == expected).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_values_that_are_no_greys_are_refused(tmp_path, bad):
    values = np.full((9, 9), 0.5, np.float32)
    values[3, 3] = bad
    with pytest.raises(ValueError, match="grey values from"):
        read(tmp_path, "a.tif", Image.fromarray(values))


def test_broken_metadata_leave_an_image_readable(tmp_path):
    path = tmp_path / "a.jpg"
    Image.new("RGB", (16, 16), (200, 100, 50)).save(path, exif=b"Exif\0\0MM\0\x2a\xff\xff\xff\xff")
    assert np.abs(read_image(str(path), 8).astype(int) - [200, 100, 50]).max() <= 3


def test_other_formats_start_no_program(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    with pytest.raises(OSError, match=r"^cannot identify it as one of BMP, .*, TIFF, WEBP$"):
        read_image(str(path), 8)


def test_pixels_are_counted_before_they_are_decoded(tmp_path, monkeypatch):
    tag(tmp_path / "a.png", 1)
    monkeypatch.setattr("sanm_train.images.MOST_PIXELS", 10)
    with pytest.raises(ValueError, match="pixels, more than 10"):
        read_image(str(tmp_path / "a.png"), 8)


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_what_is_not_a_regular_file_is_refused_at_once(tmp_path, kind):
    path = tmp_path / "a.png"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(OSError, match="not a regular file"):
        read_image(str(path), 8)


def test_hidden_files_and_folders_do_not_count(tmp_path):
    for where in ("cat", "dog", "cat/deep", "cat/.thumbs", "cat/__MACOSX", "dog/deep/.x", ".git"):
        (tmp_path / where).mkdir(parents=True)
        tag(tmp_path / where / "a.png", 1)
        tag(tmp_path / where / "._a.png", 1)
    found = readers.read_folder(tmp_path)
    seen = [os.path.relpath(path, tmp_path) for path in found.items]
    assert seen == ["cat/a.png", "cat/deep/a.png", "dog/a.png"]
    assert found.metadata["classes"] == ["cat", "dog"]


# --- tables -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["0", "1", "2"], [0, 1, 2]),
        (["0.0", "1.0", "10.0"], [0, 1, 10]),
        (["1.", "0"], [1, 0]),
        (["b", "a", "NA"], [2, 1, 0]),  # names
        (["1.5", "a"], [0, 1]),
        (["0", "nan"], "row 2 has no label, got 'nan'"),
        (["NA", "1.0"], "row 1 has no label, got 'NA'"),
        (["1", "None", "2"], "row 2 has no label, got 'None'"),
        (["-1", "0"], "must be from 0"),
        (["99999999999999999999", "0"], "must be whole numbers"),
    ],
)
def test_labels_follow_one_rule(tmp_path, labels, expected):
    path = tmp_path / "train.csv"
    rows = "".join(f"{k}.png,{label}\n" for k, label in enumerate(labels))
    path.write_text("﻿path,label\n" + rows, encoding="utf-8")  # with a byte-order mark
    if isinstance(expected, str):
        with pytest.raises(DataError, match=expected):
            readers.read_manifest(path)
    else:
        assert readers.read_manifest(path).labels.tolist() == expected


# --- settings ---------------------------------------------------------------------------------

GROWING = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [
        "lr: 2024-02-31", "lr: 0x", "lr: !!python/object:os.system {}", "lr: [", "\x00",
        "[" * 5000 + "]" * 5000, GROWING + "lr: *i", "- a", "lr: {1: {2: 3}}", "? [a]\n: b",
        "lr: 1:99", "lr: *unknown", "lr: .inf", "seed: 1e400", "&a [*a]", "!!binary x",
        "!!timestamp 99", "!!int ''", "!!float ''", "lr: !!set {a}", "\ud800",
    ],
    ids=range(21),
)  # fmt: skip
def test_settings_that_cannot_be_read_are_one_line(tmp_path, capsys, text):
    file = tmp_path / "a.yaml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    assert main(["train", "--config", str(file), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("sanm: error: ") and error.count("\n") == 1
    assert len(error) < 600 and not (tmp_path / "out").exists()


# --- runs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["train", "demo", "compare", "inspect"])
def test_an_empty_folder_name_is_refused(command, capsys):
    with pytest.raises(SystemExit):
        main([command, *["runs"][: command == "inspect"], "--out", ""])
    assert "expected a folder, got an empty name" in capsys.readouterr().err


def test_two_runs_do_not_share_a_folder(tiny, tmp_path):
    config = tiny(recipe="ce", epochs=1)
    holder = "import sys, pathlib; from sanm_train.files import locked\n"
    holder += "with locked(pathlib.Path(sys.argv[1])): print('held', flush=True); input()"
    command = [sys.executable, "-c", holder, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(FileExistsError, match="another run is using"):
            train(config, tmp_path)
        assert list(tmp_path.iterdir()) == []
        other.kill()
    train(config, tmp_path)


def test_temporary_files_have_names_of_their_own(tmp_path):
    with replacing(tmp_path / "a.csv") as temporary:
        temporary.write_text("")
        assert str(os.getpid()) in temporary.name
    with locked(tmp_path), pytest.raises(FileExistsError), locked(tmp_path):
        pass


def test_a_new_run_leaves_nothing_of_the_old_one(tiny, tmp_path):
    config = tiny(recipe="ce", epochs=1)
    train(config, tmp_path)
    (tmp_path / "inspect").mkdir()
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / ".checkpoint.123.partial.pt").touch()
    (tmp_path / "notes.txt").touch()  # not a run's
    train(config, tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["checkpoint.pt", CONFIG, METRICS, "notes.txt", "run.json"]


@pytest.mark.parametrize("offset", [0.2, 0.5, 0.9])
def test_a_checkpoint_with_a_wrong_bit_is_refused(tiny, tmp_path, offset):
    config = tiny(recipe="ce", epochs=1)
    train(config, tmp_path)
    path = tmp_path / checkpoint.NAME
    content = bytearray(path.read_bytes())
    content[int(offset * len(content))] ^= 4
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot be read"):
        train(config, tmp_path, resume=True)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_run(tmp_path)


def folder_of(root, names=range(40)):
    """Two classes of training images, one test image each; returns the manifest of the former."""
    for split, numbers in (("train", names), ("test", range(2))):
        rows = [f"{k}.png,{k % 2}\n" for k in numbers]
        for k in numbers:
            tag(root / f"{k}.png", k)
        (root / f"{split}.csv").write_text("path,label\n" + "".join(rows))
    return root / "train.csv"


def images_config(root, **more):
    given = {"dataset": "manifest", "data_root": str(root / "train.csv")}
    given |= {"test_root": str(root / "test.csv"), "image_size": 32, "model": "small-cnn"}
    given |= {"recipe": "ce", "epochs": 1, "warmup": 0, "batch_size": 20, "workers": 0}
    return TrainConfig(**(given | more))


@pytest.mark.parametrize("change", ["order", "labels", "paths", "fewer"])
def test_a_run_belongs_to_its_data(tmp_path, change):
    manifest = folder_of(tmp_path)
    out = tmp_path / "out"
    train(images_config(tmp_path), out)
    header, *rows = manifest.read_text().splitlines()
    if change == "order":
        rows = rows[2:] + rows[:2]
    elif change == "labels":
        rows[0], rows[1] = "0.png,1", "1.png,0"
    elif change == "paths":
        tag(tmp_path / "0b.png", 0)
        rows[0] = "0b.png,0"
    else:
        rows = rows[2:]
    manifest.write_text("\n".join([header, *rows]) + "\n")
    message = "training set is not the one that the run began with: "
    message += "40 samples then, 38 now" if change == "fewer" else "other (images|labels)"
    for read in (
        lambda: load_run(out),
        lambda: train(images_config(tmp_path), out, resume=True),
    ):
        with pytest.raises(CheckpointError, match=message):
            read()
    manifest.unlink()
    folder_of(tmp_path)
    assert len(load_run(out).quality[0]) == 40


def test_a_run_on_images_that_cannot_be_read_does_not_start(tmp_path):
    folder_of(tmp_path)
    for k in range(3):
        (tmp_path / f"{k + 10}.png").write_bytes(b"<html>not found</html>")
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match=r"3 of 40 training images .*/10\.png: cannot identify"):
        train(images_config(tmp_path), out)
    assert not (out / checkpoint.NAME).exists()
    with pytest.warns(UserWarning, match="was replaced by grey"):
        result = train(images_config(tmp_path, max_unreadable=0.1), out)
    assert result.history[-1]["corrupt_images"] == 3


def test_output_that_cannot_show_a_character_does_not_stop_a_run(tmp_path):
    command = [sys.executable, "-m", "sanm_train", "train", "--epochs", "1", "--limit", "130"]
    done = subprocess.run(
        [*command, "--recipe", "ce", "--warmup", "0", "--out", str(tmp_path / "größe")],
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path, monkeypatch):
    path = tmp_path / "pred_probs.npy"
    with path.open("wb") as file:
        file.truncate(1 << 20)
    assert path.stat().st_blocks == 0
    reserve(path)
    assert path.stat().st_blocks * 512 >= 1 << 20

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"No space left on device: .*pred_probs\.npy"):
        reserve(path)


def test_a_reader_that_leaves_early_ends_the_command_quietly(tmp_path):
    train_it = f"{sys.executable} -m sanm_train train --recipe ce --epochs 1 --limit 130 --quiet"
    command = f"({train_it} --out {tmp_path}/out; echo $? >&2) | true"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    lines = [line for line in done.stderr.splitlines() if "warning" not in line]
    assert lines == ["1"], done.stderr


@pytest.mark.parametrize("error", [MemoryError("60 TiB"), torch.OutOfMemoryError("60 TiB\nat x")])
def test_too_little_memory_is_one_line(tmp_path, monkeypatch, capsys, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(Recipe, "loss", fail)
    words = ["--recipe", "ce", "--epochs", "1", "--limit", "130", "--warmup", "0", "--quiet"]
    assert main(["train", "--out", str(tmp_path), *words]) == 1
    assert capsys.readouterr().err == "sanm: error: not enough memory: 60 TiB\n"


@pytest.mark.parametrize("closed", [">&-", ">&- 2>&-"])
def test_closed_output_does_not_stop_a_command(closed):
    command = f"{sys.executable} -m sanm_train list {closed}"
    done = subprocess.run(command, shell=True, capture_output=True, check=False)
    assert done.returncode == 0 and done.stderr == b""


@pytest.mark.parametrize("name", ["a\x1b[31mred\x07.yaml", "a\nb.yaml", "a\udcff.yaml"])
def test_names_of_files_do_not_reach_the_terminal_as_they_are(capsys, tmp_path, name):
    assert main(["train", "--config", str(tmp_path / name), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error[:-1].isprintable() and ".yaml" in error


def test_names_of_classes_do_not_reach_the_terminal_as_they_are(capsys):
    from sanm_train.reports.report import print_rows

    print_rows("table", [{"class": "\x1b[31mred\x07\n[b]", "images": "1"}])
    shown = capsys.readouterr().out
    assert r"\x1b[31mred\x07\n[b]" in shown and "\x1b" not in shown and "\x07" not in shown


@pytest.mark.parametrize(
    ("kind", "reason"), [(b"no", "not written by torch.save"), (None, "it names what")]
)
def test_what_is_wrong_with_a_label_file_is_said(tmp_path, kind, reason):
    path = tmp_path / "a.pt"
    torch.save({"clean_label": Call(os.system, "echo called")}, path)
    if kind is not None:
        path.write_bytes(kind)
    with pytest.raises(DataError, match=reason):
        readers.read_cifar_n(path)


def test_cells_that_a_spreadsheet_would_run_are_text(tmp_path):
    import pyarrow as pa

    from sanm_train.reports.inspection import _inert

    given = ["=1+1", "+a", "-a.png", "@x", "\tx", "a=b", "", None]
    expected = ["'=1+1", "'+a", "'-a.png", "'@x", "'\tx", "a=b", "", None]
    table = pa.table({"path": pa.array(given, pa.large_string()), "loss": [-1.0] * 8})
    assert _inert(table).to_pydict() == {"path": expected, "loss": [-1.0] * 8}
    write_csv(tmp_path / "a.csv", [{"class": "=1+1", "@x": -1.5, "n": -1, "empty": None}])
    assert (tmp_path / "a.csv").read_text() == "class,'@x,n,empty\n'=1+1,-1.5,-1,\n"


def test_names_in_no_encoding_are_shown_and_found(tmp_path):
    """Of files and of classes; Arrow and JSON take UTF-8 alone."""
    kinds = (b"cat", b"M\xe4use")
    for split, kind, number in itertools.product(("train", "test"), kinds, range(20)):
        folder = os.fsencode(tmp_path / split) + b"/" + kind
        os.makedirs(folder, exist_ok=True)
        tag(tmp_path / "a.png", number)
        os.rename(tmp_path / "a.png", folder + b"/gr\xfc\xdfe %d.png" % number)
    config = TrainConfig(
        dataset="folder", data_root=str(tmp_path), image_size=32, model="small-cnn", recipe="ce",
        epochs=1, warmup=0, batch_size=20, workers=0,
    )  # fmt: skip
    result = train(config, tmp_path / "run")
    assert result.history[-1]["corrupt_images"] == 0
    assert result.data.classes == ["M\\xe4use", "cat"]
    assert main(["inspect", str(tmp_path / "run")]) == 0
    assert r"M\xe4use/gr\xfc\xdfe 0.png" in (tmp_path / "run/inspect/samples.csv").read_text()
    assert main(["export", str(tmp_path / "run")]) == 0
    (found,) = predict(tmp_path / "run", [os.fsdecode(folder + b"/gr\xfc\xdfe 3.png")])
    assert found.name in result.data.classes and found.path.endswith(r"gr\xfc\xdfe 3.png")


@pytest.mark.parametrize(
    ("command", "size", "name"),
    [
        ("train", 20_000, "checkpoint.pt"),
        ("export", 2_000, "weights-1.pt"),
        ("export", 100_000, "model.pt2"),
        ("inspect", 1_000, "pred_probs.npy"),
        ("inspect", 8_000, "samples.csv"),
        ("predict", 100, "found.csv"),
    ],
)
def test_results_that_do_not_fit_on_the_disk(
    tiny, tmp_path, capsys, files_of_at_most, command, size, name
):
    run, small = str(tmp_path / "run"), ["--epochs", "1", "--limit", "130", "--warmup", "0"]
    train(tiny(recipe="ce", epochs=1, width=8), run)
    tag(tmp_path / "a.png", 1)
    words = {
        "train": ["train", "--recipe", "ce", "--width", "8", "--quiet", *small, "--overwrite"],
        "predict": ["predict", run, *[str(tmp_path / "a.png")] * 9],
    }.get(command, [command, run])
    words += ["--out", str(tmp_path / ("found.csv" if command == "predict" else "out"))]
    with files_of_at_most(size):
        assert main(words) == 2
    error = capsys.readouterr().err
    assert re.search(rf"sanm: error: .*File too large.*{re.escape(name)}", error), error
    assert not list(tmp_path.rglob("*partial*"))
