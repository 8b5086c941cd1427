"""refine_targets of the GPU backends against the reference: on a GPU, interpreted, or emulated.

What every backend on CPU tensors must show, these among them, is in test_refine_targets.py; this
file runs where the kernels do.
"""

from __future__ import annotations

import pytest
import torch
from inputs import DTYPES, GPU_DEVICES, LAYOUTS, each, lay_out
from tolerances import assert_accurate

import sanm_kernels as sk

SANITIZED = (
    "cuda and test_values and soft and torch.float32",
    "cuda and not (transposed or bfloat16 or float64)",
)


def run(backend, kind, logits, labels, clean_prob, temperature, layout):
    device = GPU_DEVICES.get(backend, "cpu")

    def put(x):
        x = lay_out(x, layout)
        x = x.to(kind) if x.is_floating_point() else x
        return x if device == "cpu" else x.to(device)

    given = {}
    if labels is not None:
        given = {"labels": put(labels), "clean_prob": put(clean_prob)}
    return sk.refine_targets(
        [put(z) for z in logits], temperature=temperature, backend=backend, **given
    ).cpu()


def check(backend, B, K, dtype, views=2, labels="soft", temperature=0.5, layout="contiguous"):
    logits = [(torch.randn(B, K) * 3).to(dtype) for _ in range(views)]
    given = {"soft": torch.softmax(torch.randn(B, K), 1).to(dtype), "none": None}
    given["index"] = torch.randint(0, K, (B,))
    arguments = (logits, given[labels], torch.rand(B).to(dtype), temperature, layout)
    got = run(backend, dtype, *arguments)
    exact = run("reference", torch.float64, *arguments)
    eager = run("reference", dtype, *arguments)
    assert got.dtype == eager.dtype and got.is_contiguous()
    assert_accurate(got, exact, eager, roundings=16.0)


@each(labels=["none", "index", "soft"], K=[1, 2, 10, 48, 100, 1000, 1001, 5000], dtype=DTYPES)
def test_values(backend, dtype, K, labels):
    check(backend, 37 if K < 1000 else 3, K, dtype, labels=labels)


@each(K=[12, 120], layout=LAYOUTS, dtype=DTYPES)
def test_layouts(backend, dtype, layout, K):
    check(backend, 9, K, dtype, layout=layout)


@each(K=[10, 130], temperature=[0.1, 1.0, 3.0])
def test_temperatures(backend, temperature, K):
    check(backend, 9, K, torch.float32, temperature=temperature)


@pytest.mark.parametrize("K", [10, 130, 2056, 20001])
def test_rows_too_long_and_more_views_than_one_launch_takes(backend, K):
    """In shared memory, or, where they are too long for that as well, in several sweeps."""
    if backend == "triton":
        pytest.skip("it knows no such cases")
    for dtype in (torch.float32, torch.float64):
        check(backend, 2, K, dtype, views=3)
        check(backend, 2, K, dtype, views=33)


def test_more_rows_than_lanes(backend):
    check(backend, 501, 7, torch.float32)


def test_a_label_out_of_range_gives_nan_in_its_row(backend, unchecked):
    z = torch.randn(4, 3, device=GPU_DEVICES[backend])
    for wrong in (3, -1):
        labels = torch.tensor([0, 1, wrong, 2]).to(z.device)
        clean_prob = torch.full((4,), 0.5).to(z.device)
        got = sk.refine_targets(z, labels=labels, clean_prob=clean_prob, backend=backend)
        assert got.isnan().any(1).tolist() == [False, False, True, False]
