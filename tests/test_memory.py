"""The memory of large results on the CPU: used again when nothing refers to it, and not before."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from inputs import extended, more
from torch import Tensor

import sanm_kernels as sk
from sanm_kernels import backends
from sanm_kernels.backends import cpu

TORCH = tuple(int(x) for x in torch.__version__.split(".")[:2])
needs_library = pytest.mark.skipif(
    backends.load("cpu") is not None, reason=str(backends.load("cpu"))
)
keeps = pytest.mark.skipif(TORCH < (2, 11), reason="torch 2.10 cannot be told when a tensor dies")
MIB = 2**20


@pytest.fixture(autouse=True)
def empty() -> Iterator[None]:
    """Each test begins and ends with nothing kept; in it 64 MiB may be, outside the usual limit."""
    usual = sk.set_cpu_cache_limit(0)
    sk.set_cpu_cache_limit(64)
    yield
    sk.set_cpu_cache_limit(0)
    sk.set_cpu_cache_limit(usual)


def mixed(rows: int = 256, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    """A result of `rows` × 4 KiB."""
    x = torch.rand(rows, 4, 16, 16).contiguous(memory_format=layout)
    return sk.mixup_views([x], 1.0, torch.arange(rows))


@needs_library
@keeps
def test_memory_is_used_again() -> None:
    first = mixed(300)
    at, size = first.data_ptr(), 300 * 4096
    assert cpu.kept_bytes() == 0
    del first
    assert cpu.kept_bytes() == size
    small, large = mixed(255), mixed(400)  # not so large that they are kept; larger than what is
    assert cpu.kept_bytes() == size
    second = mixed(256)
    assert second.data_ptr() == at and cpu.kept_bytes() == 0
    third = mixed(256)
    assert len({x.data_ptr() for x in (small, large, second, third)}) == 4


@needs_library
@keeps
@pytest.mark.parametrize("hold", [
    lambda x: x[7, 2:], lambda x: x.numpy(), lambda x: torch.from_dlpack(x),
    lambda x: x.untyped_storage(), lambda x: x.detach(),
    lambda x: (x * torch.ones((), requires_grad=True)).grad_fn,
], ids=["slice", "numpy", "dlpack", "storage", "detach", "saved"])  # fmt: skip
def test_not_while_anything_refers_to_it(hold) -> None:
    result = mixed()
    at, expected = result.data_ptr(), result.clone()
    held = hold(result)
    del result
    other = mixed()
    assert other.data_ptr() != at and not torch.equal(other, expected)
    if isinstance(held, Tensor) and held.shape == expected.shape:
        assert torch.equal(held, expected)
    del held
    assert mixed().data_ptr() == at


@needs_library
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_tensors_are_like_any_other(layout) -> None:
    x = torch.rand(256, 4, 16, 16).contiguous(memory_format=layout)
    for _ in range(2):  # on new memory, and on such as was used
        result = sk.mixup_views([x], 1.0, torch.arange(256))
        assert torch.equal(result, x) and result.stride() == x.stride()
        assert result.device == torch.device("cpu") and result.dtype == x.dtype
        assert result.data_ptr() % 64 == 0 and not result.requires_grad
        result.add_(1).requires_grad_()
        result.sum().backward()
        assert torch.equal(result.grad, torch.ones_like(x))


@needs_library
@keeps
def test_no_more_is_kept_than_the_limit() -> None:
    sk.set_cpu_cache_limit(5)
    results = [mixed(256 * size) for size in (2, 1, 3)]
    while results:
        del results[0]  # the oldest goes when the third comes
    assert cpu.kept_bytes() == 4 * MIB
    large = mixed(256 * 6)  # more than is ever kept
    del large
    assert cpu.kept_bytes() == 4 * MIB
    sk.set_cpu_cache_limit(0)
    assert cpu.kept_bytes() == 0
    result = mixed()
    del result
    assert cpu.kept_bytes() == 0


@needs_library
def test_the_limit_before_is_returned() -> None:
    limits = [64, 7, 0, 2**40 - 1, 3]  # the fixture's first
    assert [sk.set_cpu_cache_limit(limit) for limit in limits[1:]] == limits[:-1]
    with pytest.raises(ValueError, match="mebibytes"):
        sk.set_cpu_cache_limit(2**40)
    assert sk.set_cpu_cache_limit(3) == 3


def test_without_the_library_there_is_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "load", lambda name: "it was never built")
    assert sk.set_cpu_cache_limit(7) == sk.set_cpu_cache_limit(0) == 0
    with pytest.raises(ValueError, match="mebibytes"):
        sk.set_cpu_cache_limit(-1)


def run(code: str, limit: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"SANM_KERNELS_CPU_CACHE": limit},
        capture_output=True,
        text=True,
        check=False,
    )


@needs_library
@pytest.mark.parametrize(
    "value, kept",
    [
        ("0", 0),
        ("7", MIB),
        pytest.param("", MIB, marks=extended),
        pytest.param("1099511627775", MIB, marks=extended),
    ],
)
def test_environment(value: str, kept: int) -> None:
    code = (
        "import torch, sanm_kernels as sk; from sanm_kernels.backends import cpu\n"
        "sk.mixup_views([torch.rand(256, 1024)], 0.5, torch.arange(256))\n"
        "print(cpu.kept_bytes(), sk.set_cpu_cache_limit(0))"
    )
    done = run(code, value)
    assert done.returncode == 0, done.stderr
    size, limit = done.stdout.split()
    assert int(size) == (kept if TORCH >= (2, 11) else 0)
    assert not value or limit == value


@pytest.mark.parametrize("wrong, error", [
    ("1", TypeError), (True, TypeError), (1.5, TypeError), (-1, ValueError), (2**40, ValueError),
])  # fmt: skip
def test_wrong_limits(wrong: object, error: type[Exception]) -> None:
    got = type(wrong).__name__ if error is TypeError else wrong
    with pytest.raises(error, match=f"mebibytes: expected an int.*, got {got}"):
        sk.set_cpu_cache_limit(wrong)


@pytest.mark.parametrize("wrong", ["64MB", *more("1.5", "-1", " ", "1099511627776", "9" * 5000)])
def test_wrong_limits_of_the_environment(wrong: str) -> None:
    done = run("import sanm_kernels; sanm_kernels.available_backends()", wrong)
    assert done.returncode != 0
    assert "ValueError: SANM_KERNELS_CPU_CACHE: expected an integer in [0, 2" in done.stderr
    assert f"in MiB, got {wrong!r}" in done.stderr


#: What there is no memory for, in a process that may have 6 GiB, and what is to be said of it.
TOO_MUCH = {
    "masked_forward, classes": (
        "sk.masked_forward(f, y, q, size=(8, 8), num_classes=2**31 - 1)",
        "masked_forward: no memory for a tensor of shape [1, 2, 2147483647]: 17179869176 bytes, "
        "with features [2, 4, 2, 2], targets [2], clean_prob [2], size (8, 8), "
        "num_classes 2147483647",
    ),
    "masked_forward, size": (
        "sk.masked_forward(f, y, q, size=(2**31 - 1, 2**31 - 1), num_classes=5)",
        "masked_forward: no memory for a map of 2×2 upsampled to 2147483647×2147483647: ",
    ),
    "activation_stats, size": (
        "sk.activation_stats(f, (5, 2**31 - 1))",
        "activation_stats: no memory for a map of 2×2 upsampled to 5×2147483647: ",
    ),
    "sample_loss, rows": (
        "sk.sample_loss(z.expand(2**40, 3), y[:1].expand(2**40))",
        "sample_loss: no memory for a tensor of shape [1099511627776, 3]: 13194139533312 bytes",
    ),
    "masked_loss, rows": (
        "sk.masked_loss(z.expand(2**40, 3), y[:1].expand(2**40))",
        "masked_loss: no memory for a tensor of shape [1099511627776, 3]: 13194139533312 bytes",
    ),
    "refine_targets, classes": (
        "sk.refine_targets([z[:, :1].expand(1, 2**31 - 1)] * 2)",
        "refine_targets: no memory for a tensor of shape [1, 2147483647]: 8589934588 bytes, with "
        "logits ([1, 2147483647], [1, 2147483647])",
    ),
    "fit_label_quality, losses": (
        "sk.fit_label_quality(z[0, :1].expand(2**40))",
        "fit_label_quality: no memory for a tensor of shape [1099511627776]: 4398046511104 bytes",
    ),
    "reconstruction_loss, images": (
        "sk.reconstruction_loss(f[:, :1].expand(2, 2**33, 2, 2), f[:, :1].expand(2, 2**33, 2, 2))",
        "images: expected sides and channels below 2³¹, got [2, 8589934592, 2, 2]",
    ),
    "mixup_views, rows": (
        "sk.mixup_views([f[:1].expand(2**40, 4, 2, 2)], 0.5, y[:1].expand(2**40))",
        "mixup_views: ",
    ),
}


@needs_library
@pytest.mark.parametrize("name", TOO_MUCH)
def test_what_there_is_no_memory_for_is_named(name: str) -> None:
    call, said = TOO_MUCH[name]
    code = f"""
import resource, torch, sanm_kernels as sk
torch.set_num_threads(1)
resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
f, q, y, z = torch.rand(2, 4, 2, 2), torch.rand(2), torch.tensor([0, 1]), torch.rand(1, 3)
try:
    {call}
except (torch.OutOfMemoryError, ValueError) as error:
    print(error)
"""
    done = run(code, "")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(said) and done.stdout.count("\n") == 1, done.stdout


@needs_library
@pytest.mark.parametrize("classes", [2**62, *more(2**62 + 2**18, 2**61 + 2**17, 2**31, 2**63 - 1)])
def test_classes_whose_bytes_do_not_fit_into_64_bits(classes: int) -> None:
    """A direct call: the public function refuses them before."""
    code = f"""
import torch, sanm_kernels as sk
from sanm_kernels import backends
assert backends.load("cpu") is None
f, q, y, seed = torch.rand(2, 4, 2, 2), torch.rand(2), torch.tensor([0, 1]), torch.tensor(3)
settings = [3, 1, 0, 0, 1, 0, 1.0, 0.1, 0.3, 0.1, 0.7, 1.3, 0.0]
try:
    torch.ops.sanm_kernels.masked_forward.cpu(
        f, y, q, None, seed, None, None, 8, 8, {classes}, settings)
except ValueError as error:
    print("num_classes: expected from 2 to 2³¹ − 1" in str(error))
"""
    done = run(code, "")
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
