"""Triton's kernels compiled ahead of time, which needs no GPU: resources, rounding, arguments."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter

import pytest
from inputs import TRITON_DEVICE

pytestmark = pytest.mark.skipif(TRITON_DEVICE is None, reason="triton is not installed")


def test_every_kernel_compiles_for_every_architecture_without_spills():
    # a process of its own: this one may run Triton as an interpreter, which can't compile
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "sanm_kernels.backends.triton.aot", "--json"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout, run.stderr
    rows = json.loads(run.stdout)
    assert {row["arch"] for row in rows} == {80, 90, 100}
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16", "float16"}
    assert not [row for row in rows if row["spills"]]
    # Contraction of a·b + c would show as a sum or a product without its own rounding.
    assert not [row for row in rows if row["unrounded"]]
    per_arch = Counter(row["arch"] for row in rows)
    assert len(set(per_arch.values())) == 1
    assert run.returncode == 0
    print(f"{len(rows)} kernels compiled")
