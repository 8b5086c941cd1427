"""docs/converting.md: the functions before and after train the same network in the same steps."""

from __future__ import annotations

import copy
import re
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sanm_kernels import compat

PAGE = Path(__file__).resolve().parent.parent / "docs/converting.md"
K, B = 4, 6


@pytest.fixture
def page() -> dict[str, Any]:
    """What the page's code defines, and the names that it takes from the rest of a script."""

    def linear_rampup(epoch: float, warm_up: float) -> float:
        return 25 * min(max((epoch - warm_up) / 16, 0.0), 1.0)

    criterion = compat.SemiLoss(25)
    args = types.SimpleNamespace(num_class=K, T=0.5, alpha=4, r=0.9)
    names: dict[str, Any] = {
        "args": args, "criterion": criterion, "linear_rampup": linear_rampup, "device": "cpu",
        "attention_erase_map": compat.attention_erase_map,
    }  # fmt: skip
    for block in re.findall(r"^```py\n(.*?)^```", PAGE.read_text(), re.M | re.S):
        exec(block, names)
    return names


def loaders() -> tuple[list[Any], list[Any]]:
    labeled, unlabeled = [], []
    for _ in range(3):
        x, x2, u, u2 = torch.rand(4, B, 3, 8, 8)
        labeled.append((x, x2, torch.randint(K, (B,)), torch.rand(B)))
        unlabeled.append((u, u2))
    return labeled, unlabeled


def test_train(page):
    torch.manual_seed(0)
    data = loaders()
    first = nn.Sequential(nn.Flatten(), nn.Linear(192, K))
    other, states = copy.deepcopy(first), []
    for name in ("train", "train_converted"):
        net = copy.deepcopy(first)
        torch.manual_seed(1)
        np.random.seed(1)
        page[name](14, net, other, torch.optim.SGD(net.parameters(), 0.1), *data)
        states.append([*net.parameters(), torch.rand(()), torch.tensor(np.random.random())])
    assert not torch.equal(states[0][0], next(first.parameters()))
    torch.testing.assert_close(*states)


def test_eval_train(page):
    """The average of epochs too; 50,000 is written into the original."""
    torch.manual_seed(0)
    x, labels = 3 * torch.randn(50_000, K), torch.randint(K, (50_000,))
    order = torch.randperm(50_000)[:300]

    class Loader(list):
        dataset = range(50_000)

    found = []
    for name in ("eval_train", "eval_train_converted"):
        all_loss: list[Any] = []
        for scale in (1.0, 2.0):
            net = nn.Linear(K, K, bias=False)
            net.weight.data = scale * torch.eye(K)
            parts = torch.cat([order, torch.arange(50_000)]).split(25_150)
            page["eval_loader"] = Loader((x[i], labels[i], i) for i in parts)
            np.random.seed(0)
            quality, all_loss = page[name](net, all_loss)
        found.append(quality)
    assert found[0].std() > 0.1
    np.testing.assert_allclose(*found, atol=1e-4)


def test_masked(page):
    """Other random numbers: the losses of the two differ, the masked parts do not in kind."""

    class Net(nn.Module):
        def forward(self, x):
            return x.mean((2, 3)), x[:, :, ::2, ::2]

    x, u, w, w_u = *torch.rand(2, B, 3, 8, 8), *torch.rand(2, B, 1)
    features = torch.randn(2 * B, 5, 4, 4).relu()
    targets = torch.softmax(torch.randn(2, B, K), 2)
    decoder = nn.Upsample(scale_factor=2)
    for name in ("masked", "masked_converted"):
        found = page[name](Net(), decoder, x, u, w, w_u, features, *targets)
        for view in found[:2]:
            assert (view != torch.cat([x, u])).flatten(1).any(1).all()
        drop = targets.flatten(0, 1).amax(1) - found[2].gather(
            1, targets.flatten(0, 1).argmax(1, keepdim=True)
        ).squeeze(1)
        quality = torch.cat([w, w_u])[:, 0]
        assert (
            (drop > 0.0199 + 0.03 * (1 - quality)) & (drop < 0.0701 + 0.03 * (1 - quality))
        ).all()
        assert 0 < found[3] < 0.02
