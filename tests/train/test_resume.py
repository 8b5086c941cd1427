"""Checkpoints: a run that was cut off anywhere goes on as if it had not been."""

from __future__ import annotations

import csv
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from inputs import more

from sanm_train import MODELS, RECIPES, TrainConfig, checkpoint, register_model, train
from sanm_train.cli import main
from sanm_train.errors import CheckpointError, ConfigError
from sanm_train.models import SmallCNN
from sanm_train.train import CONFIG, METRICS, load_run

FIRST = "sanm-dividemix"


class Killed(BaseException):
    """What no code under test catches, as a kill would not be caught."""


def metrics(folder) -> list[dict[str, str]]:
    with (folder / METRICS).open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        del row["seconds"]
    return rows


def cut_off(monkeypatch, config, out, passes: int, **options) -> None:
    """Train until `passes` losses have been computed, then break off."""
    kind = RECIPES[config.recipe]
    original, left = kind.loss, [passes]

    def loss(self, *arguments):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "loss", loss)
        with pytest.raises(Killed):
            train(config, out, **options)


@pytest.mark.parametrize("recipe", [FIRST, *more(*sorted(set(RECIPES) - {FIRST}))])
def test_resumed_anywhere_nothing_changes(tiny, tmp_path, monkeypatch, recipe):
    """Cut off inside the warm-up, inside a later epoch, and again while resumed."""
    config = tiny(recipe=recipe, epochs=4, checkpoint_steps=2, average_losses=True, threshold=0.4)
    whole = train(config, tmp_path / "whole")
    steps = [row["steps"] for row in whole.history]
    out = tmp_path / "cut"
    cut_off(monkeypatch, config, out, steps[0] - 1)
    cut_off(monkeypatch, config, out, steps[1] + 3, resume=True)
    inside = checkpoint.load(out)
    assert inside["epoch"] >= 1 or inside["step"] > 0
    result = train(config, out, resume=True)
    assert metrics(out) == metrics(tmp_path / "whole")
    assert torch.equal(result.quality, whole.quality) and torch.equal(result.losses, whole.losses)
    for ours, theirs in zip(result.recipe.networks, whole.recipe.networks, strict=True):
        for name, value in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], value), name


def test_checkpoints_inside_an_epoch(tiny, tmp_path, monkeypatch):
    config = tiny(recipe="ce", limit=330, checkpoint_steps=3)
    cut_off(monkeypatch, config, tmp_path, 8)
    state = checkpoint.load(tmp_path)
    assert (state["epoch"], state["step"]) == (0, 6)


@pytest.mark.parametrize("times", [1, *more(5)])
def test_killed(tmp_path, times):
    """kill -9 at random moments after the first checkpoint; no checkpoint is ever unreadable."""
    epochs = times + 2
    settings = ["--epochs", str(epochs), "--warmup", "1", "--limit", "300", "--batch-size", "32"]
    command = [sys.executable, "-m", "sanm_train", "train", "--quiet", *settings]
    command += ["--checkpoint-steps", "3", "--resume", "--out"]
    moments = random.Random(0)
    kills = 0
    while kills < times:
        process = subprocess.Popen([*command, str(tmp_path / "cut")], stdout=subprocess.DEVNULL)
        file = tmp_path / "cut" / checkpoint.NAME
        before = file.stat().st_mtime_ns if file.exists() else 0
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if file.exists() and file.stat().st_mtime_ns != before:
                time.sleep(moments.uniform(0, 0.2))
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.002)
        assert process.wait(60) in (0, -signal.SIGKILL)
        assert checkpoint.load(tmp_path / "cut") is not None
        if process.returncode == 0:  # done before the last kill
            break
        kills += 1
    assert kills > times // 2
    for name in ("cut", "whole"):
        subprocess.run([*command, str(tmp_path / name)], check=True, stdout=subprocess.DEVNULL)
    assert len(metrics(tmp_path / "whole")) == epochs
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    assert not [path.name for path in (tmp_path / "whole").iterdir() if "partial" in path.name]


def test_a_full_disk_leaves_the_last_good_checkpoint(tiny, tmp_path, files_of_at_most):
    config = tiny(recipe="ce", epochs=1)
    train(config, tmp_path)
    good = (tmp_path / checkpoint.NAME).read_bytes()
    state = {**checkpoint.load(tmp_path), "more": torch.zeros(1 << 20)}
    with (
        files_of_at_most(1 << 20),
        pytest.raises(OSError, match=r"checkpoint.pt cannot be written: .*the last good one"),
    ):
        checkpoint.save(tmp_path, state)
    assert (tmp_path / checkpoint.NAME).read_bytes() == good
    names = [checkpoint.NAME, CONFIG, METRICS, "run.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


@pytest.mark.parametrize("content", [b"", b"no checkpoint", "half"])
def test_a_broken_checkpoint_is_named(tiny, tmp_path, content):
    config = tiny(recipe="ce", epochs=1)
    train(config, tmp_path)
    file = tmp_path / checkpoint.NAME
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    for read in (lambda: train(config, tmp_path, resume=True), lambda: load_run(tmp_path)):
        with pytest.raises(CheckpointError, match=r"checkpoint.pt cannot be read"):
            read()


def test_checkpoints_run_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("code of the file was run",)

    torch.save({"format": 1, "evil": Evil()}, tmp_path / checkpoint.NAME)
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.load(tmp_path)


def test_only_the_same_run_is_resumed(tiny, tmp_path):
    train(tiny(recipe="ce"), tmp_path)
    with pytest.raises(ConfigError, match=r"momentum was 0.9 when the run began and is 0.8 now"):
        train(tiny(recipe="ce", momentum=0.8), tmp_path, resume=True)
    done = train(tiny(recipe="ce", threads=2, lr=0.01), tmp_path, resume=True)
    assert len(done.history) == 2


def test_a_run_read_back(tiny, tmp_path):
    result = train(tiny(), tmp_path)
    again = load_run(tmp_path)
    assert again.history == result.history
    assert torch.equal(again.quality, result.quality) and torch.equal(again.losses, result.losses)
    images = result.data.test_images
    assert torch.equal(again.recipe.predict(images), result.recipe.predict(images))
    assert torch.equal(again.data.labels, result.data.labels)
    with pytest.raises(CheckpointError, match="must be a folder with a checkpoint"):
        load_run(tmp_path / "nowhere")


def test_command_line(tmp_path, capsys):
    out = ["--out", str(tmp_path), "--quiet"]
    settings = ["--epochs", "1", "--limit", "130", "--recipe", "ce"]
    assert main(["train", *out, *settings]) == 0
    assert main(["train", *out, *settings]) == 2
    assert "--resume continues, --overwrite replaces it" in capsys.readouterr().err
    assert main(["train", *out, "--resume"]) == 0  # with the settings that are saved there
    assert main(["train", *out, "--resume", "--overwrite"]) == 2
    assert main(["train", *out, "--resume", "--epochs", "2"]) == 2
    assert "epochs was 1 when the run began" in capsys.readouterr().err
    for name, before, now in (("recipe", "ce", "elr"), ("optimizer", "sgd", "adamw")):
        assert main(["train", *out, "--resume", f"--{name}", now]) == 2
        error = capsys.readouterr().err
        assert f"resume: {name} was '{before}' when the run began and is '{now}' now" in error
    assert main(["train", *out, *settings, "--overwrite", "--seed", "1"]) == 0
    assert TrainConfig.read(tmp_path / CONFIG).seed == 1


def test_checkpoints_and_records_without_their_contents(tiny, tmp_path, capsys):
    run = tmp_path / "run"
    train(tiny(recipe="ce", epochs=1), run)
    record = (run / "run.json").read_text()
    for facts in ("{}", "[]", '{"model": "small-cnn"}'):
        (run / "run.json").write_text(f'{{"starts": [], "changed": {{}}, "network": {facts}}}')
        assert main(["export", str(run)]) == 2
        assert "run.json cannot be read: it is not the record of a run" in capsys.readouterr().err
    (run / "run.json").write_text(record)
    torch.save({"format": checkpoint.FORMAT}, run / checkpoint.NAME)
    for words in (["eval"], ["export"], ["inspect"], ["train", "--resume", "--out"]):
        assert main([*words, str(run)]) == 2
        assert "checkpoint.pt is not a checkpoint of format" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["eval", "export", "resume"])
def test_a_network_that_has_changed_since(tmp_path, capsys, monkeypatch, command):
    """As a user's own does, which the run imports anew."""
    width = [8]

    @register_model("changing")
    def changing(in_channels, num_classes):
        return SmallCNN(in_channels, num_classes, width[0])

    try:
        config = TrainConfig(recipe="ce", epochs=1, warmup=0, limit=130, model="changing")
        train(config, tmp_path)
        width[0] = 16
        words = ["train", "--resume", "--out"] if command == "resume" else [command]
        assert main([*words, str(tmp_path)]) == 2
    finally:
        del MODELS["changing"]
    error = capsys.readouterr().err
    assert "sanm: error: the network is not that of the checkpoint: " in error
    assert "size mismatch for " in error and error.count("\n") == 1
