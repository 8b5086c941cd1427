"""``python -m benchmarks.kernels``: what the compiler made of every CUDA kernel, read off cuda.so.

Registers, and instructions by kind, of each kernel and architecture: a Markdown table per
architecture, with ranges over a kernel's variants, or, with --json, a row per variant. nvdisasm and
cuobjdump come with the CUDA toolkit, with pip's nvidia-cuda-nvdisasm and nvidia-cuda-cuobjdump, and
with triton. Shared memory is not in it: all of it is dynamic, chosen at launch.

A load or store is of local memory (LDL, STL: spilled registers, arrays that are indexed at run
time), generic (LD, ST: the compiler could not tell shared from global memory, and the hardware
decides anew each time), shared (LDS, STS) or global (LDG, STG). `calls` are of routines that do not
fit into a line; of these `divisions` divide 64-bit integers, some hundred instructions each. The
calls that round a floating-point quotient or root are slow paths, which few values take.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

LIBRARY = Path(__file__).resolve().parent.parent / "sanm_kernels/lib/cuda.so"
MEMORY = ("LDL", "STL", "LD", "ST", "LDS", "STS", "LDG", "STG")
COUNTED = (*MEMORY, "BAR", "SHFL", "MUFU")
DIVISION = re.compile(r"_(?:div|rem)_[su]64\b")
INSTRUCTION = re.compile(
    r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z]\w*)([\w.]*)\s*(.*?)\s*;"
)
LABEL = re.compile(r"([.$\w]+):$")
TARGET = re.compile(r"\(([.$\w]+)\)")
RESOURCES = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)")
Row = dict[str, Any]


def find(tool: str) -> str | None:
    """nvdisasm or cuobjdump: on the PATH, in the toolkit or in one of pip's packages."""
    folders = [os.environ.get("PATH", "")]
    folders += [f"{os.environ[n]}/bin" for n in ("CUDA_HOME", "CUDA_PATH") if n in os.environ]
    folders.append("/usr/local/cuda/bin")
    for site in [*sys.path, sysconfig.get_path("purelib")]:
        folders += [f"{site}/nvidia/cu13/bin", f"{site}/triton/backends/nvidia/bin"]
    return shutil.which(tool, path=os.pathsep.join(folders))


def loops(code: list[tuple[str, str, str, str]], labels: dict[str, int]) -> list[bool]:
    """Which instructions run again and again: those on a cycle of the control flow graph.

    Code that is moved out of the way and jumps back is on none. What a loop calls is in the loop.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    edges: set[tuple[int, int]] = set()
    calls: list[tuple[int, int]] = []
    meets: dict[str, int] = {}  # convergence barrier → where its threads go on
    for i, (predicate, name, _, operands) in enumerate(code):
        targets = [labels[t] for t in TARGET.findall(operands) if t in labels]
        barrier = operands.partition(",")[0]
        if name == "CALL":
            calls += [(i, target) for target in targets]
        elif name == "BSSY":
            meets[barrier] = targets[0]
        elif name == "BSYNC":
            targets = [meets.get(barrier, i + 1)]
        elif name == "RET":
            targets = []
        if name not in ("CALL", "BSSY"):
            edges |= {(i, target) for target in targets}
        conditional = predicate or (name == "BRA" and "," in operands) or name == "BRA.DIV"
        if conditional or name not in ("BRA", "BRX", "JMP", "JMX", "EXIT", "RET", "BSYNC"):
            edges.add((i, i + 1))
    edges = {(i, j) for i, j in edges if j < len(code)}
    rows, columns = zip(*edges, strict=True)
    graph = coo_array(([1] * len(edges), (rows, columns)), shape=(len(code),) * 2)
    _, parts = connected_components(graph, connection="strong")
    sizes = [0] * len(code)
    for part in parts:
        sizes[part] += 1
    looping = [sizes[part] > 1 or (i, i) in edges for i, part in enumerate(parts)]
    starts = sorted({target for _, target in calls} | {len(code)})
    reached = {target for i, target in calls if looping[i]}
    while reached:  # whole functions
        start = reached.pop()
        body = range(start, starts[starts.index(start) + 1])
        for i in body:
            looping[i] = True
        reached |= {target for i, target in calls if i in body and not looping[target]}
    return looping


def count(code: list[tuple[str, str, str, str]], labels: dict[str, int]) -> Row:
    """The instructions of a kernel and of what it calls, by kind."""
    row: Row = {"instructions": sum(name != "NOP" for _, name, _, _ in code)}
    for kind in COUNTED:
        found = [suffix for _, name, suffix, _ in code if name == kind]
        row[kind] = len(found)
        if kind in MEMORY:
            bits = [re.findall(r"\.[US]?(8|16|64|128|256)\b", suffix) for suffix in found]
            row[f"{kind} bits"] = max((int((b or ["32"])[-1]) for b in bits), default=0)
    called = [operands if name == "CALL" else "" for _, name, _, operands in code]
    row["calls"] = sum(map(bool, called))
    divides = [bool(DIVISION.search(operands)) for operands in called]
    row["divisions"] = sum(divides)
    row["in loops"] = 0
    if row["divisions"]:
        row["in loops"] = sum(map(bool.__and__, divides, loops(code, labels)))
    return row


def kernels(text: str) -> Iterable[tuple[str, Row]]:
    """Name and counts of each kernel that nvdisasm's output holds."""
    for section in re.split(r"^\t\.section\t\.text\.", text, flags=re.MULTILINE)[1:]:
        code: list[tuple[str, str, str, str]] = []  # predicate, name, suffixes, operands
        labels: dict[str, int] = {}
        for line in section.splitlines():
            if found := INSTRUCTION.match(line):
                predicate, name, suffix, operands = found.groups(default="")
                code.append((predicate, name + (".DIV" in suffix) * ".DIV", suffix, operands))
            elif label := LABEL.match(line):
                labels[label[1]] = len(code)
        yield section.partition(",")[0].strip('"'), count(code, labels)


def disassemble(cubin: Path) -> list[Row]:
    """The kernels of a file NAME.sm_ARCH.cubin."""
    path = os.pathsep.join([str(Path(str(find("nvdisasm"))).parent), os.environ.get("PATH", "")])

    def say(tool: str, *words: str) -> str:
        command = [str(find(tool)), *words, str(cubin)]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, env=os.environ | {"PATH": path}
        ).stdout

    used = {
        name: (int(r), int(s)) for name, r, s in RESOURCES.findall(say("cuobjdump", "-res-usage"))
    }
    arch = int(re.findall(r"\.sm_(\d+)a?\.", cubin.name)[-1])
    return [
        {"mangled": name, "arch": arch, "registers": used[name][0], "stack": used[name][1]} | row
        for name, row in kernels(say("nvdisasm", "-c"))
    ]


def names(mangled: list[str]) -> list[tuple[str, str]]:
    """Kernels' names, without namespaces and parameters, and their template arguments."""
    done = subprocess.run(
        ["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True
    )
    result = []
    for line in done.stdout.split("\n"):
        line = re.sub(r"\(anonymous namespace\)::|\bsanm::|\bc10::|^void ", "", line)
        depth = end = 0
        while end < len(line) and (depth or line[end] != "("):
            depth += {"<": 1, ">": -1}.get(line[end], 0)
            end += 1
        name, _, arguments = line[:end].partition("<")
        result.append((name, arguments.removesuffix(">")))
    return result


def read(library: Path) -> list[Row]:
    """A row for each variant of each kernel and each architecture in the library.

    Raises:
        FileNotFoundError: a tool is missing, or the library.
    """
    missing = [tool for tool in ("cuobjdump", "nvdisasm", "c++filt") if find(tool) is None]
    if missing:
        raise FileNotFoundError(f"{' and '.join(missing)} not found")
    with tempfile.TemporaryDirectory() as folder:
        extract = [str(find("cuobjdump")), "-xelf", "all", str(library.resolve(strict=True))]
        subprocess.run(extract, cwd=folder, check=True, capture_output=True)
        cubins = sorted(Path(folder).glob("*.cubin"), key=lambda path: -path.stat().st_size)
        with concurrent.futures.ProcessPoolExecutor() as pool:
            rows = [row for found in pool.map(disassemble, cubins) for row in found]
    for row, (kernel, variant) in zip(rows, names([r.pop("mangled") for r in rows]), strict=True):
        row |= {"kernel": kernel, "variant": variant}
    return sorted(rows, key=lambda row: (row["arch"], row["kernel"], row["variant"]))


def span(values: Iterable[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}–{high}"


def table(rows: list[Row]) -> str:
    """The rows of one architecture, one line per kernel."""
    columns = ("registers", "instructions", *COUNTED, "calls", "divisions", "in loops")
    lines = [f"| kernel | variants | {' | '.join(columns)} |", "|---" * (2 + len(columns)) + "|"]
    for kernel in sorted({row["kernel"] for row in rows}):
        variants = [row for row in rows if row["kernel"] == kernel]
        cells = []
        for column in columns:
            cell = span([row[column] for row in variants])
            bits = max((row.get(f"{column} bits", 0) for row in variants), default=0)
            cells.append(f"{cell} ({bits})" if bits else cell)
        lines.append(f"| `{kernel}` | {len(variants)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("library", type=Path, nargs="?", default=LIBRARY, help="default: cuda.so")
    parser.add_argument("--json", action="store_true", help="a row for each variant")
    given = parser.parse_args()
    rows = read(given.library)
    if given.json:
        print(json.dumps(rows, indent=1))
        return
    for arch in sorted({row["arch"] for row in rows}):
        chosen = [row for row in rows if row["arch"] == arch]
        print(f"sm_{arch}, {len(chosen)} kernels; in brackets the widest access in bits\n")
        print(table(chosen), end="\n\n")


if __name__ == "__main__":
    main()
