"""``python -m benchmarks.ptxas``: registers and spills of every CUDA kernel, as a Markdown table.

Reads what ptxas said in the last build (build/libraries/cuda/*.log). Shared memory is not in it:
all of it is dynamic, chosen at launch.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

LOGS = Path(__file__).resolve().parent.parent / "build/libraries/cuda"
ENTRY = re.compile(
    r"Compiling entry function '(\w+)' for 'sm_(\d+)a?'.*?(\d+) bytes stack frame, "
    r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
    re.DOTALL,
)


def base_name(mangled: str) -> str:
    """A kernel's name without namespaces, template arguments and parameters."""
    done = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True)
    found = re.search(r"(\w+)(?:<.*>)?\(", done.stdout.replace("(anonymous namespace)", ""))
    return found[1] if found else mangled


def span(values: list[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}–{high}"


def table(text: str) -> str:
    """The table of the logs' text: per kernel and architecture the range over its variants."""
    rows: dict[str, dict[int, list[tuple[int, int]]]] = {}  # kernel → arch → registers, spills
    for mangled, arch, _, stores, loads, registers in ENTRY.findall(text):
        found = (int(registers), int(stores) + int(loads))
        rows.setdefault(base_name(mangled), {}).setdefault(int(arch), []).append(found)
    archs = sorted({arch for row in rows.values() for arch in row})
    lines = [
        "| kernel | variants | " + " | ".join(f"sm_{a}: registers, spilled bytes" for a in archs)
    ]
    lines[0] += " |"
    lines.append("|---|---|" + "---|" * len(archs))
    for name, row in sorted(rows.items()):
        cells = [", ".join(map(span, map(list, zip(*row[a], strict=True)))) for a in archs]
        lines.append(f"| `{name}` | {len(row[archs[0]])} | " + " | ".join(cells) + " |")
    total = sum(len(row[archs[0]]) for row in rows.values())
    return "\n".join([*lines, "", f"({total} kernels for each of {len(archs)} architectures.)"])


if __name__ == "__main__":
    print(table("\n".join(path.read_text() for path in sorted(LOGS.glob("*.log")))))
