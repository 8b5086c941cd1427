"""``python -m benchmarks.roofline``: bytes and computed times of the CUDA kernels, without a GPU.

The host emulation (tests/cuda_host) runs the headline calls with the multiprocessors of an H200 and
of an A100 and counts what each launch does: blocks, barriers, warp exchanges, trips to memory that
a block waits for, and sectors of 32 bytes that blocks fetch and write (`l2`), also with each sector
counted once a launch (`memory`: what a large enough level-2 cache leaves). The table has both over
the least: each input read once, each output written once. Nothing here is measured. A launch is
taken to last

    from LAUNCH + max(moving, waiting)   blocks wait while others move data
      to LAUNCH + moving + waiting       all wait at the same time
    moving = max(memory / copy, l2 / (2 · copy))
    waiting = (waves − 1) · serial of a block on average + serial of the slowest one
    serial = TRIP · trips + BARRIER · barriers + EXCHANGE · exchanges of a warp
    waves = ⌈blocks / (multiprocessors · blocks that one holds)⌉

with copy the rate at which the GPU copies within its memory, a level-2 cache twice as fast as that,
and as many blocks at a time as threads, shared memory and registers allow; registers are those of
`--library` where that is there (build/cuda-90/cuda.so, which the tests build), else 64 a thread.
Arithmetic takes no time, loads between two barriers are issued together, and the launches of a call
follow each other without overlap. A share is that of the least at the rate of a copy.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import sanm_kernels as sk
from benchmarks import kernels

ROOT = Path(__file__).resolve().parent.parent
TRIP, BARRIER, EXCHANGE, LAUNCH = 0.7e-6, 0.03e-6, 0.015e-6, 2e-6  # seconds


class Device(NamedTuple):
    capability: int
    multiprocessors: int
    copy: float  # bytes read and written, per second
    shared: int  # bytes of a multiprocessor


DEVICES = {"H200": Device(90, 132, 4.3e12, 228 * 1024), "A100": Device(80, 108, 1.6e12, 164 * 1024)}
Call = tuple[list[Tensor], Callable[[], Any]]  # what has to be read; what is to be counted


def masked_forward(B: int, C: int, h: int, H: int, K: int, dtype: torch.dtype) -> Call:
    given = [torch.rand(B, C, h, h, dtype=dtype), torch.rand(B, K), torch.rand(B)]
    images, seed = torch.rand(B, 3, H, H, dtype=dtype), torch.tensor(0)
    options: dict[str, Any] = {"config": sk.MaskConfig.official_cifar(), "generator": seed}
    inputs = [*given, images]
    return inputs, lambda: sk.masked_forward(*given, images=images, **options).buffers


def masked_classifier(B: int, C: int, h: int, H: int, K: int) -> Call:
    """Without the weight, which a matrix product of torch reads."""
    features, targets, weight, bias = (
        torch.rand(shape) for shape in ((B, C, h, h), (B, K), (K, C), (K,))
    )
    corner = torch.randint(0, H // 2, (B, 2), dtype=torch.int32)
    box = torch.cat([corner, corner + H // 3], 1)
    classify = torch.ops.sanm_kernels.masked_classifier.cuda
    return (
        [features, box, targets, bias],
        lambda: list(classify(features, box, targets, weight, bias, H, H)),
    )


def masked_views_backward(B: int) -> Call:
    gradient = torch.rand(2 * B, 3, 224, 224)
    corner = torch.randint(0, 100, (2, B, 2), dtype=torch.int32)
    boxes = torch.cat([corner, corner + 60], 2)
    backward = torch.ops.sanm_kernels.masked_views_backward.cuda
    return [gradient, boxes], lambda: [backward(gradient, boxes, False)]


def masked_loss(K: int, backward: bool) -> Call:
    B, n = 64, 768
    logits = torch.randn(n, K).requires_grad_()
    targets = torch.softmax(torch.randn(2, B, K), 2)
    ratio, permutation = torch.rand(2, 6, B), torch.randperm(n)

    def forward() -> Any:
        return sk.masked_loss(
            logits, targets[:, None].expand(2, 6, B, K), ratio=ratio, mix=(0.7, permutation),
            num_labeled=n // 2, unlabeled_weight=25.0, prior_weight=1.0,
        )  # fmt: skip

    inputs = [logits, targets, ratio, permutation]
    if not backward:
        return inputs, forward
    total = forward().total
    return inputs, lambda: torch.autograd.grad(total, logits)


def mixup_views(rows: int) -> Call:
    views, permutation = [torch.rand(64, 3, 32, 32) for _ in range(12)], torch.randperm(768)
    return [*views, permutation], lambda: [sk.mixup_views(views, 0.7, permutation, rows=rows)]


def refine_targets(K: int) -> Call:
    logits, labels, q = (
        [torch.randn(64, K) for _ in range(4)],
        torch.zeros(64).long(),
        torch.rand(64),
    )
    return [*logits, labels, q], lambda: [sk.refine_targets(logits, labels=labels, clean_prob=q)]


def reconstruction_loss(B: int, H: int, backward: bool) -> Call:
    images, made = torch.rand(B, 3, H, H), torch.rand(2 * B, 3, H, H).requires_grad_()
    if not backward:
        return [images, made], lambda: [sk.reconstruction_loss(made, images)]
    loss = sk.reconstruction_loss(made, images)
    return [images, made], lambda: torch.autograd.grad(loss, made)


def fit_label_quality(N: int) -> Call:
    losses = torch.where(torch.rand(N) < 0.4, 4 + torch.randn(N), 0.3 * torch.randn(N).exp())
    return [losses], lambda: sk.fit_label_quality(losses)


def calls(small: bool) -> dict[str, Callable[[], Call]]:
    """The headline calls; `small`: fewer of the images and losses, with which bytes grow."""
    B, some, N = (4, 8, 10_000) if small else (256, 64, 1_000_000)
    large = (B, 2048, 7, 224, 14)
    return {
        "masked_forward 128×512×4×4 → 32 px": lambda: masked_forward(
            128, 512, 4, 32, 10, torch.float32
        ),
        f"masked_forward {B}×2048×7×7 → 224 px": lambda: masked_forward(*large, torch.float32),
        f"masked_forward {B}×2048×7×7 → 224 px, bfloat16": lambda: masked_forward(
            *large, torch.bfloat16
        ),
        "masked_classifier 128×512×4×4": lambda: masked_classifier(128, 512, 4, 32, 10),
        f"masked_classifier {B}×2048×7×7": lambda: masked_classifier(*large),
        f"masked_views_backward 2×{some}, 224 px": lambda: masked_views_backward(some),
        "masked_loss 768×100": lambda: masked_loss(100, False),
        "masked_loss 768×100, backward": lambda: masked_loss(100, True),
        "masked_loss 768×1000": lambda: masked_loss(1000, False),
        "masked_loss 768×1000, backward": lambda: masked_loss(1000, True),
        "mixup_views 12×64 → 768 rows, 32 px": lambda: mixup_views(768),
        "refine_targets 4×64×100": lambda: refine_targets(100),
        "refine_targets 4×64×1000": lambda: refine_targets(1000),
        f"reconstruction_loss 2×{some}, 224 px": lambda: reconstruction_loss(some, 224, False),
        f"reconstruction_loss 2×{some}, 224 px, backward": lambda: reconstruction_loss(
            some, 224, True
        ),
        f"fit_label_quality {N}": lambda: fit_label_quality(N),
    }


def tensors(x: Any) -> list[Tensor]:
    return [x] if isinstance(x, Tensor) else [t for y in x or () for t in tensors(y)]


def size(given: list[Tensor]) -> int:
    return sum({t.data_ptr(): t.nbytes for t in given}.values())


def count(small: bool) -> None:
    """Prints what the launches of each call do, as JSON; in the process that `counted` starts."""
    ctypes.CDLL(os.environ["SANM_CUDA_HOST_TALLY_LIBRARY"], mode=ctypes.RTLD_GLOBAL)
    library, log = os.environ["SANM_KERNELS_CUDA_EMULATION"], os.environ["SANM_CUDA_HOST_TALLY"]
    symbols = subprocess.run(["nm", library], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^([0-9a-f]+) [tTwW] (\S+)$", symbols, re.MULTILINE)
    mangled = {int(address, 16): name for address, name in found}
    result = {}
    with sk.use_backend("cuda"):
        for name, make in calls(small).items():
            torch.manual_seed(0)
            inputs, call = make()
            Path(log).write_text("")
            least = size(inputs) + size(tensors(call()))
            launches = [json.loads(line) for line in Path(log).read_text().splitlines()]
            known = kernels.names([mangled[launch["kernel"]] for launch in launches])
            for launch, (kernel, _) in zip(launches, known, strict=True):
                launch["kernel"] = kernel
            result[name] = {"least": least, "launches": launches}
    print(json.dumps(result))


def counted(device: Device, small: bool) -> dict[str, Any]:
    """What :func:`count` prints in a process that emulates the device."""
    python = [sys.executable, "-m"]
    built = subprocess.run(
        [*python, "cuda_host", "thread", "tally"], cwd=ROOT / "tests", stdout=subprocess.PIPE,
        text=True, check=True,
    ).stdout  # fmt: skip
    kernels_library, tally = re.findall(r"^/.*\.so$", built, re.MULTILINE)
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            "SANM_KERNELS_CUDA_EMULATION": kernels_library,
            "SANM_CUDA_HOST_TALLY_LIBRARY": tally,
            "SANM_CUDA_HOST_TALLY": f"{folder}/launches",
            "SANM_CUDA_HOST_CAPABILITY": str(device.capability),
            "SANM_CUDA_HOST_MULTIPROCESSORS": str(device.multiprocessors),
        }
        done = subprocess.run(
            [*python, "benchmarks.roofline", "--count", *["--small"] * small], cwd=ROOT,
            env=os.environ | environment, stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
    return json.loads(done.stdout)


def seconds(launch: dict[str, Any], device: Device, registers: dict[str, int]) -> list[float]:
    """The least and the most, by the formula above."""
    blocks, threads = launch["blocks"], launch["threads"]
    used = registers.get(launch["kernel"], 64) * threads
    together = min(32, 2048 // threads, 65536 // used, device.shared // (launch["shared"] + 1024))
    waves = -(-blocks // (device.multiprocessors * max(1, together)))

    def serial(barriers: int, exchanges: int, trips: int) -> float:
        return BARRIER * barriers + EXCHANGE * exchanges / -(-threads // 32) + TRIP * trips

    average = serial(*(launch[what] for what in ("barriers", "exchanges", "trips"))) / blocks
    waiting = (waves - 1) * average + serial(*launch["slowest"])
    moving = max(sum(launch["memory"]), sum(launch["l2"]) / 2) / device.copy
    return [LAUNCH + max(moving, waiting), LAUNCH + moving + waiting]


def table(found: dict[str, dict[str, Any]], registers: dict[str, int]) -> str:
    """A line per call: what it does on the first device, of its longest launch; computed times."""
    first = next(iter(found.values()))
    columns = ["call", "launches", "blocks × threads", "barriers", "exchanges of a warp", "memory"]
    columns += ["l2", *(f"{name}, computed" for name in found)]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, call in first.items():
        launches, least = call["launches"], call["least"]
        longest = max(launches, key=lambda launch: seconds(launch, DEVICES["H200"], registers))
        blocks, warps = longest["blocks"], -(-longest["threads"] // 32)
        cells = [
            name,
            str(len(launches)),
            f"{blocks} × {longest['threads']}",
            f"{longest['barriers'] / blocks:.0f}",
            f"{longest['exchanges'] / blocks / warps:.0f}",
            *(f"{sum(sum(x[k]) for x in launches) / least:.2f}" for k in ("memory", "l2")),
        ]
        for device, counts in found.items():
            times = [seconds(x, DEVICES[device], registers) for x in counts[name]["launches"]]
            low, high = map(sum, zip(*times, strict=True))
            share = least / DEVICES[device].copy
            cells.append(
                f"{1e6 * low:.1f}–{1e6 * high:.1f} µs, {share / high:.0%}–{share / low:.0%}"
            )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__)
    parser.add_argument("--library", type=Path, default=ROOT / "build/cuda-90/cuda.so")
    parser.add_argument("--devices", nargs="+", choices=DEVICES, default=list(DEVICES))
    parser.add_argument("--small", action="store_true", help="fewer images and losses")
    parser.add_argument("--json", action="store_true", help="what each launch does")
    parser.add_argument("--count", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.count:
        return count(given.small)
    found = {name: counted(DEVICES[name], given.small) for name in given.devices}
    if given.json:
        return print(json.dumps(found))
    rows = kernels.read(given.library) if given.library.is_file() else []
    registers: dict[str, int] = {}
    for row in rows:
        registers[row["kernel"]] = max(row["registers"], registers.get(row["kernel"], 0))
    print(table(found, registers))


if __name__ == "__main__":
    main()
