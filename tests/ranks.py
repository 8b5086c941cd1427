"""Pieces of code on several processes at once, with gloo on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

START = """
import pathlib, sys, time
import torch
import torch.distributed as dist
from sanm_train import distributed

dist.init_process_group("gloo")
try:
"""
END = """
    names = sys.argv[2:]
    torch.save({name: globals()[name] for name in names},
               pathlib.Path(sys.argv[1]) / f"rank{dist.get_rank()}.pt")
finally:
    dist.destroy_process_group()
    time.sleep(0.3)  # gloo's threads need the interpreter once more
"""


def run_ranks(folder: Path, ranks: int, code: str, *names: str) -> list[dict[str, Any]]:
    """The values of `names` after `code` on each of so many ranks."""
    script = folder / "ranks.py"
    inner = "".join(f"    {line}\n" for line in code.splitlines())
    script.write_text(START + inner + END)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), str(script), str(folder), *names]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(ranks)]
