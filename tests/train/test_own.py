"""A user's module: recipe, data set and network of one's own, from the command line."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from sanm_train import TrainConfig
from sanm_train.cli import main
from sanm_train.registry import REGISTRIES

DOCS = Path(__file__).resolve().parents[2] / "docs/training.md"
NAMES = ("smooth", "sanm-gce", "stripes", "plain")


def forget() -> None:
    sys.modules.pop("mine", None)
    for registry in REGISTRIES.values():
        for name in NAMES:
            registry.pop(name, None)
            registry.configs.pop(name, None)


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """The module that the documentation shows, in the present folder."""
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.S)
    parts = [block for block in blocks if "register" in block]
    assert len(parts) == 4
    (tmp_path / "mine.py").write_text("\n\n".join(parts))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    yield tmp_path
    forget()


def test_a_module_of_one_s_own_in_every_command(mine, capsys):
    words = ["--import", "mine", "--recipe", "smooth", "--dataset", "stripes", "--epochs", "1"]
    with pytest.raises(SystemExit):
        main(["train", *words, "--out", "run", "--help"])
    assert "--smoothing FLOAT" in capsys.readouterr().out
    assert main(["train", *words, "--out", "run", "--quiet", "--smoothing", "0.2"]) == 0
    config = TrainConfig.read(mine / "run/config.yaml")
    assert (config.imports, config.smoothing, config.model) == (("mine",), 0.2, "plain")
    for command in ("eval", "inspect", "export"):
        forget()
        assert main([command, "run"]) == 0  # the run remembers
    again = ["train", "--resume", "--out", "run", "--quiet", "--epochs"]
    forget()
    assert main([*again, "1"]) == 0
    forget()
    table = ["compare", "--import", "mine", "--recipes", "smooth", "ce", "--dataset", "stripes"]
    table += ["--seeds", "1", "--noises", "symmetric:0.5", "--epochs", "1", "--smoothing", "0.3"]
    assert main([*table, "--out", "table"]) == 0
    assert "smooth" in (mine / "table/runs.csv").read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "imports: 'mine' cannot be imported: ModuleNotFoundError: No module named 'mine'"),
        ("1 / 0", "imports: 'mine' cannot be imported: ZeroDivisionError: division by zero"),
        ("import sanm_train\nsanm_train.register_model('small-cnn')(int)", "has that name already"),
    ],
)
@pytest.mark.parametrize("command", ["train", "eval", "inspect", "compare"])
def test_a_module_that_cannot_be_used_is_one_line(command, text, message, mine, capsys):
    (mine / "mine.py").unlink()
    if text is not None:
        (mine / "mine.py").write_text(text)
    where = ["--out", "run"] if command in ("train", "compare") else ["run"]
    assert main([command, "--import", "mine", *where]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
