"""Triton's kernels compiled ahead of time, which needs no GPU: resources, rounding, arguments."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from importlib.metadata import version

import pytest
from inputs import COMPILING, TRITON_DEVICE, extended

pytestmark = pytest.mark.skipif(TRITON_DEVICE is None, reason="triton is not installed")


@extended
def test_every_kernel_compiles_for_every_architecture_without_spills():
    # a process of its own: this one may run Triton as an interpreter, which can't compile
    run = subprocess.run(
        [sys.executable, "-m", "sanm_kernels.backends.triton.aot", "--json"],
        env=COMPILING,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout, run.stderr
    rows = json.loads(run.stdout)
    assert {row["arch"] for row in rows} == {80, 90, 100}
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16", "float16"}
    # triton 3.7 spills 24 bytes on sm_100, for large maps
    known = [("masked_forward_kernel", 100)] if version("triton").startswith("3.7.") else []
    spilling = [row for row in rows if row["spills"]]
    assert not [row for row in spilling if (row["kernel"], row["arch"]) not in known]
    assert all(row["spills"] <= 24 for row in spilling)
    # Contraction of a·b + c would show as a sum or a product without its own rounding.
    assert not [row for row in rows if row["unrounded"]]
    per_arch = Counter(row["arch"] for row in rows)
    assert len(set(per_arch.values())) == 1
    assert run.returncode == bool(spilling)
    print(f"{len(rows)} kernels compiled")


SCHEDULED = """
import torch
from sanm_kernels.backends.triton import aot, launch, load, masked_forward, masked_loss

def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")

def keys(n, lam, weight, gamma):
    z, t, r = meta(n, 10), meta(n, 10), meta(n)
    scalars = torch.tensor([lam, weight, 1.0, 0.0], dtype=torch.float64)
    given = (t, r, meta(n, dtype=torch.int64), None, scalars)
    config = aot.PRESETS["paper"]._replace(ratio_gamma=gamma, ratio_low=gamma / 2)
    with launch.recording() as recorded:
        *_, per_sample, normalizer, p_mean = masked_loss.forward(z, *given, n // 2, True, -1, True)
        masked_loss.backward(meta(), *[None] * 5, z, *given, normalizer, p_mean, n // 2, True, -1,
                             True)
        masked_forward.forward(meta(64, 512, 4, 4), meta(64, 10), meta(64), None,
                               meta(dtype=torch.int64), None, meta(64, 3, 32, 32), None, None, 32,
                               32, 10, *config)
    result = []
    for kernel, arguments, values in recorded:
        options = {k: values.pop(k) for k in ("num_warps", "num_stages") if k in values}
        what = aot.source(kernel, arguments, values)
        result.append((kernel.__name__, what.signature, what.constants, what.attrs, options))
    return result

first = keys(768, 0.73, 25.0, 0.03)
assert len(first) >= 4
for lam, weight, gamma in ((1.0, 0.0, 0.0), (0.5, 1.0, 1.0), (0.501, 3.125, 0.1)):
    assert keys(768, lam, weight, gamma) == first, (lam, weight, gamma)
assert [k[0] for k in keys(767, 0.9, 1.5, 0.05)] == [k[0] for k in first]
print(len(first), "kernels, none compiled anew")
"""


def test_a_scheduled_number_compiles_nothing_anew():
    """λ, λ_u and γ, 0 and 1 among their values: the same kernels with the same specialisation."""
    run = subprocess.run(
        [sys.executable, "-c", SCHEDULED],
        env=COMPILING,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout.endswith("none compiled anew\n"), run.stderr
