"""Rows that a store keeps in memory for sealing: without a gap, bounded, and only if somebody reads them."""

from __future__ import annotations

import pytest

from strongroom.storage.port import JournalRow
from strongroom.storage.sql import RecentRows, recent_rows


def rows(first: int, last: int, text: str = "{}") -> list[JournalRow]:
    return [
        (n, f"r{n}", "acme", n, "a", "q", "create", "notes", "n", n, None, text, bytes(16), None, None)
        for n in range(first, last + 1)
    ]


def kept(first: int, last: int) -> RecentRows:
    recent = RecentRows()
    assert recent.after(first - 1, 10) == []
    recent.committed(rows(first, last))
    return recent


def test_a_reader_gets_the_rows_that_follow_its_place() -> None:
    recent = kept(5, 9)
    assert recent.after(4, 2) == rows(5, 6)
    assert recent.after(6, 10) == rows(7, 9)
    assert recent.after(4, 10) == [], "the rows before its place are forgotten"
    assert recent.after(9, 10) == []
    recent.committed(rows(10, 11))
    assert recent.after(9, 10) == rows(10, 11)


def test_nothing_is_kept_unless_somebody_reads() -> None:
    recent = RecentRows()
    recent.committed(rows(1, 3))
    assert recent.after(0, 10) == []


def test_after_a_gap_only_what_follows_it_is_kept() -> None:
    recent = kept(1, 3)
    recent.committed(rows(5, 6))
    assert recent.after(0, 10) == []
    assert recent.after(3, 10) == []
    assert recent.after(4, 10) == rows(5, 6)
    recent.committed([*rows(7, 7), *rows(9, 9)])
    assert recent.after(6, 10) == []


@pytest.mark.parametrize(("name", "most"), [("MAX_ROWS", 10), ("MAX_CHARACTERS", 20)])
def test_a_reader_that_stays_behind_reads_the_store(monkeypatch: pytest.MonkeyPatch, name: str, most: int) -> None:
    monkeypatch.setattr(recent_rows, name, most)
    recent = kept(1, 10)
    recent.committed(rows(11, 11))
    assert recent.after(0, 10) == []
    recent.committed(rows(12, 13))
    assert recent.after(11, 10) == rows(12, 13), "it is kept again once the reader has asked"


def test_what_was_changed_in_the_store_is_forgotten() -> None:
    recent = kept(1, 3)
    recent.clear()
    assert recent.after(0, 10) == []
