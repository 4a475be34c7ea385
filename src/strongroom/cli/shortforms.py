"""Reads the short forms of the command line: limits, costs, metadata, times. Pure.

tokens=100000/5h                             rolling: the last five hours
requests=60/60s
tokens=100000/anchored:5h                    five hours from the first use
cost=25.50/calendar:month@Europe/Berlin      the calendar month there (without @: UTC)
requests=1000/total                          no window
cost=100/total+10/day@Europe/Berlin          no window; 10 come back with each day there (without @: UTC)
tokens=100000/total+500/1h                   no window; 500 come back every hour
concurrency=5                                five at once
tokens=1000/1h models=gpt-*,o1 routes=/chat  only what these models and routes use
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, TypeVar

from ..errors import Problem

T = TypeVar("T")
SECONDS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}
_DURATION = re.compile(r"([0-9]{1,12})([smhdw])")
_AMOUNT = re.compile(r"[0-9]{1,30}(\.[0-9]{1,30})?")
LIMIT_FORM = "expected for example tokens=100000/5h, requests=60/60s, cost=25.50/calendar:month@Europe/Berlin"
SCOPES = ("models", "routes")


def limit(text: str) -> dict[str, Any]:
    """`RESOURCE=AMOUNT/WINDOW [models=NAME,…] [routes=NAME,…]` as the fields of a Limit; `concurrency` has no window.
    Raises ValueError with the found and the expected value."""
    form, *scopes = text.split(" ")
    fields = _counted(form, text)
    for scope in scopes:
        name, _, names = scope.partition("=")
        if name not in SCOPES or not names or name in fields:
            raise ValueError(f"found {scope!r} in {text!r}, expected models=NAME,… or routes=NAME,…")
        fields[name] = names.split(",")
    return fields


def _counted(form: str, text: str) -> dict[str, Any]:
    resource, equals, rest = form.partition("=")
    number, slash, span = rest.partition("/")
    if resource == "concurrency" and equals and not slash:
        return {"resource": resource, "limit": amount(number)}
    if not (equals and slash and resource and span):
        raise ValueError(f"found {text!r}, {LIMIT_FORM}")
    return {"resource": resource, "limit": amount(number), "window": window(span)}


def window(text: str) -> dict[str, Any]:
    """`5h`, `rolling:5h`, `anchored:5h`, `calendar:UNIT[@ZONE]`, `total` or `total+REFILL` as the fields of a
    window."""
    kind, colon, rest = text.partition(":")
    if text == "total":
        return {"kind": "total"}
    if text.startswith("total+"):
        return {"kind": "total", "refill": refill(text.removeprefix("total+"))}
    if not colon:
        return {"kind": "rolling", "seconds": seconds(text)}
    if kind in ("rolling", "anchored"):
        return {"kind": kind, "seconds": seconds(rest)}
    if kind == "calendar":
        unit, _, zone = rest.partition("@")
        return {"kind": "calendar", "unit": unit, "timezone": zone or "UTC"}
    raise ValueError(f"found the window {text!r}, expected 5h, anchored:5h, calendar:day@Europe/Berlin or total")


def refill(text: str) -> dict[str, Any]:
    """`AMOUNT/UNIT[@ZONE]` or `AMOUNT/DURATION` as the fields of a Refill."""
    number, slash, every = text.partition("/")
    if not slash or not every:
        raise ValueError(f"found the refill {text!r}, expected for example 10/day@Europe/Berlin or 500/1h")
    if _DURATION.fullmatch(every):
        return {"amount": amount(number), "seconds": seconds(every)}
    unit, _, zone = every.partition("@")
    return {"amount": amount(number), "unit": unit, "timezone": zone or "UTC"}


def seconds(text: str) -> int:
    """`90s`, `5m`, `5h`, `30d`, `2w` as seconds."""
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ValueError(f"found the duration {text!r}, expected a number and s, m, h, d or w, for example 5h")
    return int(match[1]) * SECONDS[match[2]]


def amount(text: str) -> int | Decimal:
    """A number that is not negative, exact."""
    if not _AMOUNT.fullmatch(text):
        raise ValueError(f"found the amount {text!r}, expected a number such as 100000 or 25.50")
    return Decimal(text) if "." in text else int(text)


def moment(text: str, now: datetime) -> datetime:
    """A time with a zone (`2027-01-01T00:00:00Z`), or how long from now (`30d`)."""
    if _DURATION.fullmatch(text):
        try:
            return (now + timedelta(seconds=seconds(text))).replace(microsecond=0)
        except OverflowError:
            raise ValueError(f"found {text!r}, which is past the year 9999") from None
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"found {text!r}, expected a time such as 2027-01-01T00:00:00Z, or 30d from now") from None
    if found.utcoffset() is None:
        raise ValueError(f"found {text!r}, a time without a zone: add Z for UTC")
    return found.astimezone(UTC)


def past(text: str, now: datetime) -> datetime:
    """A time with a zone (`2026-11-30T12:00:00Z`), or how long ago (`7d`)."""
    try:
        if _DURATION.fullmatch(text):
            return now - timedelta(seconds=seconds(text))
        found = datetime.fromisoformat(text)
    except OverflowError:
        raise ValueError(f"found {text!r}, which is before the year 1") from None
    except ValueError:
        raise ValueError(
            f"found {text[:64]!r}, expected a time such as 2026-11-30T12:00:00Z, or how long ago, such as 7d"
        ) from None
    if found.utcoffset() is None:
        raise ValueError(f"found {text!r}, a time without a zone: add Z for UTC")
    return found.astimezone(UTC)


def pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (equals and name):
        raise ValueError(f"found {text!r}, expected NAME=VALUE")
    return name, value


def metadata_value(text: str) -> Any:
    """The value as JSON if it is JSON (`3`, `true`, `["a"]`), else as text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def each(path: str, texts: Iterable[str], read: Callable[[str], T], problems: list[Problem]) -> dict[int, T]:
    """Every text, read, by its position. Errors are added to `problems`, so that all are reported at once."""
    found = {}
    for index, text in enumerate(texts):
        try:
            found[index] = read(text)
        except ValueError as error:
            problems.append(Problem(f"{path}.{index}", str(error)))
    return found


def by_name(
    path: str, texts: Iterable[str], read: Callable[[str], tuple[str, T]], problems: list[Problem]
) -> dict[str, T]:
    """Like `each`, for texts that name something, by that name. A repeated name is a problem."""
    found: dict[str, T] = {}
    for index, (name, value) in each(path, texts, read, problems).items():
        if name in found:
            problems.append(Problem(f"{path}.{index}", f"found {name!r} more than once, expected it once"))
        found[name] = value
    return found


def one(path: str, text: str, read: Callable[[str], T], problems: list[Problem]) -> T | None:
    """Like `each`, for one text; None if it is invalid."""
    try:
        return read(text)
    except ValueError as error:
        problems.append(Problem(path, str(error)))
        return None


def as_given(problem: Problem, positions: Sequence[int]) -> Problem:
    """A problem of a readable limit, with its index among all given limits."""
    parts = problem.path.split(".")
    if parts[0] == "limits" and len(parts) > 1 and parts[1].isdecimal():
        parts[1] = str(positions[int(parts[1])])
    return Problem(".".join(parts), problem.message)


def show_limit(limit: Mapping[str, Any]) -> str:
    """The fields of a Limit in the short form."""
    scopes = "".join(f" {scope}={','.join(limit[scope])}" for scope in SCOPES if limit.get(scope))
    window = "" if limit["resource"] == "concurrency" else f"/{show_window(limit['window'])}"
    return f"{limit['resource']}={limit['limit']}{window}{scopes}"


def show_window(window: Mapping[str, Any]) -> str:
    match window["kind"]:
        case "rolling":
            return show_seconds(window["seconds"])
        case "anchored":
            return f"anchored:{show_seconds(window['seconds'])}"
        case "calendar":
            zone = "" if window["timezone"] == "UTC" else f"@{window['timezone']}"
            return f"calendar:{window['unit']}{zone}"
        case _:
            return "total" + (f"+{show_refill(window['refill'])}" if window.get("refill") else "")


def show_refill(refill: Mapping[str, Any]) -> str:
    if refill.get("unit") is None:
        return f"{refill['amount']}/{show_seconds(refill['seconds'])}"
    zone = "" if refill["timezone"] == "UTC" else f"@{refill['timezone']}"
    return f"{refill['amount']}/{refill['unit']}{zone}"


def show_seconds(count: int) -> str:
    for unit in ("w", "d", "h", "m") if count else ():
        if count % SECONDS[unit] == 0:
            return f"{count // SECONDS[unit]}{unit}"
    return f"{count}s"
