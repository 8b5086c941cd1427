"""The trained network of a run: `sanm predict`, `sanm export`, and what the run records."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import sanm_kernels
import sanm_train
from sanm_train import TrainConfig, load_network, load_run, predict, train
from sanm_train.cli import main
from sanm_train.datasets import DATASETS
from sanm_train.errors import CheckpointError, DataError
from sanm_train.images import TensorImages
from sanm_train.models import MODELS
from sanm_train.trained import export

TINY = {"epochs": 2, "warmup": 1, "limit": 200, "batch_size": 32}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of two networks."""
    folder = tmp_path_factory.mktemp("run")
    train(TrainConfig(**TINY, width=8), folder)
    return folder


@pytest.fixture(scope="module")
def digits(tmp_path_factory, run):
    """A folder of twelve test images, and their pixels (12, 1, 8, 8) uint8."""
    folder = tmp_path_factory.mktemp("digits")
    (folder / "deep/er").mkdir(parents=True)
    pixels = (load_run(run).data.test_images.images[:12] * 255).round().to(torch.uint8)
    for i, image in enumerate(pixels):
        where = folder / ("deep/er" if i < 5 else "") / f"{i:02}.png"
        Image.fromarray(image[0].numpy()).save(where)
    return folder, pixels


def without_data(monkeypatch) -> None:
    def refuse(config):
        raise AssertionError("the data set was read")

    monkeypatch.setitem(DATASETS, "digits", refuse)


def test_predictions_are_those_of_both_networks(run, digits, monkeypatch):
    folder, pixels = digits
    result = load_run(run)
    each = [result.recipe.evaluate(net, TensorImages(pixels)) for net in result.recipe.networks]
    assert not torch.allclose(each[0], each[1], atol=1e-3)
    expected = torch.stack(each).mean(0).softmax(1)
    without_data(monkeypatch)
    rows = {os.path.relpath(row.path, folder): row for row in predict(run, [folder])}
    assert len(rows) == 12
    for i, row in enumerate(expected):
        found = rows[f"deep/er/{i:02}.png" if i < 5 else f"{i:02}.png"]
        assert found.name == str(int(row.argmax()))
        assert found.probability == pytest.approx(row.max().item(), abs=1e-5)


def test_predict_from_the_command_line(run, digits, tmp_path, capsys, monkeypatch):
    folder, _ = digits
    for name in ("=1+1.png", "b\udcff.png", "odd.png"):
        (tmp_path / name).write_bytes((folder / "05.png").read_bytes())
    (tmp_path / "broken.png").write_bytes(b"no image")
    (tmp_path / ".hidden.png").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("")
    monkeypatch.chdir(tmp_path)
    words = ["predict", str(run), str(folder / "05.png"), ".", "=1+1.png", "broken.png"]
    assert main(words) == 0
    printed = capsys.readouterr()
    header, first, *rows = csv.reader(printed.out.splitlines())
    assert header == ["path", "class", "probability"] and first[0] == str(folder / "05.png")
    assert [row[0] for row in rows] == [
        *("./=1+1.png", "./broken.png", "./b\\xff.png", "./odd.png", "'=1+1.png", "broken.png")
    ]
    broken = [row for row in rows if "broken" in row[0]]
    assert len(broken) == 2 and all(row[1:] == ["", ""] for row in broken)
    assert all(row[1:] == first[1:] for row in rows if row not in broken)
    assert printed.err.count("broken.png was replaced") == 2
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout.isatty", lambda: True)
        os.rename("odd.png", "odd\x1b[31m.png")
        assert main(["predict", str(run), "odd\x1b[31m.png"]) == 0
        assert r"odd\x1b[31m.png," in capsys.readouterr().out  # shown, not sent to the terminal
        os.rename("odd\x1b[31m.png", "odd.png")
    assert main([*words, "--out", "found.csv"]) == 0
    assert (tmp_path / "found.csv").read_text() == printed.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere", "."], "run must be a folder with a checkpoint, got nowhere"),
        (["RUN", "nowhere"], "nowhere: no such file or folder"),
        (["RUN", "."], ". holds no image"),
        (["RUN", ".", "--out", "no/where.csv"], "out: no such folder, no"),
    ],
)
def test_what_predict_refuses(run, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert main(["predict", *(str(run) if word == "RUN" else word for word in words)]) == 2
    assert f"sanm: error: {message}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_photos_are_read_as_in_the_test_of_the_run(tmp_path):
    """Resized by the shorter side and cropped, three channels, ImageNet's normalisation."""
    draws = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in ("a", "=b"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(6):
                pixels = draws.integers(0, 256, (30, 41 + i, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{i}.png")
    settings = {"model": "small-cnn", "image_size": 14, "workers": 0, "recipe": "ce"}
    config = TrainConfig(
        dataset="folder", data_root=str(tmp_path), epochs=1, batch_size=4, **settings
    )
    result = train(config, tmp_path / "run")
    expected = result.recipe.predict(result.data.test_images).softmax(1)
    rows = list(predict(tmp_path / "run", [tmp_path / "test"]))
    order = [result.data.test_images.paths.to_pylist().index(row.path) for row in rows]
    assert sorted(order) == list(range(12))
    for row, i in zip(rows, order, strict=True):
        assert row.name == ["=b", "a"][int(expected[i].argmax())]
        assert row.probability == pytest.approx(expected[i].max().item(), abs=1e-6)


def test_exported_are_the_run_s_networks(run, tmp_path, monkeypatch):
    result = load_run(run)
    images = result.data.test_images.images
    each = [result.recipe.evaluate(net, TensorImages(images)) for net in result.recipe.networks]
    expected = torch.stack(each).mean(0)
    without_data(monkeypatch)
    assert export(run, tmp_path) == tmp_path
    facts = json.loads((tmp_path / "export.json").read_text("utf-8"))
    assert {path.name for path in tmp_path.iterdir()} == {
        *("export.json", facts["program"], *facts["weights"])
    }
    program = torch.export.load(tmp_path / facts["program"]).module()
    for size in (1, 7, len(images)):
        torch.testing.assert_close(program(images[:size]), expected[:size], rtol=1e-4, atol=1e-4)
    mean, std = (torch.tensor(facts["input"][name])[:, None, None] for name in ("mean", "std"))
    assert len(facts["weights"]) == 2
    for name, logits in zip(facts["weights"], each, strict=True):
        channels, *size = facts["input"]["shape"][1:]
        number = len(facts["classes"])
        network = MODELS.build(facts["model"], channels, number, tuple(size), **facts["settings"])
        network.load_state_dict(torch.load(tmp_path / name, weights_only=True))
        with torch.no_grad():
            found = network.eval()((images - mean) / std)
        torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-4)
    assert facts["classes"] == [str(k) for k in range(10)]


def test_the_exported_program_needs_torch_alone(run, capsys):
    assert main(["export", str(run)]) == 0
    assert str(run / "export") in capsys.readouterr().out.replace("\n", "")
    code = "import sys, torch; p = torch.export.load(sys.argv[1]).module()"
    code += "; print(p(torch.rand(3, 1, 8, 8)).shape, [n for n in sys.modules if n[:4] == 'sanm'])"
    command = [sys.executable, "-c", code, str(run / "export/model.pt2")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "torch.Size([3, 10]) []\n"


def test_networks_with_a_decoder_and_a_map(run):
    """`Trained` gives logits of images in [0, 1] in eval mode, and keeps no decoder."""
    network, result = load_network(run), load_run(run)
    assert not network.training and not any("decoder" in name for name in network.state_dict())
    images = result.data.test_images.images[:5]
    with torch.no_grad():
        found = network(images)
    torch.testing.assert_close(found, result.recipe.predict(TensorImages(images)))


def test_a_run_records_its_starts(tmp_path):
    settings = {**TINY, "recipe": "ce", "lr": 0.05, "noise": "symmetric"}
    train(TrainConfig(**settings), tmp_path)
    record = json.loads((tmp_path / "run.json").read_text())
    (start,) = record["starts"]
    assert start["versions"]["sanm_kernels"] == sanm_kernels.__version__
    assert start["versions"]["torch"] == torch.__version__
    assert {"python", "numpy", "pillow", "pyarrow"} <= start["versions"].keys()
    assert start["date"].endswith("+00:00") and start["device"] == "cpu"
    asked = {name: settings[name] for name in settings if name not in ("noise", "batch_size")}
    assert record["changed"] == {**asked, "batch_size": 32}
    again = TrainConfig.read(tmp_path / "config.yaml", lr=0.01)
    train(again, tmp_path, resume=True)
    resumed = json.loads((tmp_path / "run.json").read_text())
    assert resumed["starts"][0] == start and len(resumed["starts"]) == 2
    assert resumed["changed"] == {**record["changed"], "lr": 0.01}
    train(TrainConfig(**settings), tmp_path)  # another run, which replaces that one
    assert len(json.loads((tmp_path / "run.json").read_text())["starts"]) == 1


@pytest.mark.parametrize("text", ["", "[]", "{}", "[" * 100_000])
def test_a_broken_record_is_named(run, tmp_path, text, capsys):
    (tmp_path / "checkpoint.pt").write_bytes((run / "checkpoint.pt").read_bytes())
    (tmp_path / "run.json").write_text(text)
    assert main(["export", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "run.json cannot be read" in error and error.count("\n") == 1
    (tmp_path / "run.json").unlink()
    with pytest.raises(OSError, match=r"run must be a folder with a run\.json"):
        load_network(tmp_path)


def test_errors(run, tmp_path):
    with pytest.raises(CheckpointError, match="run must be a folder with a checkpoint"):
        export(tmp_path / "nothing")
    with pytest.raises(DataError, match="no such file"):
        list(predict(run, ["nothing.png"]))
    assert sanm_train.load_run is load_run
