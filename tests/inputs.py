"""Hostile inputs: the same values under every layout that a caller may hand in.

And which of the tests that are made from them `make test` runs: `each` and `more`.
"""

from __future__ import annotations

import copy
import importlib.util
import itertools
import os
from collections.abc import Callable, Iterable, Sequence

import pytest
import torch
from maker import DTYPES as DTYPES
from maker import LAYOUTS as LAYOUTS
from maker import lay_out
from torch import Tensor
from torch.utils._pytree import tree_leaves

from sanm_kernels import MaskConfig, backends
from sanm_kernels.ops.base import overload_of

#: One configuration per branch of masked_forward.
MASK_CONFIGS = {
    "paper": MaskConfig.paper(),
    "official_cifar": MaskConfig.official_cifar(),
    "official_clothing1m": MaskConfig.official_clothing1m(),
    "mean": MaskConfig().replace(fill="mean", ratio_high=0.4),
    "pixel": MaskConfig().replace(fill="pixel", shared_draws=False),
    "min_only": MaskConfig().replace(
        views=("min",), fill="uniform", ratio_high=0.5, ratio_gamma=0.5
    ),
    "max_only": MaskConfig().replace(views=("max",), fill_value=0.5, quantize=True),
}
#: Backends that run on the CPU.
BACKENDS = ("reference", "cpu")
#: Fields of MaskedForward that backends agree on to the last bit.
EXACT = (
    "ratio_max",
    "ratio_min",
    "box_max",
    "box_min",
    "targets_max",
    "targets_min",
    "images_max",
    "images_min",
)
#: Where Triton's kernels run here: a GPU, or the interpreter's "cpu"; None without Triton.
TRITON_DEVICE = None
if importlib.util.find_spec("triton") is not None:
    TRITON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
#: Where the CUDA kernels run here: a GPU, or the "cpu" that emulates them; None with neither.
CUDA_DEVICE = "cpu"  # tests/conftest.py builds and names the emulation
if not os.environ.get("SANM_KERNELS_CUDA_EMULATION"):
    CUDA_DEVICE = "cuda" if backends.usable("cuda") is None else None
#: GPU backend → where its kernels run here.
GPU_DEVICES = {"triton": TRITON_DEVICE, "cuda": CUDA_DEVICE}
#: Backends that run on the CPU here, interpreted and emulated ones among them: for operators on
#: small rows.
CPU_BACKENDS = (*BACKENDS, *(name for name, device in GPU_DEVICES.items() if device == "cpu"))
#: Environment of a process in which no backend is interpreted or emulated; there Triton compiles.
EMULATION = ("TRITON_INTERPRET", "SANM_KERNELS_CUDA_EMULATION")
COMPILING = {k: v for k, v in os.environ.items() if k not in EMULATION}

#: Of a test that `make test-all` runs and `make test` does not.
extended = pytest.mark.extended


def more(*values: object) -> list[object]:
    """Values of a parameter that are for `make test-all` only."""
    return [pytest.param(value, marks=extended) for value in values]


def each(**axes: Iterable[object]) -> pytest.MarkDecorator:
    """Parametrize over the product of `axes`, most of it for `make test-all` only.

    `make test` runs as many cases as the longest axis has values, with every value of every axis
    among them.
    """
    values = [tuple(axis) for axis in axes.values()]
    core = {
        tuple((i + j) % len(axis) for j, axis in enumerate(values))
        for i in range(max(map(len, values)))
    }
    cases = []
    for place in itertools.product(*(range(len(axis)) for axis in values)):
        case = [axis[i] for axis, i in zip(values, place, strict=True)]
        marks = () if place in core else extended
        cases.append(pytest.param(*case, marks=marks, id="-".join(map(_title, case))))
    return pytest.mark.parametrize(",".join(axes), cases)


def _title(value: object) -> str:
    """What pytest's -k can name: "3x5x7" for a shape, a function's name."""
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    return getattr(value, "__name__", str(value))


def upstreams(
    shape: torch.Size | tuple[int, ...], dtype: torch.dtype, seed: int = 0
) -> dict[str, Tensor]:
    """Upstream gradients that are neither one nor contiguous, by name."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    result = {"dense": dense, "expanded": torch.full((), 0.37, dtype=dtype).expand(shape)}
    if dense.dim():
        result["strided"] = lay_out(dense, "strided")
    return result


def random_case(seed: int) -> dict[str, Tensor | int]:
    """A random call of masked_forward on small odd sizes: arguments by name, and a seed."""
    g = torch.Generator().manual_seed(seed)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=g))

    batch, channels, classes = integer(1, 5), integer(1, 200), integer(2, 12)
    if seed % 3 == 0:
        channels = integer(1, 1500)
    h, w, height, width = integer(1, 9), integer(1, 9), integer(1, 40), integer(1, 40)
    features = torch.randn(batch, channels, h, w, generator=g)
    if seed % 4:
        features = features.relu()
    if seed % 5 == 0:
        features = (features * 4).round() / 4  # ties
    images = torch.rand(batch, (1, 3, 4)[integer(0, 2)], height, width, generator=g)
    if seed % 2:
        features = features.contiguous(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    return {
        "features": features,
        "targets": torch.softmax(torch.randn(batch, classes, generator=g) * 3, 1),
        "clean_prob": torch.rand(batch, generator=g),
        "images": images,
        "sample_index": torch.randint(0, 2**50, (batch,), generator=g),
        "generator": integer(0, 2**40),
    }


def example(
    batch: int = 4,
    channels: int = 24,
    h: int = 4,
    w: int = 4,
    cin: int = 3,
    height: int = 16,
    width: int = 12,
    classes: int = 5,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """features, targets, clean_prob and images of a small call of masked_forward."""
    return (
        torch.randn(batch, channels, h, w).to(dtype),
        torch.softmax(torch.randn(batch, classes) * 2, 1),
        torch.rand(batch),
        torch.rand(batch, cin, height, width).to(dtype),
    )


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Both absent, or equal to the last bit."""
    if a is None or b is None:
        return a is b
    return torch.equal(a, b)


def assert_refused(
    function: Callable[..., object],
    error: type[Exception],
    message: str,
    arguments: Sequence[object],
    options: dict[str, object],
) -> None:
    """The call raises the error with the message, and leaves its tensors as they are."""
    tensors = [x for x in tree_leaves((arguments, options)) if isinstance(x, Tensor)]
    before = copy.deepcopy(tensors)
    with pytest.raises(error, match=message):
        function(*arguments, **options)
    for x, y in zip(tensors, before, strict=True):
        assert x.is_meta or torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0))


def on_device(x: object, device: str) -> object:
    """Tensors on the device, with their strides and their offset from an aligned address."""
    if not isinstance(x, Tensor) or x.device.type == device:
        return x
    extent = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True) if n > 0)
    storage = torch.zeros(extent + x.storage_offset(), dtype=x.dtype, device=device)
    return storage.as_strided(x.shape, x.stride(), x.storage_offset()).copy_(x)


def call_operator(backend: str, op: str, *arguments: object) -> object:
    """The operator on a GPU backend, its results on the CPU."""
    assert backends.load(backend) is None
    results = overload_of(op, backend)(*(on_device(x, GPU_DEVICES[backend]) for x in arguments))
    return [r.cpu() for r in results] if isinstance(results, tuple) else results.cpu()


def double(x: object) -> object:
    """In float64, where it is floating."""
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
