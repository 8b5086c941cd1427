"""`make gpu-train`, rehearsed on the CPU with few images."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from benchmarks.step import PARTS
from benchmarks.training import SHARES, main
from sanm_train.readers import IDX_FILES


@pytest.mark.extended
def test_a_rehearsal_trains_all_recipes_and_writes_what_came_of_it(tmp_path, capsys):
    for files, number in zip(IDX_FILES.values(), (600, 40), strict=True):
        labels = torch.arange(number) % 10
        images = (labels[:, None, None] * 25 + torch.randint(5, (number, 12, 12))).byte()
        for name, array in zip(files, (images, labels), strict=True):
            head = b"\0\0\x08" + bytes([array.ndim]) + np.array(array.shape, ">u4").tobytes()
            (tmp_path / name).write_bytes(head + array.byte().numpy().tobytes())
    backward = torch.Tensor.backward
    arguments = ["--data-root", str(tmp_path), "--device", "cpu", "--width", "2", "--steps", "1"]
    assert main([*arguments, "--minutes", "0.01", "--out", str(tmp_path / "a.json")]) == 0
    assert torch.Tensor.backward is backward  # the clocks are gone again
    found = json.loads((tmp_path / "a.json").read_text())
    assert [row["recipe"] for row in found["recipes"]] == list(SHARES)
    for row in found["recipes"]:
        assert row["epochs"] == len(row["accuracies"]) == 2 and row["steps"] >= 2
        assert set(row["ms_by_part"]) == set(PARTS) and row["ms_per_step"] > 0
        assert 0 < row["outside_networks"] < 1
    assert str(tmp_path) not in (tmp_path / "a.json").read_text()
    assert "sanm-dividemix: 2 epochs" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured(tmp_path, capsys):
    assert main(["--data-root", str(tmp_path)]) == 2
    assert "nothing was measured" in capsys.readouterr().out
