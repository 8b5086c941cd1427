"""Criteria whose losses are cut out of their source, and those left to run as they are."""

from __future__ import annotations

import functools
import importlib.util
import math
import types
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from forms import criterion_inputs, lu, lx, rampup

from sanm_kernels import compat
from sanm_kernels.rewriting import with_losses

args = types.SimpleNamespace(lambda_u=30)


def marked(*given: torch.Tensor) -> tuple[Any, Any]:
    return "L_x", [x.shape[0] for x in given]


class Plain:
    def __call__(self, outputs_x, targets_x, outputs_u, targets_u, epoch, warm_up):
        probs_u = torch.softmax(outputs_u, dim=1)
        Lx = -torch.mean(torch.sum(F.log_softmax(outputs_x, dim=1) * targets_x, dim=1))
        Lu = torch.mean((probs_u - targets_u) ** 2)
        return Lx, Lu, args.lambda_u * rampup(epoch, warm_up)


class OfItself(torch.nn.Module):
    """With a weight of several statements, defaults, and a docstring."""

    def __init__(self):
        super().__init__()
        self.most = 75

    def forward(self, x, tx, u, tu, epoch, length=16, warm_up=10):
        """What it is."""
        done = np.clip((epoch - warm_up) / length, 0.0, 1.0)
        log_p = x.log_softmax(1)
        weight = self.most * float(done)
        return -(log_p * tx).sum(1).mean(), F.mse_loss(u.softmax(1), tu), weight, done


def of_cells(most, ramp):
    class Inner:
        def __call__(self, x, tx, u, tu, epoch, warm_up):
            squares = torch.nn.functional.mse_loss(torch.softmax(u, 1), tu)
            return -(F.log_softmax(x, 1) * tx).sum(1).mean(), squares, most * ramp(epoch, warm_up)

    return Inner


REWRITTEN = {
    "plain": (Plain, (17.5, 10), {}),
    "of itself": (OfItself, (17.5,), {"warm_up": 5}),
    "of cells": (of_cells(40, rampup), (17.5, 10), {}),
}


@pytest.mark.parametrize("title", REWRITTEN)
def test_the_losses_are_ours_and_all_else_its_own(title):
    cls, more, named = REWRITTEN[title]
    method = "forward" if title == "of itself" else "__call__"
    original, given, criterion = getattr(cls, method), criterion_inputs(0), cls()
    expected = criterion(*given, *more, **named)
    ours = with_losses(original, marked)
    assert ours(criterion, *given, *more, **named) == ("L_x", [6, 6, 8, 8], *expected[2:])
    module = types.ModuleType("their_script")
    module.SemiLoss = cls
    with compat.patch(module, verbose=False) as done:
        assert done.findings["SemiLoss"].state == "replaced"
        assert getattr(cls, method).__code__.co_filename == "<sanm_kernels>"
        torch.testing.assert_close(criterion(*given, *more, **named), expected)
        with pytest.raises(TypeError, match=rf"{method}.*missing .*'epoch'"):
            criterion(*given)
    assert getattr(cls, method) is original


def keyword_only(self, x, tx, u, tu, epoch, *, most=75):
    return x.mean(), u.mean(), most * epoch


def test_arguments_given_by_name_alone():
    ours, given = with_losses(keyword_only, marked), criterion_inputs(0)
    assert (ours(None, *given, 3)[2], ours(None, *given, epoch=3, most=2)[2]) == (225, 6)


def test_global_names_are_looked_up_at_every_call(monkeypatch):
    ours = with_losses(Plain.__call__, marked)
    given = criterion_inputs(0)
    for most in (30, 50):
        monkeypatch.setattr(args, "lambda_u", most)
        assert ours(Plain(), *given, 18, 10)[2] == most / 2
    monkeypatch.setitem(globals(), "rampup", lambda epoch, warm_up: 7)
    assert ours(Plain(), *given, 18, 10)[2] == 350


def printing(self, x, tx, u, tu, epoch):
    print(epoch)
    return lx(x, tx), lu(u, tu), 0.0


def counting(self, x, tx, u, tu, epoch):
    self.calls = 1
    return x.mean(), u.mean(), 0.0


def helping(self, x, tx, u, tu, epoch):
    return lx(x, tx), lu(u, tu), 0.0


def in_place(self, x, tx, u, tu, epoch):
    y = u.softmax(1).sub_(tu)
    return x.mean(), (y * y).mean(), 0.0


def of_a_mode(self, x, tx, u, tu, epoch, dim=1):
    return x.mean(), u.softmax(dim).mean(), 0.0


def of_another(self, x, tx, u, tu, epoch):
    return x.mean() * args.lambda_u, u.mean(), 0.0


def of_a_weight(self, x, tx, u, tu, epoch):
    weight = math.sqrt(epoch)
    return x.mean() * weight, u.mean(), weight


def of_logits(self, x, tx, u, tu, epoch):
    largest = float(x.max())
    return x.mean(), u.mean(), epoch * largest


def branching(self, x, tx, u, tu, epoch):
    if epoch > 3:
        return x.mean(), u.mean(), 1.0
    return x.mean(), u.mean(), 0.0


def in_parts(self, x, tx, u, tu, epoch):
    a, b = x.mean(), u.mean()
    return a, b, 0.0


def one_sum(self, x, tx, u, tu, epoch):
    return x.mean() + u.mean()


def many(self, *given):
    return given[0].mean(), given[2].mean(), 0.0


def wrapped(function):
    @functools.wraps(function)
    def call(self, *given):
        return function(self, *given)

    return call


@wrapped
def decorated(self, x, tx, u, tu, epoch):
    return x.mean(), u.mean(), 0.0


exec("def made(self, x, tx, u, tu, epoch):\n    return x.mean(), u.mean(), 0.0")


@pytest.mark.parametrize(
    "function",
    [printing, counting, helping, in_place, of_a_mode, of_another, of_a_weight, of_logits,
     branching, in_parts, one_sum, many, decorated, globals()["made"]],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_what_else_it_does_is_not_cut_out(function):
    assert with_losses(function, marked) is None


def test_a_file_that_has_changed_since(tmp_path):
    path = tmp_path / "their_criterion.py"
    text = "def call(self, x, tx, u, tu, epoch):\n    return x.mean(), u.mean(), {}\n"
    path.write_text(text.format(1.0))
    spec = importlib.util.spec_from_file_location("their_criterion", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert with_losses(module.call, marked)(None, *criterion_inputs(0), 3)[2] == 1.0
    path.write_text(text.format(22.0))
    assert with_losses(module.call, marked) is None
    path.write_text("def call(")
    assert with_losses(module.call, marked) is None
