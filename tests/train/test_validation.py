"""No test set, and a share of the noisy training set in its place."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch
from PIL import Image

from sanm_train import TrainConfig, in_memory, load_run, train
from sanm_train.cli import main
from sanm_train.datasets import DATASETS, load_digits
from sanm_train.errors import ConfigError
from sanm_train.reports.comparison import compare
from sanm_train.reports.inspection import evaluate, inspect
from sanm_train.train import METRICS, build


def rows_of(folder):
    with (folder / METRICS).open() as file:
        return list(csv.DictReader(file))


def page(folder) -> str:
    return " ".join((folder / "inspect/report.html").read_text("utf-8").split())


@pytest.mark.parametrize("part", [0.1, 0.3, 0.5])
def test_a_validation_share_is_drawn_evenly_from_each_given_label(part):
    data = build(TrainConfig(seed=3)).data
    cut = data.with_validation(part, seed=3)
    assert cut.test_noisy and len(cut) + len(cut.test_labels) == len(data)
    assert len(cut.test_labels) == pytest.approx(part * len(data), abs=1)
    held = torch.ones(len(data), dtype=torch.bool)
    held[cut.index] = False
    assert torch.equal(cut.test_labels, data.labels[held])  # the given ones, half of them wrong
    assert torch.equal(cut.test_images.images, data.images.images[held])
    assert torch.equal(cut.labels, data.labels[cut.index])
    assert torch.equal(cut.true_labels, data.true_labels[cut.index])
    for label in range(10):
        number = int((data.labels == label).sum())
        assert int((cut.test_labels == label).sum()) == pytest.approx(part * number, abs=1)
    assert torch.equal(data.with_validation(part, seed=3).index, cut.index)
    assert not torch.equal(data.with_validation(part, seed=4).index, cut.index)


def test_validation_says_that_its_labels_are_noisy(tmp_path, capsys):
    words = ["--validation", "0.2", "--limit", "400", "--epochs", "2", "--warmup", "1", "--quiet"]
    assert main(["train", *words, "--out", str(tmp_path)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "accuracies are on 80 validation images, whose labels are noisy" in printed
    result = load_run(tmp_path)
    assert len(result.data) == 320 and len(result.data.test_labels) == 80
    right = result.recipe.predict(result.data.test_images).argmax(1) == result.data.test_labels
    last = rows_of(tmp_path)[-1]
    assert "test_accuracy" not in last
    assert float(last["noisy_validation_accuracy"]) == pytest.approx(right.double().mean().item())
    assert result.last_accuracy == pytest.approx(right.double().mean().item())
    inspect(tmp_path)
    assert "80 validation images from the training set, whose labels are as noisy" in page(tmp_path)
    assert "noisy validation accuracy, last epoch" in page(tmp_path)
    with (tmp_path / "inspect/samples.csv").open() as file:
        assert [int(row["index"]) for row in csv.DictReader(file)] == result.data.index.tolist()
    capsys.readouterr()
    assert evaluate(tmp_path)["accuracy"] == pytest.approx(result.last_accuracy)
    assert "validation images with noisy labels" in " ".join(capsys.readouterr().out.split())
    other = train(TrainConfig(validation=0.2, limit=400, epochs=1, seed=1))
    assert not torch.equal(other.data.index, result.data.index)


@pytest.fixture
def no_test(monkeypatch):
    """A data set by the name bare: 200 digits and no test images."""

    def load(config):
        digits = load_digits(config)
        some = (digits.images.images[:200], digits.labels[:200])
        return in_memory("bare", some, None, config.device, num_classes=10)

    monkeypatch.setitem(DATASETS, "bare", load)
    return {"dataset": "bare", "model": "small-cnn", "augmentation": "digits", "epochs": 2}


def test_a_run_needs_no_test_set(no_test, tmp_path, capsys):
    settings = {**no_test, "noise": "symmetric", "warmup": 1, "mask": "small-images"}
    result = train(TrainConfig(**settings), tmp_path, progress=True)
    assert not result.accuracies and np.isnan(result.last_accuracy)
    assert [row["test_accuracy"] for row in rows_of(tmp_path)] == ["", ""]
    assert [row["best_accuracy"] for row in rows_of(tmp_path)] == ["", ""]
    inspect(tmp_path)
    assert "No test set: no accuracy is known." in page(tmp_path)
    assert "accuracy, last epoch" not in page(tmp_path) and ">nan" not in page(tmp_path)
    with pytest.raises(ConfigError, match=r"there are no test images .* --validation 0\.1"):
        evaluate(tmp_path)
    again = train(TrainConfig(**{**settings, "validation": 0.25}))
    assert len(again.accuracies) == 2 and len(again.data.test_labels) == 50
    capsys.readouterr()
    kinds = {"ce": {"recipe": "ce"}}
    assert compare(tmp_path / "table", [0, 1], ["symmetric:0.5"], kinds, **no_test) == 0
    printed = capsys.readouterr().out
    assert "nan" not in printed and "–" in printed


def test_an_empty_test_set_is_spread_over_ranks(no_test):
    data = DATASETS["bare"](TrainConfig(**no_test))
    assert [len(data.shard(rank, 3).test_labels) for rank in range(3)] == [0, 0, 0]


def test_folders_and_manifests_without_test_images(tmp_path, capsys):
    lines = ["path,label"]
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(4):
            path = tmp_path / "train" / name / f"{i}.png"
            Image.new("L", (20, 20), 60 * i).save(path)
            lines.append(f"train/{name}/{i}.png,{name}")
    (tmp_path / "list.csv").write_text("\n".join(lines))
    words = ["--model", "small-cnn", "--image-size", "14", "--workers", "0", "--quiet"]
    words += ["--recipe", "ce", "--epochs", "1", "--batch-size", "4"]
    for dataset, root in (("folder", tmp_path), ("manifest", tmp_path / "list.csv")):
        out = tmp_path / dataset
        where = ["--dataset", dataset, "--data-root", str(root), "--out", str(out)]
        assert main(["train", *words, *where]) == 0
        assert "there is no test set" in " ".join(capsys.readouterr().out.split())
        assert rows_of(out)[0]["test_accuracy"] == ""
        assert main(["eval", str(out)]) == 2
        assert "there are no test images" in capsys.readouterr().err
        assert main(["inspect", str(out)]) == 0
