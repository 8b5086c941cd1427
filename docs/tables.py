"""Makes the tables anew that programs print: python docs/tables.py [WORD IN THE COMMAND …]

A page has the command in a comment before the table, and tests compare the table with the code.
The machine code is of build/cuda-90/cuda.so, which `pytest tests/test_cuda_code.py` builds.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

DOCS = Path(__file__).resolve().parent
MADE = re.compile(r"(?<=<!-- python )(-m .+)( -->\n\n)((?:\|.*\n)*)")


def rows(page: str, word: str) -> list[list[str]]:
    """The cells of the one table whose command has `word` in it, without its two first lines."""
    (text,) = (table for command, _, table in MADE.findall(page) if word in command)
    lines = [line.strip("| ").split("|") for line in text.splitlines()[2:]]
    return [[cell.strip(" `") for cell in line] for line in lines]


def remake(page: str, words: Sequence[str]) -> str:
    """The page with the tables of all commands, or of those with one of the words, made anew."""

    def make(found: re.Match[str]) -> str:
        command, between, table = found.groups()
        if not words or any(word in command for word in words):
            done = subprocess.run(
                [sys.executable, *shlex.split(command)],
                cwd=DOCS.parent, stdout=subprocess.PIPE, text=True, check=True,
            )  # fmt: skip
            table = "".join(f"{line}\n" for line in done.stdout.splitlines() if line[:1] == "|")
        return f"{command}{between}{table}"

    return MADE.sub(make, page)


def main(words: Sequence[str]) -> None:
    for path in [DOCS.parent / "README.md", *sorted(DOCS.glob("*.md"))]:
        before = path.read_text()
        after = remake(before, words)
        if after != before:
            path.write_text(after)
            print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
