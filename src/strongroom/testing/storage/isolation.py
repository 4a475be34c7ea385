"""No tenant's call sees or changes another tenant's documents, whatever the names of tenants and documents."""

from __future__ import annotations

import asyncio
from typing import Any

from hypothesis import assume, given
from hypothesis import strategies as st

from ...context import MAX_TENANT_BYTES, text_problem
from ...entities import MAX_ID_BYTES, Aggregate, Query, Where
from ...errors import AlreadyExists, Conflict, NotFound
from ...storage.port import Add, Append, Check, Create, Delete, Patch, Put, Store
from .backend import StorageSuite, examples
from .preconditions import refused
from .samples import (
    HOSTILE_NAMES,
    NOW,
    batch,
    identical,
    item,
    record,
    sample,
    shared,
    stored,
)

COUNT = [Aggregate("count"), Aggregate("sum", "used")]
_names = st.sampled_from(HOSTILE_NAMES) | st.text(
    st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), min_size=1, max_size=12
)


class TestIsolation(StorageSuite):
    async def test_tenants_of_any_name_are_isolated(self, store: Store) -> None:
        """Each tenant has a document with the same id and the same unique value."""
        names = dict.fromkeys(HOSTILE_NAMES)
        assert not any(text_problem(name, MAX_TENANT_BYTES) for name in names)
        created = [
            store.commit(batch(t, Create("items", "same", item(t, code="same", used=1)), Append(record("same", t), 0)))
            for t in names
        ]
        await asyncio.gather(*created)
        for name in names:
            expected = stored("same", item(name, code="same", used=1))
            assert identical(await store.get("items", name, "same"), expected), repr(name)
            assert identical(await store.find("items", name, Query(Where("code", "==", "same"))), [expected]), repr(
                name
            )
            assert await store.aggregate("items", name, COUNT, None) == {"count": 1, "sum_used": 1}
            page = await store.changes(None, tenant=name, limit=1000)
            assert [r.tenant for r in page.records] == [name]
        gone = list(names)[::2]
        for name in gone:
            await store.commit(batch(name, Delete("items", "same")))
        for name in names:
            assert (await store.get("items", name, "same") is None) == (name in gone), repr(name)
        assert await store.find("items", "another", Query()) == []

    async def test_ids_of_any_name_are_different_documents(self, store: Store) -> None:
        names = list(dict.fromkeys(HOSTILE_NAMES))
        assert not any(text_problem(name, MAX_ID_BYTES) for name in names)
        await store.commit(batch("acme", *(Create("items", id, item(id)) for id in names)))
        await store.commit(batch("other", *(Create("items", id, item("other's")) for id in names)))
        for id in names[::2]:
            await store.commit(batch("acme", Patch("items", id, {"label": "patched"}), Add("items", id, "used", 1)))
        for id in names[1::2]:
            await store.commit(batch("acme", Delete("items", id)))
        found = await store.find("items", "acme", Query(limit=1000))
        assert {d["id"]: (d["label"], d["used"]) for d in found} == dict.fromkeys(names[::2], ("patched", 1))
        others = await store.find("items", "other", Query(limit=1000))
        assert {d["id"]: d["label"] for d in others} == dict.fromkeys(names, "other's")

    @examples(2)
    @given(first=_names, second=_names, id=_names)
    async def test_any_two_tenants_are_isolated(self, store: Store, first: str, second: str, id: str) -> None:
        assume(first != second)
        before = {t: await store.find("samples", t, Query(limit=1000)) for t in (first, second)}
        await store.commit(batch(first, Put("samples", id, sample(name=first))))
        assert await store.find("samples", second, Query(limit=1000)) == before[second]
        if not any(d["id"] == id for d in before[second]):
            assert await store.get("samples", second, id) is None
            await refused(store, NotFound, Delete("samples", id), tenant=second)
        document = await store.get("samples", first, id)
        assert document is not None
        assert document["name"] == first

    async def test_no_operation_reaches_another_tenants_document(self, store: Store) -> None:
        mine = item("mine", code="c", used=3)
        await store.commit(batch("acme", Create("items", "x", mine)))
        await refused(store, NotFound, Patch("items", "x", {"label": "theirs"}), tenant="other")
        await refused(store, NotFound, Patch("items", "x", {"label": "theirs"}, expected=NOW), tenant="other")
        await refused(store, NotFound, Delete("items", "x"), tenant="other")
        await refused(store, NotFound, Delete("items", "x", expected=NOW), tenant="other")
        await refused(store, NotFound, Add("items", "x", "used", 1), tenant="other")
        await refused(store, Conflict, Check("items", "x", NOW), tenant="other")
        await refused(store, Conflict, Put("items", "x", item(), expected=NOW), tenant="other")
        await store.commit(batch("other", Check("items", "x", 0), Put("items", "x", item("theirs"), expected=0)))
        await store.commit(batch("other", Patch("items", "x", {"code": "c"}), now_us=NOW + 9))
        await store.commit(batch("other", Delete("items", "x"), now_us=NOW + 10))
        assert identical(await store.get("items", "acme", "x"), stored("x", mine))

    async def test_every_kind_of_read_stays_in_its_tenant(self, store: Store) -> None:
        for n, tenant in enumerate(("acme", "other", "third")):
            rows = [item(tenant, code=f"{k}", shelf="s", place=k, used=10**n) for k in range(20)]
            operations: list[Any] = [Create("items", f"{k:02}", row) for k, row in enumerate(rows)]
            await store.commit(batch(tenant, *operations))
        for n, tenant in enumerate(("acme", "other", "third")):
            for query in (
                Query(),
                Query(order_by=("-place",)),
                Query(Where("code", "in", [f"{k}" for k in range(20)])),
                Query(Where("label", "!=", "nobody")),
                Query(Where("label", "not-in", ["nobody"])),
                Query(Where("place", ">=", 0), ("shelf", "-place"), start_after=("r", 0, "")),
                Query(fields=("label",)),
            ):
                found = await store.find("items", tenant, query)
                assert len(found) == 20
                assert {d["label"] for d in found} == {tenant}
            totals = await store.aggregate("items", tenant, [*COUNT, Aggregate("average", "used")], None)
            assert totals == {"count": 20, "sum_used": 20 * 10**n, "average_used": float(10**n)}

    async def test_a_unique_index_is_per_tenant_and_global_in_a_global_collection(self, store: Store) -> None:
        for tenant in ("acme", "other"):
            await store.commit(batch(tenant, Create("items", "x", item(code="c", shelf="s", place=1))))
        await store.commit(batch("acme", Create("shared", "x", shared(code="c"))))
        await refused(store, AlreadyExists, Create("shared", "y", shared(code="c")), tenant="other")
        await refused(store, AlreadyExists, Create("shared", "x", shared()), tenant="other")

    async def test_global_documents_stand_beside_tenants_of_any_name(self, store: Store) -> None:
        await store.commit(batch(None, Create("shared", "x", shared("global"))))
        for tenant in ("", "None", "null", "global", "shared"):
            if tenant:
                await store.commit(batch(tenant, Create("items", "x", item(tenant)), Add("shared", "x", "used", 1)))
        assert [d["label"] for d in await store.find("shared", None, Query())] == ["global"]
        for tenant in ("None", "null", "global", "shared"):
            assert [d["label"] for d in await store.find("items", tenant, Query())] == [tenant]
        assert await store.aggregate("shared", None, COUNT, None) == {"count": 1, "sum_used": 4}

    async def test_the_tenants_of_a_store_can_be_listed(self, store: Store) -> None:
        assert await store.tenants() == []
        names = sorted(dict.fromkeys(HOSTILE_NAMES), key=str.encode)
        for name in names:
            await store.commit(batch(name, Create("items", "x", item())))
        await store.commit(batch("acme", Create("samples", "x", sample())))
        await store.commit(batch(None, Create("shared", "x", shared())))
        expected = sorted({*names, "acme"}, key=str.encode)
        assert await store.tenants(limit=1_000) == expected
        pages: list[str] = []
        while page := await store.tenants(pages[-1] if pages else None, limit=7):
            assert len(page) <= 7
            pages += page
        assert pages == expected
        assert await store.tenants(after=expected[3], limit=1) == expected[4:5]
        await store.commit(batch("acme", Delete("samples", "x")))
        assert set(await store.tenants()) >= set(names)
