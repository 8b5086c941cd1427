"""Checkpoints of whole runs: one file, replaced in one go, read without running its code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from . import distributed
from .files import replacing

NAME = "checkpoint.pt"
FORMAT = 1


class CheckpointError(OSError):
    """A checkpoint that cannot be written, read or used here."""


def save(folder: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors, numbers, strings, containers of these); the old file stays if it
    fails."""
    path = folder / NAME
    try:
        with replacing(path) as temporary, temporary.open("wb") as file:
            torch.save({"format": FORMAT, **state}, file)
    except (OSError, RuntimeError) as error:  # torch's writer raises either
        kept = "; the last good one is kept" if path.exists() else ""
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path} cannot be written: {reason}{kept}") from None


def load(folder: Path) -> dict[str, Any] | None:
    """The checkpoint in `folder`; None if there is none.

    Raises:
        CheckpointError: it cannot be read, or another version of this package has written it.
    """
    path = folder / NAME
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a broken file raises depends on where it breaks
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} cannot be read: {reason}") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path} is no checkpoint of format {FORMAT}")
    return state


def check_ranks(state: dict[str, Any]) -> None:
    """A run goes on with as many processes as it had: each has its own samples."""
    saved, here = len(state["ranks"]), distributed.size()
    if saved != here:
        raise CheckpointError(
            f"the run was of {saved} processes and can be resumed with as many only, got {here}"
        )
