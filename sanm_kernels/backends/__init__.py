"""Which backend serves which operator, why another does not, and how to force one."""

from __future__ import annotations

import contextlib
import functools
import importlib
import numbers
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch.autograd import forward_ad

from sanm_kernels.ops import internals
from sanm_kernels.ops.base import (
    BACKENDS,
    functions,
    operators,
    overload_of,
    raise_forward_mode,
    tensors,
    transformable,
    value_checks,
)

F = TypeVar("F", bound=Callable[..., Any])

#: In order of preference, per device type; any other device is served by the reference.
PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
if torch.version.hip is not None:  # there no kernel has run yet: Triton's run where they are forced
    PREFERENCE["cuda"] = ("reference",)
#: Device types that a backend's kernels run on; the reference runs anywhere.
DEVICES: dict[str, tuple[str, ...]] = {"cpu": ("cpu",), "triton": ("cuda",), "cuda": ("cuda",)}
if os.environ.get("TRITON_INTERPRET") == "1":  # then Triton's kernels run interpreted
    DEVICES["triton"] = ("cuda", "cpu")
if os.environ.get("SANM_KERNELS_CUDA_EMULATION"):  # then the CUDA kernels run on the host
    DEVICES["cuda"] = ("cpu",)

#: Backends whose kernels run on a device and cannot report a wrong value.
SILENT = ("triton", "cuda")


class _Forced(str):
    """A forced backend's name; each entry of `_forced` is told from the others by identity."""


_forced: list[str] = []  # innermost use_backend last


def _check_name(name: object, argument: str) -> str:
    if name not in BACKENDS:
        raise ValueError(
            f"{argument}: expected one of {', '.join(map(repr, BACKENDS))}, got {name!r}"
        )
    return str(name)


@functools.cache
def load(backend: str) -> str | None:
    """Load a backend's kernels, once. Returns None, or the reason why they can't be loaded."""
    try:
        module = importlib.import_module(f"sanm_kernels.backends.{backend}")
    except ModuleNotFoundError as error:
        return f"this build has no {backend} backend ({error})"
    reason: str | None = module.load()
    return reason


@functools.cache
def runs_on(backend: str, device: torch.device) -> str | None:
    """None if `backend` runs on `device`, a GPU with its index, else the reason."""
    if backend == "reference":
        return None
    if device.type not in DEVICES[backend]:
        return f"it runs on {' and '.join(DEVICES[backend])} tensors, not on {device.type}"
    reason = load(backend)
    if reason is None and device.type == "cuda":
        module = importlib.import_module(f"sanm_kernels.backends.{backend}")
        reason = module.probe(device.index)
    return reason


def gpus() -> list[torch.device]:
    """Those that torch sees."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.device("cuda", index) for index in range(count)]


@functools.cache
def usable(backend: str) -> str | None:
    """None if `backend` runs on some device here, else the reason."""
    reason = load(backend)
    if reason is not None or DEVICES.get(backend) != ("cuda",):
        return reason
    current = torch.cuda.current_device()  # first: a probe takes memory on its GPU
    reasons: list[str] = []
    for device in sorted(gpus(), key=lambda device: device.index != current):
        reason = runs_on(backend, device)
        if reason is None:
            return None
        reasons.append(reason)
    return "; ".join(dict.fromkeys(reasons))


def serves(backend: str, op: str, device: torch.device | str) -> str | None:
    """None if `backend` can run operator `op` on `device`, else the reason.

    "cuda" is the current GPU.
    """
    device = torch.device(device)
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    reason = runs_on(backend, device)
    if reason is not None or backend == "reference":
        return reason
    if overload_of(op, backend).has_kernel_for_dispatch_key(device.type.upper()):
        return None
    return f"it has no kernel for {op}"


def preferred(op: str, device: torch.device | str) -> str:
    """The backend that serves `op` on `device` unless another is forced."""
    for backend in PREFERENCE.get(torch.device(device).type, ()):
        if serves(backend, op, device) is None:
            return backend
    return "reference"


class Chosen(NamedTuple):
    """An operator on the backend that serves it, and what else a call of it needs to know."""

    overload: Any
    backend: str
    check: Callable[..., None] | None  #: of values, where the kernels cannot report wrong ones
    differentiable: Callable[..., Any] | None
    transformable: Callable[..., Any] | None


@functools.cache
def _choose(op: str, device: torch.device, forced: str | None) -> Chosen:
    backend = forced or preferred(op, device)
    if forced is not None:
        reason = serves(forced, op, device)
        if reason is not None:
            raise RuntimeError(f"backend {forced!r} cannot run {op}: {reason}")
    elif backend == "reference":
        _warn(device)
    return Chosen(
        overload_of(op, backend),
        backend,
        value_checks.get(op) if backend in SILENT else None,
        functions.get((op, backend)),
        transformable.get((op, backend)),
    )


@functools.cache
def _warn(device: torch.device) -> None:
    """Say, once a device, that the slow reference serves where compiled kernels could."""
    could = {"cpu": sys.platform == "linux", "cuda": torch.cuda.is_available()}
    if not could.get(device.type, False):
        return
    names, served, advice = PREFERENCE[device.type][:-1], "it lacks operators", remedy()
    if device.type == "cuda" and torch.version.hip is not None:
        names, served = ("cuda", "triton"), "it has not been run on ROCm yet"
        advice = "To try it: SANM_KERNELS_BACKEND=triton"
    reasons = "\n  ".join(f"{name}: {runs_on(name, device) or served}" for name in names)
    warnings.warn(
        f"sanm_kernels has no compiled kernels for {device} tensors and computes in plain torch, "
        f"which is several times slower.\n  {reasons}\n  {advice}",
        RuntimeWarning,
        stacklevel=2,
    )


def shadowed() -> list[Path]:
    """Other copies of this package on the path, which the one that was imported hides."""
    own = Path(__file__).resolve().parent.parent
    found = dict.fromkeys(Path(entry or ".", own.name).resolve() for entry in sys.path)
    return [path for path in found if path != own and (path / "__init__.py").is_file()]


def remedy() -> str:
    """What to do where the compiled library is missing."""
    own = Path(__file__).resolve().parent.parent
    for other in shadowed():
        if list(other.glob("lib/*.so")):
            return (
                f"{other} is a compiled copy, which {own} hides: import it from another folder, "
                f"or compile this one: pip install -v -e {shlex.quote(str(own.parent))}"
            )
    if (own.parent / "setup.py").is_file():
        return f"To compile them: pip install -v -e {shlex.quote(str(own.parent))}"
    return "To compile them: pip install -v --force-reinstall --no-deps FOLDER_OF_THE_SOURCES"


@internals.constant
def _choose_constant(op: str, device: torch.device, forced: str | None) -> str:
    return _choose(op, device, forced).backend


def forced(backend: str | None) -> str | None:
    """The forced backend, if any: `backend`, the innermost use_backend's, the environment's."""
    if backend is not None:
        return _check_name(backend, "backend")
    return _forced[-1] if _forced else None


def serving(op: str, device: torch.device, backend: str | None) -> str:
    """The backend that runs `op` for tensors on `device`.

    A backend is forced by, in this order, the `backend` argument, the innermost
    :func:`use_backend`, and the environment variable ``SANM_KERNELS_BACKEND``.

    Raises:
        ValueError: the forced name is not a backend.
        RuntimeError: the forced backend cannot run the operator; the message says why.
    """
    if not torch.compiler.is_compiling():
        return _choose(op, device, forced(backend)).backend
    return _choose_constant(op, device, forced(backend))


def call(op: str, device: torch.device, backend: str | None, *arguments: Any) -> Any:
    """Run operator `op` on the backend that :func:`serving` names.

    torch.library's autograd layer, which is Python and takes longer than a small kernel, is used by
    traced calls alone. Others skip it: where nothing is to be differentiated the kernel is called
    below autograd, else a function of the same formulas (`ops.base.differentiable` says what that
    saves). Operators without formulas are never differentiated: their public function detaches.
    """
    if torch.compiler.is_compiling():
        return overload_of(op, serving(op, device, backend))(*arguments)
    chosen = _choose(op, device, forced(backend))
    if chosen.check is not None:
        chosen.check(*arguments)
    if internals.transforms_active():
        return (chosen.transformable or chosen.overload)(*arguments)
    if internals.forward_mode_active() and chosen.transformable is not None:
        for x in tensors(arguments):
            if forward_ad.unpack_dual(x).tangent is not None:
                raise_forward_mode(op)
    if chosen.differentiable is None:
        return chosen.overload(*arguments)
    if torch.is_grad_enabled():
        return chosen.differentiable(*arguments)
    with internals.below_autograd():
        return chosen.overload(*arguments)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force every call inside the ``with`` block onto one backend, in all threads.

    Args:
        name: ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``.

    Returns:
        The context manager.

    Raises:
        ValueError: `name` is not a backend.
        RuntimeError: the backend runs on no device here; the message says why.
    """
    reason = usable(_check_name(name, "name"))
    if reason is not None:
        raise RuntimeError(f"backend {name!r} is not available: {reason}")
    own = _Forced(name)
    _forced.append(own)
    try:
        yield
    finally:  # another thread's block may have begun later and be open still
        _forced[:] = [other for other in _forced if other is not own]


def available_backends() -> dict[str, str | None]:
    """Which backends can be used here.

    Returns:
        Every backend's name, with None if it can be used (on at least one GPU, for those of GPUs),
        or else the reason why it can't.
    """
    return {name: usable(name) for name in BACKENDS}


def set_cpu_cache_limit(mebibytes: int) -> int:
    """Limit the memory that the CPU kernels keep for later results; free what exceeds it.

    Fresh memory costs a page fault per 4 KiB when it is first written to, which can take longer
    than the kernel. So the memory of results of 1 MiB and more is kept when their last tensor is
    gone, and given to the next result that it fits. The limit is at first 512 MiB, or as many as
    the environment variable ``SANM_KERNELS_CPU_CACHE`` says when the kernels are loaded. Tensors on
    such memory cannot be enlarged by ``resize_``. Nothing is kept with torch 2.10, and other
    backends do not use it.

    Args:
        mebibytes: the limit in MiB, ≥ 0; 0 keeps nothing.

    Returns:
        The limit that held before, in MiB, to be set again later. Without the compiled library
        there is nothing to limit, and it is 0.

    Raises:
        TypeError, ValueError: `mebibytes`, or the environment variable, is not an integer, or
            is out of range.
    """
    cpu = importlib.import_module("sanm_kernels.backends.cpu")
    if isinstance(mebibytes, bool) or not isinstance(mebibytes, numbers.Integral):
        raise TypeError(f"mebibytes: expected an int, got {type(mebibytes).__name__}")
    if mebibytes not in cpu.LIMITS:
        raise ValueError(f"mebibytes: expected {cpu.IN_LIMITS}, got {mebibytes}")
    return int(cpu.set_cache_limit(int(mebibytes))) if load("cpu") is None else 0


def table() -> dict[str, dict[str, str]]:
    """For each operator, the backend that serves it by default: on "cpu", and on "cuda".

    GPUs that differ are listed one by one, "cuda:0", "cuda:1" and so on.
    """
    columns = {str(d): {op: preferred(op, d) for op in operators} for d in gpus()}
    first = next(iter(columns.values()), None)
    if first is not None and all(column == first for column in columns.values()):
        columns = {"cuda": first}
    columns = {"cpu": {op: preferred(op, "cpu") for op in operators}} | columns
    return {op: {device: column[op] for device, column in columns.items()} for op in operators}


_environment = os.environ.get("SANM_KERNELS_BACKEND")
if _environment:
    _forced.append(_check_name(_environment, "SANM_KERNELS_BACKEND"))
