"""The command line: what it writes and how it refuses."""

from __future__ import annotations

import csv
import re

import pytest

from sanm_train.cli import main
from sanm_train.registry import REGISTRIES

TINY = ["--epochs", "2", "--warmup", "1", "--limit", "130", "--quiet"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rate", "1.5"], r"rate must be in \[0, 1\], got 1.5"),
        (["--rate", "-0.1"], r"rate must be in \[0, 1\]"),
        (["--rate", "nan"], r"rate must be in \[0, 1\], got nan"),
        (["--recipe", "sanm-dividmix"], "did you mean 'sanm-dividemix'"),
        (["--dataset", "digit"], "did you mean 'digits'"),
        (["--noise", "symetric"], "did you mean 'symmetric'"),
        (["--model", "resnet"], "model must be one of"),
        (["--views", "none"], "views must be one of both, max, min; got 'none'"),
        (["--epochs", "0"], "epochs must be at least 1, got 0"),
        (["--lr", "0"], "lr must be above 0"),
        (["--batch-size", "1"], "batch_size must be at least 2"),
        (["--seed", "-1"], r"seed must be in \[0, 4294967295\], got -1"),
        (["--ratio-low", "0.9"], "ratio_low"),
        (["--device", "nonsense"], "device"),
        (["--dataset", "cifar10"], "data_root must be the folder that holds cifar-10-batches-py/"),
        (["--dataset", "folder", "--data-root", "nowhere"], "got 'nowhere': no such folder"),
        (
            ["--dataset", "manifest", "--data-root", "a.csv"],
            "data_root must be a file, got 'a.csv'",
        ),
        (["--noise", "file"], "noise file is for cifar10 and cifar100, not for digits"),
        (["--preset", "cifar-sym50"], "preset must be one of .* did you mean 'cifar1"),
        (["--config", "no.yaml"], "config: no.yaml cannot be read as YAML"),
    ],
)
def test_bad_settings(arguments, message, capsys, tmp_path):
    out = tmp_path / "run"
    assert main(["train", "--out", str(out), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("sanm: error: ") and error.count("\n") == 1
    assert re.search(message, error)
    assert not out.exists()


def test_bad_output_folders(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["train", "--out", str(tmp_path / "file" / "run"), *TINY]) == 2
    assert "out must be a writable folder" in capsys.readouterr().err
    assert main(["train", "--out", "/proc/run", *TINY]) == 2
    assert "/proc/run" in capsys.readouterr().err


def test_unknown_option_and_missing_command(capsys):
    for arguments in (["train", "--out", "x", "--nope"], [], ["fly"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
    assert "invalid choice: 'fly'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "advice"),
    [
        ("--batchsize=3", "did you mean 'batch-size'"),
        ("--elr-weight", "--elr-weight is a setting of elr, sanm-elr only"),
        ("--noise-file", "--noise-file is a setting of cifar10, cifar100 only"),
        ("--zzzz", "unrecognized arguments: --zzzz\n"),
    ],
)
def test_unknown_options_are_told_from_those_of_others(option, advice, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--out", "x", option])
    assert stop.value.code == 2 and advice in capsys.readouterr().err


def help_of(words, capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        main([*words, "--help"])
    assert stop.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_help_has_the_settings_of_what_is_chosen(capsys, tmp_path):
    page = help_of(["train", "--recipe", "elr", "--dataset", "folder"], capsys)
    assert "early-learning regularisation: --elr-weight FLOAT λ of the penalty" in page
    assert "--alpha" not in page
    assert "--noise {none,symmetric,asymmetric,instance,file} label noise (default: none)" in page
    assert "masking, where not set below (default: paper)" in page
    assert "passes over the training set (default: 80)" in page
    assert "network (default: torchvision:resnet50)" in page
    page = help_of(["train"], capsys)
    assert "(default: small-images)" in page and "--alpha" in page and "--elr-weight" not in page
    (tmp_path / "a.yaml").write_text("recipe: elr\n")
    assert "--elr-weight" in help_of(["train", "--config", str(tmp_path / "a.yaml")], capsys)
    assert "--noise-set" in help_of(["train", "--preset", "cifar10n-worse"], capsys)
    page = help_of(["compare"], capsys)
    assert "--elr-weight" in page and "--alpha" in page and "--rate" not in page


def test_list_has_all_there_is(capsys):
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    for registry in REGISTRIES.values():
        for name in registry.names():
            assert re.search(rf"^  {re.escape(name)}( |$)", printed, re.M), name
    assert "  digits                     sanm-dividemix on digits\n" in printed


def test_list_says_the_published_settings(capsys):
    """Of the presets: optimiser, rate, epochs, batch, warm-up, as the method's section 7."""
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    made = "sgd, rate 0.02, a tenth from epoch 150 of 360, weight decay 0.0005, batches of 128"
    for line in (
        f"cifar10-sym50              sanm-dividemix on cifar10, symmetric 50%: {made}, warm-up 10",
        f"cifar100-sym80             sanm-dividemix on cifar100, symmetric 80%: {made}, warm-up 20",
        f"cifar10n-worse             sanm-dividemix on cifar10, worse_label: {made}, warm-up 10",
        "clothing1m                 sanm-dividemix on clothing1m, none: sgd, rate 0.0009, a tenth "
        "from epoch 40 of 80, weight decay 0.001, batches of 64, warm-up 1",
    ):
        assert f"  {line}\n" in printed


def test_train_inspect_and_eval(tmp_path, capsys):
    run = str(tmp_path / "run")
    assert main(["train", "--out", run, *TINY]) == 0
    assert "sanm-div" in capsys.readouterr().out
    assert main(["inspect", run]) == 0
    assert "report.html" in capsys.readouterr().out.replace("\n", "")
    with (tmp_path / "run/inspect/samples.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["index"]) for row in rows] == list(range(130))
    assert sum(row["given_label"] != row["true_label"] for row in rows) in range(50, 80)
    assert main(["eval", run]) == 0
    assert "accuracy" in capsys.readouterr().out
    for command in ("inspect", "eval"):
        assert main([command, str(tmp_path / "nowhere")]) == 2
        assert "must be a folder with a checkpoint" in capsys.readouterr().err


def test_demo_writes_table_figure_and_csv(tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path), "--epochs", "2", "--limit", "200"]) == 0
    printed = capsys.readouterr().out
    assert "last accuracy" in printed.replace("\n", " ") or "accuracy" in printed
    assert (tmp_path / "masking.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "masking.png").stat().st_size > 50_000
    samples = tmp_path / "sanm-dividemix/inspect/samples.csv"
    assert len(samples.read_text().splitlines()) == 201
    for recipe in ("ce", "sanm-dividemix"):
        assert len((tmp_path / recipe / "metrics.csv").read_text().splitlines()) == 3
    assert main(["demo", "--out", str(tmp_path), "--epochs", "1"]) == 2
    assert "holds a run already; --overwrite replaces it" in capsys.readouterr().err


def test_compare_keeps_runs_of_other_settings_apart(tmp_path, capsys):
    arguments = ["compare", "--out", str(tmp_path), "--recipes", "ce", "--noises", "symmetric:0.5"]
    arguments += ["--limit", "100", "--epochs"]
    of_two_seeds = re.compile(r"│ +\d+\.\d, \d+\.\d │")
    assert main([*arguments, "1", "--seeds", "2"]) == 0
    assert of_two_seeds.search(capsys.readouterr().out)
    assert main([*arguments, "1", "--seeds", "1"]) == 0  # shows the seeds that were asked for
    assert not of_two_seeds.search(capsys.readouterr().out)
    assert main([*arguments, "2", "--seeds", "1"]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "has runs of ce with epochs 1, not 2; name another folder" in error
    (tmp_path / "runs.csv").write_text("a,b\n1,2\n")
    assert main([*arguments, "1", "--seeds", "1"]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "runs.csv has no column noise, seed, variant" in error


def test_compare_goes_on_where_it_was(tmp_path, capsys):
    arguments = ["compare", "--out", str(tmp_path), "--recipes", "ce", "elr", "--epochs", "1"]
    arguments += ["--limit", "100", "--seeds", "1", "--noises", "symmetric:0.2"]
    assert main(arguments) == 0
    first = (tmp_path / "runs.csv").read_text()
    assert main([*arguments, "asymmetric:0.4"]) == 0
    both = (tmp_path / "runs.csv").read_text()
    assert both.startswith(first) and len(both.splitlines()) == 5
    assert "asymmetric:0.4" in capsys.readouterr().out
    assert main([*arguments, "symmetric"]) == 2
    assert "noises must be like symmetric:0.5, got 'symmetric'" in capsys.readouterr().err
    assert main([*arguments[:4], "sanm", "--epochs", "1"]) == 2
    assert "recipes must be one of" in capsys.readouterr().err
