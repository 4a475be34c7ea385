"""Counters: sums are exact, and concurrent additions never exceed a bound."""

from __future__ import annotations

import asyncio
import random

import pytest

from ...entities import INT64_MAX, INT64_MIN, Query
from ...errors import BoundExceeded
from ...storage.port import Add, Append, Create, Store
from .backend import StorageSuite
from .preconditions import refused
from .samples import batch, item, record, shared


async def used(store: Store, id: str = "x", tenant: str = "acme") -> int:
    document = await store.get("items", tenant, id)
    assert document is not None
    value: int = document["used"]
    return value


class TestCounters(StorageSuite):
    async def test_a_bound_is_reached_exactly_and_never_passed(self, store: Store) -> None:
        await store.commit(batch("acme", Create("items", "x", item())))
        adds = [store.commit(batch("acme", Add("items", "x", "used", 1, at_most=60))) for _ in range(100)]
        outcomes = await asyncio.gather(*adds, return_exceptions=True)
        admitted = [o.values[0] for o in outcomes if not isinstance(o, BaseException)]
        refusals = [o for o in outcomes if isinstance(o, BaseException)]
        assert sorted(admitted) == list(range(1, 61)), "each addition says what it came to"
        assert len(refusals) == 40
        assert all(type(o) is BoundExceeded and o.details["operation"] == 0 for o in refusals), refusals
        assert await used(store) == 60

    @pytest.mark.parametrize("seed", [1, 2, 3])
    async def test_many_tasks_adding_and_taking_stay_within_both_bounds(self, store: Store, seed: int) -> None:
        await store.commit(batch("acme", Create("items", "x", item(used=20))))
        randoms = random.Random(seed)
        admitted: list[int] = []

        async def work(amounts: list[int]) -> None:
            for amount in amounts:
                try:
                    committed = await store.commit(batch("acme", Add("items", "x", "used", amount, 50, 0)))
                except BoundExceeded:
                    continue
                admitted.append(amount)
                assert 0 <= committed.values[0] <= 50

        await asyncio.gather(*(work([randoms.randint(-20, 20) for _ in range(12)]) for _ in range(12)))
        assert await used(store) == 20 + sum(admitted)
        assert len(admitted) > 30

    async def test_several_limits_in_one_batch_are_all_or_nothing(self, store: Store) -> None:
        """Like a key with limits for a minute, a day and a month: a denied request counts on none of them."""
        await store.commit(batch("acme", *(Create("items", id, item()) for id in ("minute", "day", "month"))))
        adds = (
            Add("items", "minute", "used", 1, at_most=30),
            Add("items", "day", "used", 1, at_most=20),
            Add("items", "month", "used", 1, at_most=25),
        )
        outcomes = await asyncio.gather(
            *(store.commit(batch("acme", *adds, Append(record(f"{n}")))) for n in range(50)), return_exceptions=True
        )
        admitted = [o for o in outcomes if not isinstance(o, BaseException)]
        refused_at = {o.details["operation"] for o in outcomes if isinstance(o, BoundExceeded)}
        assert (len(admitted), refused_at) == (20, {1})
        assert [d["used"] for d in await store.find("items", "acme", Query())] == [20, 20, 20]
        assert len((await store.changes(None)).records) == 20

    async def test_additions_in_one_batch_add_up(self, store: Store) -> None:
        await store.commit(batch("acme", Create("items", "x", item(used=1))))
        adds = [Add("items", "x", "used", n) for n in range(10)]
        committed = await store.commit(batch("acme", *adds))
        assert dict(committed.values) == dict(enumerate([1, 2, 4, 7, 11, 16, 22, 29, 37, 46]))
        await refused(store, BoundExceeded, *adds, Add("items", "x", "used", 1, at_most=91), at=10)
        assert await used(store) == 46

    async def test_a_counter_stays_in_int64(self, store: Store) -> None:
        await store.commit(batch("acme", Create("items", "x", item(used=INT64_MAX - 1))))
        await store.commit(batch("acme", Add("items", "x", "used", 1)))
        await refused(store, BoundExceeded, Add("items", "x", "used", 1))
        await refused(store, BoundExceeded, Add("items", "x", "used", INT64_MAX))
        assert await used(store) == INT64_MAX
        await store.commit(batch("acme", Add("items", "x", "used", -INT64_MAX), Add("items", "x", "used", INT64_MIN)))
        assert await used(store) == INT64_MIN
        committed = await store.commit(batch("acme", Add("items", "x", "used", INT64_MAX)))
        assert committed.values[0] == -1
        await store.commit(batch("acme", Add("items", "x", "used", -INT64_MAX)))
        assert await used(store) == INT64_MIN
        await refused(store, BoundExceeded, Add("items", "x", "used", -1))
        assert await used(store) == INT64_MIN

    async def test_a_counter_past_its_bound_cannot_move_further_but_can_come_back(self, store: Store) -> None:
        """Like a limit that was lowered below its usage."""
        await store.commit(batch("acme", Create("items", "x", item(used=10))))
        await refused(store, BoundExceeded, Add("items", "x", "used", 1, at_most=5))
        await refused(store, BoundExceeded, Add("items", "x", "used", 0, at_most=5))
        committed = await store.commit(batch("acme", Add("items", "x", "used", -5, at_most=5)))
        assert committed.values[0] == 5

    async def test_counters_of_many_documents_and_tenants_do_not_mix(self, store: Store) -> None:
        places = [(tenant, id) for tenant in ("acme", "other") for id in ("x", "y")]
        await store.commit(batch(None, Create("shared", "x", shared())))
        for tenant, id in places:
            await store.commit(batch(tenant, Create("items", id, item())))
        adds = [
            store.commit(batch(tenant, Add("items", id, "used", n), Add("shared", "x", "used", 1)))
            for n in range(10)
            for tenant, id in places
        ]
        await asyncio.gather(*adds)
        assert [await used(store, id, tenant) for tenant, id in places] == [45] * 4
        document = await store.get("shared", None, "x")
        assert document is not None
        assert document["used"] == 40
