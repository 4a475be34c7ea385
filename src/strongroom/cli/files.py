"""Files of commands. One that is written is complete or absent, readable by its owner only, and durable."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from ..errors import AlreadyExists, ConfigError, InvalidInput, Problem
from . import output


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


@contextmanager
def named(file: Path) -> Iterator[None]:
    """Put the file's name into the error. Raises ConfigError for an OSError."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{file}: {(error.strerror or str(error)).lower()}") from None


async def write_lines(file: Path, force: bool, lines: AsyncIterator[bytes]) -> int:
    """Write lines to a new file, with progress. The number of lines. Raises AlreadyExists, ConfigError."""
    count = 0
    with named(file), new_file(file, force) as new, output.progress("writing") as progress:
        async for line in lines:
            new.write(line)
            count += 1
            progress(count, count)
    return count


def small_text(option: str, file: Path, most: int) -> str:
    """The text of a file that an option names. Raises InvalidInput for one of more than `most` bytes, ConfigError."""
    with named(file), file.open("rb") as opened:
        content = opened.read(most + 1)
    if len(content) > most:
        raise InvalidInput([Problem(option, f"{file}: found more than {most} bytes")])
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise InvalidInput([Problem(option, f"{file}: is not UTF-8 text")]) from None
