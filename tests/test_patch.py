"""`compat.patch` on many forms of the released functions: replaced by the same, or kept."""

from __future__ import annotations

import functools
import random
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from forms import (
    ERASE,
    FORMS,
    NEG,
    RAMP,
    DivideMix,
    Entropy,
    Form,
    LongRamp,
    OnGpuOnly,
    Probabilities,
    criterion_inputs,
    lu,
    lx,
    masking,
    masking_clothing1m,
    masking_inputs,
    rampup,
)
from torch import Tensor

from sanm_kernels import compat, dropin, trials


def script(name: str = "their_script", **names: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    vars(module).update(names)
    return module


def called(module: types.ModuleType, form: Form) -> list[Any]:
    """Results, gradients, changed arguments and next random number of a call."""
    function = getattr(module, form.name)
    if form.name == ERASE:
        given = masking_inputs(3)
        if form.stub is masking_clothing1m:
            given = given[:3]
        return [*function(*given), *given, random.random()]
    given = criterion_inputs(3)
    if form.name == NEG:
        given = given[:1]
    result = function(*form.made_with)(*given, *form.more)
    results = list(result) if isinstance(result, tuple) else [result]
    total = sum((i + 1) * r for i, r in enumerate(results[:2]))
    leaves = [x for x in given if x.requires_grad]
    return [*results, *torch.autograd.grad(total, leaves, allow_unused=True)]


@pytest.fixture(autouse=True)
def originals() -> Iterator[None]:
    """The classes above are as they were, whatever a test leaves patched."""
    classes = [form.stub for form in FORMS.values() if isinstance(form.stub, type)]
    before = {cls: dict(vars(cls)) for cls in classes}
    yield
    for cls, held in before.items():
        assert dict(vars(cls)) == held, cls


@pytest.mark.parametrize("title", FORMS)
def test_none_is_silently_different(title):
    form = FORMS[title]
    module = script(**{form.name: form.stub})
    untouched = form.state == "not verified"
    expected = None if untouched else called(module, form)
    states = random.getstate(), str(np.random.get_state()), torch.get_rng_state()
    with compat.patch(module, verbose=False) as done:
        assert random.getstate() == states[0] and str(np.random.get_state()) == states[1]
        assert torch.equal(torch.get_rng_state(), states[2])
        finding = done.findings[form.name]
        assert finding.state == form.state, done
        assert (form.name in done.replaced) == (form.state == "replaced")
        for words in form.says:
            assert words in finding.reason, done
        largest = {k: v for k, v in finding.differences.items() if v > 0 or v != v}
        print(f"{title:42}{finding.state:14}", *(f"{k} {v:.0e}" for k, v in largest.items()))
        if form.state == "replaced":
            bound = 0.0 if form.name == ERASE else 2e-5  # of values up to 180: rounding
            assert all(value <= bound for value in finding.differences.values()), done
        if untouched:
            return
        for a, b in zip(expected, called(module, form), strict=True):
            if isinstance(a, Tensor) and form.name == ERASE:
                assert torch.equal(a, b)
            elif isinstance(a, Tensor):
                torch.testing.assert_close(a, b, rtol=4e-6, atol=4e-7, equal_nan=True)
            else:
                assert a == b


def test_objects_and_other_modules_compute_with_ours_too(monkeypatch):
    """What was made or imported before patch was called."""
    erase = masking()
    criterion, module = LongRamp(50), script(attention_erase_map=erase, SemiLoss=LongRamp)
    other = script("their_utils", mask=erase, nothing=1)
    monkeypatch.setitem(sys.modules, other.__name__, other)
    given, calls = criterion_inputs(0), []
    monkeypatch.setattr(dropin, "call", counted(dropin.call, calls))
    with compat.patch(module, verbose=False) as done:
        assert other.mask is module.attention_erase_map is not erase
        assert "also in their_utils" in done.findings["attention_erase_map"].reason
        calls.clear()
        assert criterion(*given, *RAMP)[2] == 50 * 7.5 / 40 and calls
        assert isinstance(module.SemiLoss(1), LongRamp)
    assert other.mask is module.attention_erase_map is erase and other.nothing == 1
    calls.clear()
    criterion(*given, *RAMP)
    assert calls == [] and done.replaced == {}
    done.undo()


def counted(function: Callable[..., Any], calls: list[int]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        return function(*arguments, **named)

    return call


def test_force_replaces_what_differs_or_cannot_be_called():
    module = script(attention_erase_map=masking_clothing1m, SemiLoss=OnGpuOnly, NegEntropy=int)
    with compat.patch(module, verbose=False) as done:
        assert done.replaced == {} and module.attention_erase_map is masking_clothing1m
    with compat.patch(module, force=True, verbose=False) as done:
        assert set(done.replaced) == {"attention_erase_map", "SemiLoss"}
        assert done.findings["attention_erase_map"].reason.startswith("forced, kept: ratio_max")
        assert "forced, not verified" in done.findings["SemiLoss"].reason
        assert done.findings["NegEntropy"].state == "not verified"
        ratio = module.attention_erase_map(*masking_inputs(0)[:3])[0]
        assert (ratio <= 0.23).all()


def test_what_is_a_package_s_own_is_left():
    module = script(SemiLoss=compat.SemiLoss, NegEntropy=Entropy)
    with compat.patch(module, verbose=False):
        again = compat.patch(module, verbose=False)
        assert again.replaced == {}
        assert {f.reason for f in again.findings.values()} == {"it is this package's already"}


def test_a_call_of_another_kind_is_the_script_s_own():
    """A mode that was not tried may change the losses."""

    class Modes:
        def __call__(self, x, tx, u, tu, epoch, warm_up, squared=True, name="both"):
            second = lu(u, tu) if squared else lu(u, tu).sqrt()
            return lx(x, tx), second, rampup(epoch, warm_up)

    given = criterion_inputs(1)
    expected = [Modes()(*given, *RAMP, squared)[1] for squared in (True, False)]
    module = script(SemiLoss=Modes)
    with compat.patch(module, verbose=False) as done:
        assert done.findings["SemiLoss"].state == "replaced"
        for squared, value in zip((True, False), expected, strict=True):
            got = module.SemiLoss()(*given, *RAMP, squared=squared)
            torch.testing.assert_close(got[1], value)
        named = dict(zip(("x", "tx", "u", "tu"), given, strict=True))
        got = module.SemiLoss()(epoch=17.5, warm_up=10, **named)
        torch.testing.assert_close(got[0], lx(given[0], given[1]))
        assert got[2] == 7.5 / 16
        with pytest.raises(TypeError, match="epoch"):
            module.SemiLoss()(*given)


def test_a_device_where_the_original_cannot_be_called_is_passed_over(monkeypatch):
    class OnCpu:
        def __call__(self, x, tx, u, tu, epoch, warm_up):
            return lx(x.cpu(), tx), lu(u, tu), rampup(epoch, warm_up)

    module = script(SemiLoss=OnCpu, attention_erase_map=masking())
    for devices, state in ((["meta", "cpu"], "replaced"), (["meta"], "not verified")):
        monkeypatch.setattr(trials, "devices", lambda devices=devices: devices)
        with compat.patch(module, verbose=False) as done:
            assert {f.state for f in done.findings.values()} == {state}, done
    assert done.findings["SemiLoss"].reason.startswith("NotImplementedError: Cannot copy out of")


def test_what_cannot_always_be_called_is_not_verified():
    class Early:
        def __call__(self, x, tx, u, tu, epoch):
            if epoch > 100:
                raise ValueError("too late")
            return lx(x, tx), lu(u, tu), 0.0

    with compat.patch(script(SemiLoss=Early), verbose=False) as done:
        finding = done.findings["SemiLoss"]
        assert (finding.state, finding.reason) == ("not verified", "ValueError: too late")


def test_images_of_another_kind_are_the_script_s_own():
    """Non-square ones, other channels, half precision: they were not tried."""
    calls: list[int] = []
    module = script(attention_erase_map=counted(masking(), calls))
    images, features, q, targets = masking_inputs(0)
    others = {
        "not square": (images[:, :, :20], features, q, targets),
        "one channel": (images[:, :1], features, q, targets),
        "tiny": (images[..., :4, :4], features, q, targets),
        "half": (images, features.half(), q, targets),
    }
    with compat.patch(module, verbose=False) as done:
        assert done.findings["attention_erase_map"].state == "replaced"
        calls.clear()
        module.attention_erase_map(images, features, q, targets)
        assert calls == []
        for given in others.values():
            module.attention_erase_map(*given)
        assert len(calls) == 4


@pytest.mark.parametrize("K", [5, 100])
@pytest.mark.parametrize("apart", [False, True])
def test_one_call_for_both_halves(K, apart, monkeypatch):
    """Also where they are not of one tensor, unless torch itself is as fast on the CPU."""
    calls: list[int] = []
    z, t = torch.randn(9, K, requires_grad=True), torch.softmax(torch.randn(9, K), 1)
    module = script(SemiLoss=DivideMix)
    halves = (z[:4] * 1, t[:4], z[4:] * 1, t[4:]) if apart else (z[:4], t[:4], z[4:], t[4:])
    expected = [*DivideMix()(*halves, *RAMP)]
    expected.append(torch.autograd.grad(expected[0] + expected[1], z, retain_graph=True)[0])
    monkeypatch.setattr(dropin, "call", counted(dropin.call, calls))
    with compat.patch(module, verbose=False):
        calls.clear()
        got = [*DivideMix()(*halves, *RAMP)]
        got.append(torch.autograd.grad(got[0] + got[1], z)[0])
    assert len(calls) == (0 if apart and K == 100 else 1)
    torch.testing.assert_close(got, expected)


def test_a_half_without_rows_is_the_script_s_own():
    x, t, u, tu = criterion_inputs(0)
    module = script(SemiLoss=DivideMix, NegEntropy=Entropy)
    with compat.patch(module, verbose=False):
        assert module.SemiLoss()(x, t, u[:0], tu[:0], *RAMP)[1].isnan()
        assert module.NegEntropy()(u[:0]).isnan()


def test_the_weight_is_the_script_s_own_at_every_call():
    args = types.SimpleNamespace(lambda_u=150, num_class=4)

    class Global:
        def __init__(self):
            self.calls = 0

        def __call__(self, outputs_x, targets_x, outputs_u, targets_u, epoch, warm_up):
            self.calls += 1
            assert outputs_x.shape[1] == args.num_class or not isinstance(outputs_x, Tensor)
            weight = args.lambda_u * rampup(epoch, warm_up)
            return lx(outputs_x, targets_x), lu(outputs_u, targets_u), weight

    module = script(SemiLoss=Global, args=args, criterion=Global())
    z, t = torch.randn(3, 4), torch.softmax(torch.randn(3, 4), 1)
    with compat.patch(module, verbose=False) as done:
        assert done.findings["SemiLoss"].state == "kept"  # it looks at the shape
    Global.__call__ = lambda self, x, tx, u, tu, epoch, warm_up: (
        lx(x, tx), lu(u, tu), args.lambda_u * rampup(epoch, warm_up))  # fmt: skip
    with compat.patch(module, verbose=False) as done:
        assert done.findings["SemiLoss"].state == "replaced"
        assert module.criterion(z, t, z, t, 18, 10)[2] == 75
        args.lambda_u = 75
        assert module.criterion(z, t, z, t, epoch=18, warm_up=10)[2] == 37.5
    assert module.criterion.calls == 0  # trials are on a copy


def test_names_of_the_script_s_own_arguments():
    def attention_erase_map(x, maps, w, y):
        return masking()(x, maps, w, y)

    module = script(attention_erase_map=attention_erase_map)
    given = masking_inputs(0)
    with compat.patch(module, verbose=False):
        a = module.attention_erase_map(given[0], given[1], y=given[3].clone(), w=given[2])
    random.seed(0)
    masking_inputs(0)
    b = attention_erase_map(given[0], given[1], given[2], given[3].clone())
    assert all(map(torch.equal, a, b))


def test_patch_says_what_it_did_and_can_be_undone(capsys):
    erase = masking(gamma=0.05)
    module = script(attention_erase_map=erase, SemiLoss=Probabilities, NegEntropy=Entropy, other=1)
    own = Entropy.__call__
    done = compat.patch(module)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "<sanm_kernels in their_script:"
    assert said[1] == "  attention_erase_map replaced: γ = 0.05, a in [0.02, 0.07]"
    assert said[2].startswith("  SemiLoss kept: L_x differs by nan, L_u differs by ")
    assert said[3] == "  NegEntropy replaced>"
    assert Entropy.__call__ is not own and module.other == 1
    done.undo()
    assert module.attention_erase_map is erase and Entropy.__call__ is own
    done.undo()
    with compat.patch(module, verbose=False):
        assert Entropy.__call__ is not own
    assert Entropy.__call__ is own and capsys.readouterr().out == ""


def test_patch_refuses_what_is_no_script():
    with pytest.raises(TypeError, match="module: expected a module, got str"):
        compat.patch("train")
    with pytest.raises(ValueError, match="module: expected one with some of"):
        compat.patch(script())


def test_losses_that_are_collected():
    """Without a gradient, of whatever object; all else is cross-entropy's own."""
    collect, labels = torch.nn.CrossEntropyLoss(reduction="none"), torch.arange(8) % 5
    others = [
        torch.nn.CrossEntropyLoss(),
        torch.nn.CrossEntropyLoss(torch.ones(5), reduction="none"),
    ]
    module = script(CE=collect, same=collect, CEloss=others[0], weighted=others[1])
    logits = 9 * torch.randn(8, 5)
    expected = collect(logits, labels)
    calls: list[int] = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(dropin, "call", counted(dropin.call, calls))
        with compat.patch(module, verbose=False) as done:
            assert set(done.findings) == {"CE", "same"} and set(done.replaced) == {"CE"}
            assert done.findings["same"].reason == "it is this package's already"
            assert module.CE is collect and isinstance(collect, torch.nn.CrossEntropyLoss)
            calls.clear()
            torch.testing.assert_close(collect(logits, labels), expected)
            assert len(calls) == 1
            trained = logits.clone().requires_grad_()
            collect(trained, labels).sum().backward()
            collect(logits.double(), labels)
            collect(logits[:, :, None], labels[:, None])
            assert len(calls) == 1 and trained.grad is not None
            assert collect(logits, torch.tensor([-100] * 8)).tolist() == [0.0] * 8
            with pytest.raises(IndexError):
                collect(logits, labels + 9)
    assert type(collect) is torch.nn.CrossEntropyLoss and done.replaced == {}
    module.args = types.SimpleNamespace(num_class=100)
    with compat.patch(module, verbose=False) as done:
        assert {f.state for f in done.findings.values()} == {"kept"}
