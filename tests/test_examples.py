"""The examples, run as a user runs them: as scripts, in another folder, for a few epochs."""

from __future__ import annotations

import importlib.util
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from inputs import extended

from sanm_kernels import compat

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
DIVIDEMIX = "dividemix_switch/dividemix.py"


@pytest.fixture
def run(tmp_path):
    """A function that runs an example and returns what it prints; it may write no files."""

    def call(script: str, *arguments: str, **environment: str) -> str:
        clean = {k: v for k, v in os.environ.items() if not k.startswith("SANM_KERNELS")}
        clean |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'python'}"}
        done = subprocess.run(
            [sys.executable, EXAMPLES / script, *arguments],
            cwd=tmp_path,
            env=clean | environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        assert not list(tmp_path.iterdir()), "files were written into the working folder"
        return done.stdout

    return call


def number(text: str, pattern: str) -> float:
    """The only number that `pattern`, with # for a number, finds in `text`."""
    found = re.findall(pattern.replace("#", r"(\d+\.\d+)"), text)
    assert len(found) == 1, f"{pattern!r} in {text!r}"
    return float(found[0])


def check_quality(text: str) -> None:
    assert number(text, "label quality: right labels #, wrong") > 0.6
    assert number(text, "wrong labels #") < 0.2


@extended
def test_plain_loop(run):
    text = run("plain_loop.py", "--epochs", "12")
    check_quality(text)
    without, with_sanm = (number(text, f"{name} SANM: #% of") for name in ("without", "with"))
    assert 50 < without < with_sanm and with_sanm > 75


@extended
@pytest.mark.parametrize("options", ["", "--devices 2 --precision bf16-mixed"])
def test_lightning_module(run, options):
    text = run("lightning_module.py", "--epochs", "6", *options.split())
    check_quality(text)
    assert number(text, "validation accuracy: #%") > 70


@extended
def test_dividemix_switched_by_one_import(run):
    """Asymmetric noise, so that all three functions are called."""
    arguments = (DIVIDEMIX, "--epochs", "8", "--noise", "asym", "--rate", "0.4")
    slow = run(*arguments, FUNCTIONS="slow")
    ours = run(*arguments)
    accuracies = number(slow, "slow_functions: #%"), number(ours, "sanm_kernels.compat: #%")
    assert min(accuracies) > 75 and abs(accuracies[0] - accuracies[1]) < 10
    for text in (slow, ours):
        assert number(text, r"masking: \d+ calls, # ms each") > 0


def slow_functions():
    path = EXAMPLES / "dividemix_switch/slow_functions.py"
    spec = importlib.util.spec_from_file_location("slow_functions", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (2, 10, 14)], ids=str)
def test_slow_functions_mask_as_compat_does(shape):
    """Where rounding cannot move the peak or the trough to another pixel, everything is equal."""
    B, K = 256, 10
    images, features, w = torch.rand(B, *shape), torch.randn(B, 16, 4, 4).relu(), torch.rand(B)
    targets = torch.softmax(torch.randn(B, K), 1)
    results, states = [], []
    for functions in (slow_functions(), compat):
        changed = targets.clone()
        random.seed(0)
        *views, returned = functions.attention_erase_map(images, features, w, changed)
        assert returned is changed
        results.append((*views, changed))
        states.append(random.getstate())
    assert states[0] == states[1]
    torch.testing.assert_close(results[0][2], results[1][2], rtol=0, atol=1e-6)

    energy = features.double().square().sum(1, keepdim=True)
    heat = F.interpolate(energy, shape[1:], mode="bilinear").flatten(1).sort(1).values
    one_level = (heat[:, -1] - heat[:, 0]) / 255
    gaps = (heat[:, 1] - heat[:, 0], heat[:, -1] - heat[:, -2])
    for view, gap in enumerate(gaps):
        clear = gap > 1.01 * one_level
        assert clear.sum() > 16
        assert torch.equal(results[0][view][clear], results[1][view][clear])
        assert (results[0][view] != images).flatten(1).any(1).all()


def test_slow_criteria_are_those_of_compat():
    slow = slow_functions()
    x, u = torch.randn(6, 5), torch.randn(7, 5)
    tx, tu = (torch.softmax(torch.randn(n, 5), 1) for n in (6, 7))
    for epoch in (3.0, 9.5, 40.0):
        values = [m.SemiLoss(lambda_u=20)(x, tx, u, tu, epoch, 4) for m in (slow, compat)]
        torch.testing.assert_close(values[0][:2], values[1][:2])
        assert values[0][2] == pytest.approx(values[1][2])
    torch.testing.assert_close(slow.NegEntropy()(x), compat.NegEntropy()(x))
