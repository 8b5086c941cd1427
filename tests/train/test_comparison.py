"""Tables of many runs: controls, differences seed by seed, and what is drawn of them."""

from __future__ import annotations

import csv
import re

import numpy as np
import pytest
import torch

from sanm_train.cli import main
from sanm_train.reports.comparison import differences
from sanm_train.reports.figure import draw_accuracies, draw_calibration


def test_ablate_has_controls_and_paired_differences(tmp_path, capsys):
    arguments = ["--epochs", "2", "--limit", "100", "--warmup", "1", "--seeds", "2"]
    out = ["ablate", "--out", str(tmp_path), *arguments]
    assert main([*out, "--recipes", "sanm-ce"]) == 0
    printed = capsys.readouterr().out
    with (tmp_path / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    parts = ["plain views", "random box", "no modulation", "no reconstruction"]
    parts += ["max view only", "min view only"]
    names = ["ce", "sanm-ce", *(f"sanm-ce: {part}" for part in parts)]
    assert [(row["variant"], row["seed"]) for row in rows] == [(n, s) for s in "01" for n in names]
    for row in rows:
        assert len(row["accuracies"].split()) == 2
        assert 0 < float(row["loss_auc"]) < 1 and 0 < float(row["cleanlab_auc"]) < 1
    assert printed.count("│ sanm-ce: random box") == 2 + 3  # against ce, the control, the whole
    assert main([*out, "--recipes", "ce"]) == main([*out[:3], "--seeds", "0"]) == 2
    assert "recipes must be SANM on another recipe, got ce" in capsys.readouterr().err


def test_differences_are_paired():
    accuracies = {"a": (0.9, 0.8, 0.7, 0.1), "b": (0.8, 0.75, 0.6), "c": (0.5, 0.9, 0.7)}
    rows = [
        {"variant": name, "seed": str(seed), "last_accuracy": str(accuracy)}
        for name, runs in accuracies.items()
        for seed, accuracy in enumerate(runs)  # a's last one has no counterpart
    ]
    rows.reverse()
    found = differences(rows, {"a": ["b", "c"], "c": ["nothing"]})
    keys = ("variant", "against", "difference", "seeds", "beyond two errors")
    assert [tuple(row[key] for key in keys) for row in found] == [
        ("a", "b", "+8.3 ± 1.7", "3", "yes"),  # 10, 5, 10: deviation 2.9, over the root of 3
        ("a", "c", "+10.0 ± 15.3", "3", "no"),  # 40, -10, 0
    ]


def test_compare_has_the_controls_and_a_base(tmp_path, capsys):
    arguments = ["compare", "--out", str(tmp_path), "--recipes", "ce", "sanm-ce", "--epochs", "1"]
    arguments += ["--limit", "100", "--seeds", "2", "--noises", "symmetric:0.5"]
    assert main(arguments) == 0
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.count("│ sanm-ce: plain views") == 2 + 1  # against ce
    assert main([*arguments, "--base", "sanm-ce"]) == 0
    assert re.search(r"│ ce +│ +sanm-ce │ [+-]\d+\.\d ± \d+\.\d │", capsys.readouterr().out)
    assert main([*arguments, "--base", "sanm"]) == 2
    assert "base must be one of" in capsys.readouterr().err


def test_calibration_is_the_share_of_right_labels_in_each_bin():
    quality = torch.tensor([0.0, 0.05, 0.31, 0.33, 0.95, 1.0])
    right = torch.tensor([False, True, False, False, True, True])
    figure = draw_calibration({"a": quality}, right)
    above, below = figure.axes
    (x, y), heights = above.lines[1].get_data(), below.patches[0].get_data().values
    assert x.tolist() == pytest.approx([0.025, 0.32, 0.975]) and y.tolist() == [0.5, 0, 1]
    assert heights.tolist() == pytest.approx([1 / 3, 0, 0, 1 / 3, *[0] * 5, 1 / 3])


def test_accuracies_are_drawn_as_means_with_their_errors():
    runs = [[0.5, 0.6, 0.9], [0.7, 0.8, 0.7]]
    figure = draw_accuracies({"noise": {"ce": runs, "none": []}})
    (axis,) = figure.axes
    (line,), (band,) = axis.lines, axis.collections
    assert line.get_ydata().tolist() == pytest.approx([60, 70, 80])
    low, high = (
        np.array(band.get_paths()[0].vertices)[:, 1].min(),
        band.get_datalim(axis.transData).y1,
    )
    assert (low, high) == pytest.approx((50, 90))  # deviation 14.1, over the root of 2
