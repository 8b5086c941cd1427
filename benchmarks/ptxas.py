"""``python -m benchmarks.ptxas``: registers and spills of every CUDA kernel, as a Markdown table.

Reads what ptxas said in the last build (build/libraries/cuda/*.log); dynamic shared memory is
chosen at launch and not known to it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

LOGS = Path(__file__).resolve().parent.parent / "build/libraries/cuda"
ENTRY = re.compile(
    r"Compiling entry function '(\w+)' for 'sm_(\d+)a?'.*?(\d+) bytes stack frame, "
    r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)",
    re.DOTALL,
)


def short(mangled: str) -> str:
    """A kernel's name and template arguments, without namespaces and parameters."""
    if shutil.which("c++filt") is None:
        return mangled
    done = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True)
    name = re.sub(r"\(anonymous namespace\)::|\b(sanm|c10)::|^void ", "", done.stdout.strip())
    return name.partition("(")[0]


def table(text: str) -> str:
    """The table of the logs' text."""
    rows: dict[str, dict[int, str]] = {}
    for name, arch, stack, stores, loads, registers, rest in ENTRY.findall(text):
        static = re.search(r"(\d+) bytes smem", rest)
        notes = [f"{static[1]} B shared"] if static else []
        if int(stack) or int(stores) or int(loads):
            notes.append(f"stack {stack} B, spills {stores}/{loads} B")
        cell = " ".join([registers, *(f"({note})" for note in notes)])
        rows.setdefault(name, {})[int(arch)] = cell
    archs = sorted({arch for row in rows.values() for arch in row})
    lines = ["| registers of | " + " | ".join(f"sm_{a}" for a in archs) + " |"]
    lines.append("|---|" + "---|" * len(archs))
    for name, row in sorted((short(name), row) for name, row in rows.items()):
        lines.append(f"| `{name}` | " + " | ".join(row.get(a, "") for a in archs) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table("\n".join(path.read_text() for path in sorted(LOGS.glob("*.log")))))
