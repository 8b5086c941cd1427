"""What only a GPU shows: compiled graphs, CUDA graphs, streams, synchronisation, launches, size.

Every public function runs on the backend that serves CUDA tensors by default; `make gpu` runs this
file once more with SANM_KERNELS_BACKEND=triton. The values themselves are tested in
tests/ops/test_gpu_*.py: on a GPU where there is one, interpreted and emulated elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import test_run_time_numbers as run_time_numbers
import torch
from operations import is_own, launched
from sheets import OPERATIONS, Inputs, Operation, inputs_of, with_gradients
from test_run_time_numbers import SCHEDULE
from torch import Tensor

import sanm_kernels as sk
from sanm_kernels import backends

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

DEVICE = "cuda"
NAMES = list(OPERATIONS)
#: Sizes that fill tiles unevenly, and those of a training step.
SIZES = ("odd", "usual")


def draw(
    operation: Operation, seed: int = 0, size: str = "odd", device: str | None = None
) -> Inputs:
    sizes = operation.sizes if size == "usual" else {}
    return inputs_of(operation, device or DEVICE, torch.float32, seed, **sizes)


def assert_same(got: Inputs, expected: Inputs) -> None:
    """Equal to the last bit."""
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


def overwrite(target: Inputs, source: Inputs) -> None:
    for name, value in source.items():
        target[name].copy_(value)


@pytest.mark.parametrize("name", NAMES)
def test_torch_compile_equals_eager(name):
    """Forward and backward in one graph. CPU twins: the tests of torch.compile in tests/ops."""
    operation = OPERATIONS[name]
    torch.compiler.reset()
    compiled = torch.compile(operation.run, fullgraph=True)
    for seed in range(2):
        x = draw(operation, seed)
        assert_same(with_gradients(operation, x, compiled), with_gradients(operation, x))


def capture(function: Callable[[], Inputs]) -> tuple[torch.cuda.CUDAGraph, Inputs]:
    """A graph of the call, and the tensors that a replay writes to."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compile and load everything first
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function()
    return graph, outputs


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_a_cuda_graph_replayed_with_new_inputs_gives_what_a_call_gives(name, size):
    """Forward and backward. No CPU twin: a graph needs a GPU."""
    operation = OPERATIONS[name]
    if operation.op == "fit_label_quality" and size == "usual":
        pytest.skip("its graph is the same for every number of samples")
    held = draw(operation, 0, size)
    graph, outputs = capture(lambda: with_gradients(operation, held))
    for seed in (1, 2):
        new = draw(operation, seed, size)
        overwrite(held, new)
        graph.replay()
        assert_same(outputs, with_gradients(operation, new))


def test_a_cuda_graph_follows_numbers_on_the_device():
    """λ, λ_u, ρ, ν and T. CPU twins: tests/test_run_time_numbers.py."""
    x = {name: value.to(DEVICE) for name, value in run_time_numbers.inputs().items()}
    held = [torch.tensor(value, device=DEVICE) for value in SCHEDULE[0]]
    graph, outputs = capture(lambda: run_time_numbers.results(x, held))
    for numbers in SCHEDULE[1:]:
        for tensor, value in zip(held, numbers, strict=True):
            tensor.fill_(value)
        graph.replay()
        new = [torch.tensor(value, device=DEVICE) for value in numbers]
        assert_same(outputs, run_time_numbers.results(x, new))


def test_the_compilers_cuda_graphs_follow_numbers():
    """Of Python, which are no inputs of a graph. CPU twins: tests/test_run_time_numbers.py."""
    torch.compiler.reset()
    compiled = torch.compile(run_time_numbers.run, fullgraph=True, mode="reduce-overhead")
    x = {name: value.to(DEVICE) for name, value in run_time_numbers.inputs().items()}
    for numbers in SCHEDULE * 3:  # warmed up, captured, replayed
        torch.compiler.cudagraph_mark_step_begin()
        got = run_time_numbers.results(x, numbers, function=compiled)
        for name, value in run_time_numbers.results(x, numbers).items():
            torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("size", SIZES)
def test_a_cuda_graph_of_masked_forward_writes_to_its_buffers(size):
    """With out=. CPU twin: the tests of out= in tests/ops/test_masked_forward.py."""
    operation = OPERATIONS["masked_forward"]
    held = draw(operation, 0, size)

    def call(x: Inputs, out: sk.MaskedForward | None = None) -> sk.MaskedForward:
        return sk.masked_forward(
            x["features"], x["targets"], x["clean_prob"], images=x["images"], draws=x["draws"],
            config=sk.MaskConfig.official_cifar(), out=out,
        )  # fmt: skip

    buffers = call(held)
    graph, _ = capture(lambda: {"images": call(held, buffers).images_masked})
    for seed in (1, 2):
        new = draw(operation, seed, size)
        overwrite(held, new)
        graph.replay()
        for got, expected in zip(buffers.buffers, call(new).buffers, strict=True):
            assert torch.equal(got, expected)


@contextmanager
def no_synchronisation() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", NAMES)
def test_no_call_waits_for_the_device(name):
    """Forward and backward. No CPU twin: the CPU has nothing to wait for."""
    operation = OPERATIONS[name]
    x = draw(operation)
    with_gradients(operation, x)  # what is copied to the device once may wait
    with no_synchronisation():
        results = with_gradients(operation, x)
    assert all(bool(value.isfinite().all()) for value in results.values())


@pytest.mark.parametrize("kind", ["none", "seed", "tensor", "generator", "CUDA generator"])
def test_no_kind_of_random_numbers_waits_for_the_device(kind):
    x = draw(OPERATIONS["masked_forward"])
    generator = {
        "none": None,
        "seed": 5,
        "tensor": torch.tensor(5, device=DEVICE),
        "generator": torch.Generator(),
        "CUDA generator": torch.Generator(DEVICE) if kind == "CUDA generator" else None,
    }[kind]

    def call() -> Tensor:
        result = sk.masked_forward(
            x["features"], x["targets"], x["clean_prob"], images=x["images"], generator=generator
        )
        return result.images_masked

    call()
    with no_synchronisation():
        call()


@pytest.mark.parametrize("name", NAMES)
def test_a_default_device_changes_nothing(name):
    """Run-time numbers stay on the CPU also where new tensors do not."""
    operation = OPERATIONS[name]
    x = draw(operation)
    expected = operation.run(x)
    with torch.device(DEVICE), no_synchronisation():
        got = operation.run(x)
    assert_same(got, expected)


def test_the_check_of_synchronisation_sees_one():
    """Shows that the tests above can fail."""
    x = torch.ones(3, device=DEVICE)
    with pytest.raises(RuntimeError), no_synchronisation():
        x.sum().item()


def own(function: Callable[[], object]) -> dict[str, int]:
    """How often each kernel of ours is launched."""
    function()
    counts = launched(function, DEVICE)
    return {name: n for name, n in counts.items() if is_own(name)}


def needs(backend: str, op: str) -> None:
    reason = backends.serves(backend, op, DEVICE)
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_masked_forward_is_one_launch(backend):
    """Statistics, boxes, targets and both views. `make gpu` writes the counts of all functions."""
    needs(backend, "masked_forward")
    operation = OPERATIONS["masked_forward"]
    x = draw(operation, size="usual")
    assert x["features"].shape == (128, 512, 4, 4) and x["images"].shape[2:] == (32, 32)
    assert sum(own(lambda: operation.run(x, backend=backend)).values()) == 1


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("K", [10, 100, 1000])
def test_masked_loss_is_three_launches_with_its_gradient(backend, K):
    needs(backend, "masked_loss")
    operation = OPERATIONS["masked_loss"]
    x = inputs_of(operation, DEVICE, torch.float32, B=64, K=K)
    x["logits"].requires_grad_()

    def step() -> None:
        torch.autograd.grad(operation.run(x, backend=backend)["total"], x["logits"])

    assert 1 <= sum(own(step).values()) <= 3


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_the_same_bits_twice(name, size):
    """Also with other work in between. CPU twins: the tests of thread numbers in tests/ops."""
    operation = OPERATIONS[name]
    x = draw(operation, 0, size)
    first = with_gradients(operation, x)
    for seed in range(1, 4):
        with_gradients(operation, draw(operation, seed))
        assert_same(with_gradients(operation, x), first)


@pytest.mark.parametrize("name", NAMES)
def test_another_stream(name):
    """Every launch goes to the current stream, behind what was put there before."""
    operation = OPERATIONS[name]
    held, new = draw(operation, 0, "usual"), draw(operation, 1, "usual")
    expected = with_gradients(operation, new)
    with_gradients(operation, held)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # some 50 ms, in which a launch elsewhere would read `held`
        overwrite(held, new)
        got = with_gradients(operation, held)
    stream.synchronize()
    assert_same(got, expected)


@pytest.mark.parametrize("name", NAMES)
def test_another_device_than_the_current_one(name):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    operation = OPERATIONS[name]
    assert torch.cuda.current_device() == 0
    expected = with_gradients(operation, draw(operation))
    got = with_gradients(operation, draw(operation, device="cuda:1"))
    assert all(value.device.index == 1 for value in got.values())
    assert_same({k: v.to("cuda:0") for k, v in got.items()}, expected)


def needs_memory(gib: float) -> None:
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"needs {gib:.0f} GiB of GPU memory, {free:.0f} are free")


def masked_ends(features: Tensor, ends: slice) -> None:
    """masked_forward of all samples gives, at `ends`, what copies of those samples give."""
    batch = len(features)
    torch.manual_seed(1)
    config = sk.MaskConfig.official_cifar()
    given = {
        "targets": torch.softmax(torch.randn(batch, 4, device=DEVICE), 1),
        "clean_prob": torch.rand(batch, device=DEVICE),
        "images": torch.rand(batch, 1, 8, 8, device=DEVICE),
        "draws": torch.rand(batch, config.num_draws(1), dtype=torch.float64, device=DEVICE),
    }
    got = sk.masked_forward(features, config=config, **given)
    some = {name: value[ends].clone() for name, value in given.items()}
    expected = sk.masked_forward(features[ends].clone(), config=config, **some)
    for field in ("box_max", "box_min", "targets_max", "images_max", "images_min"):
        assert torch.equal(getattr(got, field)[ends], getattr(expected, field)), field
    assert torch.equal(got.stats.max[ends], expected.stats.max)


def test_features_of_over_2_31_elements_in_all():
    needs_memory(8)
    batch = 2**31 // (512 * 16) + 5
    features = torch.randn(batch, 512, 4, 4, dtype=torch.float16, device=DEVICE)
    features = features.mul_(8).round_().div_(8)  # sums that no order of summation changes
    assert features.numel() > 2**31
    masked_ends(features, slice(batch - 3, batch))


@pytest.mark.parametrize("channels_last", [False, True])
def test_features_with_strides_over_2_31_within_a_sample(channels_last):
    needs_memory(8)
    batch, channels, stride = 2, 2051, 2**20 + 8
    storage = torch.zeros(channels * stride, dtype=torch.float16, device=DEVICE)
    if channels_last:  # 16 cells far apart, their channels next to each other
        far = 2**31 // 15 // 8 * 8 + 64
        strides = (4096, 1, 4 * far, far)
    else:
        strides = (16, stride, 4, 1)
    assert (
        max(s * (n - 1) for s, n in zip(strides, (batch, channels, 4, 4), strict=True))
        * (1.25 if channels_last else 1)
        > 2**31 - 1
    )
    features = storage.as_strided((batch, channels, 4, 4), strides)
    features.copy_(torch.randn(batch, channels, 4, 4, device=DEVICE).mul(8).round().div(8))
    masked_ends(features, slice(0, batch))


def test_mixup_views_of_over_2_31_elements():
    needs_memory(12)
    rows, size = 2050, 2**20
    view = torch.randn(rows, size, dtype=torch.float16, device=DEVICE)
    assert view.numel() > 2**31
    permutation = torch.arange(rows - 1, -1, -1, device=DEVICE)
    mixed = sk.mixup_views([view[:7], view[7:]], 0.3, permutation)
    for i in (0, 1, rows - 2, rows - 1):
        pair = [view[i : i + 1], view[rows - 1 - i : rows - i]]
        order = torch.tensor([1], device=DEVICE)
        expected = sk.mixup_views(pair, 0.3, order, rows=1, backend="reference")
        assert torch.equal(mixed[i], expected[0]), i
