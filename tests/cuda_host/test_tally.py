"""What the CUDA kernels move through memory in the headline calls, counted by the emulation.

`python -m benchmarks.roofline` counts, and computes times from it, for all sizes and two GPUs.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from inputs import extended

import cuda_host

pytestmark = [
    extended,
    pytest.mark.skipif(cuda_host.why_not() is not None, reason=str(cuda_host.why_not())),
]
MOST = 1.05  # times the least: each input read once, each output written once
TARGETS = "a target's row is read for each of the rows that it is mixed into, from the L2 cache"
PASSES = "two passes for the range and the start, one for each EM step and one for the posterior"
#: Call → what is over MOST, at most, and why. `memory` counts a sector once a launch; `l2` as often
#: as a block fetches or writes it.
EXCEPTIONS = {
    "masked_loss 768×100": ({"l2": 2.61}, TARGETS),
    "masked_loss 768×100, backward": ({"l2": 1.94}, TARGETS),
    "masked_loss 768×1000": ({"l2": 2.58}, TARGETS),
    "masked_loss 768×1000, backward": ({"l2": 1.91}, TARGETS),
    "mixup_views 12×64 → 768 rows, 32 px": ({"l2": 1.51}, "a row is read as itself and as partner"),
    "reconstruction_loss 2×8, 224 px": ({"l2": 1.34}, "an image is read for each of two views"),
    "reconstruction_loss 2×8, 224 px, backward": ({"l2": 1.21}, "an image is read for each view"),
    "fit_label_quality 10000": ({"memory": 13.0, "l2": 15.0}, PASSES),
}


@pytest.fixture(scope="module")
def counted():
    command = [sys.executable, "-m", "benchmarks.roofline", "--small", "--json"]
    done = subprocess.run(
        [*command, "--devices", "H200"],
        cwd=cuda_host.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["H200"]


def test_the_tally_is_exact(counted):
    """Where what a launch does is known beforehand."""
    rows, row = 768, 3 * 32 * 32 * 4
    (launch,) = counted["mixup_views 12×64 → 768 rows, 32 px"]["launches"]
    assert launch["memory"] == [rows * row + 8 * rows, rows * row]
    assert launch["l2"] == [2 * rows * row + 32 * rows, rows * row]
    assert launch["barriers"] == launch["exchanges"] == 0
    # one block_reduce: two barriers, and in each warp two butterflies of five exchanges
    squares, finish = counted["reconstruction_loss 2×8, 224 px"]["launches"]
    assert (squares["kernel"], finish["kernel"]) == ("squares_kernel", "finish_kernel")
    assert squares["barriers"] == 2 * squares["blocks"]
    assert squares["exchanges"] == 10 * squares["threads"] // 32 * squares["blocks"]
    assert squares["memory"][1] == finish["memory"][0] == 4 * squares["blocks"]


def test_kernels_move_the_least_or_say_why(counted):
    faults = []
    for name, call in counted.items():
        allowed, why = EXCEPTIONS.get(name, ({}, ""))
        for what in ("memory", "l2"):
            moved = sum(sum(launch[what]) for launch in call["launches"]) / call["least"]
            if moved > allowed.get(what, MOST):
                faults.append(f"{name}: {what} is {moved:.3f} of the least")
            elif what in allowed and moved <= MOST:
                faults.append(f"{name}: the exception for {what} is no longer needed: {why}")
    faults += [f"{name}: no such call" for name in EXCEPTIONS if name not in counted]
    assert not faults, "\n".join(faults)
