"""Output folders, and files that are either the old or the new one, never half of one."""

from __future__ import annotations

import csv
import io
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path in the same folder, renamed to `path` if the block succeeds.

    What was written is on the disk before the old file goes, so that a crash leaves one of both.
    What a killed process leaves of the temporary file, the next one overwrites.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_csv(path: str | Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as CSV; the columns are all keys in order of appearance, absent values empty."""
    text = io.StringIO()
    columns = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _short(value) for name, value in row.items()} for row in rows)
    with replacing(path) as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8")


def prepare_folder(path: str | Path) -> Path:
    """Create the folder if need be; OSError names it when it cannot be written to."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(f"out must be a writable folder, got {path}: {reason}") from None
    return folder


def _short(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value
