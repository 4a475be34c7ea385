"""Server-sent events: the parser, and the state of a watcher that continues without a gap or a repetition. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import Gone
from ._wire import decode
from .errors import UnexpectedAnswer
from .models import Change

READY = "ready"
"""The name of the first event of each connection. It carries the current cursor."""
MAX_EVENT_BYTES = 16 * 1_048_576
_LINE_END = re.compile(rb"\r\n|\n|\r(?!$)")


@dataclass(frozen=True, slots=True)
class Event:
    """The lines between two empty lines. `data` is None without data lines: such an event only moves the cursor."""

    name: str
    data: bytes | None
    id: str | None


class Parser:
    """Parses bytes to events, by the WHATWG's HTML standard."""

    def __init__(self) -> None:
        self.retry_ms: int | None = None
        self._rest = b""
        self._size = 0
        self._begin()

    def _begin(self) -> None:
        self._name = "message"
        self._data: list[bytes] = []
        self._id: str | None = None
        self._size = 0

    def feed(self, chunk: bytes) -> list[Event]:
        """The events that `chunk` completes. Raises UnexpectedAnswer for an event above the largest size."""
        *lines, self._rest = _LINE_END.split(self._rest + chunk)
        events = []
        for line in lines:
            if line:
                self._line(line)
            else:
                if self._data or self._id is not None:
                    events.append(Event(self._name, b"\n".join(self._data) if self._data else None, self._id))
                self._begin()
        if self._size + len(self._rest) > MAX_EVENT_BYTES:
            raise UnexpectedAnswer(f"an event of the stream is larger than {MAX_EVENT_BYTES} bytes")
        return events

    def _line(self, line: bytes) -> None:
        self._size += len(line)
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        match name:
            case b"event":
                self._name = value.decode("utf-8", "replace")
            case b"data":
                self._data.append(value)
            case b"id" if b"\x00" not in value:
                self._id = value.decode("utf-8", "replace")
            case b"retry" if value.isdigit():
                self.retry_ms = int(value)
            case _:
                pass  # a comment, or a field of a newer standard


class Resumption:
    """The state of a watcher.

    Only the last event of the server's page has a cursor. So after a lost connection the first events of a page come
    again, and the watcher recognises the returned ones by their content.
    """

    def __init__(self, cursor: str | None) -> None:
        self.cursor = cursor
        self._given: set[tuple[str, str, int | None, object]] = set()

    def take(self, event: Event) -> Change | None:
        """The change of an event; None without a change, or for one that was returned before. Raises Gone if changes
        were missed."""
        change = None
        if event.name == "reset":
            raise Gone(
                "the journal no longer covers this cursor: read the collection again, and watch without a cursor"
            )
        if event.data is not None and event.name in ("create", "update", "delete", "removed"):
            change = decode(Change, event.data)
            mark = (change.id, change.action, change.version, change.at)
            if mark in self._given:
                change = None
            self._given.add(mark)
        if event.id is not None and event.id != self.cursor:
            self.cursor = event.id
            self._given.clear()
        return change
