"""What autograd must hear of: results written over, and derivatives that do not exist."""

from __future__ import annotations

import pytest
import torch
from operations import OPERATIONS

import sanm_kernels as sk

BACKENDS = ["reference", "cpu"]
DIFFERENTIABLE = [name for name, operation in OPERATIONS.items() if operation.wrt]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_graph_that_saved_what_out_overwrites_does_not_run(backend):
    features, images = torch.rand(2, 4, 3, 3), torch.rand(2, 3, 9, 9)
    arguments = (features, torch.tensor([0, 1]), torch.rand(2))
    options = {"images": images, "num_classes": 3, "backend": backend}
    out = sk.masked_forward(*arguments, **options)
    for saved in (out.images_masked, out.images_max, out.targets_max):
        weight = torch.ones_like(saved, requires_grad=True)
        loss = (saved * weight).sum()
        sk.masked_forward(*arguments, **options, out=out)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_second_derivatives_are_refused(backend, name):
    operation = OPERATIONS[name]
    inputs = operation.make()
    for key in operation.wrt:
        inputs[key] = inputs[key].double().requires_grad_()
    leaves = [inputs[key] for key in operation.wrt]
    outputs = operation.run(inputs, backend=backend).values()
    total = sum(x.square().sum() for x in outputs if x.requires_grad)
    first = torch.autograd.grad(total, leaves, create_graph=True, allow_unused=True)
    again = sum(g.square().sum() for g in first if g is not None)
    message = "can be differentiated once, not twice"
    with pytest.raises(RuntimeError, match=message):
        torch.autograd.grad(again, leaves, allow_unused=True, retain_graph=True)
    with pytest.raises(RuntimeError, match=message):
        again.backward()


def test_first_derivatives_are_the_same_with_a_graph_of_their_own():
    logits, labels = torch.randn(4, 5, requires_grad=True), torch.randint(0, 5, (4,))
    grads = [
        torch.autograd.grad(sk.masked_loss(logits, labels).total, logits, create_graph=kept)[0]
        for kept in (False, True)
    ]
    assert torch.equal(*grads)
