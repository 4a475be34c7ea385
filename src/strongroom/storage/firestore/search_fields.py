"""The fields by which Firestore finds journal records of a time or of a request, in the order of the journal.

A page of the journal is in the order of the documents' names, so Firestore can find its records by equal values only:
it merges the indexes of single fields. A range of times becomes a few periods of one length. And neither the time nor
the request's id is indexed itself, because both grow: such an index takes 500 writes a second.
"""

from __future__ import annotations

import hashlib
from typing import Any

from ..port import JournalFilter

REQUEST = "request"
"""The hash of the request's id."""
LENGTHS = (31, 34, 37, 40, 43, 46)
"""The lengths of the periods, as powers of two in microseconds: 36 minutes, 5 hours, 38 hours, 13 days, 102 days, 2
years."""
PERIODS = tuple(f"period_{length}" for length in LENGTHS)
MAX_VALUES = 30
"""Firestore's limit for the values of `in`."""
EARLY, AHEAD = -1, -2
"""Instead of a period: of a time before BEGIN; and of a time after END, or after the writer's clock by AHEAD_US."""
BEGIN, END = 22 << 46, 32 << 46
"""From 2019 to 2041."""
AHEAD_US = 3_600_000_000


def put_search_fields(fields: Any, at_us: int, request_id: str, now_us: int) -> None:
    fields[REQUEST].bytes_value = request_key(request_id)
    special = EARLY if at_us < BEGIN else AHEAD if at_us >= min(END, now_us + AHEAD_US) else None
    for length, name in zip(LENGTHS, PERIODS, strict=True):
        fields[name].integer_value = at_us >> length if special is None else special


def request_key(request_id: str) -> bytes:
    return hashlib.sha256(request_id.encode()).digest()[:12]


def needs_search_fields(where: JournalFilter) -> bool:
    return where.request_id is not None or where.since_us is not None or where.until_us is not None


def periods_of(where: JournalFilter, now_us: int) -> tuple[str, list[int]] | None:
    """The field and the values that find all records of the filter's range of times, and few others. None without a
    range.

    A record that is later than the present time of any node by more than AHEAD_US was so when it was written.
    """
    if where.since_us is None and where.until_us is None:
        return None
    since = BEGIN if where.since_us is None else max(BEGIN, where.since_us)
    latest = min(END, now_us + 2 * AHEAD_US)
    until = latest if where.until_us is None else min(latest, where.until_us)
    special = [AHEAD, EARLY] if where.since_us is None or where.since_us < BEGIN else [AHEAD]
    for length, name in zip(LENGTHS, PERIODS, strict=True):
        first, last = since >> length, (until - 1) >> length
        if last - first + 1 + len(special) <= MAX_VALUES:
            return name, [*special, *range(first, last + 1)]
    raise AssertionError("the longest periods cover all times")
