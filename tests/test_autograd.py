"""What autograd must hear of: results written over, and derivatives that do not exist."""

from __future__ import annotations

import pytest
import torch
from sheets import OPERATIONS

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


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_first_used_in_inference_mode(backend):
    """Tensors of numbers are kept, and one of inference mode could not be saved for backward."""
    logits, labels = torch.randn(4, 5, requires_grad=True), torch.randint(0, 5, (4,))
    numbers = {"prior_weight": 0.123456789, "backend": backend}
    with torch.inference_mode():
        expected = sk.masked_loss(logits, labels, **numbers).total
    total = sk.masked_loss(logits, labels, **numbers).total
    total.backward()
    assert torch.equal(total, expected) and logits.grad is not None


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_view_given_twice_gets_both_gradients(backend):
    x, other = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3)
    permutation = torch.tensor([4, 3, 5, 0, 2, 1])
    mixed = sk.mixup_views([x, other, x], 0.25, permutation, backend=backend)
    mixed.backward(torch.arange(18.0).reshape(6, 3))
    stack = torch.cat([x, other, x])
    plain = 0.25 * stack + 0.75 * stack[permutation]
    (expected,) = torch.autograd.grad(plain, x, torch.arange(18.0).reshape(6, 3))
    torch.testing.assert_close(x.grad, expected)


def differentiable(name, backend):
    """A scalar function of an operation's differentiable inputs, and those, in float64."""
    operation = OPERATIONS[name]
    torch.manual_seed(0)
    inputs = operation.make()
    leaves = {key: inputs[key].double() for key in operation.wrt}

    def function(leaves):
        outputs = operation.run(inputs | leaves, backend=backend).values()
        return sum((x * torch.linspace(-1, 2, x.numel()).view(x.shape)).sum() for x in outputs)

    return function, leaves


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_reverse_mode_of_torch_func_is_that_of_autograd(backend, name):
    function, leaves = differentiable(name, backend)
    held = {key: x.clone().requires_grad_() for key, x in leaves.items()}
    expected = torch.autograd.grad(function(held), list(held.values()))
    got = torch.func.grad(function)(leaves)
    pulled = torch.func.vjp(function, leaves)[1](torch.ones((), dtype=torch.float64))[0]
    for key, gradient in zip(held, expected, strict=True):
        assert torch.equal(got[key], gradient) and torch.equal(pulled[key], gradient), key


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_forward_mode_is_refused(backend, name):
    """Silently 0 once."""
    function, leaves = differentiable(name, backend)
    tangents = {key: torch.ones_like(x) for key, x in leaves.items()}
    message = "no forward-mode derivative"
    with pytest.raises(NotImplementedError, match=message):
        torch.func.jvp(function, (leaves,), (tangents,))
    with pytest.raises(NotImplementedError, match=message):
        torch.func.jacfwd(function)(leaves)
    with torch.autograd.forward_ad.dual_level():
        dual = {key: torch.autograd.forward_ad.make_dual(leaves[key], tangents[key])
                for key in leaves}  # fmt: skip
        with pytest.raises(NotImplementedError, match=message):
            function(dual)
        function(leaves)  # without tangents


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap_and_jacrev(backend):
    logits, labels = torch.randn(3, 4, 5), torch.randint(5, (4,))

    def function(z):
        return sk.sample_loss(z, labels, backend=backend)

    stacked = torch.func.vmap(function)(logits)
    each = [torch.func.jacrev(function)(z) for z in logits]
    assert torch.equal(stacked, torch.stack([function(z) for z in logits]))
    assert torch.equal(torch.func.vmap(torch.func.jacrev(function))(logits), torch.stack(each))
    plain = torch.func.jacrev(
        lambda z: torch.nn.functional.cross_entropy(z, labels, reduction="none")
    )
    torch.testing.assert_close(each[0], plain(logits[0]))
    with pytest.raises(RuntimeError, match="can be differentiated once, not twice"):
        torch.func.jacrev(torch.func.jacrev(function))(logits[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_tensors_kept_from_a_transform_have_their_gradients(backend, name):
    """After torch.func.grad has ended, what it handed out is the tensor that it was given."""
    operation = OPERATIONS[name]
    key = operation.wrt[0]
    inputs = operation.make()
    inputs[key] = given = inputs[key].requires_grad_()
    kept = []

    def keep(x):
        kept.append(x)
        return x.sum()

    torch.func.grad(keep)(given)
    found = []
    for x in (given, kept[0]):
        outputs = operation.run(inputs | {key: x}, backend=backend).values()
        total = sum(y.square().sum() for y in outputs if y.requires_grad)
        found.append(torch.autograd.grad(total, given)[0])
    assert torch.equal(*found)
