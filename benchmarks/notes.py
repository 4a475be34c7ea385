"""The row that `read`, `write` and `store` use, the same for every contender."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

TENANT = "bench"
FIELDS = ("title", "body", "status", "author", "priority", "due_at")
DESCRIPTION = "a note of 6 fields, 200 characters the longest, with an index of 2 columns"
_BODY = "The quick brown fox jumps over the lazy dog. " * 5
_DUE = datetime(2030, 1, 1, tzinfo=UTC)


def note(number: int) -> dict[str, Any]:
    """The fields of one note."""
    return {
        "title": f"Note number {number}",
        "body": _BODY[:200],
        "status": "draft" if number % 3 else "done",
        "author": f"author{number % 100}@example.com",
        "priority": number % 10,
        "due_at": _DUE + timedelta(minutes=number % 100_000),
    }
