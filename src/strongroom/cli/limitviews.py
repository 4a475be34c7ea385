"""How the command line shows limits and their state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from . import output, shortforms

if TYPE_CHECKING:
    from ..limits import ClockMended, Limit, LimitStatus

_COLUMNS: tuple[tuple[str, Callable[[LimitStatus], str]], ...] = (
    ("RESOURCE", lambda s: s.resource),
    ("OF", lambda s: s.subject),
    ("WINDOW", lambda s: "open now" if s.resource == "concurrency" else shortforms.show_window(s.window)),
    ("USED", lambda s: str(s.used)),
    ("LIMIT", lambda s: str(s.limit)),
    ("REMAINING", lambda s: str(s.remaining)),
    ("FREES FROM", lambda s: output.moment(s.resets_at, "")),
)
_SPLIT: tuple[tuple[str, Callable[[LimitStatus], str]], ...] = (
    ("RECORDED", lambda s: str(s.recorded)),
    ("RESERVED", lambda s: str(s.reserved)),
    ("LEASED", lambda s: str(s.leased)),
)
"""The parts of `used`, shown if `used` is more than `recorded`."""
_SPARSE: tuple[tuple[str, Callable[[LimitStatus], str]], ...] = (
    ("MODELS", lambda s: " ".join(s.models)),
    ("ROUTES", lambda s: " ".join(s.routes)),
    ("DENIED", lambda s: "yes" if s.exceeded else ""),
)
"""Columns that are shown if at least one limit has a value."""


def print_limits(limits: Sequence[LimitStatus]) -> None:
    """A table of limits and their state; nothing without limits."""
    if not limits:
        return
    columns = [*_COLUMNS]
    if any(status.reserved or status.leased for status in limits):
        columns[4:4] = _SPLIT
    columns += [(name, cell) for name, cell in _SPARSE if any(cell(status) for status in limits)]
    output.print_line()
    output.print_table([name for name, _ in columns], [[cell(status) for _, cell in columns] for status in limits])


def limit_texts(limits: Sequence[Limit]) -> list[str]:
    """Each limit in its short form, with its refill, models and routes."""
    return [shortforms.show_limit(limit.model_dump()) for limit in limits]


def print_mended(mended: ClockMended | None, json: bool) -> None:
    """Print whether the time of the last use was reset, and to which time."""
    if json:
        output.print_json({"mended": mended is not None, **(asdict(mended) if mended is not None else {})})
    elif mended is None:
        output.print_line("nothing to mend: its time is not ahead of the clock")
    else:
        output.print_line(f"its time was {output.moment(mended.before)}; it is now {output.moment(mended.now)}")
