"""`compat.patch` on many forms of the released functions: replaced by the same, or kept."""

from __future__ import annotations

import functools
import math
import random
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sanm_kernels import compat, trials
from sanm_kernels.reference import activation


def script(name: str = "their_script", **names: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__dict__.update(names)
    return module


# ---- Masking as the scripts have it: one sample after another, draws from `random`.


def masking(
    low: float = 0.02,
    high: float = 0.07,
    gamma: float = 0.03,
    scale: float = 0.5,
    aspects: tuple[float, float] = (0.8, 1.25),
    pixels: bool = False,
    quantize: bool = True,
    in_place: bool = True,
    device: str | None = None,
) -> Callable[..., Any]:
    def attention_erase_map(images, outputs, gmmweight, target_mask):
        if device is not None:
            images = images.to(device)
        channels, H, W = images.shape[1:]
        peaks, troughs = activation.locate((outputs**2).sum(1), H, W, quantize).tolist()
        views = images.clone(), images.clone()
        if not in_place:
            target_mask = target_mask.clone()
        for i in range(len(images)):
            ratio = random.uniform(low, high) * (H * W if pixels else 1)
            ratio = torch.tensor(ratio) + gamma * (1 - gmmweight[i].reshape(()))
            aspect = torch.tensor(random.uniform(*aspects))
            area = ratio if pixels else ratio * (H * W) * scale
            rows = min(max(round(math.sqrt(area * aspect)), 1), H)
            columns = min(max(round(math.sqrt(area / aspect)), 1), W)
            for view, place in zip(views, (peaks, troughs), strict=True):
                top, left = min(place[i][0], H - rows), min(place[i][1], W - columns)
                for channel in range(channels):
                    fill = random.random()
                    view[i, channel, top : top + rows, left : left + columns] = fill
            label = target_mask[i].argmax()
            rest = target_mask[i, label] - ratio
            target_mask[i] += ratio / (target_mask.shape[1] - 1)
            target_mask[i, label] = rest
        return *views, target_mask

    return attention_erase_map


def masking_clothing1m(images, outputs, gmmweight):
    """Areas in pixels, γ·(1 − q) added to them, returned as if they were ratios."""
    pixels = images.shape[2] * images.shape[3]
    area = torch.tensor([random.uniform(0.06, 0.13) * pixels for _ in images])
    area = area + 0.1 * (1 - gmmweight.reshape(-1))
    return area, area, images.clone(), images.clone()


def masking_inputs(seed: int) -> tuple[Tensor, ...]:
    torch.manual_seed(seed)
    random.seed(seed)
    features = torch.randn(9, 24, 5, 5).relu()
    return torch.rand(9, 3, 24, 24), features, torch.rand(9, 1), torch.softmax(torch.randn(9, 7), 1)


# ---- Criteria. `lx` and `lu` are DivideMix's; the forms differ in what comes after them.


def lx(outputs: Tensor, targets: Tensor) -> Tensor:
    return -torch.mean(torch.sum(F.log_softmax(outputs, dim=1) * targets, dim=1))


def lu(outputs: Tensor, targets: Tensor) -> Tensor:
    return torch.mean((torch.softmax(outputs, dim=1) - targets) ** 2)


def rampup(current: float, warm_up: float, length: float = 16) -> float:
    return float(np.clip((current - warm_up) / length, 0.0, 1.0))


class DivideMix:
    def __call__(self, outputs_x, targets_x, outputs_u, targets_u, epoch, warm_up):
        return lx(outputs_x, targets_x), lu(outputs_u, targets_u), 30 * rampup(epoch, warm_up)


class C2D:  # the ramp is given its λ_u too
    def __call__(self, outputs_x, targets_x, outputs_u, targets_u, epoch, warm_up, lambda_u):
        weight = lambda_u * rampup(epoch, warm_up)
        return lx(outputs_x, targets_x), lu(outputs_u, targets_u), weight


class LambdaFirst:
    def __call__(self, outputs_x, targets_x, outputs_u, targets_u, lambda_u, epoch, warm_up):
        weight = lambda_u * rampup(epoch, warm_up)
        return lx(outputs_x, targets_x), lu(outputs_u, targets_u), weight


class WithoutEpoch:
    def __call__(self, outputs_x, targets_x, outputs_u, targets_u):
        return lx(outputs_x, targets_x), lu(outputs_u, targets_u)


class MixMatch(torch.nn.Module):  # five arguments, a module, a ramp over all epochs
    def forward(self, outputs_x, targets_x, outputs_u, targets_u, epoch):
        return lx(outputs_x, targets_x), lu(outputs_u, targets_u), 75 * rampup(epoch, 0, 1024)


class LongRamp:
    def __init__(self, lambda_u, length=40):
        self.lambda_u, self.length = lambda_u, length

    def __call__(self, outputs_x, targets_x, outputs_u, targets_u, epoch, warm_up):
        weight = self.lambda_u * rampup(epoch, warm_up, self.length)
        return lx(outputs_x, targets_x), lu(outputs_u, targets_u), weight


class RampGiven:
    def __call__(self, xs, tx, us, tu, epoch, warm_up, rampup_length=16):
        return lx(xs, tx), lu(us, tu), 25 * rampup(epoch, warm_up, rampup_length)


class Probabilities:
    def __call__(self, outputs_x, targets_x, outputs_u, targets_u, epoch, warm_up):
        labeled = -torch.mean(torch.sum(torch.log(outputs_x) * targets_x, dim=1))
        unlabeled = torch.mean((outputs_u - targets_u) ** 2)
        return labeled, unlabeled, 30 * rampup(epoch, warm_up)


class ProbabilitiesU:  # of the unlabelled half alone
    def __call__(self, outputs_x, targets_x, outputs_u, targets_u, epoch, warm_up):
        unlabeled = torch.mean((outputs_u - targets_u) ** 2)
        return lx(outputs_x, targets_x), unlabeled, 30 * rampup(epoch, warm_up)


class SummedU:
    def __call__(self, outputs_x, targets_x, outputs_u, targets_u, epoch, warm_up):
        unlabeled = lu(outputs_u, targets_u) * outputs_u.shape[1]
        return lx(outputs_x, targets_x), unlabeled, 30 * rampup(epoch, warm_up)


class WeightInside:
    def __call__(self, outputs_x, targets_x, outputs_u, targets_u, epoch, warm_up):
        return lx(outputs_x, targets_x) + 30 * rampup(epoch, warm_up) * lu(outputs_u, targets_u)


class WeightOfLogits:
    def __call__(self, outputs_x, targets_x, outputs_u, targets_u, epoch, warm_up):
        weight = 30 * rampup(epoch, warm_up) * float(outputs_x.detach().abs().max() > 0)
        return lx(outputs_x, targets_x), lu(outputs_u, targets_u), weight


class NoGradientU:
    def __call__(self, outputs_x, targets_x, outputs_u, targets_u, epoch, warm_up):
        unlabeled = lu(outputs_u.detach(), targets_u)
        return lx(outputs_x, targets_x), unlabeled, 30 * rampup(epoch, warm_up)


class LateChange:  # after the ramp another loss
    def __call__(self, outputs_x, targets_x, outputs_u, targets_u, epoch, warm_up):
        labeled = lx(outputs_x, targets_x) * (2 if epoch > 200 else 1)
        return labeled, lu(outputs_u, targets_u), 30 * rampup(epoch, warm_up)


class OnGpuOnly:
    def __call__(self, outputs_x, targets_x, outputs_u, targets_u, epoch, warm_up):
        raise AssertionError("Torch not compiled with CUDA enabled")


class Entropy:
    def __call__(self, outputs):
        probs = torch.softmax(outputs, dim=1)
        return torch.mean(torch.sum(probs.log() * probs, dim=1))


class ClampedEntropy:
    def __call__(self, outputs):
        probs = torch.softmax(outputs, dim=1).clamp(min=1e-8)
        return torch.mean(torch.sum(probs.log() * probs, dim=1))


class EntropyOfProbabilities:
    def __call__(self, probs):
        return torch.mean(torch.sum(probs.clamp(min=1e-12).log() * probs, dim=1))


class PositiveEntropy(Entropy):
    def __call__(self, outputs):
        return -super().__call__(outputs)


def criterion_inputs(seed: int) -> tuple[Tensor, ...]:
    torch.manual_seed(seed)
    x, u = 3 * torch.randn(6, 5), 3 * torch.randn(8, 5)
    tx, tu = torch.softmax(torch.randn(6, 5), 1), torch.softmax(torch.randn(8, 5), 1)
    return x.requires_grad_(), tx, u.requires_grad_(), tu


class Form(NamedTuple):
    """A form of a released function, what `patch` is to say, and what it is called with then."""

    name: str
    stub: Any
    state: str
    says: tuple[str, ...] = ()
    more: tuple[float, ...] = ()
    made_with: tuple[float, ...] = ()


ERASE, SEMI, NEG = "attention_erase_map", "SemiLoss", "NegEntropy"
RAMP = (17.5, 10)
TARGETS = ("returned targets", "argument 4")
FORMS = {
    "masking: the released CIFAR function": Form(ERASE, masking(), "replaced"),
    "masking: γ = 0.05": Form(ERASE, masking(gamma=0.05), "replaced"),
    "masking: γ = 0.02": Form(ERASE, masking(gamma=0.02), "replaced"),
    "masking: ratios 0.05 to 0.1": Form(ERASE, masking(0.05, 0.1), "replaced"),
    "masking: ratios 0.02 to 0.3, γ = 0.1": Form(ERASE, masking(0.02, 0.3, 0.1), "replaced"),
    "masking: whole areas": Form(ERASE, masking(scale=1.0), "replaced"),
    "masking: areas in pixels": Form(ERASE, masking(pixels=True), "kept", TARGETS),
    "masking: flatter boxes": Form(ERASE, masking(aspects=(0.5, 1.0)), "kept", ("view at the",)),
    "masking: not quantised": Form(ERASE, masking(quantize=False), "kept", ("view at the",)),
    "masking: targets not in place": Form(ERASE, masking(in_place=False), "kept", TARGETS[1:]),
    "masking: on a GPU alone": Form(ERASE, masking(device="cuda:9"), "not verified"),
    "masking: Clothing1M": Form(ERASE, masking_clothing1m, "kept", ("ratio_max", "ratio_min")),
    "SemiLoss: DivideMix": Form(SEMI, DivideMix, "replaced", more=RAMP),
    "SemiLoss: C2D, epoch, warm_up, lambda_u": Form(SEMI, C2D, "replaced", more=(*RAMP, 50)),
    "SemiLoss: lambda_u first": Form(SEMI, LambdaFirst, "replaced", more=(50, *RAMP)),
    "SemiLoss: without the epoch": Form(SEMI, WithoutEpoch, "replaced"),
    "SemiLoss: MixMatch": Form(SEMI, MixMatch, "replaced", more=(17.5,)),
    "SemiLoss: another ramp": Form(SEMI, LongRamp, "replaced", more=RAMP, made_with=(50, 80)),
    "SemiLoss: the ramp's length given": Form(SEMI, RampGiven, "replaced", more=(*RAMP, 80)),
    "SemiLoss: of probabilities": Form(SEMI, Probabilities, "kept", ("L_x", "L_u"), RAMP),
    "SemiLoss: L_u of probabilities": Form(SEMI, ProbabilitiesU, "kept", ("L_u",), RAMP),
    "SemiLoss: L_u summed over classes": Form(SEMI, SummedU, "kept", ("L_u",), RAMP),
    "SemiLoss: one sum": Form(SEMI, WeightInside, "kept", ("cannot be had",), RAMP),
    "SemiLoss: weight of the logits": Form(SEMI, WeightOfLogits, "kept", ("cannot be had",), RAMP),
    "SemiLoss: L_u without a gradient": Form(SEMI, NoGradientU, "kept", ("gradient 3",), RAMP),
    "SemiLoss: another L_x later on": Form(SEMI, LateChange, "kept", ("L_x",), RAMP),
    "SemiLoss: on a GPU alone": Form(SEMI, OnGpuOnly, "not verified"),
    "NegEntropy": Form(NEG, Entropy, "replaced"),
    "NegEntropy: clamped": Form(NEG, ClampedEntropy, "kept", ("penalty",)),
    "NegEntropy: of probabilities": Form(NEG, EntropyOfProbabilities, "kept", ("penalty",)),
    "NegEntropy: the other sign": Form(NEG, PositiveEntropy, "kept", ("penalty",)),
}


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
    monkeypatch.setattr(compat, "masked_loss", counted(compat.masked_loss, calls))
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
        "half": (images, features.half(), q, targets),
    }
    with compat.patch(module, verbose=False) as done:
        assert done.findings["attention_erase_map"].state == "replaced"
        calls.clear()
        module.attention_erase_map(images, features, q, targets)
        assert calls == []
        for given in others.values():
            module.attention_erase_map(*given)
        assert len(calls) == 3


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
