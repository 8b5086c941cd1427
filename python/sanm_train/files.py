"""Output folders, and files that are either the old or the new one, never half of one."""

from __future__ import annotations

import csv
import errno
import fcntl
import io
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PARTIAL = ".partial"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
#: How text begins that a spreadsheet would run.
RUNS = r"^[=+\-@\t\r]"


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path in the same folder, renamed to `path` if the block succeeds.

    What was written is on the disk before the old file goes, so that a crash leaves one of both.
    `remove_partial` removes what a killed process leaves of the temporary file.

    Raises:
        OSError: there is no room for it; it names `path`.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{PARTIAL}{path.suffix}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        full: BaseException | None = error
        while full is not None:  # torch's writer raises what hides the reason
            if isinstance(full, OSError) and full.errno in FULL:
                raise OSError(full.errno, os.strerror(full.errno), str(path)) from None
            full = full.__context__
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_csv(path: str | Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as CSV; the columns are all keys in order of appearance, absent values empty.
    Text that a spreadsheet would run has an apostrophe in front."""
    text = io.StringIO()
    columns = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writerow({name: inert(name) for name in columns})
    writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
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


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep the folder to this process, as far as others ask too; the lock ends with the process.

    Raises:
        FileExistsError: another process has it.
    """
    opened = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileExistsError(f"out: another run is using {folder}") from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(opened)


def remove_partial(folder: Path) -> None:
    """Remove temporary files that killed processes left in the folder, which is `locked`."""
    for path in folder.glob(f".*{PARTIAL}*"):
        path.unlink(missing_ok=True)


def reserve(path: Path) -> None:
    """Have the disk set aside all bytes of a sparse file that is mapped to memory: writing there to
    a full disk ends the process.

    Raises:
        OSError: there is no room; it names the file.
    """
    with path.open("r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None


def first_line(error: BaseException) -> str:
    """What is wrong, on one line; not torch's advice on loading files that run code."""
    text = str(error)
    if "weights_only" in text and "Unsupported operand" in text:
        return "it was not written by torch.save"
    if "weights_only" in text:
        return "it names what is not a tensor, a number or a container of these"
    return text.splitlines()[0] if text else type(error).__name__


def shown(path: str | Path) -> str:
    """A path as text for Arrow and JSON: bytes that are not UTF-8 as \\xff."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def open_shown(path: str, flags: int) -> int:
    """`os.open` of a path that `shown` may have changed."""
    try:
        return os.open(path, flags)
    except FileNotFoundError:
        named = re.sub(rb"\\x([0-9a-f]{2})", lambda m: bytes([int(m[1], 16)]), path.encode())
        if named == path.encode():
            raise
        return os.open(named, flags)


def inert(text: str) -> str:
    """`text` as a cell that no spreadsheet runs: an apostrophe in front makes it text."""
    return f"'{text}" if re.match(RUNS, text) else text


def printable(text: str) -> str:
    """`text` with control characters shown, which a terminal would obey."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _cell(value: Any) -> Any:
    if isinstance(value, str):
        return inert(value)
    return f"{value:.6g}" if isinstance(value, float) else value
