"""``python tests/operations.py PART``, with every call of the sheets:

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
from pathlib import Path
from typing import Any

import torch
from cuda_host import libraries
from sheets import OPERATIONS, Operation, inputs_of, wider, with_gradients
from torch import Tensor

import sanm_kernels as sk
from sanm_kernels import backends
from sanm_kernels.__main__ import info, text

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


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
