"""The table of launch configurations, and the choice by measurement that is kept on disk."""

from __future__ import annotations

import json
import logging

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from sanm_kernels.backends.triton import tune


@pytest.mark.parametrize("name", tune.TABLE)
def test_every_size_has_a_configuration(name):
    for capability in (75, 80, 86, 90, 100, 120):
        table = tune.rows(name, capability)
        limits = [limit for limit, _ in table]
        assert limits == sorted(limits) and limits[-1] == float("inf")
    for bucket in (0, 1, 10**9):
        assert tune.choose(name, bucket, torch.empty(1), lambda config: None)["num_warps"] > 0


def test_a_measured_choice_is_logged_and_kept(tmp_path, monkeypatch, caplog):
    import triton.testing

    monkeypatch.setenv("SANM_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    tune._kept.cache_clear()
    table = tune.rows("pixels", 80)
    timed = []

    def do_bench(go, return_mode):
        go()
        return {4: 2.0, 8: 1.0}[timed[-1]["num_warps"]]

    monkeypatch.setattr(triton.testing, "do_bench", do_bench)
    x = torch.empty(1)
    with caplog.at_level(logging.INFO, logger="sanm_kernels"):
        best = tune._measured("pixels", 64, x, table, timed.append)
    assert best["num_warps"] == 8 and len(timed) == len(table)
    assert "autotune a GPU/pixels/torch.float32/64" in caplog.text
    kept = json.loads((tmp_path / "autotune.json").read_text())
    assert list(kept.values()) == [best]
    tune._kept.cache_clear()  # as a new process would
    assert tune._measured("pixels", 64, x, table, timed.append) == best
    assert len(timed) == len(table), "timed again"
    (tmp_path / "autotune.json").write_text("{")
    tune._kept.cache_clear()
    assert tune._measured("pixels", 64, x, table, timed.append) == best
    assert "not readable, timing anew" in caplog.text
    tune._kept.cache_clear()
