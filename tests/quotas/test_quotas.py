"""Quotas: who sees and sets them, what counts against them, and what a change keeps. On each store."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import suppress
from decimal import Decimal
from typing import Any

import pytest

from strongroom import Context, Strongroom
from strongroom.context import system_context
from strongroom.entities.query import Query
from strongroom.errors import Conflict, Denied, InvalidInput, NotFound, Unavailable
from strongroom.limits.usage_state import KeyUsage
from strongroom.limits.windows import Calendar, Limit, Refill, Rolling, Total
from strongroom.quotas.model import Quota, quota_id
from strongroom.storage.port import Batch, Delete
from tests.helpers.faulty_store import Fault, FaultyStore
from tests.helpers.stores import opened, rolling
from tests.helpers.waiting import wait_until

ADMIN = Context(None, "key:admin", {"admin": True})


def bound(tenant: str) -> Context:
    """Who belongs to a tenant, with all a management key's rights there."""
    return Context(tenant, f"key:{tenant}", {"admin": True, "tenant": tenant})


async def listed(room: Strongroom, **more: Any) -> list[str]:
    return [quota.id for quota in (await room.quotas.list(**more)).items]


async def put(room: Strongroom, kind: str, tenant: str, name: str = "", *limits: Limit, **more: Any) -> Quota:
    return await room.quotas.put(kind=kind, tenant=tenant, name=name, limits=list(limits), **more)  # type: ignore[arg-type]


async def test_a_quota_is_put_replaced_changed_and_removed(room: Strongroom) -> None:
    made = await put(room, "user", "acme", "u1", rolling("tokens", 100), description="the first")
    assert await room.quotas.get("user", "acme", "u1") == made
    assert (made.kind, made.tenant, made.name, made.description) == ("user", "acme", "u1", "the first")

    replaced = await put(room, "user", "acme", "u1", rolling("tokens", 200))
    assert (replaced.id, replaced.description, replaced.limits[0].limit) == (made.id, None, 200)
    assert replaced.created_at == made.created_at

    changed = await room.quotas.update("user", "acme", "u1", description="again")
    assert (changed.description, changed.limits) == ("again", replaced.limits)

    await room.quotas.delete("user", "acme", "u1")
    with pytest.raises(NotFound, match="no quota of the user 'u1' of the tenant 'acme'"):
        await room.quotas.get("user", "acme", "u1")
    with pytest.raises(NotFound):
        await room.quotas.delete("user", "acme", "u1")
    with pytest.raises(NotFound):
        await room.quotas.update("user", "acme", "u1", description="gone")


async def test_every_window_is_stored_and_read_back_unchanged(room: Strongroom) -> None:
    limits = [
        Limit(resource="cost", limit=Decimal("99.000000001"), window=Total(refill=Refill(amount=2, unit="month"))),
        Limit(resource="tokens", limit=5, window=Total(refill=Refill(amount=3, seconds=60)), models=("gpt-*", "o1")),
        Limit(resource="tokens", limit=5, window=Calendar(unit="day", timezone="Pacific/Chatham"), routes=("/chat",)),
        Limit(resource="requests", limit=5, window=Rolling(seconds=60)),
        Limit.model_validate({"resource": "concurrency", "limit": 3}),
    ]
    await put(room, "group", "acme", "free", *limits)
    found = (await room.quotas.get("group", "acme", "free")).limits
    assert found == limits
    assert isinstance(found[0].window, Total)
    assert found[0].window.refill is not None
    assert found[0].window.refill.units == 2 * 10**9
    assert [limit.id for limit in found] == [limit.id for limit in limits]


async def test_all_keys_of_a_subject_share_its_quota(room: Strongroom) -> None:
    await put(room, "tenant", "acme", "", rolling("requests", 5))
    await put(room, "user", "acme", "u1", rolling("requests", 3))
    first = await room.keys.create(name="first", tenant="acme", user_id="u1")
    second = await room.keys.create(name="second", tenant="acme", user_id="u1")
    other = await room.keys.create(name="other", tenant="acme", user_id="u2")
    stranger = await room.keys.create(name="stranger", tenant="globex", user_id="u1")
    answers = [await room.keys.verify(key.text) for key in (first, second, first, second)]
    assert [answer.valid for answer in answers] == [True, True, True, False]
    assert [status.subject for status in answers[3].limits if status.exceeded] == ["user:u1"]
    assert [(await room.keys.verify(other.text)).valid for _ in range(3)] == [True, True, False]
    assert all([(await room.keys.verify(stranger.text)).valid for _ in range(6)])

    user = await room.quotas.stats("user", "acme", "u1")
    assert [(s.resource, s.limit, s.used, s.recorded, s.reserved) for s in user.limits] == [("requests", 3, 3, 3, 0)]
    tenant = await room.quotas.stats("tenant", "acme")
    assert [(s.used, s.remaining) for s in tenant.limits] == [(5, 0)]


async def test_changing_the_maximum_keeps_the_usage_and_applies_at_once(room: Strongroom) -> None:
    await put(room, "tenant", "acme", "", rolling("requests", 2))
    key = await room.keys.create(name="a key", tenant="acme")
    assert [(await room.keys.verify(key.text)).valid for _ in range(3)] == [True, True, False]
    await room.quotas.update("tenant", "acme", limits=[rolling("requests", 3)])
    assert [(await room.keys.verify(key.text)).valid for _ in range(2)] == [True, False]
    await room.quotas.delete("tenant", "acme")
    assert (await room.keys.verify(key.text)).valid
    await put(room, "tenant", "acme", "", rolling("requests", 1))
    assert [(await room.keys.verify(key.text)).valid for _ in range(2)] == [True, False]


async def test_removing_a_quota_removes_its_usage(room: Strongroom) -> None:
    await put(room, "tenant", "acme", "", rolling("requests", 9))
    key = await room.keys.create(name="a key", tenant="acme")
    await room.keys.verify(key.text)
    id = quota_id("tenant", "acme")
    assert await room.database.get_or_none(system_context(), KeyUsage, id) is not None
    await room.quotas.delete("tenant", "acme")
    assert await room.database.get_or_none(system_context(), KeyUsage, id) is None
    await put(room, "tenant", "acme", "", rolling("requests", 9))
    stats = await room.quotas.stats("tenant", "acme")
    assert (stats.count, stats.totals, stats.limits[0].used) == (0, {}, 0)


async def test_a_quota_and_its_usage_are_removed_in_one_commit(room: Strongroom, store: FaultyStore) -> None:
    """Whatever becomes of the process, no quota that is made again inherits what was counted against the one before."""
    await put(room, "tenant", "acme", "", rolling("requests", 9))
    key = await room.keys.create(name="a key", tenant="acme")
    await room.keys.verify(key.text)
    id, deletes = quota_id("tenant", "acme"), []

    def dies_after_the_first(number: int, batch: Batch) -> Fault | None:
        found = {one.collection for one in batch.operations if isinstance(one, Delete) and one.id == id}
        if found:
            deletes.append(found)
        return Fault("before", Unavailable("the process is gone")) if len(deletes) > 1 else None

    store.fault = dies_after_the_first
    with suppress(Unavailable):
        await room.quotas.delete("tenant", "acme")
    assert deletes == [{"quotas", "key_usage"}]
    store.fault = lambda number, batch: None
    await put(room, "tenant", "acme", "", rolling("requests", 9))
    assert (await room.quotas.stats("tenant", "acme")).limits[0].used == 0


async def test_a_quota_can_be_removed_while_its_keys_are_used(room: Strongroom) -> None:
    await put(room, "tenant", "acme", "", rolling("requests", 1_000_000))
    keys = [await room.keys.create(name=f"key {number}", tenant="acme") for number in range(4)]
    stop = False
    codes: Counter[str] = Counter()

    async def use(text: str) -> None:
        while not stop:
            codes[(await room.keys.verify(text)).code] += 1
            await asyncio.sleep(0)

    users = [asyncio.create_task(use(key.text)) for key in keys]
    await wait_until(lambda: codes["VALID"] > 20)
    await room.quotas.delete("tenant", "acme")
    stop = True
    await asyncio.gather(*users)
    assert set(codes) == {"VALID"}
    assert await room.database.get_or_none(system_context(), KeyUsage, quota_id("tenant", "acme")) is None


@pytest.mark.parametrize("limits", ["durable", "leased"])
async def test_a_recreated_quota_starts_empty_on_every_node(limits: str) -> None:
    async with (
        opened("json://:memory:", limits=limits) as (one, store),
        opened("json://:memory:", beside=store, limits=limits) as (two, _),
    ):
        await put(one, "tenant", "acme", "", rolling("requests", 2))
        key = await one.keys.create(name="a key", tenant="acme")

        async def codes() -> list[str]:
            return [(await node.keys.verify(key.text)).code for node in (two, one)]

        while "RATE_LIMITED" not in await codes():
            pass
        assert (await two.keys.verify(key.text)).code == "RATE_LIMITED"  # by what it has in memory
        await one.quotas.delete("tenant", "acme")
        await put(one, "tenant", "acme", "", rolling("requests", 2))

        async def admitted() -> bool:
            return (await two.keys.verify(key.text)).valid

        await wait_until(admitted)
        assert (await one.quotas.stats("tenant", "acme")).limits[0].used <= 2


async def test_changing_the_refill_of_a_quota_keeps_its_usage(room: Strongroom) -> None:
    def budget(amount: int) -> Limit:
        return Limit(resource="cost", limit=10, window=Total(refill=Refill(amount=amount, unit="month")))

    await put(room, "tenant", "acme", "", budget(1))
    key = await room.keys.create(name="a key", tenant="acme")
    assert (await room.keys.verify(key.text, cost={"cost": Decimal("7.000000001")})).valid
    await room.quotas.update("tenant", "acme", limits=[budget(5)])
    denied = await room.keys.verify(key.text, cost={"cost": Decimal("9")})
    assert denied.code == "USAGE_EXCEEDED"
    assert denied.limits[0].used == Decimal("7.000000001")
    assert denied.retry_after_s is not None
    assert denied.retry_after_s < 63 * 86_400  # two refills of five, not seven of one
    assert (await room.keys.verify(key.text, cost={"cost": Decimal("2.999999999")})).valid


async def test_quotas_are_listed_by_tenant_kind_and_name_in_pages(room: Strongroom) -> None:
    for kind, tenant, name in [
        ("user", "b", "u2"), ("group", "b", "g1"), ("tenant", "b", ""), ("user", "a", "u9"), ("user", "b", "u1"),
        ("tenant", "a", ""),
    ]:  # fmt: skip
        await put(room, kind, tenant, name)
    a, b = [quota_id("tenant", "a"), quota_id("user", "a", "u9")], [
        quota_id("group", "b", "g1"), quota_id("tenant", "b"), quota_id("user", "b", "u1"), quota_id("user", "b", "u2")
    ]  # fmt: skip
    assert await listed(room) == a + b
    assert await listed(room, tenant="b") == b
    assert await listed(room, tenant="b", kind="user") == b[2:]
    assert await listed(room, kind="user") == [a[1], *b[2:]]
    assert await listed(room, tenant="nobody") == []
    found: list[str] = []
    cursor = None
    for _ in range(3):
        page = await room.quotas.list(limit=2, cursor=cursor)
        found += [quota.id for quota in page.items]
        cursor = page.next_cursor
    assert found == a + b
    assert cursor is None


async def test_a_caller_bound_to_a_tenant_sees_and_sets_only_its_quotas(room: Strongroom) -> None:
    await put(room, "user", "acme", "u1", rolling("tokens", 1))
    await put(room, "user", "globex", "u1", rolling("tokens", 1))
    acme = bound("acme")
    assert await listed(room, context=acme) == [quota_id("user", "acme", "u1")]
    assert await listed(room, tenant="globex", context=acme) == []
    for call in (room.quotas.get, room.quotas.stats, room.quotas.delete, room.quotas.update):
        with pytest.raises(NotFound):
            await call("user", "globex", "u1", context=acme)
    for caller in (acme, Context("acme", "key:acme", {"admin": True})):  # who belongs to it, and who acts for it
        with pytest.raises(Denied):
            await put(room, "user", "globex", "u2", context=caller)
    assert (await put(room, "user", "acme", "u2", rolling("tokens", 1), context=acme)).name == "u2"
    await room.quotas.delete("user", "acme", "u2", context=acme)


async def test_a_tenant_cannot_raise_the_quota_that_binds_it(room: Strongroom) -> None:
    await put(room, "tenant", "acme", "", rolling("tokens", 1), context=ADMIN)
    acme = bound("acme")
    assert (await room.quotas.get("tenant", "acme", context=acme)).limits[0].limit == 1
    with pytest.raises(Denied):
        await put(room, "tenant", "acme", "", rolling("tokens", 100), context=acme)
    with pytest.raises(Denied):
        await room.quotas.update("tenant", "acme", limits=[], context=acme)
    with pytest.raises(Denied):
        await room.quotas.delete("tenant", "acme", context=acme)
    assert (await room.quotas.get("tenant", "acme")).limits[0].limit == 1


async def test_a_caller_without_an_administrators_claim_sets_nothing(room: Strongroom) -> None:
    with pytest.raises(Denied):
        await put(room, "user", "acme", "u1", context=Context("acme", "user:u1"))
    assert await listed(room) == []


async def test_similar_names_are_different_quotas(room: Strongroom) -> None:
    await put(room, "user", "a/b", "c", description="one")
    await put(room, "user", "a", "b/c", description="another")
    await put(room, "group", "a", "b/c", description="a third")
    assert (await room.quotas.get("user", "a/b", "c")).description == "one"
    assert (await room.quotas.get("user", "a", "b/c")).description == "another"
    assert (await room.quotas.get("group", "a", "b/c")).description == "a third"


async def test_an_outdated_expected_version_is_refused(room: Strongroom) -> None:
    made = await put(room, "user", "acme", "u1", expected=0)
    with pytest.raises(Conflict):
        await put(room, "user", "acme", "u1", expected=0)
    changed = await room.quotas.update("user", "acme", "u1", description="x", expected=made.version)
    for stale in (
        put(room, "user", "acme", "u1", expected=made.version),
        room.quotas.update("user", "acme", "u1", description="y", expected=made.version),
        room.quotas.delete("user", "acme", "u1", expected=made.version),
    ):
        with pytest.raises(Conflict):
            await stale
    await room.quotas.delete("user", "acme", "u1", expected=changed.version)


async def test_an_idempotent_retry_changes_nothing(room: Strongroom) -> None:
    made = await put(room, "user", "acme", "u1", rolling("tokens", 1), idempotency_key="k1")
    again = await put(room, "user", "acme", "u1", rolling("tokens", 1), idempotency_key="k1")
    assert again.version == made.version
    with pytest.raises(Conflict):
        await put(room, "user", "acme", "u1", rolling("tokens", 2), idempotency_key="k1")
    await room.quotas.delete("user", "acme", "u1", idempotency_key="k2")
    await room.quotas.delete("user", "acme", "u1", idempotency_key="k2")
    with pytest.raises(NotFound):
        await room.quotas.delete("user", "acme", "u1", idempotency_key="k3")


async def test_changes_are_journalled_in_the_tenant_with_their_actor(room: Strongroom) -> None:
    await put(room, "user", "acme", "u1", context=bound("acme"))
    await room.quotas.update("user", "acme", "u1", description="x", context=bound("acme"))
    await room.quotas.delete("user", "acme", "u1", context=bound("acme"))
    page = await room.store.changes(None, tenant="acme")
    records = [record for record in page.records if record.collection == "quotas"]
    assert [(record.action, record.actor) for record in records] == [
        ("create", "key:acme"), ("update", "key:acme"), ("delete", "key:acme")
    ]  # fmt: skip


async def test_concurrent_puts_of_one_quota_leave_one(room: Strongroom) -> None:
    results = await asyncio.gather(
        *(put(room, "user", "acme", "u1", rolling("tokens", n), expected=0) for n in range(1, 9)),
        return_exceptions=True,
    )
    made = [result for result in results if isinstance(result, Quota)]
    assert len(made) == 1
    assert all(isinstance(result, Quota | Conflict) for result in results)
    assert (await room.quotas.get("user", "acme", "u1")).limits == made[0].limits
    assert len((await room.database.find(system_context(), Quota, Query())).items) == 1


@pytest.mark.parametrize(
    ("wrong", "path", "message"),
    [
        ({"kind": "team"}, "kind", "found 'team', expected tenant, user or group"),
        ({"kind": None}, "kind", "found null, expected tenant, user or group"),
        ({"name": ""}, "name", "found an empty text"),
        ({"kind": "tenant"}, "name", "a quota of kind tenant has no name"),
        ({"tenant": ""}, "tenant", "found an empty text"),
        ({"tenant": "x" * 129}, "tenant", "found 129 bytes, expected at most 128"),
        ({"name": "x" * 512}, "name", "found 512 bytes, expected at most 492"),
        ({"name": "a\x00b"}, "name", "found U+0000"),
        ({"limits": None}, "limits", "found null, expected a list"),
        ({"limits": [{"resource": "tokens", "limit": 5}]}, "limits.0.window", "is required, with a kind: rolling, "),
        ({"limits": [rolling("tokens", 1), rolling("tokens", 2)]}, "limits", "found two limits on tokens with "),
        ({"limits": [rolling("tokens", 1, n) for n in range(1, 34)]}, "limits", "found 33 entries, expected"),
        ({"description": "x" * 1001}, "description", "found 1001 characters, expected at most 1000"),
        ({"more": 1}, "more", "is not a known field"),
    ],
)  # fmt: skip
async def test_an_invalid_quota_names_the_field_and_the_expectation(
    wrong: dict[str, Any], path: str, message: str
) -> None:
    async with Strongroom.open("json://:memory:") as room:
        with pytest.raises(InvalidInput) as caught:
            await room.quotas.put(**{"kind": "user", "tenant": "acme", "name": "u1", "limits": [], **wrong})
    (problem,) = caught.value.problems
    assert problem.path == path
    assert problem.message.startswith(message)


async def test_every_problem_of_a_quota_is_reported_at_once() -> None:
    window = {"kind": "rolling", "seconds": 0, "refill": {"amount": 1}}
    async with Strongroom.open("json://:memory:") as room:
        with pytest.raises(InvalidInput) as caught:
            await room.quotas.put(  # type: ignore[call-arg]
                kind="team",  # type: ignore[arg-type]
                tenant="",
                limits=[{"resource": "T", "limit": -1, "window": window}],
                more=1,
            )
        assert {problem.path for problem in caught.value.problems} == {
            "kind", "tenant", "limits.0.resource", "limits.0.limit", "limits.0.window.seconds",
            "limits.0.window.refill", "more",
        }  # fmt: skip
        with pytest.raises(InvalidInput):
            await room.quotas.get("team", "acme")
        with pytest.raises(InvalidInput):
            await room.quotas.update("user", "acme", "u1", kind="group")  # type: ignore[call-arg]
