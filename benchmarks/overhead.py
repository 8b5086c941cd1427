"""``python -m benchmarks.overhead``: what a call costs that has next to nothing to compute.

On one core, in CPU time: the median over rounds in which the functions take turns.

``--triton``: the same calls with Triton's kernels, up to the launch and without a GPU. Counted are
this package's Python and Triton's own until it has found the compiled kernel; left out are Triton's
launcher, the driver, the switch to the tensors' GPU and torch's CUDA allocator: results, and what
torch computes beside the kernels, are the CPU's.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import sanm_kernels as sk
from benchmarks.common import Watch, serving
from sanm_kernels import backends
from sanm_kernels.ops.base import library

ROUNDS, CALLS = 150, 100
#: What is compared with torch's own function.
OVER = {
    "masked_loss + backward": "F.cross_entropy + backward",
    "sample_loss": "F.cross_entropy, none",
}


def microseconds(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """CPU time of a call of each function."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.process_time_ns()
            for _ in range(CALLS):
                function()
            times[name].append((time.process_time_ns() - start) / CALLS)
    return {name: statistics.median(some) / 1000 for name, some in times.items()}


def functions() -> dict[str, Callable[[], object]]:
    """masked_forward at B = 1, (512, 4, 4) features, a 3×32×32 image, official semantics.

    Losses and targets of 4 rows and 10 classes, mixing of two views (4, 8).
    """
    features, images = torch.randn(1, 512, 4, 4), torch.rand(1, 3, 32, 32)
    soft, clean_prob = torch.softmax(torch.randn(1, 10), 1), torch.rand(1)
    config = sk.MaskConfig.official_cifar()
    draws = torch.rand(1, config.num_draws(3), dtype=torch.float64)

    def masked_forward(out: sk.MaskedForward | None = None) -> sk.MaskedForward:
        return sk.masked_forward(
            features, soft, clean_prob, images=images, config=config, draws=draws, out=out
        )

    given = masked_forward()
    logits = torch.randn(4, 10, requires_grad=True)
    constant = logits.detach()
    labels, targets = torch.tensor([1, 7, 0, 3]), torch.softmax(torch.randn(4, 10), 1)
    views, permutation = [torch.rand(4, 8), torch.rand(4, 8)], torch.randperm(8)
    partner = torch.randperm(4)
    image, reconstruction = torch.rand(1, 3, 8, 8), torch.rand(2, 3, 8, 8, requires_grad=True)
    weights = {"num_labeled": 2, "unlabeled_weight": 0.5, "prior_weight": 1.0}

    def backward(loss: Callable[[], Tensor], *leaves: Tensor) -> Callable[[], None]:
        def run() -> None:
            for leaf in leaves:
                leaf.grad = None
            loss().backward()

        return run

    return {
        "masked_forward": masked_forward,
        "masked_forward, out=": lambda: masked_forward(given),
        "masked_loss": lambda: sk.masked_loss(constant, targets),
        "masked_loss, mixed": lambda: sk.masked_loss(
            constant, targets, mix=(0.3, partner), **weights
        ),
        "masked_loss + backward": backward(lambda: sk.masked_loss(logits, targets).total, logits),
        "F.cross_entropy + backward": backward(lambda: F.cross_entropy(logits, targets), logits),
        "sample_loss": lambda: sk.sample_loss(constant, labels),
        "F.cross_entropy, none": lambda: F.cross_entropy(constant, labels, reduction="none"),
        "mixup_views": lambda: sk.mixup_views(views, 0.3, permutation),
        "refine_targets": lambda: sk.refine_targets([constant, targets]),
        "reconstruction_loss + backward": backward(
            lambda: sk.reconstruction_loss(reconstruction, image), reconstruction
        ),
        "activation_stats": lambda: sk.activation_stats(features, (32, 32)),
        "torch.empty_like": lambda: torch.empty_like(images),
    }


class Driver:
    """Of a GPU that is not there."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return importlib.import_module("triton.backends.compiler").GPUTarget("cuda", 90, 32)


class Compiled:
    """A kernel that does nothing when it is launched."""

    function, packed_metadata = None, ()

    def launch_metadata(self, *_: Any) -> None: ...

    def run(self, *_: Any) -> None: ...


def stub_triton() -> None:
    """Let the Triton backend serve CPU tensors with kernels that do nothing."""
    importlib.import_module("triton.runtime").driver.set_active(Driver())
    jit = importlib.import_module("triton.runtime.jit")

    def compile_nothing(kernel: Any, key: Any, signature: Any, device: int, *_: Any) -> Compiled:
        found = kernel.device_caches[device][0][key] = Compiled()  # where the next call finds it
        return found

    jit.JITFunction._do_compile = compile_nothing
    package = importlib.import_module("sanm_kernels.backends.triton")
    launch = importlib.import_module("sanm_kernels.backends.triton.launch")

    def implements(op: str) -> Callable[[Any], Any]:
        def register(launcher: Any) -> Any:
            library.impl(f"{op}.triton", launcher, "CPU")
            return launcher

        return register

    launch.implements = implements
    package.register()
    backends.DEVICES["triton"] = ("cpu",)
    backends.SILENT = ()  # on a GPU values are not checked
    backends.load = lambda backend: None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--triton", action="store_true", help="its launches, without a GPU")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    served: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    torch.set_num_threads(1)
    if options.triton:
        stub_triton()
        served = sk.use_backend("triton")
    with served:
        print(f"ours is {serving(['masked_forward'], 'cpu')['masked_forward']}")
        watch = Watch(despite=True)
        watch.keeps("before the run")
        cases = functions()
        microseconds(cases, 1)  # first what is done once
        times = microseconds(cases, options.rounds)
        watch.keeps("during the run")
    for name, time_of_one in times.items():
        other = OVER.get(name)
        ratio = f", {time_of_one / times[other]:.2f} × {other}" if other else ""
        print(f"{name:32}{time_of_one:8.1f} µs{ratio}")


if __name__ == "__main__":
    main()
