"""The progress bar of a run."""

from __future__ import annotations

from typing import Any

from .extra import extra

with extra():
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )


class RunProgress:
    """One line: recipe, epochs done, step, last and best accuracy. A context manager."""

    def __init__(self, title: str, epochs: int) -> None:
        texts = (TextColumn(f"{{task.{name}}}") for name in ("description", "fields[note]"))
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("epochs"), TimeRemainingColumn())
        self._progress = Progress(next(texts), *columns, next(texts))
        self._task = self._progress.add_task(title, total=epochs, note="")
        self._accuracy = ""

    def __enter__(self) -> RunProgress:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def step(self, epoch: int, step: int) -> None:
        """`step` optimiser steps of epoch `epoch` (from 0) are done."""
        self._progress.update(self._task, note=f"{self._accuracy}step {step}")

    def epoch(self, row: dict[str, Any]) -> None:
        """An epoch with these metrics is done."""
        for name in ("test_accuracy", "noisy_validation_accuracy"):
            if row.get(name) is not None:
                shown = name.removesuffix("_accuracy").replace("_", " ")
                self._accuracy = f"{shown} {row[name]:.1%} (best {row['best_accuracy']:.1%}) "
        self._progress.update(self._task, completed=row["epoch"] + 1, note=self._accuracy)
