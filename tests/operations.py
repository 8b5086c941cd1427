"""Every public function as a call, for test_gpu.py; and ``python tests/operations.py PART``:

probe: device, driver, versions, backends, and every function once on each; errors: the error of
every public function against float64, by dtype; launches: how many kernels a call launches;
exercise: every function once on small odd shapes, for compute-sanitizer; installed: the same with
the compiled library of an installed copy, which this must not find in the checkout. Exit status 1
if a function raises, a result is not finite, or a backend does not serve that should.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import itertools
import json
import os
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cuda_host import libraries
from torch import Tensor

import sanm_kernels as sk
from sanm_kernels import backends
from sanm_kernels.__main__ import info, text

Inputs = dict[str, Tensor]
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
OFFICIAL = sk.MaskConfig.official_cifar()


@dataclass(frozen=True)
class Operation:
    """A public function as a call on named tensors.

    Attributes:
        op: the operator that serves it.
        make: sizes → inputs, float32 on the CPU.
        run: inputs, options such as `backend` → floating-point outputs by name.
        wrt: the inputs that the outputs are differentiable in.
        cast: the inputs that take the dtype under test; the others keep theirs.
        sizes: keyword arguments of `make` for a usual call; without them it is small and odd.
    """

    op: str
    make: Callable[..., Inputs]
    run: Callable[..., Inputs]
    wrt: tuple[str, ...]
    cast: tuple[str, ...]
    sizes: dict[str, int]


def _masked(B: int = 3, C: int = 9, h: int = 3, H: int = 13, K: int = 5) -> Inputs:
    return {
        # Multiples of 1/8: E is exact in any order of summation, so all agree on the boxes.
        "features": (8 * torch.randn(B, C, h, h)).relu().round() / 8,
        "targets": torch.softmax(4 * torch.randn(B, K), 1),
        "clean_prob": torch.rand(B),
        "draws": torch.rand(B, OFFICIAL.num_draws(3), dtype=torch.float64),
        "images": torch.rand(B, 3, H, H),
        "weight": torch.randn(K, C),
        "bias": torch.randn(K),
    }


def run_masked_forward(x: Inputs, **options: Any) -> Inputs:
    """Official semantics, both views and the targets."""
    result = sk.masked_forward(
        x["features"], x["targets"], x["clean_prob"], images=x["images"], draws=x["draws"],
        config=OFFICIAL, **options,
    )  # fmt: skip
    assert result.images_masked is not None and result.targets_max is not None
    return {"images_masked": result.images_masked, "targets_max": result.targets_max}


def _run_classifier(x: Inputs, **options: Any) -> Inputs:
    result = sk.masked_forward(
        x["features"], x["targets"], x["clean_prob"], size=(20, 21), draws=x["draws"][:, :2],
        classifier=(x["weight"], x["bias"]), **options,
    )  # fmt: skip
    assert result.logits is not None and result.loss is not None
    return {"logits": result.logits, "loss": result.loss}


def _run_clamped(x: Inputs, **options: Any) -> Inputs:
    """The paper's drop, whose gradient in the targets is an operator of its own."""
    result = sk.masked_forward(
        x["features"], x["targets"], x["clean_prob"], size=(13, 13), draws=x["draws"][:, :2],
        **options,
    )  # fmt: skip
    assert result.targets_max is not None and result.targets_min is not None
    return {"targets_max": result.targets_max, "targets_min": result.targets_min}


def _run_into(x: Inputs, **options: Any) -> Inputs:
    """Two calls: the second writes into the result of the first, which had other draws."""

    def call(draws: Tensor, out: sk.MaskedForward | None = None) -> sk.MaskedForward:
        return sk.masked_forward(
            x["features"], x["targets"], x["clean_prob"], images=x["images"], draws=draws,
            config=OFFICIAL, out=out, **options,
        )  # fmt: skip

    result = call(x["draws"], call(1 - x["draws"]))
    assert result.images_masked is not None and result.targets_max is not None
    return {"images_masked": result.images_masked, "targets_max": result.targets_max}


def _run_stats(x: Inputs, **options: Any) -> Inputs:
    stats = sk.activation_stats(x["features"], (20, 21), **options)
    return {name: getattr(stats, name) for name in ("max", "min", "mean", "std", "entropy")}


def _loss(B: int = 3, K: int = 7) -> Inputs:
    n = 12 * B
    return {
        "logits": 3 * torch.randn(n, K),
        "targets": torch.softmax(4 * torch.randn(2, B, K), 2),
        "ratio": 0.1 * torch.rand(2, 6, B),
        "permutation": torch.randperm(n),
    }


def _run_loss(x: Inputs, **options: Any) -> Inputs:
    n, K = x["logits"].shape
    targets = x["targets"]
    loss = sk.masked_loss(
        x["logits"], targets[:, None].expand(2, 6, targets.shape[1], K), ratio=x["ratio"],
        mix=(0.7, x["permutation"]), num_labeled=n // 2, unlabeled_weight=25.0, prior_weight=1.0,
        confidence_weight=0.1, **options,
    )  # fmt: skip
    return {"total": loss.total}


def _rebuilt(B: int = 3, H: int = 13) -> Inputs:
    low = torch.randint(0, H // 2, (2, B, 2))
    return {
        "reconstruction": torch.rand(2 * B, 3, H, H),
        "images": torch.rand(B, 3, H, H),
        "boxes": torch.cat([low, low + torch.randint(1, H // 2, (2, B, 2))], 2),
    }


def _run_rebuilt(x: Inputs, **options: Any) -> Inputs:
    return {"loss": sk.reconstruction_loss(x["reconstruction"], x["images"], **options)}


def _run_boxes(x: Inputs, **options: Any) -> Inputs:
    return _run_rebuilt(x, boxes=x["boxes"], region="masked", **options)


def _views(B: int = 3, H: int = 13) -> Inputs:
    views = {f"view{i}": torch.rand(B, 3, H, H) for i in range(4)}
    return views | {"permutation": torch.randperm(4 * B)}


def _run_views(x: Inputs, **options: Any) -> Inputs:
    views = [x[f"view{i}"] for i in range(4)]
    rows = 3 * len(views[0])
    return {"mixed": sk.mixup_views(views, 0.7, x["permutation"], rows=rows, **options)}


def _guess(B: int = 5, K: int = 7) -> Inputs:
    logits = {f"logits{i}": 3 * torch.randn(B, K) for i in range(4)}
    return logits | {"labels": torch.randint(K, (B,)), "clean_prob": torch.rand(B)}


def _run_guess(x: Inputs, **options: Any) -> Inputs:
    logits = [x[f"logits{i}"] for i in range(4)]
    guessed = sk.refine_targets(logits, labels=x["labels"], clean_prob=x["clean_prob"], **options)
    return {"targets": guessed}


def _rows(B: int = 5, K: int = 7) -> Inputs:
    return {"logits": 3 * torch.randn(B, K), "labels": torch.randint(K, (B,))}


def _run_rows(x: Inputs, **options: Any) -> Inputs:
    return {"loss": sk.sample_loss(x["logits"], x["labels"], **options)}


def _losses(N: int = 600) -> Inputs:
    wrong, spread = torch.rand(N) < 0.4, torch.randn(N)
    return {"losses": torch.where(wrong, 4 + spread, 0.3 * spread.exp()).abs()}


def _run_losses(x: Inputs, **options: Any) -> Inputs:
    quality = sk.fit_label_quality(x["losses"], **options)
    return {"clean_prob": quality.clean_prob, "means": quality.means}


MAP = {"B": 128, "C": 512, "h": 4, "H": 32, "K": 10}
VIEWS = tuple(f"view{i}" for i in range(4))
GUESSES = tuple(f"logits{i}" for i in range(4))
BATCH = {"B": 64, "K": 100}
# fmt: off
OPERATIONS = {
    "masked_forward": Operation("masked_forward", _masked, run_masked_forward,
                                ("images", "targets"), ("images",), MAP),
    "masked_forward, classifier": Operation("masked_forward", _masked, _run_classifier,
                                            ("features", "weight", "bias"), ("features",), MAP),
    "masked_forward, clamped": Operation("masked_forward", _masked, _run_clamped,
                                         ("targets",), ("targets",), MAP),
    "masked_forward, out=": Operation("masked_forward", _masked, _run_into, (), ("images",),
                                      MAP),
    "activation_stats": Operation("activation_stats", _masked, _run_stats, (), ("features",), MAP),
    "masked_loss": Operation("masked_loss", _loss, _run_loss, ("logits",), ("logits",), BATCH),
    "reconstruction_loss": Operation("reconstruction_loss", _rebuilt, _run_rebuilt,
                                     ("reconstruction",), ("reconstruction", "images"),
                                     {"B": 128, "H": 32}),
    "reconstruction_loss, boxes": Operation("reconstruction_loss", _rebuilt, _run_boxes,
                                            ("reconstruction",), ("reconstruction", "images"),
                                            {"B": 128, "H": 32}),
    "mixup_views": Operation("mixup_views", _views, _run_views, VIEWS, VIEWS,
                             {"B": 64, "H": 32}),
    "refine_targets": Operation("refine_targets", _guess, _run_guess, (), GUESSES, BATCH),
    "sample_loss": Operation("sample_loss", _rows, _run_rows, ("logits",), ("logits",), BATCH),
    "fit_label_quality": Operation("fit_label_quality", _losses, _run_losses, (), ("losses",),
                                   {"N": 50_000}),
}
# fmt: on


def inputs_of(
    operation: Operation, device: str, dtype: torch.dtype, seed: int = 0, **sizes: int
) -> Inputs:
    """The operation's inputs on a device, with those under test rounded to `dtype`."""
    torch.manual_seed(seed)
    made = operation.make(**sizes)
    return {
        name: (x.to(dtype) if name in operation.cast else x).to(device) for name, x in made.items()
    }


def wider(operation: Operation, x: Inputs) -> Inputs:
    """The same values in float64 on the CPU."""
    wide = {*operation.cast, *operation.wrt}
    return {name: v.cpu().double() if name in wide else v.cpu() for name, v in x.items()}


def with_gradients(
    operation: Operation, x: Inputs, run: Callable[..., Inputs] | None = None, **options: Any
) -> Inputs:
    """Outputs, and gradients as "d NAME", where each output arrives with its own slope."""
    x = dict(x)
    for name in operation.wrt:
        x[name] = x[name].detach().requires_grad_()
    outputs = (run or operation.run)(x, **options)
    results = {name: out.detach() for name, out in outputs.items()}
    if operation.wrt:
        total = sum(
            # slopes that differ between the elements, in the dtype of the output
            (out * torch.arange(out.numel(), device=out.device).remainder(7).sub(2.5)
             .to(out.dtype).view(out.shape)).sum()
            for out in outputs.values()
        )  # fmt: skip
        gradients = torch.autograd.grad(total, [x[name] for name in operation.wrt])
        results |= {f"d {n}": g for n, g in zip(operation.wrt, gradients, strict=True)}
    return results


def error(got: Tensor, exact: Tensor) -> dict[str, float]:
    """Largest absolute error, and that over the largest exact value."""
    exact = exact.cpu().double()
    most = (got.cpu().double() - exact).abs().max().item()
    return {"max_abs": most, "max_rel": most / max(exact.abs().max().item(), 1e-300)}


def served_by(operation: Operation, device: str) -> list[str]:
    """The compiled backends that serve it here, Triton's interpreter included; or the reference."""
    compiled = [name for name in backends.available_backends() if name != "reference"]
    serving = [b for b in compiled if backends.serves(b, operation.op, device) is None]
    return serving or ["reference"]


def errors(device: str, tiny: bool) -> Iterator[dict[str, Any]]:
    """Per operation, backend, dtype and quantity: our error and that of plain torch, to float64."""
    for name, operation in OPERATIONS.items():
        for dtype in DTYPES:
            x = inputs_of(operation, device, dtype, **({} if tiny else operation.sizes))
            exact = with_gradients(operation, wider(operation, x), backend="reference")
            plain = with_gradients(operation, x, backend="reference")
            for backend in served_by(operation, device):
                ours = with_gradients(operation, x, backend=backend)
                for quantity, value in exact.items():
                    yield {
                        "function": name, "quantity": quantity, "dtype": str(dtype)[6:],
                        "backend": backend, **error(ours[quantity], value),
                        "torch": error(plain[quantity], value),
                    }  # fmt: skip


def triton_kernels() -> set[str]:
    """Names of this package's Triton kernels that are loaded."""
    return {
        name
        for module, content in list(sys.modules.items())
        if module.startswith("sanm_kernels.backends.triton.")
        for name, value in vars(content).items()
        if type(value).__name__ in ("JITFunction", "InterpretedFunction")
    }


def is_own(kernel: str) -> bool:
    """Whether a kernel is this package's: Triton's by name, the CUDA library's by namespace."""
    return "sanm::" in kernel or kernel in triton_kernels()


def launched(function: Callable[[], object], device: str) -> Counter[str]:
    """Kernels that a call launches on the device, by name; our own alone where it is the CPU.

    The caller has run the function before, so that nothing is compiled or loaded meanwhile.
    """
    if device == "cpu":
        return _interpreted(function)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        function()
        torch.cuda.synchronize()
    kind = torch.autograd.DeviceType.CUDA
    return Counter(e.name for e in profile.events() if e.device_type == kind)


def _interpreted(function: Callable[[], object]) -> Counter[str]:
    """Launches of Triton's interpreter, which no profiler sees."""
    counts: Counter[str] = Counter()
    with contextlib.ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("sanm_kernels.backends.triton.") and hasattr(module, "launch"):
                original = module.launch
                if not callable(original):  # the module of that name
                    continue

                def counted(kernel: Any, grid: Any, *args: Any, _go=original, **meta: Any) -> None:
                    counts[kernel.fn.__name__] += 0 not in grid
                    _go(kernel, grid, *args, **meta)

                stack.callback(setattr, module, "launch", original)
                module.launch = counted
        function()
    return counts


def launches(device: str, tiny: bool) -> Iterator[dict[str, Any]]:
    """Per operation and backend: launches of ours and all other device work."""
    for name, operation in OPERATIONS.items():
        x = inputs_of(operation, device, torch.float32, **({} if tiny else operation.sizes))
        whats = ["forward", "forward and backward"][: 1 + bool(operation.wrt)]
        for backend, what in itertools.product(served_by(operation, device), whats):
            # the second includes the slopes and sums of `with_gradients`
            both = what != "forward"
            call = functools.partial(with_gradients, operation) if both else operation.run
            function = functools.partial(call, x, backend=backend)
            function()
            counts = launched(function, device)
            own = {k: n for k, n in counts.items() if is_own(k)}
            yield {
                "function": name, "what": what, "backend": backend, "own": sum(own.values()),
                "others": counts.total() - sum(own.values()), "kernels": own,
            }  # fmt: skip


def exercise(device: str, tiny: bool) -> Iterator[dict[str, Any]]:
    """Every operation, forward and backward, in two dtypes, on small odd shapes."""
    for name, operation in OPERATIONS.items():
        kinds = (torch.float32,) if tiny else (torch.float32, torch.float16)
        for backend, dtype in itertools.product(served_by(operation, device), kinds):
            if backend == "reference":
                continue  # torch's own kernels, perhaps hundreds
            row = {"function": name, "dtype": str(dtype)[6:], "backend": backend}
            try:
                x = inputs_of(operation, device, dtype)
                results = with_gradients(operation, x, backend=backend)
                row["ok"] = all(bool(v.isfinite().all()) for v in results.values())
            except Exception as error:  # the others may run all the same
                traceback.print_exc()
                row |= {"ok": False, "error": f"{type(error).__name__}: {error}"}
            yield row


def lacking(backend: str) -> str | None:
    """What keeps from a GPU a backend that should serve it here; None if nothing does."""
    reason = backends.runs_on(backend, torch.device("cuda", 0))
    if reason is None:
        return None
    if backend == "triton" and importlib.util.find_spec("triton") is not None:
        return f"triton is installed, but its kernels cannot be used: {reason}"
    nvcc = libraries.find_nvcc()
    asked = torch.version.cuda is not None and os.environ.get("SANM_CUDA") != "0"
    if backend == "cuda" and nvcc is not None and asked:
        return f"nvcc is there ({nvcc}), but the CUDA library cannot be used: {reason}"
    return None


def probe(device: str, tiny: bool) -> Iterator[dict[str, Any]]:
    """Device, driver, versions, backends; then every operation once on each backend.

    Also compiles Triton's kernels, which the steps that follow then find compiled.
    """
    facts = info()
    print(text(facts), flush=True)
    known: dict[str, Any] = {"device": device, "torch": torch.__version__}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        known |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "driver": torch._C._cuda_getDriverVersion(),
            "runtime": torch._C._cuda_getCompiledVersion(),
        }
    yield known
    for backend, reason in facts["backends"].items():
        wrong = lacking(backend) if device == "cuda" else None
        yield {"backend": backend, "ok": wrong is None, "reason": wrong or reason}
    yield from exercise(device, tiny=True)


def installed(device: str, tiny: bool) -> Iterator[dict[str, Any]]:
    """As `exercise`, of a package that is not the checkout's, with its own compiled backend."""
    package = Path(sk.__file__).resolve().parent
    if package.parent == Path(__file__).resolve().parent.parent:
        raise SystemExit(f"{package} is the checkout's")
    backend = "cuda" if device == "cuda" else "cpu"
    with sk.use_backend(backend):  # raises where there is none
        for row in exercise(device, tiny):
            if row["backend"] == backend:
                yield row | {"package": str(package)}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python tests/operations.py", description=__doc__)
    parts = {part.__name__: part for part in (probe, errors, launches, exercise, installed)}
    parser.add_argument("part", choices=parts)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON, written after each row")
    options = parser.parse_args(arguments)
    rows = []
    for row in parts[options.part](options.device, options.tiny):
        rows.append(row)
        print(*(f"{k}={v}" for k, v in row.items()), flush=True)
        if options.out is not None:
            temporary = options.out.with_suffix(".tmp")  # the file is whole at any time
            temporary.write_text(json.dumps({options.part: rows}))
            os.replace(temporary, options.out)
    return 0 if all(row.get("ok", True) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
