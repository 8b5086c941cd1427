"""``python -m sanm_kernels info [--json]``: versions, and which backend serves each operator."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import sanm_kernels
from sanm_kernels import backends
from sanm_kernels.backends import cpu, cuda


def info() -> dict[str, Any]:
    """What `info --json` prints: plain strings, numbers, lists and dicts.

    Returns:
        The keys ``versions``, ``processor`` and ``cuda``; ``package``, where it was imported from,
        and ``shadowed``, other copies on the path; ``forced``, the backend that the environment
        forces, or None; ``backends``, for each None or the reason why it can't be used on any
        device; ``gpus``, for each (``"cuda:0"``) the same of the backends that may run on it;
        ``remedy``, what to do where kernels are not compiled, or None; ``operators``, for each and
        each device type, or each GPU where they differ, the backend that serves it.
    """
    unavailable, gpus = sanm_kernels.available_backends(), backends.gpus()
    return {
        "versions": {
            "sanm_kernels": sanm_kernels.__version__,
            "torch": torch.__version__,
            "triton": _version("triton"),
            "python": platform.python_version(),
            "system": platform.platform(),
        },
        "package": str(Path(sanm_kernels.__file__).parent),
        "shadowed": [str(path) for path in backends.shadowed()],
        "processor": {
            "machine": platform.machine(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "library": None if cpu.loaded is None else f"cpu_{cpu.loaded}.so",
        },
        "cuda": {
            "version": torch.version.cuda,
            "rocm": torch.version.hip,
            "devices": [torch.cuda.get_device_name(device) for device in gpus],
            "library": cuda.facts(),
        },
        "forced": backends._forced[0] if backends._forced else None,
        "backends": unavailable,
        "gpus": {
            str(device): {name: backends.runs_on(name, device) for name in ("cuda", "triton")}
            for device in gpus
        },
        "remedy": backends.remedy() if unavailable["cpu"] is not None else None,
        "operators": backends.table(),
    }


def text(facts: dict[str, Any]) -> str:
    """The facts of :func:`info` as what a person reads."""
    versions, processor, cuda = facts["versions"], facts["processor"], facts["cuda"]
    rows = [
        ("package", facts["package"]),
        *(("", f"hides the copy in {path}") for path in facts["shadowed"]),
        *((name, version or "not installed") for name, version in versions.items()),
        (
            "processor",
            f"{processor['machine']}, {processor['capability']}, {processor['threads']} threads",
        ),
        ("library", processor["library"] or "none"),
        ("CUDA", cuda["version"] or "not in this torch"),
        *([("ROCm", cuda["rocm"])] if cuda["rocm"] else []),
        *([("CUDA library", _library(cuda["library"]))] if cuda["library"] else []),
        ("GPUs", ", ".join(cuda["devices"]) or "none"),
    ]
    lines = [f"{name:14}{value}" for name, value in rows]
    lines += ["", "Backends"]
    for name, reason in facts["backends"].items():
        lines.append(f"  {name:12}{'available' if reason is None else f'not available: {reason}'}")
        for device, reasons in facts["gpus"].items():
            if reason is None and reasons.get(name) is not None:
                lines.append(f"  {'':12}not on {device}: {reasons[name]}")
    if cuda["rocm"]:
        lines.append(
            "  No kernel has been run on ROCm yet: the reference serves, Triton if forced."
        )
    if facts["remedy"] is not None:
        lines.append(f"  {facts['remedy']}")
    if facts["forced"] is not None:
        lines.append(f"  SANM_KERNELS_BACKEND forces {facts['forced']}")
    devices = list(next(iter(facts["operators"].values())))
    width = max(map(len, facts["operators"])) + 2
    lines += ["", "  ".join([f"{'Served by':{width}}", *(f"{d + ' tensors':14}" for d in devices)])]
    for name, served in facts["operators"].items():
        lines.append("  ".join([f"  {name:{width - 2}}", *(f"{served[d]:14}" for d in devices)]))
    return "\n".join(line.rstrip() for line in lines)


def _library(facts: dict[str, str]) -> str:
    return (
        f"built with CUDA {facts['runtime']} for compute capability {facts['architectures']}; "
        f"the driver serves CUDA {facts['driver']}"
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m sanm_kernels", description=__doc__)
    parser.add_argument(
        "--version",
        action="version",
        version=f"sanm_kernels {sanm_kernels.__version__} (torch {torch.__version__}, "
        f"Python {platform.python_version()})",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("info", help="versions, and which backend serves each operator")
    command.add_argument("--json", action="store_true", help="print as JSON")
    options = parser.parse_args(arguments)
    facts = info()
    print(json.dumps(facts, indent=2) if options.json else text(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
