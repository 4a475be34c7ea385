"""The lease log: the use that a process has spent from its leases. It survives the process, so that the unspent units
of a killed process come back exactly.

A file of 8-byte cells is mapped into memory. Writing a cell costs no system call, and the kernel keeps it even if the
process is killed (`kill -9` included). It does not survive the machine: the file of an earlier boot is ignored, and its
leases count as spent. The file is locked while its process lives, so a process that gets the lock knows that its owner
is dead. A second file has the names, one JSON line for each pair of cells.

    <lease>.spent   cells: magic, format; then for each slot what was spent in all, and when last (microseconds)
    <lease>.names   {"boot": …}, then ["subject", "limit", slot] for each slot in use
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import mmap
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

try:
    import fcntl
except ImportError:  # not on Windows, where leases go unlogged
    LOCKS = False
else:
    LOCKS = True

MAGIC = int.from_bytes(b"SRSPENT1", "little")
HEADER_CELLS = 2
FIRST_SLOTS = 1_024
MIN_COMPACTED = 4_096
"""The file of names is compacted once it has so many lines, and twice as many as are in use."""
CELL = 8
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_log = logging.getLogger(__name__)


class LeaseLog:
    """The cells of one process's leases. Without a folder they are in its memory only."""

    def __init__(self, lease: str, folder: Path | None = None) -> None:
        self.lease = lease
        self._free: list[int] = []
        self._live: dict[int, tuple[str, str]] = {}
        """The subject and the limit of each slot in use, by index."""
        self._lines = 0
        self._next = 0
        self._slots = FIRST_SLOTS
        self._spent: int | None = None
        self._names: int | None = None
        mapped: mmap.mmap | None = None
        boot = boot_id()
        if folder is not None and LOCKS and boot is not None:
            try:
                mapped = self._open(folder, boot)
            except OSError as error:
                self._close_files()
                _log.warning("limit leases are not logged: the units of a killed process come back late: %s", error)
        size = (HEADER_CELLS + 2 * self._slots) * CELL
        self.cells = memoryview(mapped if mapped is not None else bytearray(size)).cast("Q")
        self.cells[0], self.cells[1] = MAGIC, 1

    def _open(self, folder: Path, boot: str) -> mmap.mmap:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        check_folder(folder)
        self._folder, self._boot = folder, boot
        self.compact()
        self._spent = os.open(folder / f"{self.lease}.spent", _NEW, 0o600)
        return self._mapped(self._spent)

    def compact(self) -> None:
        """Compact the file of names. It is locked before it gets its name, so that no other process can take this one
        for dead."""
        new = self._folder / f"{self.lease}.new"
        names = os.open(new, _NEW | os.O_APPEND, 0o600)
        try:
            fcntl.flock(names, fcntl.LOCK_EX | fcntl.LOCK_NB)
            lines = [{"boot": self._boot}, *([state, limit, at] for at, (state, limit) in self._live.items())]
            _write(names, "".join(json.dumps(line) + "\n" for line in lines).encode())
            new.rename(self._folder / f"{self.lease}.names")
        except OSError:
            os.close(names)
            new.unlink(missing_ok=True)
            raise
        before, self._names, self._lines = self._names, names, len(lines)
        if before is not None:
            os.close(before)

    def _mapped(self, descriptor: int) -> mmap.mmap:
        size = (HEADER_CELLS + 2 * self._slots) * CELL
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)  # a full disk raises an error now, and not a signal later
        else:
            os.ftruncate(descriptor, size)
        return mmap.mmap(descriptor, size)

    def slot(self, state: str, limit: str) -> int:
        """The index of a zeroed cell for the spent units of one limit; the next cell is for the moment."""
        if self._free:
            number = self._free.pop()
        else:
            if self._next == self._slots:
                self._grow()
            number = self._next
            self._next += 1
        index = HEADER_CELLS + 2 * number
        self.cells[index] = self.cells[index + 1] = 0
        self._live[index] = state, limit
        try:
            self._note(state, limit, index)
        except OSError as error:
            self._go_without(error)
        return index

    def _note(self, state: str, limit: str, index: int) -> None:
        if self._names is None:
            return
        if self._lines >= max(MIN_COMPACTED, 2 * len(self._live)):
            self.compact()
        else:
            _write(self._names, json.dumps([state, limit, index]).encode() + b"\n")
            self._lines += 1

    def _go_without(self, error: OSError) -> None:
        """The log cannot be written any more. Remove it, since it would tell of less than was spent."""
        _unlink(self._folder, self.lease)
        self._close_files()
        before = self.cells
        self.cells = memoryview(bytearray((HEADER_CELLS + 2 * self._slots) * CELL)).cast("Q")
        self.cells[: len(before)] = before
        _log.warning("limit leases are not logged any more: the units of a killed process come back late: %s", error)

    def free(self, index: int) -> None:
        """Free a cell and the one after it."""
        del self._live[index]
        self._free.append((index - HEADER_CELLS) // 2)

    def moment(self, index: int, now_us: int) -> None:
        """Units written from now on are spent at `now_us` or later."""
        self.cells[index + 1] = now_us

    def _grow(self) -> None:
        self._slots *= 2
        before = self.cells
        if self._spent is not None:
            try:
                # It is the same file: the new view has the cells that were written through the old one.
                self.cells = memoryview(self._mapped(self._spent)).cast("Q")
            except OSError as error:
                self._go_without(error)
        else:
            self.cells = memoryview(bytearray((HEADER_CELLS + 2 * self._slots) * CELL)).cast("Q")
            self.cells[: len(before)] = before

    def close(self) -> None:
        """All leases were returned: remove the files."""
        if self._names is not None:
            _unlink(self._folder, self.lease)
        self._close_files()

    def abandon(self) -> None:
        """Some leases could not be returned: keep the files, for the process that recovers them."""
        self._close_files()

    def _close_files(self) -> None:
        for descriptor in (self._spent, self._names):
            if descriptor is not None:
                os.close(descriptor)
        self._spent = self._names = None


class DeadLeaseLog:
    """The log of a dead process: by subject and limit, the units spent in all, and when it spent last. `remove` it
    once its leases are recovered."""

    def __init__(self, lease: str, found: dict[str, dict[str, tuple[int, int]]], folder: Path, lock: int) -> None:
        self.lease = lease
        self.found = found
        self._folder = folder
        self._lock = lock

    def remove(self) -> None:
        _unlink(self._folder, self.lease)
        os.close(self._lock)

    def leave(self) -> None:
        """Keep the log: it is tried again later."""
        os.close(self._lock)


def _write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _unlink(folder: Path, lease: str) -> None:
    for suffix in ("spent", "new", "names"):  # the names last: the other files are found by them
        with contextlib.suppress(OSError):
            os.unlink(folder / f"{lease}.{suffix}")


def check_folder(folder: Path) -> None:
    """Raise PermissionError if another user could put logs into a folder, or replace the folder.

    Each folder of its path, and each link on the way, must be this user's or root's, and writable for no others; sticky
    folders, such as /tmp, may be.
    """
    own = (0, os.getuid())
    seen = [Path(folder.absolute().anchor)]
    for name in folder.absolute().parts[1:]:
        seen.append(seen[-1] / name)
    path = folder.resolve(strict=True)
    if path.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user")
    for part in dict.fromkeys([*seen, path, *path.parents]):
        found = part.lstat()
        if found.st_uid not in own:
            raise PermissionError(f"{folder}: {part} belongs to another user")
        if stat.S_ISLNK(found.st_mode) or found.st_mode & stat.S_ISVTX:
            continue
        # A group that is the user's primary one is mostly theirs alone, and what they make is often writable for it.
        others = stat.S_IWOTH if found.st_gid in (0, os.getgid()) else stat.S_IWOTH | stat.S_IWGRP
        if found.st_mode & others:
            raise PermissionError(f"{folder}: others may write to {part}")


def dead_logs(folder: Path) -> Iterator[DeadLeaseLog]:
    """The logs of dead processes in a folder, each locked for the caller. None if `check_folder` raises: others could
    have written them."""
    if not LOCKS or not folder.is_dir():
        return
    try:
        check_folder(folder)
    except OSError as error:
        _log.debug("logs of leases are not read: %s", error)  # each look at them would say so again
        return
    for path in sorted(folder.glob("*.names")):
        try:
            lock = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)  # its process lives, or another process recovers it
            continue
        if os.fstat(lock).st_uid != os.getuid() or not _is_at(
            lock, path
        ):  # another one has finished with it in this moment, or it was written anew
            os.close(lock)
            continue
        yield DeadLeaseLog(path.stem, _read(path), folder, lock)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _read(path: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """The use of a dead process; nothing for a log of an earlier boot, or a damaged one."""
    found: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        lines = path.read_bytes().split(b"\n")
        cells = memoryview(path.with_suffix(".spent").read_bytes()).cast("Q")
        if json.loads(lines[0]).get("boot") != boot_id() or cells[0] != MAGIC:
            return found
    except (OSError, ValueError, TypeError, IndexError, AttributeError):
        return found
    for line in lines[1:]:
        try:
            state, limit, index = _name(json.loads(line))
        except ValueError:
            continue  # the process was killed while it wrote its last line, and had spent nothing of it
        if index + 1 < len(cells):
            found.setdefault(state, {})[limit] = cells[index], cells[index + 1]
    return found


def _name(line: Any) -> tuple[str, str, int]:
    match line:
        case [str(state), str(limit), int(index)]:
            return state, limit, index
    raise ValueError


def folder_for(url: str, given: str | None = None) -> Path | None:
    """Where the processes of one machine that use a store keep their logs: the folder that is given; beside the file of
    an embedded store; else a folder of this user's among the temporary ones, named after the store. None for a store
    that lives in one process's memory."""
    if given is not None:
        return Path(given)
    parts = urlsplit(url)
    path = unquote(parts.path.removeprefix("/") if parts.scheme in ("sqlite", "json") else "")
    if parts.netloc or not path:  # a server's
        # These parameters name the store; others, such as the number of connections, do not.
        apart = [(name, value) for name, value in parse_qsl(parts.query) if name in ("schema", "collection")]
        place = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path} {apart}"
        if parts.scheme in ("sqlite", "json"):
            return None
        name = hashlib.sha256(place.encode()).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"strongroom-{os.getuid()}" / name
    return Path(f"{path}.leases")


def boot_id() -> str | None:
    """The id of this boot of the machine; None if the system has none."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return None


__all__ = ["DeadLeaseLog", "LeaseLog", "check_folder", "dead_logs", "folder_for"]
