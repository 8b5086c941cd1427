"""Several processes under torchrun (gloo): the same split, shards that share nothing, resuming."""

from __future__ import annotations

import csv
import os
import subprocess
import sys

import pytest
import torch
from inputs import extended

from sanm_train import TrainConfig, checkpoint, train
from sanm_train.data import batches
from sanm_train.train import METRICS, build, load_run

FIT = """
import pathlib, sys
import torch
from sanm_train import TrainConfig, checkpoint, distributed
from sanm_train.loop import launched
from sanm_train.train import build

folder = pathlib.Path(sys.argv[1])
config = TrainConfig.read(folder / "config.yaml")
with launched(config):
    result = build(config)
    for network, state in zip(result.recipe.networks, checkpoint.load(folder)["networks"]):
        network.load_state_dict(state)
    result.recipe.fit_quality()
    names = ("quality", "losses")
    found = {name: distributed.whole(getattr(result.recipe, name)) for name in names}
    found["mixtures"] = torch.stack(distributed.gather(result.recipe.mixtures))
    found["index"] = torch.cat(distributed.gather(result.recipe.data.index))
    if distributed.rank() == 0:
        torch.save(found, folder / f"fit{distributed.size()}.pt")
"""

CUT = """
import sys
from sanm_train import cli, loop

update, left = loop.Loop._update, [int(sys.argv.pop(1))]
def cut(self, *arguments):
    left[0] -= self.epoch == 1
    if left[0] < 0:
        raise SystemExit("cut off")
    return update(self, *arguments)
loop.Loop._update = cut
cli.main()
"""


def torchrun(processes: int, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of one process over 333 samples: shards of 167 and 166, of 84 and 83."""
    folder = tmp_path_factory.mktemp("run")
    train(TrainConfig(epochs=2, warmup=2, limit=333, batch_size=32), folder)
    return folder


@extended
def test_posterior_is_the_same_on_1_2_and_4_ranks(trained):
    script = trained / "fit.py"
    script.write_text(FIT)
    found = {}
    for ranks in (1, 2, 4):
        done = torchrun(ranks, str(script), str(trained))
        assert done.returncode == 0, done.stderr
        found[ranks] = torch.load(trained / f"fit{ranks}.pt")
        assert found[ranks]["index"].sort().values.equal(torch.arange(333))  # no padding, no gap
        mixtures = found[ranks]["mixtures"]
        assert mixtures.shape[0] == ranks and (mixtures == mixtures[0]).all()  # bits, on all ranks
    spread = found[1]["quality"]
    assert spread.min() < 0.1 and spread.max() > 0.9
    for ranks in (2, 4):
        torch.testing.assert_close(found[ranks]["losses"], found[1]["losses"], rtol=0, atol=1e-5)
        difference = (found[ranks]["quality"] - found[1]["quality"]).abs().max().item()
        assert difference <= 1e-6, f"{ranks} ranks: {difference}"


@extended
def test_training_on_two_ranks_and_resuming(tmp_path):
    settings = ["--epochs", "3", "--warmup", "1", "--limit", "333"]
    settings += ["--batch-size", "32", "--accumulate", "2", "--checkpoint-steps", "4", "--quiet"]
    command = ["-m", "sanm_train", "train", *settings, "--out"]
    done = torchrun(2, *command, str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("last accuracy") <= 1  # one rank reports
    assert "Initializing distributed" not in done.stderr  # what Fabric would say of itself
    with (tmp_path / "two" / METRICS).open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 and all(float(row["train_loss"]) < 10 for row in rows)
    assert rows[0]["steps"] == "20"  # of the optimiser, of both networks: 333 samples in tens
    state = checkpoint.load(tmp_path / "two")
    sizes = [rank["quality"].shape[1] for rank in state["ranks"]]
    assert sizes == [167, 166]
    draws = [rank["random"]["torch"] for rank in state["ranks"]]
    assert not torch.equal(*draws)  # augmentations differ from rank to rank
    run = load_run(tmp_path / "two")  # on one process: all samples in order
    assert run.quality.shape[1] == 333
    one = torchrun(1, *command, str(tmp_path / "two"), "--resume")
    assert one.returncode == 1
    assert "the run had 2 processes and can only be resumed with as many, got 1" in one.stderr

    # Cut off in its second epoch, the run goes on as if it had not been.
    script = tmp_path / "cut.py"
    script.write_text(CUT)
    done = torchrun(2, str(script), "7", "train", *settings, "--out", str(tmp_path / "cut"))
    assert done.returncode != 0 and "cut off" in done.stderr
    assert checkpoint.load(tmp_path / "cut")["step"] > 0
    again = torchrun(2, *command, str(tmp_path / "cut"), "--resume")
    assert again.returncode == 0, again.stderr
    assert metrics_of(tmp_path / "cut") == metrics_of(tmp_path / "two")


def metrics_of(folder) -> list[dict[str, str]]:
    with (folder / METRICS).open() as file:
        return [{**row, "seconds": ""} for row in csv.DictReader(file)]


RANK = """
import os, sys
from sanm_train.cli import main
sys.exit(main([*sys.argv[1:], "--lr", ("0.02", "0.1")[int(os.environ["RANK"])]]))
"""


@extended
def test_ranks_with_different_settings_do_not_start(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    done = torchrun(2, str(script), "train", "--out", str(tmp_path / "out"), "--limit", "130")
    assert done.returncode != 0
    assert "lr is 0.02 on rank 0 and 0.1 on rank 1" in done.stderr
    assert not (tmp_path / "out" / METRICS).exists()


@extended
def test_an_error_on_all_ranks_ends_all(tmp_path):
    command = ["-m", "sanm_train", "train", "--out", str(tmp_path), "--quiet", "--limit", "130"]
    done = torchrun(2, *command, "--recipe", "ce", "--lr", "1e30", "--epochs", "2")
    assert done.returncode == 1
    assert "training failed: epoch 0" in done.stderr
    done = torchrun(2, *command, "--batch-size", "3", "--overwrite")
    assert "batch_size must be at least two for each of 2 processes" in done.stderr


def test_shards_cover_all_and_share_none():
    data = build(TrainConfig(limit=11)).data
    shards = [data.shard(rank, 4) for rank in range(4)]
    assert [len(shard) for shard in shards] == [3, 3, 3, 2]
    for shard in shards:
        (images,) = shard.images.stream([torch.arange(len(shard))])
        (whole,) = data.images.stream([shard.index])
        assert torch.equal(images, whole) and torch.equal(shard.labels, data.labels[shard.index])
    assert torch.equal(torch.cat([shard.index for shard in shards]), data.index)
    tests = [len(shard.test_labels) for shard in shards]
    assert sum(tests) == len(data.test_labels) == sum(len(s.test_images) for s in shards)
    order = torch.cat(batches(torch.arange(11), 3, torch.Generator().manual_seed(0)))
    assert order.sort().values.equal(torch.arange(11))
