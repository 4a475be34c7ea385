"""Structured logs: one JSON object a line on standard error, with no secret in it."""

from __future__ import annotations

import logging
import re
import sys
import traceback
from datetime import UTC, datetime
from typing import TextIO

import msgspec

from ..keys import SCAN_PATTERN

_SECRETS = re.compile(rf"{SCAN_PATTERN}|(?<=[Bb]earer )\S+")
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message", "taskName"}
_encode = msgspec.json.Encoder().encode
QUIET = ("uvicorn.error", "uvicorn.access", "asyncio")
"""Loggers that log from `warning` up: their lower lines repeat ours."""


class JsonFormatter(logging.Formatter):
    """`{"time", "level", "logger", "message", …extra, "error", "trace"}`. Keys and bearer tokens are masked.

    A traceback has only its places. The text of the exception may repeat a caller's input.
    """

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _masked(record.getMessage()),
        }
        line.update({name: _masked(value) for name, value in vars(record).items() if name not in _STANDARD})
        if record.exc_info and record.exc_info[0] is not None:
            line["error"] = record.exc_info[0].__name__
            frames = traceback.extract_tb(record.exc_info[2])
            line["trace"] = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames]
        return _encode(line).decode()


def _masked(value: object) -> object:
    if value is None or isinstance(value, bool | int | float):
        return value
    return _SECRETS.sub("***", str(value))


def configure(level: str, stream: TextIO | None = None) -> None:
    """Write every log line of this process, from `level` up, to standard error as JSON."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in QUIET:
        logger = logging.getLogger(name)
        logger.handlers[:] = []
        logger.propagate = True
        logger.setLevel(max(logging.WARNING, root.level))
