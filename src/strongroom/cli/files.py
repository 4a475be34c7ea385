"""A file that a command writes: complete or absent, readable by its owner only, and durable."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from ..errors import AlreadyExists


def check_target(file: Path, force: bool) -> None:
    """Refuse an unusable target before the work instead of after it. Raises AlreadyExists, OSError."""
    if file.is_dir():
        raise IsADirectoryError(None, "is a directory")
    if not file.absolute().parent.is_dir():
        raise NotADirectoryError(None, "its folder does not exist")
    if file.exists() and not force:
        raise AlreadyExists(f"{file}: exists already (--force overwrites it)")


@contextmanager
def new_file(file: Path, force: bool) -> Iterator[IO[bytes]]:
    """A new file to write, which is in its place at the end. Raises AlreadyExists, OSError."""
    import tempfile

    folder = file.absolute().parent
    handle, name = tempfile.mkstemp(prefix=f".{file.name}.", dir=folder)  # made with mode 0600
    try:
        with os.fdopen(handle, "wb") as new:
            yield new
            new.flush()
            os.fsync(new.fileno())
        _put_in_place(name, file, force)
    except FileExistsError:
        raise AlreadyExists(f"{file}: exists already (--force overwrites it)") from None
    finally:
        with suppress(FileNotFoundError):
            os.unlink(name)
    sync = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(sync)
    finally:
        os.close(sync)


def _put_in_place(name: str, file: Path, force: bool) -> None:
    """Rename a finished file. Raises FileExistsError, without `force`, if the target appeared meanwhile."""
    if not force:
        try:
            os.link(name, file)  # unlike a rename, a link never replaces another file
            return
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            if file.exists():
                raise FileExistsError from None
    os.replace(name, file)
