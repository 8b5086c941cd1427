"""Triton's kernels compiled ahead of time, which needs no GPU: resources, rounding, arguments."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import pytest
from inputs import COMPILING, TRITON_DEVICE, extended
from test_docs import launches, made_table

ROOT = Path(__file__).resolve().parent.parent.parent
pytestmark = pytest.mark.skipif(TRITON_DEVICE is None, reason="triton is not installed")


#: Kernels that read or write images or feature maps: 128 bits a thread at a time.
READ = {
    "energy_kernel",
    "hidden_means_kernel",
    "masked_forward_kernel",
    "mixup_views_backward_kernel",
    "mixup_views_kernel",
    "reconstruction_backward_kernel",
    "squares_kernel",
    "views_backward_kernel",
    # not pool_kernel: of 7×7 cells a channel, only every fourth or eighth begins at a whole vector
}
WRITTEN = {
    "features_backward_kernel",
    "masked_forward_kernel",
    "mixup_views_backward_kernel",
    "mixup_views_kernel",
    "reconstruction_backward_kernel",
    "views_backward_kernel",
}
#: Calls without images.
NO_IMAGES = re.compile("classifier|clamped|activation_stats")


@extended
def test_every_kernel_compiles_for_every_target_without_spills_and_reads_images_widely():
    # a process of its own: this one may run Triton as an interpreter, which can't compile
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.triton_kernels", "--json", "--processes", "2"],
        env=COMPILING,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout, run.stderr
    rows = json.loads(run.stdout)
    kernels = {row["kernel"] for row in rows}
    per_target = Counter(row["target"] for row in rows)
    assert set(per_target) == {"sm_80", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942"}
    for target in per_target:
        own = [row for row in rows if row["target"] == target]
        assert {row["kernel"] for row in own} == kernels
        assert {row["dtype"] for row in own} == {"float32", "bfloat16", "float16"}
    # triton 3.7 spills 24 bytes on sm_100, for large maps
    known = [("masked_forward_kernel", "sm_100")] if version("triton").startswith("3.7.") else []
    spilling = [row for row in rows if row["spills"]]
    assert not [row for row in spilling if (row["kernel"], row["target"]) not in known]
    assert all(row["spills"] <= 24 for row in spilling)
    # Contraction of a·b + c would show as a sum or a product without its own rounding.
    assert not [row for row in rows if row["unrounded"]]
    assert run.returncode == bool(spilling)
    # With the table's row for larger images a small one may have fewer vectors than threads.
    widest: dict[tuple[str, str, str, str], int] = {}
    for row in rows:
        if row["target"] == "sm_90":
            for kind, bits in row["widest"].items():
                key = (row["kernel"], kind, row["call"], row["dtype"])
                widest[key] = max(bits, widest.get(key, 0))
    asked = {
        (kernel, kind, call, dtype): bits
        for (kernel, kind, call, dtype), bits in widest.items()
        if kernel in (READ if kind == "ld" else WRITTEN)
        # what has no images writes none
        and (kind == "ld" or kernel != "masked_forward_kernel" or not NO_IMAGES.search(call))
    }
    assert {key[0] for key in asked} == READ | WRITTEN
    assert not {key: bits for key, bits in asked.items() if bits != 128}
    if f"triton {version('triton')}" in (ROOT / "docs/backends.md").read_text():
        for kernel, _, *shown in made_table("triton_kernels"):
            own = [r for r in rows if (r["kernel"], r["target"]) == (kernel, "sm_90")]
            for name, cell in zip(("registers", "shared", "spills"), shown, strict=False):
                found = sorted({row[name] for row in own})
                assert cell == "–".join(str(n) for n in found[:1] + found[1:][-1:]), kernel
    print(per_target)


COUNTED = """
import collections, json, torch
from benchmarks import triton_kernels
from sanm_kernels.backends.triton import launch

launches = collections.defaultdict(set)

def count(op, launcher):
    def run(*arguments):
        before = len(recorded)
        result = launcher(*arguments)
        launches[op].add(len(recorded) - before)
        return result
    return run

kernels = collections.Counter(job[1] for _, job in triton_kernels.jobs(["sm_90"]))
calls = triton_kernels.calls()
launch.launchers |= {op: count(op, launcher) for op, launcher in launch.launchers.items()}
for call in calls.values():
    with launch.recording() as recorded:
        call(torch.float32)
print(json.dumps([kernels, {op: sorted(found) for op, found in launches.items()}]))
"""


def test_the_tables_of_the_docs_are_those_of_the_code():
    """Kernels, how many variants each has, and launches of a call."""
    run = subprocess.run(
        [sys.executable, "-c", COUNTED], env=COMPILING, cwd=ROOT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    kernels, counted = json.loads(run.stdout)
    assert {row[0]: int(row[1]) for row in made_table("triton_kernels")} == kernels
    shown = launches("Triton kernels")
    assert shown.pop("masked_forward_out") == shown["masked_forward"]  # the same kernels
    assert set(shown) == set(counted)
    wrong = {op: found for op, found in counted.items() if not shown[op].issuperset(found)}
    assert not wrong, f"the docs have {[shown[op] for op in wrong]}"


SCHEDULED = """
import torch
from benchmarks import triton_kernels
from sanm_kernels.backends.triton import launch, load, masked_forward, masked_loss
from sanm_kernels.reference.masked_forward import Settings

def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")

def keys(n, lam, weight, gamma):
    z, t, r = meta(n, 10), meta(n, 10), meta(n)
    scalars = torch.tensor([lam, weight, 1.0, 0.0], dtype=torch.float64)
    given = (t, r, meta(n, dtype=torch.int64), None, scalars)
    low, high = gamma / 2, 1 - gamma
    config = Settings(3, True, True, False, True, 0, 1.0, low, high, gamma, 0.8, 1.25, [0.0])
    with launch.recording() as recorded:
        settings = (n // 2, True, -1, True)
        *_, per_sample, normalizer, p_mean, counts = masked_loss.forward(z, *given, *settings)
        kept = (normalizer, p_mean, counts)
        masked_loss.backward(meta(), *[None] * 5, z, *given, *kept, *settings)
        masked_forward.forward(meta(64, 512, 4, 4), meta(64, 10), meta(64), None,
                               meta(dtype=torch.int64), None, meta(64, 3, 32, 32), 32, 32, 10,
                               config.numbers())
    result = []
    for kernel, arguments, values in recorded:
        options = {k: values.pop(k) for k in ("num_warps", "num_stages") if k in values}
        what = triton_kernels.source(kernel, arguments, values)
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
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout.endswith("none compiled anew\n"), run.stderr
