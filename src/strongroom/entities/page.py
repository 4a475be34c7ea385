"""One page of a list."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """The items of one page, and the cursor of the next page (None: this is the last)."""

    items: list[T]
    next_cursor: str | None


__all__ = ["Page"]
