"""Checkpoints of whole runs: one file, replaced in one go, read without running its code."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from . import distributed
from .errors import CheckpointError
from .files import first_line, replacing

NAME = "checkpoint.pt"
FORMAT = 4
PARTS = {"config", "data", "history", "networks", "averages", "mixtures", "ranks"}


def save(folder: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors, numbers, strings, containers of these); the old file stays if it
    fails."""
    path = folder / NAME
    try:
        with replacing(path) as temporary, temporary.open("wb") as file:
            torch.save({"format": FORMAT, **state}, file)
    except (OSError, RuntimeError) as error:  # torch's writer raises either
        kept = "; the last good one is kept" if path.exists() else ""
        raise CheckpointError(f"{path} cannot be written: {first_line(error)}{kept}") from None


def load(folder: Path) -> dict[str, Any] | None:
    """The checkpoint in `folder`; None if there is none.

    Raises:
        CheckpointError: it cannot be read, or another version of this package has written it.
    """
    path = folder / NAME
    if not path.exists():
        return None
    try:
        with zipfile.ZipFile(path) as archive:  # torch writes checksums, and reads past wrong ones
            if (damaged := archive.testzip()) is not None:
                raise OSError(f"{damaged} in it is damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a broken file raises depends on where it breaks
        raise CheckpointError(f"{path} cannot be read: {first_line(error)}") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT or not state.keys() >= PARTS:
        raise CheckpointError(f"{path} is not a checkpoint of format {FORMAT}")
    return state


def load_module(module: torch.nn.Module, state: Mapping[str, Any]) -> None:
    """`module.load_state_dict(state)`; a user's own network may have been changed since.

    Raises:
        CheckpointError: it is not that of the state.
    """
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split("\n", 2)[1].split())
        raise CheckpointError(f"the network is not that of the checkpoint: {reason}") from None


def check_data(state: dict[str, Any], data: dict[str, Any]) -> None:
    """Label quality belongs to samples by their position: the data must be those of the run."""
    changed = [name for name, value in state["data"].items() if data[name] != value]
    if changed:
        what = f"{state['data']['samples']} samples then, {data['samples']} now"
        if "samples" not in changed:
            what = f"other {' and '.join(changed)}, or in another order"
        raise CheckpointError(f"the training set is not the one that the run began with: {what}")


def check_ranks(state: dict[str, Any]) -> None:
    """A run resumes with as many processes as it had: each has its own samples."""
    saved, here = len(state["ranks"]), distributed.size()
    if saved != here:
        raise CheckpointError(
            f"the run had {saved} processes and can only be resumed with as many, got {here}"
        )
