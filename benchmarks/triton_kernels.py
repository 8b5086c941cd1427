"""``python -m benchmarks.triton_kernels``: compile every Triton kernel, without a GPU.

Calls of every operator are recorded on tensors without memory (device ``meta``), and what they
would launch is compiled for the targets asked for, the dtypes taking turns over the variants; for
sm_90 in every dtype. ``--all`` compiles every dtype for all. Prints registers, shared memory,
spills and the widest accesses to global memory of each kernel, as a table or as JSON.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from maker import lay_out
from sheets import SHEETS, Operation, Recorder, with_gradients
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sanm_kernels.backends.triton import launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx90a": GPUTarget("hip", "gfx90a", 64),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
THOROUGH = "sm_90"  # compiled in every dtype also without --all
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NAMES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "i1",
    torch.uint8: "u8",
}


def _describe(x: Any, specialize: bool) -> tuple[str, Any, bool]:
    """Signature, constant (None if it is none) and divisibility by 16 of one argument."""
    if x is None:
        return "constexpr", x, False
    if isinstance(x, Tensor):
        return "*" + _NAMES[x.dtype], None, True
    if isinstance(x, bool):
        return "i1", None, False
    if isinstance(x, int):
        if specialize and x == 1:
            return "constexpr", x, False
        return ("i32" if -(2**31) <= x < 2**31 else "i64"), None, specialize and x % 16 == 0
    if isinstance(x, float):
        return "fp32", None, False
    raise TypeError(f"argument of type {type(x).__name__}")


def source(kernel: Any, arguments: tuple[Any, ...], meta: dict[str, Any]) -> ASTSource:
    """What a launch of `kernel` with these arguments would compile."""
    signature: dict[str, Any] = {}
    constants: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}
    values = dict(zip(kernel.arg_names, arguments, strict=False)) | meta
    for position, parameter in enumerate(kernel.params):
        name, value = parameter.name, values[parameter.name]
        if parameter.is_constexpr:
            signature[name] = "constexpr"
            constants[(position,)] = value
            continue
        specialize = not parameter.do_not_specialize
        parts = value if isinstance(value, tuple) else (value,)
        types = []
        for i, part in enumerate(parts):
            kind, constant, divisible = _describe(part, specialize)
            if parameter.annotation_type and isinstance(part, int | float):
                kind = parameter.annotation_type
            path = (position, i) if isinstance(value, tuple) else (position,)
            types.append(kind)
            if kind == "constexpr":
                constants[path] = constant if part is not None else None
            if divisible:
                attributes[path] = [["tt.divisibility", 16]]
        signature[name] = tuple(types) if isinstance(value, tuple) else types[0]
    return ASTSource(kernel, signature, constants, attributes)


def compile_one(job: tuple[str, str, str, Any, Any, Any, dict[str, int]]) -> dict[str, Any]:
    """Compile one kernel for one target and read its resources off the binary."""
    module, name, target, signature, constants, attributes, options = job
    compiled = triton.compile(
        ASTSource(getattr(importlib.import_module(module), name), signature, constants, attributes),
        target=TARGETS[target],
        options={**options, **launch.options(TARGETS[target].backend)},
    )
    read = _nvidia if TARGETS[target].backend == "cuda" else _amd
    return {
        "kernel": name,
        "target": target,
        "num_warps": options["num_warps"],
        "shared": compiled.metadata.shared,
        **read(compiled.asm),
    }


def _nvidia(asm: dict[str, Any]) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-res-usage", file.name],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    numbers = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    ptx = asm["ptx"]
    return {
        "registers": int(numbers["REG"]),
        "spills": int(numbers["STACK"]) + int(numbers["LOCAL"]),
        # sums and products that ptxas might contract, were it not for its --fmad=false
        "unrounded": len(re.findall(r"\b(?:add|sub|mul|mad)\.(?:ftz\.)?f(?:32|64)\b", ptx)),
        "widest": {kind: _widest(kind, ptx) for kind in ("ld", "st")},
    }


def _widest(kind: str, ptx: str) -> int:
    """Bits of the widest access to global memory, "ld" or "st", that a thread makes."""
    accesses = re.findall(rf"\b{kind}\.global\S*?(?:\.v(\d))?\.[bfsu](\d+)\s", ptx)
    return max((int(count or 1) * int(bits) for count, bits in accesses), default=0)


def _amd(asm: dict[str, Any]) -> dict[str, Any]:
    text = asm["amdgcn"]

    def number(what: str) -> int:
        return sum(map(int, re.findall(rf"\.{what}:\s*(\d+)", text)))

    def widest(what: str) -> int:
        words = re.findall(rf"\b(?:global|buffer|flat)_{what}_dword(?:x(\d))?\b", text)
        return max((32 * int(n or 1) for n in words), default=0)

    fused = r"= f(?:add|sub|mul) [a-z ]*\b(?:contract|fast)\b"
    return {
        "registers": number("vgpr_count"),
        "spills": number("vgpr_spill_count") + number("private_segment_fixed_size"),
        "unrounded": len(re.findall(fused, asm["llir"])),
        "widest": {"ld": widest("load"), "st": widest("store")},
    }


def calls() -> dict[str, Callable[[torch.dtype], None]]:
    """Calls of every operator, those of its backward pass among them, by name; each takes a dtype.

    Those of the sheets on tensors without memory, in both memory formats.
    """
    backend = importlib.import_module("sanm_kernels.backends.triton")
    backend.register()

    def call(operation: Operation, layout: str, sizes: dict[str, int], dtype: torch.dtype) -> None:
        with torch.device("meta"):
            made = operation.make(**sizes)
        for name, value in made.items():
            if name in operation.cast or value.dim() == 4:
                made[name] = lay_out(value.to(dtype), layout)
        with Recorder() as recorder:
            with_gradients(operation, made, backend="reference")
        for op, _, arguments in recorder.calls:
            with torch.no_grad():
                launch.launchers[op](*arguments)

    result = {}
    for sheet in SHEETS.values():
        for name, operation in (sheet.operations | sheet.variants).items():
            if name.endswith("out="):  # which looks where memory is; the kernels are the same
                continue
            first = operation is next(iter(sheet.operations.values()))
            for sizes in [*sheet.compiled, *(sheet.compiled_large if first else ())]:
                images = any(value.dim() == 4 for value in operation.make().values())
                for layout in ("contiguous", "channels_last")[: 1 + images]:
                    shown = " ".join(f"{key}={value}" for key, value in sizes.items())
                    result[f"{name}, {shown}, {layout}"] = functools.partial(
                        call, operation, layout, sizes
                    )
    return result


def _launches(call: Any, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """What a call launches: module, kernel, signature, constants, attributes, options of each."""
    with launch.recording() as recorded:
        call(dtype)
    result = []
    for kernel, arguments, meta in recorded:
        options = {k: meta.pop(k) for k in ("num_warps", "num_stages") if k in meta}
        what = source(kernel, arguments, meta)
        result.append((kernel.__module__, kernel.__name__, what.signature, what.constants,
                       what.attrs, options))  # fmt: skip
    return result


def jobs(
    targets: Sequence[str] = tuple(TARGETS), only: str = "", everything: bool = False
) -> list[tuple[dict[str, Any], tuple[Any, ...]]]:
    """What to compile, without repeats: a row of the report so far, and compile_one's argument."""
    recorded = {
        name: list(zip(*(_launches(call, dtype) for dtype in DTYPES), strict=True))
        for name, call in calls().items()
        if only in name
    }
    result: dict[tuple[str, str], tuple[dict[str, Any], tuple[Any, ...]]] = {}

    def add(target: str, name: str, dtype: torch.dtype, what: tuple[Any, ...]) -> None:
        label = {"call": name, "dtype": str(dtype).removeprefix("torch.")}
        result.setdefault((target, repr(what)), (label, (*what[:2], target, *what[2:])))

    for turn, target in enumerate(targets):
        if everything or target == THOROUGH:
            for name, launches in recorded.items():
                for each in launches:
                    for dtype, what in zip(DTYPES, each, strict=True):
                        add(target, name, dtype, what)
            continue
        done = set()
        variants: Counter[str] = Counter()
        for name, launches in recorded.items():
            for each in launches:
                if repr(each[0]) not in done:  # the same in another dtype
                    done.add(repr(each[0]))
                    kernel = each[0][1]
                    i = (turn + variants[kernel]) % len(DTYPES)
                    variants[kernel] += 1
                    add(target, name, DTYPES[i], each[i])
    return list(result.values())


def report(
    targets: Sequence[str] = tuple(TARGETS),
    only: str = "",
    everything: bool = False,
    processes: int | None = None,
) -> list[dict[str, Any]]:
    """Compile in several processes; one row per variant and target."""
    todo = jobs(targets, only, everything)
    with concurrent.futures.ProcessPoolExecutor(processes) as pool:
        compiled = pool.map(compile_one, [job for _, job in todo], chunksize=4)
        return [label | row for (label, _), row in zip(todo, compiled, strict=True)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.triton_kernels",
                                     description=__doc__)  # fmt: skip
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--only", default="", help="calls whose name holds this")
    parser.add_argument("--all", action="store_true", help="every dtype for every target")
    parser.add_argument("--processes", type=int, help="by default one a core")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    rows = report(options.target, options.only, options.all, options.processes)
    print(json.dumps(rows, indent=1) if options.json else table(rows))
    return int(any(row["spills"] for row in rows))


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: what each kernel takes for each target, as the range over its variants.

    A column for each target, or, where there is but one, for each of the values.
    """
    targets = [name for name in TARGETS if any(row["target"] == name for row in rows)]
    columns, comma = targets, ", "
    if len(targets) == 1:
        columns = ["variants", "registers", "shared", "spilled", "widest read", "widest write"]
        comma = " | "
    lines = ["| kernel | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    for kernel in sorted({row["kernel"] for row in rows}):
        cells = []
        for target in targets:
            found = [row for row in rows if (row["kernel"], row["target"]) == (kernel, target)]
            ranges = [str(len(found))]
            for what in ("registers", "shared", "spills"):
                low, high = (
                    choose((row[what] for row in found), default=0) for choose in (min, max)
                )
                ranges.append(f"{low}" if low == high else f"{low}–{high}")
            widest = [row["widest"] for row in found]
            for kind in ("ld", "st"):
                ranges.append(str(min((bits[kind] for bits in widest), default=0)))
            cells.append(comma.join(ranges))
        lines.append(f"| `{kernel}` | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
