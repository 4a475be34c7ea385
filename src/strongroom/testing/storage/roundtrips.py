"""Stored values are returned equal and with the same types."""

from __future__ import annotations

import pytest
from hypothesis import given

from ...entities import Document, Op, Query, Where
from ...storage.port import Create, Patch, Put, Store
from .backend import StorageSuite, examples
from .samples import (
    ANY_VERSION,
    EDGES,
    HOSTILE_NAMES,
    batch,
    documents,
    identical,
    item,
    sample,
    stored,
    tenants,
)

_tenant = tenants("round-trip")


class TestRoundTrips(StorageSuite):
    @pytest.mark.parametrize("field", EDGES)
    async def test_every_edge_value_comes_back_equal_and_of_its_type(self, store: Store, field: str) -> None:
        """Written by Create, Put or Patch, and read by get or find."""
        values = (None, *EDGES[field])
        for number, value in enumerate(values):
            await store.commit(
                batch(
                    "acme",
                    Create("samples", f"{number}-created", sample(**{field: value})),
                    Put("samples", f"{number}-put", sample(**{field: value})),
                    Create("samples", f"{number}-patched", sample()),
                    Patch("samples", f"{number}-patched", {field: value}),
                )
            )
        found = {d["id"]: d for d in await store.find("samples", "acme", Query(limit=1000))}
        for number, value in enumerate(values):
            for how in ("created", "put", "patched"):
                expected = stored(f"{number}-{how}", sample(**{field: value}))
                got = await store.get("samples", "acme", f"{number}-{how}")
                assert identical(got, expected), f"get: found {got}, expected {expected}"
                assert identical(found[f"{number}-{how}"], expected), f"find: found {found[f'{number}-{how}']}"

    @examples(2)
    @given(document=documents)
    async def test_any_document_comes_back(self, store: Store, document: Document) -> None:
        tenant = next(_tenant)
        await store.commit(batch(tenant, Create("samples", "a", document)))
        expected = stored("a", document)
        got = await store.get("samples", tenant, "a")
        assert identical(got, expected), f"get: found {got}"
        found = await store.find("samples", tenant, Query())
        assert identical(found, [expected]), f"find: found {found}"

    async def test_any_text_can_be_an_id(self, store: Store) -> None:
        ids = dict.fromkeys((*HOSTILE_NAMES, "x" * 512, "x" * 511 + "y", "é" * 256))
        for id in ids:
            await store.commit(batch("acme", Create("items", id, item(label=id))))
        for id in ids:
            document = await store.get("items", "acme", id)
            assert document is not None, repr(id)
            assert (document["id"], document["label"]) == (id, id)
            (found,) = await store.find("items", "acme", Query(Where("id", Op.EQ, id)))
            assert found["label"] == id
        everything = await store.find("items", "acme", Query(limit=1000))
        assert [d["id"] for d in everything] == sorted(ids, key=str.encode)

    async def test_a_projection_gives_the_id_and_what_was_asked_for(self, store: Store) -> None:
        await store.commit(batch("acme", Create("samples", "a", sample(rank=1, name="x", extra={"b": 1}))))
        (found,) = await store.find("samples", "acme", Query(fields=("rank", "version", "extra")))
        assert identical(found, {"id": "a", "rank": 1, "version": ANY_VERSION, "extra": {"b": 1}})
        assert await store.find("samples", "acme", Query(fields=())) == [{"id": "a"}]

    async def test_mutating_a_returned_document_does_not_change_the_store(self, store: Store) -> None:
        given = sample(tags=["a"], extra={"deep": {"list": [1]}})
        await store.commit(batch("acme", Create("samples", "a", given)))
        given["tags"].append("b")
        given["extra"]["deep"]["list"].append(2)
        first = await store.get("samples", "acme", "a")
        (second,) = await store.find("samples", "acme", Query())
        for document in (first, second):
            assert document is not None
            document["name"] = "changed"
            document["extra"]["deep"]["list"].clear()
        expected = stored("a", sample(tags=["a"], extra={"deep": {"list": [1]}}))
        assert identical(await store.get("samples", "acme", "a"), expected)

    async def test_a_missing_document_is_none(self, store: Store) -> None:
        assert await store.get("samples", "acme", "nothing") is None
        assert await store.find("samples", "acme", Query()) == []
        assert await store.get("shared", None, "nothing") is None

    async def test_a_document_of_a_megabyte_comes_back(self, store: Store) -> None:
        document = sample(note="é" * 245_000, blob=bytes(500_000), extra={"a": ["x" * 5_000]})
        await store.commit(batch("acme", Create("samples", "large", document)))
        assert identical(await store.get("samples", "acme", "large"), stored("large", document))
