"""`--folds`: every label is judged by networks that were not trained on it."""

from __future__ import annotations

import csv
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from inputs import extended
from pyarrow import parquet

import sanm_kernels as sk
from sanm_train import TrainConfig, load_run, train
from sanm_train.cli import main
from sanm_train.errors import ConfigError
from sanm_train.reports.folds import train_folds
from sanm_train.train import build

WORDS = ["--recipe", "ce", "--folds", "3", "--epochs", "20", "--limit", "900", "--rate", "0.3"]


@pytest.fixture(scope="module")
def folds(tmp_path_factory):
    """The folder of three runs, each on two thirds of 900 digits."""
    folder = tmp_path_factory.mktemp("folds")
    assert main(["train", *WORDS, "--lr", "0.05", "--quiet", "--out", str(folder)]) == 0
    return folder


def test_every_sample_is_judged_by_the_run_that_has_not_seen_it(folds):
    whole = build(TrainConfig(recipe="ce", limit=900, rate=0.3)).data
    found = parquet.read_table(folds / "samples.parquet")
    assert found["index"].to_pylist() == list(range(900))
    assert found["given_label"].to_pylist() == whole.labels.tolist()
    predictions = np.load(folds / "pred_probs.npy")
    number, clean = found["fold"].to_numpy(), found["clean_prob"].to_numpy()
    assert sorted(np.bincount(number)[1:]) == [300, 300, 300]
    for k in (1, 2, 3):
        result, rows = load_run(folds / f"fold-{k}"), (number == k).nonzero()[0]
        assert not set(result.data.index.tolist()) & set(rows)
        assert len(result.data) == 600 and result.data.test_noisy
        images = whole.images.images[rows]
        logits = result.recipe.networks[0].eval()(result.recipe.augment.plain(images)).detach()
        np.testing.assert_allclose(predictions[rows], logits.softmax(1), atol=1e-5)
        losses = F.cross_entropy(logits, whole.labels[rows], reduction="none")
        fit = sk.fit_label_quality(losses, seed=0, backend="reference")
        np.testing.assert_allclose(clean[rows], fit.clean_prob, atol=1e-4)
    wrong = (whole.labels != whole.true_labels).numpy()
    assert clean[~wrong].mean() > clean[wrong].mean() + 0.4
    with (folds / "relabel.csv").open() as file:
        listed = {int(row["index"]) for row in csv.DictReader(file)}
    assert wrong[list(listed)].mean() > 0.6


RANKS = """
import os, sys, time
from sanm_train import cli
from sanm_train.reports import folds

train, late = folds.train, []
def slow(config, out, **more):
    if int(os.environ["RANK"]) == len(late) % 2:  # one rank goes on before the other
        time.sleep(2)
    late.append(out)
    return train(config, out, **more)
folds.train = slow
sys.exit(cli.main())
"""


@extended
def test_two_ranks_train_the_same_parts(tmp_path):
    """Also where one of them begins a run when the other has long been there."""
    (tmp_path / "ranks.py").write_text(RANKS)
    words = ["--folds", "3", "--epochs", "2", "--limit", "300", "--quiet", "--recipe", "ce"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command += ["2", str(tmp_path / "ranks.py"), "train", *words, "--out", str(tmp_path / "out")]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,  # ranks that miss each other wait for longer
    )
    assert done.returncode == 0, done.stderr
    found = parquet.read_table(tmp_path / "out/samples.parquet")
    predictions = np.load(tmp_path / "out/pred_probs.npy")
    assert found["index"].to_pylist() == list(range(300))
    for k in (1, 2, 3):
        result, rows = load_run(tmp_path / f"out/fold-{k}"), found["fold"].to_numpy() == k
        assert rows.sum() == 100 == len(result.data.test_labels)
        expected = result.recipe.predict(result.data.test_images).softmax(1)
        np.testing.assert_allclose(predictions[rows], expected, atol=1e-5)


def test_each_given_label_has_its_share_in_every_part():
    data = build(TrainConfig()).data
    parts = data.folds(5, seed=1)
    for label in range(10):
        number = torch.bincount(parts[data.labels == label], minlength=5)
        assert number.max() - number.min() <= 1
    assert not torch.equal(parts, data.folds(5, seed=2))


def test_finished_parts_are_not_trained_again(folds, tmp_path, capsys):
    before = {path: path.read_bytes() for path in folds.glob("fold-*/checkpoint.pt")}
    samples = (folds / "samples.csv").read_bytes()
    assert len(before) == 3
    (folds / "samples.csv").unlink()
    assert main(["train", *WORDS, "--lr", "0.05", "--quiet", "--out", str(folds)]) == 0
    assert {path: path.read_bytes() for path in before} == before
    assert (folds / "samples.csv").read_bytes() == samples
    assert main(["train", *WORDS, "--quiet", "--seed", "5", "--out", str(folds)]) == 2
    assert "resume: seed was 0 when the run began and is 5 now" in capsys.readouterr().err


def test_what_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="fold must be from 1 to folds"):
        TrainConfig(folds=3, fold=4)
    with pytest.raises(ConfigError, match="folds must be 0 or at least 2"):
        TrainConfig(folds=1)
    with pytest.raises(ConfigError, match="validation and folds exclude each other"):
        TrainConfig(folds=3, validation=0.1)
    with pytest.raises(ConfigError, match="one fold at a time"):
        train(TrainConfig(folds=3))
    with pytest.raises(ConfigError, match="100 samples are too few for 3 parts"):
        train_folds(TrainConfig(folds=3, limit=100), tmp_path)
