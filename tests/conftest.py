"""Shared by all tests: this folder is importable, and random numbers start from the same seed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # then Triton's kernels are tested in its interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

HERE = str(Path(__file__).resolve().parent)
if HERE not in sys.path:
    sys.path.insert(0, HERE)


@pytest.fixture(autouse=True)
def seed() -> None:
    """A test's random numbers do not depend on which tests ran before it."""
    torch.manual_seed(0)
