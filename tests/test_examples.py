"""The examples, run as a user runs them: as scripts, in another folder, for a few epochs."""

from __future__ import annotations

import collections
import importlib.util
import os
import random
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
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


LOOPS = {
    "plain_loop.py": "torch",
    "lightning_module.py": "lightning",
    "accelerate_loop.py": "accelerate",
    "hf_trainer.py": "transformers",
    "timm_loop.py": "timm",
}


@extended
@pytest.mark.parametrize("script", LOOPS)
def test_loops(script, run):
    """Half of the labels are wrong: without SANM about 50 to 60 % after so few epochs."""
    if importlib.util.find_spec(LOOPS[script]) is None:
        pytest.skip(f"{LOOPS[script]} is not installed")
    text = run(script, "--epochs", "14")
    check_quality(text)
    assert number(text, "test accuracy: #%") > 75


@extended
def test_lightning_on_two_devices(run):
    text = run(
        "lightning_module.py", "--epochs", "14", "--devices", "2", "--precision", "bf16-mixed"
    )
    check_quality(text)
    assert number(text, "test accuracy: #%") > 75


@pytest.mark.parametrize("script", LOOPS)
def test_sanm_adds_at_most_ten_lines(script):
    lines = (EXAMPLES / script).read_text().splitlines()
    added = [line for line in lines if line.endswith("# SANM")]
    assert 5 < len(added) <= 10
    ours = re.compile(r"SANM|quality|Indexed|sanm_train")
    left = [line for line in lines if ours.search(line) and line not in added]
    text = [line for line in left if not line.startswith(('"""', "Lines ", "added "))]
    assert all("report(" in line for line in text), text  # what the example alone shows


@extended
def test_dividemix_switched_by_one_line(run):
    """Asymmetric noise, so that all functions are called."""
    arguments = (DIVIDEMIX, "--epochs", "8", "--noise", "asym", "--rate", "0.4")
    slow, ours = run(*arguments), run(*arguments, "--patch")
    assert ours.count("replaced") == 5 and "replaced" not in slow
    accuracies = [number(text, "#% of the test digits") for text in (slow, ours)]
    assert min(accuracies) > 75 and abs(accuracies[0] - accuracies[1]) < 10
    for text in (slow, ours):
        assert number(text, r"masking: \d+ calls, # ms each") > 0


def both(name, original, ours, largest):
    """`ours`, which notes by how much it differs from `original` in the same state."""

    def call(*given):
        copies = [x.detach().clone() if isinstance(x, torch.Tensor) else x for x in given]
        states = random.getstate(), np.random.get_state()
        expected = original(*copies)
        after = random.getstate(), np.random.get_state()[2]
        random.setstate(states[0])
        np.random.set_state(states[1])
        got = ours(*given)
        assert (random.getstate(), np.random.get_state()[2]) == after
        for a, b in zip(
            *(x if isinstance(x, tuple) else (x,) for x in (expected, got)), strict=True
        ):
            a, b = (torch.as_tensor(x).detach() for x in (a, b))
            largest[name].append(float((a - b).abs().max() / a.abs().max().clamp(min=1)))
        return got

    return call


def fitted(cls):
    def fit(losses):
        found = cls(2, max_iter=10, tol=1e-2, reg_covar=5e-4).fit(losses)
        return found.predict_proba(losses), found.means_, found.n_iter_, found

    return fit


def test_dividemix_has_the_same_losses_in_every_step_of_three_epochs(monkeypatch, capsys):
    """Each computed by the original too, from the same state; rounding is all that may differ."""
    patch, largest = compat.patch, collections.defaultdict(list)

    def checked(module, **options):
        own = {name: vars(module)[name] for name in ("attention_erase_map", "GaussianMixture")}
        own |= {cls: vars(module)[cls].__call__ for cls in ("SemiLoss", "NegEntropy")}
        done = patch(module, **options)
        assert {f.state for f in done.findings.values()} == {"replaced"}, done
        for name in ("SemiLoss", "NegEntropy"):
            cls = vars(module)[name]
            monkeypatch.setattr(cls, "__call__", both(name, own[name], cls.__call__, largest))
        plain = torch.nn.CrossEntropyLoss(reduction="none")
        module.CE = both("CE", plain, module.CE, largest)
        erase = own["attention_erase_map"]
        module.attention_erase_map = both("masking", erase, module.attention_erase_map, largest)
        ours = fitted(module.GaussianMixture)
        compared = both(
            "mixture",
            *(lambda x, f=f: f(x)[:3] for f in (fitted(own["GaussianMixture"]), ours)),
            largest,
        )

        class Compared:
            def __init__(self, *_, **__):
                pass

            def fit(self, losses):
                state = np.random.get_state()
                compared(losses)
                np.random.set_state(state)
                return ours(losses)[3]

        module.GaussianMixture = Compared
        return done

    monkeypatch.setattr(compat, "patch", checked)
    options = ["--patch", "--losses", "--noise", "asym", "--rate", "0.4"]
    monkeypatch.setattr(sys, "argv", [DIVIDEMIX, *options, "--epochs", "4", "--warm-up", "1"])
    monkeypatch.syspath_prepend(str(EXAMPLES / "dividemix_switch"))
    runpy.run_path(str(EXAMPLES / DIVIDEMIX), run_name="their_script")
    steps = re.findall(r"^(?:-?[\d.e-]+ ){2}-?[\d.e-]+$", capsys.readouterr().out, re.M)
    print({name: (len(apart), max(apart)) for name, apart in largest.items()})
    assert set(largest) == {"SemiLoss", "NegEntropy", "CE", "masking", "mixture"}
    assert len(largest["SemiLoss"]) == 3 * len(steps) > 200
    assert max(largest["masking"]) == 0
    for name, bound in {"SemiLoss": 1e-6, "NegEntropy": 1e-6, "CE": 1e-6, "mixture": 1e-5}.items():
        assert max(largest[name]) < bound, name


def slow_functions():
    path = EXAMPLES / "dividemix_switch/slow_functions.py"
    spec = importlib.util.spec_from_file_location("slow_functions", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("size", [8, 9, 32])
@pytest.mark.parametrize("cells", [4, 7])
def test_slow_functions_mask_as_compat_does(size, cells):
    B, K = 256, 10
    images, features = torch.rand(B, 3, size, size), torch.randn(B, 16, cells, cells).relu()
    targets, w = torch.softmax(torch.randn(B, K), 1), torch.rand(B, 1)
    results = []
    for functions in (slow_functions(), compat):
        changed = targets.clone()
        random.seed(0)
        *views, returned = functions.attention_erase_map(images, features, w, changed)
        assert returned is changed
        assert all((view != images).flatten(1).any(1).all() for view in views)
        results.append((*views, changed, torch.tensor(random.random())))
    assert all(map(torch.equal, *results))


def test_slow_criteria_are_those_of_compat():
    slow = slow_functions()
    x, u = torch.randn(6, 5), torch.randn(7, 5)
    tx, tu = (torch.softmax(torch.randn(n, 5), 1) for n in (6, 7))
    for epoch in (3.0, 9.5, 40.0):
        values = [m.SemiLoss(lambda_u=20)(x, tx, u, tu, epoch, 4) for m in (slow, compat)]
        torch.testing.assert_close(values[0][:2], values[1][:2])
        assert values[0][2] == pytest.approx(values[1][2])
    torch.testing.assert_close(slow.NegEntropy()(x), compat.NegEntropy()(x))
