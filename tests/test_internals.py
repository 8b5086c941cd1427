"""Without the names of torch that are not public everything gives the same, on the public way."""

from __future__ import annotations

import runpy
from typing import Any

import pytest
import torch
from sheets import OPERATIONS, inputs_of, with_gradients
from torch.autograd import forward_ad

import sanm_kernels as sk
from sanm_kernels import backends
from sanm_kernels.ops import internals

#: Where torch has the name, the name, and what of ours needs it.
NAMES: dict[str, tuple[Any, str]] = {
    "below_autograd": (torch._C, "_AutoDispatchBelowAutograd"),
    "transforms_active": (torch._C, "_are_functorch_transforms_active"),
    "device_guard": (torch.cuda, "_DeviceGuard"),
    "forward_mode_active": (forward_ad, "_current_level"),
}


def hide(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the package what it is where torch lacks a name; torch itself keeps it."""
    holder, name = NAMES[missing]
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(holder, name)
        found = runpy.run_path(str(internals.__file__))
    assert found[missing] is not getattr(internals, missing)
    monkeypatch.setattr(internals, missing, found[missing])


@pytest.fixture(params=NAMES)
def hidden(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    hide(request.param, monkeypatch)


def everything(backend: str) -> dict[str, torch.Tensor]:
    """Outputs and gradients of every function, without and with gradients to record."""
    result = {}
    for name, operation in OPERATIONS.items():
        x = inputs_of(operation, "cpu", torch.float32)
        with torch.no_grad():
            plain = operation.run(x, backend=backend)
        recorded = with_gradients(operation, x, backend=backend)
        for kind, found in (("plain", plain), ("recorded", recorded)):
            result |= {f"{name}, {kind}, {key}": value for key, value in found.items()}
    return result


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("missing", NAMES)
def test_results_and_gradients_are_the_same(missing, backend, monkeypatch):
    if backends.load("cpu") is not None and backend == "cpu":
        pytest.skip(str(backends.load("cpu")))
    expected = everything(backend)
    hide(missing, monkeypatch)
    found = everything(backend)
    assert len(expected) > 30 and list(found) == list(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_transforms_and_the_refusal_of_forward_mode(hidden):
    logits, labels = torch.randn(4, 5, requires_grad=True), torch.tensor([0, 1, 2, 3])

    def loss(z):
        return sk.masked_loss(z, labels).total

    (wanted,) = torch.autograd.grad(loss(logits), logits)
    constant = logits.detach()
    torch.testing.assert_close(torch.func.grad(loss)(constant), wanted)
    batch = torch.stack([constant, 2 * constant])
    torch.testing.assert_close(torch.func.vmap(loss)(batch), torch.stack([loss(z) for z in batch]))
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(loss, (constant,), (constant,))
    with (
        forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match="no forward-mode derivative"),
    ):
        loss(forward_ad.make_dual(constant, constant))


def test_second_derivatives_are_refused(hidden):
    logits = torch.randn(4, 5, requires_grad=True)
    loss = sk.masked_loss(logits, torch.tensor([0, 1, 2, 3])).total
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once, not twice"):
        gradient.sum().backward()


def test_a_constant_of_a_trace_is_marked_as_torch_marks_it():
    def ours() -> None: ...

    def theirs() -> None: ...

    internals.constant(ours)
    torch.compiler.assume_constant_result(theirs)
    assert vars(ours) == vars(theirs) != {}
