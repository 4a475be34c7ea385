"""Threshold alerts: when the use of a limit crosses a percentage of it (50, 80, 100%), once a window. Pure.

The ledger calls, with what a decision changed: `crossed` says which thresholds were passed, `untold` which of them
were not told of in this window yet and what to remember, and `operations` gives the events for the same batch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..context import utc_from_us
from ..events import LIMIT_THRESHOLD, PREFIX, event, put
from ..storage.port import Put
from .windows import Limit, Rolling, from_units

DEFAULT_THRESHOLDS = (50, 80, 100)
MAX_THRESHOLDS = 20
MAX_THRESHOLD = 1_000
"""Percent. Use is recorded over a limit too."""
_SECOND = 1_000_000
_UNIT_S = {"minute": 60.0, "hour": 3_600.0, "day": 82_800.0, "week": 601_200.0, "month": 2_415_600.0}
"""The shortest length of each calendar unit; a day may lose an hour to summer time."""
Told = Mapping[str, Any]
"""What is remembered of one counter, as JSON: `most` (the limit's units), `ends` (the window's end, None if it rolls or
has none), `at` (when each threshold was told of, by threshold)."""


@dataclass(frozen=True, slots=True)
class Crossing:
    """The use of one limit has crossed one threshold (in percent). `account_id` is a key's id or a `quota_id`;
    `key_id` is the key that was used, if one was. `used` and `most` are units. `window_ends_us` is the next refill of a
    total that has one, and None where the window rolls or there is none."""

    subject_id: str
    tenant: str
    key_id: str | None
    limit: Limit
    threshold: int
    used: int
    most: int
    window_ends_us: int | None
    now_us: int


def crossed(before: int, after: int, most: int, thresholds: Sequence[int]) -> list[int]:
    """The thresholds (percent) between `before` and `after` units used of `most`, ascending. Both are as of one moment,
    so that in a new window `before` is 0. None for a limit of 0."""
    if after <= before or most <= 0:
        return []
    return sorted(t for t in thresholds if before * 100 < t * most <= after * 100)


def untold(
    told: Told | None, reached: Sequence[int], limit: Limit, most: int, window_ends_us: int | None, now_us: int
) -> tuple[list[int], Told]:
    """The crossed thresholds that need an event, and what to remember of this counter.

    Each once a window: of a window with an end until that end; of a rolling one, whose use goes up and down across a
    threshold all the time, once in its length; of a total, once, and once in each period between two refills if it has
    them. A limit that was changed begins anew.
    """
    rolls = isinstance(limit.window, Rolling)
    ends = None if rolls else window_ends_us
    same = told is not None and told["most"] == most and told["ends"] == ends
    at: dict[str, int] = dict(told["at"]) if told is not None and same else {}
    if isinstance(limit.window, Rolling):
        length_us = limit.window.seconds * _SECOND
        at = {name: moment for name, moment in at.items() if now_us - moment < length_us}
    new = [threshold for threshold in reached if str(threshold) not in at]
    at.update({str(threshold): now_us for threshold in new})
    return new, {"most": most, "ends": ends, "at": at}


def operations(crossing: Crossing) -> Sequence[Put]:
    """The event for the batch that commits the crossing. Its id is derived from the crossing, so that a second node, or
    a repeated commit whose answer was lost, makes no second event."""
    limit = crossing.limit
    ends_us = crossing.window_ends_us
    data: dict[str, Any] = {
        "subject": subject_of(crossing.subject_id),
        "key_id": crossing.key_id,
        "resource": limit.resource,
        "threshold": crossing.threshold,
        "limit": from_units(limit.resource, crossing.most),
        "used": from_units(limit.resource, crossing.used),
        "window": limit.window.model_dump(mode="json"),
        "window_ends_at": utc_from_us(ends_us) if ends_us is not None else None,
    }
    if limit.models:
        data["models"] = list(limit.models)
    if limit.routes:
        data["routes"] = list(limit.routes)
    return (put(event(LIMIT_THRESHOLD, crossing.tenant, data, now_us=crossing.now_us, id=_event_id(crossing))),)


def length_s(window: Mapping[str, Any]) -> float:
    """The least length of a window in seconds. For a total, the time between two refills, or infinity without one.
    `window`: the dump of a Window."""
    schedule = window.get("refill") or window
    if schedule.get("unit") is not None:
        return _UNIT_S[schedule["unit"]]
    return float(schedule.get("seconds", math.inf))


def _event_id(crossing: Crossing) -> str:
    limit = crossing.limit
    window = str(crossing.window_ends_us)
    if isinstance(limit.window, Rolling):  # those told of are a window's length apart, so no two share a number
        window = f"#{crossing.now_us // (limit.window.seconds * _SECOND)}"
    counter = f"{limit.id}\x00{','.join(limit.models)}\x00{','.join(limit.routes)}"
    what = "\x00".join((crossing.subject_id, counter, str(crossing.most), str(crossing.threshold), window))
    return PREFIX + hashlib.sha256(what.encode()).hexdigest()[:31]


def subject_of(subject_id: str) -> dict[str, str]:
    """The owner of a limit, by the id of its subject: a key's id, or one made by `quotas.quota_id`."""
    kind, _, rest = subject_id.partition(":")
    if kind not in ("tenant", "user", "group"):
        return {"kind": "key", "id": subject_id}
    length, _, named = rest.partition(":")
    tenant, name = named[: int(length)], named[int(length) + 1 :]
    return {"kind": kind, "id": tenant if kind == "tenant" else name}
