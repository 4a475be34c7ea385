"""Cache keys stay inside their tenant, documents round-trip exactly, and damaged envelopes are rejected."""

from __future__ import annotations

from contextlib import suppress
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from strongroom import Cached, CachedList, Entity
from strongroom.cache.entry import (
    ABSENT,
    Entry,
    decode_body,
    encode_body,
    key_of,
    seal,
    shape_of,
    unseal,
)
from strongroom.state.model import Action, Policy, Signal
from strongroom.testing.storage.samples import maps


class Anything(Entity, collection="anything", cache=Cached(seconds=60)):
    value: dict[str, Any] = {}


texts = st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), min_size=1, max_size=30)
hostile = st.sampled_from(
    ["a:b", ":", "a", "a%3Ab", "%", "%3A", "*", "policy", "a:policy:b", "..", "/", " ", "\n", "{a}", "é", "A"]
)
parts = texts | hostile
names = st.sampled_from(["policy", "signal", "actions", "a"])


@given(st.tuples(st.none() | parts, names, parts), st.tuples(st.none() | parts, names, parts))
def test_two_documents_never_share_a_cache_key(
    one: tuple[str | None, str, str], other: tuple[str | None, str, str]
) -> None:
    assume(one != other)
    assert key_of(*one) != key_of(*other)


@given(st.none() | parts, names, parts)
def test_a_key_has_exactly_its_three_parts_and_no_whitespace(tenant: str | None, name: str, id: str) -> None:
    key = key_of(tenant, name, id)
    assert len(key.split(":")) == 3
    assert key.isascii()
    assert not set(key) & set(" \r\n*?[]{}")


def test_keys_are_those_of_seed_002_below_the_tenant() -> None:
    policy, signal, action = (cls.__collection__.cached for cls in (Policy, Signal, Action))
    assert policy is not None
    assert signal is not None
    assert action is not None
    assert key_of("acme", policy.name, "p1") == "acme:policy:p1"
    assert key_of("acme", signal.name, "s1") == "acme:signal:s1"
    assert key_of("acme", action.lists[0].name, "billing") == "acme:actions:billing"
    assert (policy.seconds, signal.seconds) == (300, 60)


@given(maps)
def test_what_can_be_stored_comes_back_equal_and_of_the_same_types(value: Any) -> None:
    collection = Anything.__collection__
    document = {"id": "a", "version": 2**62, "created_at": datetime(1, 1, 1, tzinfo=UTC), "value": value}
    found = decode_body(encode_body(document, collection))
    assert found == document
    assert repr(found) == repr(document)
    assert decode_body(encode_body([document, document], collection)) == [document, document]


def test_a_cached_absence_differs_from_every_document() -> None:
    collection = Anything.__collection__
    assert encode_body(None, collection) == ABSENT
    assert encode_body([], collection) != ABSENT
    assert decode_body(ABSENT) is None


def test_decimals_and_times_keep_every_digit() -> None:
    collection = Anything.__collection__
    document = {"value": {"d": Decimal("0.10000000000000000000000000000000000001"), "list": [Decimal("1E+20")]}}
    assert repr(decode_body(encode_body(document, collection))) == repr(document)
    last = datetime(9999, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC)
    assert decode_body(encode_body({"at": last}, collection)) == {"at": last}


@given(st.binary(max_size=60), st.integers(0, 2**63 - 1), st.integers(0, 2**53))
def test_an_envelope_returns_its_content(body: bytes, version: int, ticket: int) -> None:
    entry = Entry(body or ABSENT, version, ticket)
    assert unseal("a:b:c", 7, seal("a:b:c", 7, entry)) == entry


@given(st.binary(min_size=1, max_size=60), st.data())
def test_a_damaged_moved_or_foreign_envelope_is_rejected(body: bytes, data: st.DataObject) -> None:
    envelope = seal("a:b:c", 7, Entry(body, 3, 9))
    assert unseal("a:b:d", 7, envelope) is None
    assert unseal("a:b:c", 8, envelope) is None
    assert unseal("a:b:c", 7, envelope[:-1]) is None
    changed = bytearray(envelope)
    changed[data.draw(st.integers(18, len(envelope) - 1))] ^= data.draw(st.integers(1, 255))  # checksum or body
    assert unseal("a:b:c", 7, bytes(changed)) is None


@given(st.binary(max_size=80))
def test_decoding_an_envelope_of_any_bytes_never_raises(found: bytes) -> None:
    assert unseal("k", 1, found) is None or found.startswith(b"E1")
    with suppress(ValueError):
        decode_body(found)


@pytest.mark.parametrize("field", ["other", "text"])
def test_a_changed_declaration_has_another_shape(field: str) -> None:
    class One(Entity, collection="ones", cache=Cached(seconds=60)):
        text: str

    if field == "other":

        class Two(Entity, collection="ones", cache=Cached(seconds=60)):
            other: str

    else:

        class Two(Entity, collection="ones", cache=Cached(seconds=60)):  # type: ignore[no-redef]
            text: str | None

    assert shape_of(One.__collection__) != shape_of(Two.__collection__)


def test_lists_are_declared_with_their_conditions() -> None:
    listed = CachedList("open", by="owner", where={"b": 1, "a": "x"}, order_by=["-created_at"])
    assert listed.where == (("a", "x"), ("b", 1))
    assert listed.order_by == ("-created_at",)
