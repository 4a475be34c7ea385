"""The leaf of a record: its encoding is fixed, every field is in it, and redaction leaves it as it was."""

from __future__ import annotations

from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strongroom.journal.leaf import COMMITTED, hidden, leaf_of, redacted_salt
from strongroom.storage.port import JOURNAL_ROW, JournalRow

ROW: JournalRow = (
    5, "id-1", "acme", 1_700_000_000_000_001, "key:k1", "request", "update", "notes", "n1", 4,
    '{"a":1}', '{"a":"é"}', bytes(range(16)), None, None,
)  # fmt: skip


def changed(**fields: object) -> JournalRow:
    row = dict(zip(JOURNAL_ROW, ROW, strict=True))
    return cast(JournalRow, tuple({**row, **fields}.values()))


def test_the_encoding_of_version_1_does_not_change() -> None:
    assert leaf_of(ROW).hex() == "893fb5a6f6a35aa650bdda66d367a9793fa0afae6f4c0b4654b787e2650d7d9e"
    assert (
        leaf_of(changed(tenant=None, actor="ädmin", claims='{"sub":"u"}', before=None, rules="7")).hex()
        == "68c50bfbccdacb43f812494f1bb6d3d3607f45dd9585cb17561a5ca9b1010741"
    )


@pytest.mark.parametrize("field", [name for name in JOURNAL_ROW if name not in ("sequence", "version")])
def test_every_field_that_does_not_depend_on_the_store_is_in_the_leaf(field: str) -> None:
    other = {"at_us": 2, "salt": bytes(16)}.get(field, '{"b":2}')
    assert leaf_of(changed(**{field: other})) != leaf_of(ROW)


@pytest.mark.parametrize("field", ["sequence", "version"])
def test_what_the_store_gives_is_not_in_the_leaf(field: str) -> None:
    assert leaf_of(changed(**{field: 99})) == leaf_of(ROW)


texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12)


@given(st.lists(texts, min_size=7, max_size=7), st.lists(texts, min_size=7, max_size=7))
def test_two_records_have_one_encoding_only_if_they_are_equal(some: list[str], others: list[str]) -> None:
    names = ("id", "tenant", "request_id", "action", "collection", "entity_id", "actor")
    one, other = (changed(**dict(zip(names, values, strict=True))) for values in (some, others))
    assert (leaf_of(one) == leaf_of(other)) == (some == others)


@given(st.sets(st.sampled_from(COMMITTED)), st.sets(st.sampled_from(COMMITTED)))
def test_redaction_leaves_the_leaf_as_it_was_and_gives_up_the_salts(first: set[str], second: set[str]) -> None:
    row, gone = ROW, set[str]()
    for fields in (first, second):
        salt = redacted_salt(row, frozenset(fields | gone))
        gone |= fields
        blank = {name: None if name in ("before", "after") else "" for name in gone}
        row = cast(JournalRow, tuple({**dict(zip(JOURNAL_ROW, row, strict=True)), **blank, "salt": salt}.values()))
    assert leaf_of(row) == leaf_of(ROW)
    if len(gone) == len(COMMITTED):
        assert ROW[12] not in row[12]


def test_an_api_keys_hash_enters_by_its_own_commitment() -> None:
    row = changed(collection="api_keys", before=None, after='{"hash":"abc","name":"x"}')
    _, after = hidden(row)
    assert after is not None
    assert "abc" not in after
    assert leaf_of(changed(collection="api_keys", before=None, after='{"hash":"abd","name":"x"}')) != leaf_of(row)
