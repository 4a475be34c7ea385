"""Structured logs: one JSON object a line on standard error, with no secret in it."""

from __future__ import annotations

import logging
import re
import sys
import traceback
from datetime import UTC, datetime
from typing import Literal, TextIO

import msgspec

from ..keys import SCAN_PATTERN
from .trace_context import current_trace

_SECRETS = re.compile(rf"{SCAN_PATTERN}|(?<=[Bb]earer )\S+")
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message", "taskName"}
_encode = msgspec.json.Encoder().encode
QUIET = ("uvicorn.error", "uvicorn.access", "asyncio")
"""Loggers that log from `warning` up: their lower lines repeat ours."""


SEVERITIES = {"CRITICAL": "CRITICAL", "ERROR": "ERROR", "WARNING": "WARNING", "INFO": "INFO", "DEBUG": "DEBUG"}
"""Cloud Logging's severities, by Python's names of the levels."""
LogFormat = Literal["json", "cloud-logging"]


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
        return _encode(self.completed(record, line)).decode()

    def completed(self, record: logging.LogRecord, line: dict[str, object]) -> dict[str, object]:
        """The line with the trace of the request that it belongs to, if there is one."""
        if (trace := current_trace()) is not None:
            line["trace_id"], line["span_id"], _ = trace
        return line


class CloudLoggingFormatter(JsonFormatter):
    """As JsonFormatter, with the fields that Google's Cloud Logging takes out of a line: `severity`, and the trace and
    span of the request. `project`: the Google Cloud project whose traces they are."""

    def __init__(self, project: str | None) -> None:
        super().__init__()
        self._project = project

    def completed(self, record: logging.LogRecord, line: dict[str, object]) -> dict[str, object]:
        line["severity"] = SEVERITIES.get(record.levelname, "DEFAULT")
        if (trace := current_trace()) is not None:
            trace_id, span_id, sampled = trace
            line["logging.googleapis.com/trace"] = (
                f"projects/{self._project}/traces/{trace_id}" if self._project else trace_id
            )
            line["logging.googleapis.com/spanId"] = span_id
            line["logging.googleapis.com/trace_sampled"] = sampled
        return line


def _masked(value: object) -> object:
    if value is None or isinstance(value, bool | int | float):
        return value
    return _SECRETS.sub("***", str(value))


def configure(
    level: str, stream: TextIO | None = None, *, format: LogFormat = "json", project: str | None = None
) -> None:
    """Write every log line of this process, from `level` up, to standard error as JSON. `project`: as of
    CloudLoggingFormatter."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(CloudLoggingFormatter(project) if format == "cloud-logging" else JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in QUIET:
        logger = logging.getLogger(name)
        logger.handlers[:] = []
        logger.propagate = True
        logger.setLevel(max(logging.WARNING, root.level))
