"""λ, λ_u, ρ, ν, T: read by the kernels when they run, wherever they are."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest
import torch
from inputs import CPU_BACKENDS, each
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

import sanm_kernels as sk
from sanm_kernels import backends

#: λ, λ_u, ρ, ν, T of successive calls, 0 and 1 among them.
SCHEDULE = ((0.3, 25.0, 1.0, 0.5, 0.5), (1.0, 0.0, 0.25, 0.0, 1.0), (0.75, 3.0, 0.0, 2.0, 0.1))


def inputs(device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Arguments of `run`; on another device without values."""
    torch.manual_seed(0)
    made = {
        "logits": torch.randn(9, 7, dtype=dtype),
        "targets": torch.rand(12, 7, dtype=dtype).softmax(1),
        "permutation": torch.randperm(12),
        "view": torch.randn(6, 3, 4, 5, dtype=dtype),
    }
    if device == "cpu":
        return made
    return {name: torch.empty_like(x, device=device) for name, x in made.items()}


def run(x: dict[str, Tensor], numbers: Any, backend: str | None = None) -> dict[str, Tensor]:
    """All functions that take such numbers."""
    lam, unlabeled, prior, confidence, temperature = numbers
    z, permutation = x["logits"], x["permutation"]
    common: dict[str, Any] = {
        "mix": (lam, permutation), "num_labeled": 4, "unlabeled_weight": unlabeled,
        "backend": backend,
    }  # fmt: skip
    loss = sk.masked_loss(
        z, x["targets"], prior_weight=prior, confidence_weight=confidence, **common
    )
    rows = sk.masked_loss(z, x["targets"], reduction="none", **common)
    return {
        "loss": loss.total,
        "rows": rows.total,
        "mixed": sk.mixup_views([x["view"], x["view"] + 1], lam, permutation, backend=backend),
        "guessed": sk.refine_targets([z, 2 * z], temperature=temperature, backend=backend),
    }


def results(
    x: dict[str, Tensor], numbers: Any, backend: str | None = None, function: Any = run
) -> dict[str, Tensor]:
    """The functions' results and gradients."""
    leaves = {name: x[name].detach().requires_grad_() for name in ("logits", "view")}
    out = function(x | leaves, numbers, backend)
    upstream = [
        torch.arange(t.numel(), dtype=t.dtype, device=t.device).view(t.shape) - 2.5
        for t in out.values()
    ]
    differentiable = [name for name in out if out[name].requires_grad]
    total = sum((out[n] * u).sum() for n, u in zip(out, upstream, strict=True)
                if n in differentiable)  # fmt: skip
    total.backward()
    assert differentiable == ["loss", "rows", "mixed"]
    return {name: t.detach() for name, t in out.items()} | {
        f"d {name}": leaf.grad for name, leaf in leaves.items()
    }


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


@contextlib.contextmanager
def on_device(backend: str) -> Iterator[None]:
    """Kernels take their numbers as they do where those are on a GPU, from memory."""
    with pytest.MonkeyPatch.context() as patch:
        if backend == "cuda":
            patch.setenv("SANM_CUDA_HOST_NUMBERS", "device")
        elif backend == "triton":
            from sanm_kernels.backends.triton import launch

            patch.setattr(launch, "on_host", lambda numbers: False)
        else:
            from sanm_kernels.reference import masked_loss, mixup_views, refine_targets

            for module in (masked_loss, mixup_views, refine_targets):
                patch.setattr(module, "numbers", lambda x: list(x.unbind()))
        yield


@each(
    backend=[name for name in CPU_BACKENDS if name != "cpu"],
    dtype=[torch.float32, torch.float64],
    step=range(3),
)
def test_numbers_on_the_device_give_the_bits_of_arguments(backend, dtype, step):
    x = inputs(dtype=dtype)
    expected = results(x, SCHEDULE[step], backend)
    with on_device(backend):
        got = results(x, SCHEDULE[step], backend)
    if backend == "reference":  # torch squares for an exponent of 2 that it knows, and calls pow
        torch.testing.assert_close(got.pop("guessed"), expected.pop("guessed"))
    assert_same(got, expected)


def test_memory_is_what_is_read():
    """The twin of a CUDA graph: the same tensor of numbers, with other values."""
    x = inputs()
    for backend in CPU_BACKENDS:
        if backend in ("reference", "cpu"):
            continue
        assert backends.load(backend) is None
        op = getattr(torch.ops.sanm_kernels.mixup_views, backend)
        lam = torch.tensor([0.25], dtype=torch.float64)
        with on_device(backend):
            first = op([x["view"], x["view"]], lam, x["permutation"], 12)
            lam.fill_(0.5)
            second = op([x["view"], x["view"]], lam, x["permutation"], 12)
        assert not torch.equal(first, second)


def traced() -> list[torch.fx.GraphModule]:
    """The graphs of forward and backward that a compiler gets for another device than the CPU."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    def function(x: dict[str, Tensor], numbers: Any) -> Tensor:
        return sum(out.sum() for out in run(x, numbers).values())

    torch.compiler.reset()
    compiler = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    compiled = torch.compile(function, backend=compiler, fullgraph=True)
    x = inputs("meta")
    for name in ("logits", "view"):
        x[name].requires_grad_()
    for numbers in SCHEDULE[:2]:  # the second with numbers that dynamo takes for inputs
        compiled(x, numbers).backward()
    return graphs


def test_a_traced_operator_reads_nothing_on_the_host():
    """What is on the CPU in a compiler's CUDA graph keeps its value in every replay."""
    seen = set()
    for graph in traced():
        for node in graph.graph.nodes:
            if node.op != "call_function" or not str(node.target).startswith("sanm_kernels."):
                continue
            seen.add(str(node.target).split(".")[1])
            for argument in node.all_input_nodes:
                value = argument.meta["val"]
                values = value if isinstance(value, (list, tuple)) else [value]
                for tensor in filter(lambda v: isinstance(v, Tensor), values):
                    assert tensor.device.type == "meta", (node.target, argument)
    forward = {"masked_loss", "mixup_views", "refine_targets"}
    assert seen == forward | {"masked_loss_backward", "mixup_views_backward"}


@pytest.mark.parametrize(
    "kind",
    [torch.tensor, numpy.float64, numpy.float32, lambda v: torch.tensor(v).double()],
    ids=["float32 tensors", "float64", "float32", "float64 tensors"],
)
def test_tensors_and_numpy_numbers_are_numbers(kind):
    x = inputs()
    numbers = SCHEDULE[0]
    exact = tuple(operator.methodcaller("item")(kind(v)) for v in numbers)
    assert_same(results(x, tuple(map(kind, numbers))), results(x, exact))


@each(backend=["reference", "cpu"], kind=["floats", "tensors", "NumPy's"])
def test_a_compiled_schedule_is_followed(backend, kind):
    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    x = inputs()
    for numbers in SCHEDULE:
        make = {"floats": float, "tensors": torch.tensor, "NumPy's": numpy.float64}[kind]
        given = tuple(map(make, numbers))
        expected = results(x, tuple(float(v) for v in given), backend)
        got = results(x, given, backend, compiled)
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, rtol=1e-6, atol=1e-6, msg=name)


def test_weights_of_rows_have_the_precision_of_the_logits():
    """`reduction="none"` of float64 logits, whatever torch's default dtype is."""
    x = inputs(dtype=torch.float64)
    expected = run(x, (0.3, 1 / 3, 0.0, 0.0, 1.0))["rows"]
    torch.testing.assert_close(
        expected[4:], sk.masked_loss(x["logits"], x["targets"], mix=(0.3, x["permutation"]),
                                     num_labeled=4).per_sample[4:] / 3, rtol=1e-14, atol=0,
    )  # fmt: skip
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        assert_same(run(x, (0.3, 1 / 3, 0.0, 0.0, 1.0)), {"rows": expected})
    finally:
        torch.set_default_dtype(before)


def test_a_tensor_elsewhere_is_refused():
    x = inputs()
    with pytest.raises(ValueError, match=r"lam: expected a number or a tensor on the CPU"):
        sk.mixup_views([x["view"]], torch.tensor(0.5, device="meta"), x["permutation"])
    with pytest.raises(ValueError, match="reduction: 'none' needs"):
        sk.masked_loss(x["logits"], x["targets"][:9], reduction="none", prior_weight=0.1)
