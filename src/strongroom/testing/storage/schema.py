"""Schema: the changes that `prepare` plans, applies and refuses, and their effect on existing documents."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from types import MappingProxyType
from typing import Any

import pytest

from ...entities import Aggregate, Collection, Document, FieldSpec, FieldType, Index, Query, Where
from ...errors import AlreadyExists, SchemaError, StrongroomError
from ...storage.port import Add, ChangeKind, Create, Patch, Put, SchemaChange, Store
from .backend import Backend, StorageSuite
from .preconditions import refused
from .samples import COLLECTIONS, batch, identical, item, stored

TEXT = FieldSpec("name", FieldType.TEXT)


def declare(
    *fields: FieldSpec, indexes: tuple[Index, ...] = (), name: str = "things", scope: str = "tenant"
) -> Collection:
    by_name = {spec.name: spec for spec in (TEXT, *fields)}
    return Collection(name, scope == "tenant", MappingProxyType(by_name), indexes)


def kinds(changes: tuple[SchemaChange, ...]) -> set[tuple[ChangeKind, str]]:
    return {(change.kind, change.collection) for change in changes}


async def fill(store: Store, **more: Any) -> list[Document]:
    """Two tenants' documents."""
    for tenant in ("acme", "other"):
        for name in ("a", "b"):
            await store.commit(batch(tenant, Create("things", name, {"name": name, **more})))
    return [stored(name, {"name": name, **more}) for name in ("a", "b")]


class TestSchema(StorageSuite):
    async def test_a_new_collection_is_planned_then_applied_then_there(self, store: Store) -> None:
        declared = [*COLLECTIONS, declare()]
        planned = await store.prepare(declared, mode="plan")
        assert kinds(planned) == {(ChangeKind.CREATE_COLLECTION, "things")}
        assert not any(change.destructive for change in planned)
        with pytest.raises(StrongroomError):  # a plan changes nothing
            await store.find("things", "acme", Query())
        assert await store.prepare(declared) == planned
        held = await fill(store)
        assert await store.prepare(declared, mode="plan") == ()
        assert await store.prepare(declared) == ()
        assert identical(await store.find("things", "acme", Query()), held)

    async def test_existing_documents_get_the_default_of_a_new_field(self, store: Store) -> None:
        await store.prepare([declare()])
        await fill(store)
        defaults: dict[str, tuple[FieldType, Any]] = {
            "flag": (FieldType.BOOL, True),
            "rank": (FieldType.INT, 7),
            "ratio": (FieldType.FLOAT, 0.5),
            "price": (FieldType.DECIMAL, Decimal("9.99")),
            "text": (FieldType.TEXT, 'it\'s a "default" \\ é'),
            "blob": (FieldType.BYTES, b"\x00\xff"),
            "moment": (FieldType.TIMESTAMP, datetime(2025, 6, 15, 12, 30, 0, 123_456, tzinfo=UTC)),
            "tags": (FieldType.LIST, ["a", {"b": [1]}]),
            "extra": (FieldType.MAP, {"$bytes": "x", "a": {"b": b"y"}}),
            "empty": (FieldType.LIST, []),
        }
        specs = [FieldSpec(name, kind, has_default=True, default=d) for name, (kind, d) in defaults.items()]
        nulls = [
            FieldSpec("null_text", FieldType.TEXT, optional=True),
            FieldSpec("null_map", FieldType.MAP, optional=True),
        ]
        with_default = FieldSpec("null_int", FieldType.INT, optional=True, has_default=True, default=3)
        changes = await store.prepare([declare(*specs, *nulls, with_default)])
        assert kinds(changes) == {(ChangeKind.ADD_FIELD, "things")}
        assert {change.name for change in changes} == {*defaults, "null_text", "null_map", "null_int"}
        assert not any(change.destructive for change in changes)
        expected = {name: value for name, (_, value) in defaults.items()} | {
            "null_text": None,
            "null_map": None,
            "null_int": 3,
        }
        for tenant in ("acme", "other"):
            got = await store.get("things", tenant, "a")
            assert identical(got, stored("a", {"name": "a", **expected})), got
            for name, value in expected.items():
                if defaults.get(name, (FieldType.TEXT,))[0].is_scalar and not name.startswith("null"):
                    assert len(await store.find("things", tenant, Query(Where(name, "==", value)))) == 2, name
        found = await store.aggregate("things", "acme", [Aggregate("sum", "rank"), Aggregate("sum", "price")], None)
        assert found == {"sum_rank": 14, "sum_price": Decimal("19.98")}
        assert len(await store.find("things", "acme", Query(Where("tags", "array-contains", "a")))) == 2
        assert len(await store.find("things", "acme", Query(Where("null_text", "==", None)))) == 2
        await store.commit(batch("acme", Add("things", "a", "rank", 1), Patch("things", "a", {"null_text": "x"})))
        got = await store.get("things", "acme", "a")
        assert got is not None
        assert (got["rank"], got["null_text"]) == (8, "x")

    async def test_documents_do_not_share_a_mutable_default(self, store: Store) -> None:
        await store.prepare([declare()])
        await fill(store)
        await store.prepare([declare(FieldSpec("tags", FieldType.LIST, has_default=True, default=["a"]))])
        for _ in range(2):
            got = await store.get("things", "acme", "a")
            assert got is not None
            assert got["tags"] == ["a"]
            got["tags"].append("b")

    async def test_a_required_field_without_default_is_refused_where_there_are_documents(self, store: Store) -> None:
        required = FieldSpec("rank", FieldType.INT)
        await store.prepare([declare()])
        held = await fill(store)
        also = declare(name="also")
        (change,) = [c for c in await store.prepare([declare(required)], mode="plan") if c.name == "rank"]
        assert change.kind is ChangeKind.ADD_FIELD
        with pytest.raises(SchemaError, match="rank"):
            await store.prepare([also, declare(required)])
        assert identical(await store.find("things", "acme", Query()), held), "the old declarations are still in force"
        await store.commit(batch("acme", Create("things", "c", {"name": "c"})))
        assert kinds(await store.prepare([also, declare()], mode="plan")) == {(ChangeKind.CREATE_COLLECTION, "also")}

    async def test_a_required_field_without_default_is_added_where_there_is_no_document(self, store: Store) -> None:
        await store.prepare([declare()])
        await store.prepare([declare(FieldSpec("rank", FieldType.INT))])
        await store.commit(batch("acme", Create("things", "a", {"name": "a", "rank": 1})))
        assert len(await store.find("things", "acme", Query(Where("rank", "==", 1)))) == 1

    async def test_dropping_a_field_is_destructive(self, store: Store) -> None:
        rank = FieldSpec("rank", FieldType.INT, optional=True)
        await store.prepare([declare(rank)])
        held = await fill(store, rank=1)
        (change,) = await store.prepare([declare()], mode="plan")
        assert (change.kind, change.name, change.destructive) == (ChangeKind.DROP_FIELD, "rank", True)
        with pytest.raises(SchemaError, match="rank"):
            await store.prepare([declare(FieldSpec("more", FieldType.INT, optional=True))])
        assert identical(await store.find("things", "acme", Query()), held)
        await store.prepare([declare()], allow_destructive=True)
        assert identical(await store.get("things", "other", "b"), stored("b", {"name": "b"}))
        assert await store.prepare([declare()]) == ()

    async def test_changing_a_fields_type_is_destructive(self, store: Store) -> None:
        number = FieldSpec("rank", FieldType.INT, optional=True)
        text = replace(number, type=FieldType.TEXT)
        await store.prepare([declare(number)])
        held = await fill(store, rank=1)
        (change,) = await store.prepare([declare(text)], mode="plan")
        assert (change.kind, change.name, change.destructive) == (ChangeKind.CHANGE_FIELD, "rank", True)
        with pytest.raises(SchemaError, match="rank"):
            await store.prepare([declare(text)])
        assert identical(await store.find("things", "acme", Query()), held)
        await store.prepare([declare(text)], allow_destructive=True)
        assert await store.prepare([declare(text)]) == ()
        got = await store.get("things", "acme", "a")
        assert got is not None
        assert got["name"] == "a"
        assert got["rank"] is None or isinstance(got["rank"], str)
        await store.commit(batch("acme", Put("things", "a", {"name": "a", "rank": "first"})))
        assert len(await store.find("things", "acme", Query(Where("rank", "==", "first")))) == 1

    async def test_an_index_is_added_and_dropped_without_loss(self, store: Store) -> None:
        plain, unique = Index("name", "-created_at"), Index("name", unique=True)
        await store.prepare([declare()])
        held = await fill(store)
        changes = await store.prepare([declare(indexes=(plain, unique))])
        assert [change.kind for change in changes] == [ChangeKind.ADD_INDEX] * 2
        assert not any(change.destructive for change in changes)
        assert await store.prepare([declare(indexes=(plain, unique))]) == ()
        assert identical(await store.find("things", "acme", Query()), held)
        await refused(store, AlreadyExists, Create("things", "c", {"name": "a"}))
        changes = await store.prepare([declare(indexes=(plain,))])
        assert [change.kind for change in changes] == [ChangeKind.DROP_INDEX]
        await store.commit(batch("acme", Create("things", "c", {"name": "a"})))
        assert identical(await store.find("things", "acme", Query(limit=2)), held)

    async def test_a_unique_index_that_the_documents_break_is_refused(self, store: Store) -> None:
        await store.prepare([declare()])
        await fill(store)  # the same names in two tenants are allowed
        await store.commit(batch("acme", Create("things", "twin", {"name": "a"})))
        unique = declare(indexes=(Index("name", unique=True),))
        with pytest.raises(SchemaError):
            await store.prepare([declare(name="also"), unique])
        await store.commit(batch("acme", Create("things", "triplet", {"name": "a"})))
        assert (ChangeKind.CREATE_COLLECTION, "also") in kinds(await store.prepare([declare(name="also")], mode="plan"))
        await store.commit(
            batch("acme", Patch("things", "twin", {"name": "b2"}), Patch("things", "triplet", {"name": "c"}))
        )
        await store.prepare([unique])
        await refused(store, AlreadyExists, Patch("things", "twin", {"name": "a"}))

    async def test_collections_that_are_not_declared_are_left_alone_and_out_of_reach(self, store: Store) -> None:
        await store.commit(batch("acme", Create("items", "x", item("kept"))))
        assert kinds(await store.prepare([declare()])) == {(ChangeKind.CREATE_COLLECTION, "things")}
        with pytest.raises(StrongroomError):
            await store.get("items", "acme", "x")
        with pytest.raises(StrongroomError):
            await store.find("items", "acme", Query())
        with pytest.raises(StrongroomError):
            await store.commit(batch("acme", Create("things", "a", {"name": "a"}), Create("items", "y", item())))
        assert await store.find("things", "acme", Query()) == []
        assert await store.prepare(COLLECTIONS) == ()
        assert identical(await store.get("items", "acme", "x"), stored("x", item("kept")))
        assert await store.get("items", "acme", "y") is None

    async def test_a_changed_schema_outlives_the_process(self, backend: Backend) -> None:
        url = backend.new_url()
        store = await backend.open(url)
        await store.prepare([declare()])
        await fill(store)
        grown = declare(FieldSpec("rank", FieldType.INT, has_default=True, default=7), indexes=(Index("rank"),))
        await store.prepare([grown])
        await store.close()
        store = await backend.open(url)
        try:
            if store.capabilities.persistent:
                assert await store.prepare([grown]) == ()
                assert identical(await store.get("things", "acme", "a"), stored("a", {"name": "a", "rank": 7}))
            else:
                assert kinds(await store.prepare([grown])) == {(ChangeKind.CREATE_COLLECTION, "things")}
        finally:
            await store.close()

    async def test_hostile_values_in_a_default_are_only_values(self, store: Store) -> None:
        await store.prepare([declare()])
        await fill(store)
        default = "'); DROP TABLE things; --\n\"%s {} \\"
        await store.prepare([declare(FieldSpec("text", FieldType.TEXT, has_default=True, default=default))])
        assert len(await store.find("things", "acme", Query(Where("text", "==", default)))) == 2
