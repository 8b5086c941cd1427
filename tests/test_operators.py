"""Every operator on every backend that runs here, forward and backward: what `make test` rests on.

The tests of tests/ops/ go further into each operator; which of them `make test` leaves out, their
parametrization says (inputs.py). This file is made from the registry and leaves out nothing.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from inputs import BACKENDS, GPU_DEVICES
from sheets import OPERATIONS, Inputs, Recorder, inputs_of, wider, with_gradients
from tolerances import assert_accurate

import sanm_kernels as sk
from sanm_kernels import backends

DEVICES = {name: "cpu" for name in BACKENDS} | GPU_DEVICES
#: Backend → its sources, and how they register the kernel of an operator.
ROOT = Path(__file__).resolve().parent.parent
REGISTERED = {
    "cpu": ("csrc/cpu/*.cpp", r'm\.impl\("(\w+)\.cpu"'),
    "cuda": ("csrc/cuda/*.cu", r'm\.impl\("(\w+)\.cuda"'),
    "triton": ("sanm_kernels/backends/triton/*.py", r'@implements\("(\w+)"\)'),
}


# NumPy's, of Triton's interpreter
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def device_of(backend: str) -> str:
    device = DEVICES[backend]
    if device is None:
        pytest.skip(backends.load(backend) or "not here")
    return device


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("backend", [name for name in DEVICES if name != "reference"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_results_and_gradients(name, backend, dtype):
    """Against the reference, on small odd sizes; what that is measured against: tests/ops/."""
    operation = OPERATIONS[name]
    x = inputs_of(operation, device_of(backend), dtype)
    got = with_gradients(operation, x, backend=backend)
    exact = with_gradients(operation, wider(operation, x), backend="reference")
    plain = {key: value.cpu() for key, value in x.items()}
    eager = with_gradients(operation, plain, backend="reference")
    assert got.keys() == exact.keys() == eager.keys()
    for key, value in got.items():
        assert value.dtype == eager[key].dtype
        assert_accurate(value.cpu(), exact[key], eager[key], key, 16.0)


@pytest.mark.parametrize("name", [name for name in OPERATIONS if OPERATIONS[name].wrt])
def test_gradients_of_the_reference_are_slopes(name):
    operation = OPERATIONS[name]
    x = wider(operation, inputs_of(operation, "cpu", torch.float64))
    leaves = [x[key].requires_grad_() for key in operation.wrt]

    def run(*given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        changed = x | dict(zip(operation.wrt, given, strict=True))
        return tuple(operation.run(changed, backend="reference").values())

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


def into(out: sk.MaskedForward | None, x: Inputs, backend: str) -> sk.MaskedForward:
    names = ("features", "targets", "clean_prob")
    return sk.masked_forward(
        *(x[name] for name in names), images=x["images"], draws=x["draws"],
        config=sk.MaskConfig.official_cifar(), out=out, backend=backend,
    )  # fmt: skip


@pytest.mark.parametrize("backend", DEVICES)
def test_results_in_memory_that_is_given(backend):
    operation, device = OPERATIONS["masked_forward"], device_of(backend)
    first, second = (inputs_of(operation, device, torch.float32, seed) for seed in (0, 1))
    expected = into(None, second, backend)
    got = into(into(None, first, backend), second, backend)
    for a, b in zip(got.buffers, expected.buffers, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", DEVICES)
def test_no_operator_is_left_out(backend):
    """The backend serves what its sources register, and the calls above run all of it."""
    device = device_of(backend)
    served = {op for op in backends.operators if backends.serves(backend, op, device) is None}
    if backend in REGISTERED:
        files, pattern = REGISTERED[backend]
        sources = "".join(path.read_text() for path in ROOT.glob(files))
        assert served == set(re.findall(pattern, sources))
    else:
        assert served == set(backends.operators)
    with Recorder() as recorder:
        for operation in OPERATIONS.values():
            sizes = {"N": 9} if operation.op == "fit_label_quality" else {"B": 1}
            if operation.op in served:
                x = inputs_of(operation, device, torch.float32, **sizes)
                with_gradients(operation, x, backend=backend)
    called = {(op._overloadname, name) for name, op, _ in recorder.calls}
    assert called == {(backend, name) for name in served}


class Exported(torch.nn.Module):
    """Functions whose batch may be of any size in an exported program."""

    def forward(self, features, labels, quality, images, logits):
        masked = sk.masked_forward(
            features, labels, quality, images=images, num_classes=5, generator=3
        )
        return (
            masked.images_max,
            masked.targets_min,
            sk.sample_loss(logits, labels),
            sk.refine_targets([logits, 2 * logits], labels=labels, clean_prob=quality),
            sk.reconstruction_loss(masked.images_masked, images),
        )


@pytest.mark.parametrize("strict", [False, True])
def test_exported_with_a_batch_of_any_size(strict):
    def inputs(n):
        return (
            torch.randn(n, 6, 2, 2), torch.randint(5, (n,)), torch.rand(n),
            torch.rand(n, 3, 8, 8), torch.randn(n, 5),
        )  # fmt: skip

    batch = torch.export.Dim("batch", min=2, max=4096)
    program = torch.export.export(
        Exported(), inputs(8), dynamic_shapes=[{0: batch}] * 5, strict=strict
    )
    for n in (8, 13):
        x = inputs(n)
        for got, expected in zip(program.module()(*x), Exported()(*x), strict=True):
            assert torch.equal(got, expected)
