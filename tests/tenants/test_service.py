"""Creating, listing, changing, suspending and resuming tenants."""

from __future__ import annotations

from typing import Any

import pytest

from strongroom import Strongroom
from strongroom.context import MAX_TENANT_BYTES, Context, name_problem, system_context
from strongroom.errors import AlreadyExists, Conflict, Denied, InvalidInput, NotFound
from strongroom.storage.port import Batch, Create
from strongroom.tenants import Tenant, User
from strongroom.testing.storage.samples import HOSTILE_NAMES
from tests.helpers.stores import rolling


async def names(room: Strongroom, **wanted: Any) -> list[str]:
    """The tenants of a list, over all pages."""
    found, cursor = [], None
    while True:
        page = await room.tenants.list(cursor=cursor, **wanted)
        found += [tenant.id for tenant in page.items]
        cursor = page.next_cursor
        if cursor is None:
            return found


async def test_a_tenant_is_created_changed_and_listed(url: str) -> None:
    async with Strongroom.open(url) as room:
        made = await room.tenants.create("acme", name="Acme Inc.", plan="gold", metadata={"crm": 17})
        assert (made.status, made.plan, made.version > 0) == ("active", "gold", True)
        assert await room.tenants.get("acme") == made
        with pytest.raises(AlreadyExists):
            await room.tenants.create("acme")
        changed = await room.tenants.update("acme", expected=made.version, plan="silver", region="eu-central-1")
        assert (changed.plan, changed.name) == ("silver", "Acme Inc.")
        with pytest.raises(Conflict):
            await room.tenants.update("acme", expected=made.version, plan="gold")
        with pytest.raises(NotFound):
            await room.tenants.get("other")
        with pytest.raises(NotFound):
            await room.tenants.update("other", plan="gold")
        assert await names(room, plan="silver") == ["acme"]
        assert await names(room, plan="gold") == []
        record = (await room.audit.list(tenant="acme", collection="tenants", action="update")).items[-1]
        assert (record.before, record.after) == (
            {"plan": "gold", "region": None},
            {"plan": "silver", "region": "eu-central-1"},
        )


async def test_names_that_were_used_freely_appear_as_tenants(url: str) -> None:
    async with Strongroom.open(url) as room:
        await room.tenant("with documents").create(User(email="ann@example.com"))
        await room.keys.create(name="k", tenant="with keys")
        await room.quotas.put(kind="tenant", tenant="with a quota", limits=[rolling("tokens", 5)])
        await room.keys.create(name="platform", tenant="*", permissions=["strongroom:read"])
        await room.tenants.create("created", plan="gold")
        expected = ["created", "with a quota", "with documents", "with keys"]
        assert await names(room) == expected
        assert await names(room, limit=1) == expected
        assert await names(room, status="active", limit=3) == expected
        for name in expected[1:]:
            found = await room.tenants.get(name)
            assert (found.status, found.version, found.created_at) == ("active", 0, None)
        suspended = await room.tenants.suspend("with keys", "unpaid")
        assert (suspended.status, suspended.version > 0) == ("suspended", True)
        assert (await room.tenants.update("with documents", plan="gold")).plan == "gold"
        assert await names(room) == expected
        assert await names(room, status="active") == [name for name in expected if name != "with keys"]
        assert await names(room, status="suspended") == ["with keys"]
        assert await names(room, plan="gold") == ["created", "with documents"]


async def test_a_long_list_has_every_tenant_once_whatever_made_it_one(room: Strongroom) -> None:
    expected = set()
    for number in range(60):
        name = f"t{number:03d}"
        expected.add(name)
        if number % 4 == 0:
            await room.tenants.create(name)
        if number % 4 in (0, 1):
            await room.keys.create(name="k", tenant=name)
        if number % 4 in (1, 2):
            await room.tenant(name).create(User(email="ann@example.com"))
        if number % 4 == 3:
            await room.quotas.put(kind="user", tenant=name, name="u", limits=[rolling("tokens", 5)])
    for limit in (1, 7, 59, 60, 1000):
        assert await names(room, limit=limit) == sorted(expected)


async def test_many_keys_of_one_tenant_do_not_hide_the_next_one(room: Strongroom) -> None:
    for number in range(130):
        await room.keys.create(name=f"k{number}", tenant="a")
    await room.keys.create(name="k", tenant="b")
    assert await names(room, limit=1) == ["a", "b"]


async def test_a_tenant_is_suspended_and_resumed_and_the_journal_says_why(url: str) -> None:
    async with Strongroom.open(url) as room:
        await room.tenants.create("acme")
        first = await room.tenants.suspend("acme", "unpaid invoice 17")
        assert (first.status, first.reason) == ("suspended", "unpaid invoice 17")
        assert first.suspended_at is not None
        again = await room.tenants.suspend("acme", "unpaid invoices 17 and 18")
        assert (again.reason, again.suspended_at) == ("unpaid invoices 17 and 18", first.suspended_at)
        assert (await room.tenants.suspend("acme")).reason == "unpaid invoices 17 and 18"
        resumed = await room.tenants.resume("acme")
        assert (resumed.status, resumed.reason, resumed.suspended_at) == ("active", None, None)
        assert await room.tenants.resume("acme") == resumed, "the second one changes nothing"
        records = (await room.audit.list(tenant="acme", collection="tenants", action="update")).items
        assert [record.after and record.after.get("reason") for record in records] == [
            "unpaid invoice 17",
            "unpaid invoices 17 and 18",
            None,
        ]


async def test_a_hostile_name_is_a_tenant_like_any_other(url: str) -> None:
    async with Strongroom.open(url) as room:
        taken = [name for name in HOSTILE_NAMES if name != "*" and name_problem(name, MAX_TENANT_BYTES) is None]
        for number, name in enumerate(taken):
            if number % 2:
                await room.tenants.create(name)
            await room.tenant(name).create(User(email="ann@example.com"))
        assert await names(room, limit=7) == sorted(taken)
        for name in taken[::9]:
            assert (await room.tenants.suspend(name, "x")).status == "suspended"
        assert await names(room, status="suspended") == sorted(taken[::9])
        for name in taken[::9]:
            assert (await room.tenants.resume(name)).id == name


@pytest.mark.parametrize("name", ["", "*", " a", "a\x00b", "x" * 129, "\ud800"])
async def test_a_name_that_no_tenant_can_have_is_refused(room: Strongroom, name: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        await room.tenants.create(name, contact_email="no")
    assert "id" in {problem.path for problem in refused.value.problems}
    with pytest.raises((InvalidInput, NotFound)):
        await room.tenants.suspend(name, "x")


async def test_an_ambiguous_name_of_an_earlier_version_can_be_suspended(room: Strongroom) -> None:
    if room.store.capabilities.name != "json":
        return
    batch = Batch(" acme", (Create("users", "u", User.__codec__.encode(User(email="a@example.com"))),), 1)
    await room.store.commit(batch)
    assert (await room.tenants.suspend(" acme", "x")).id == " acme"
    assert await names(room) == [" acme"]


async def test_wrong_fields_are_all_named(room: Strongroom) -> None:
    with pytest.raises(InvalidInput) as refused:
        await room.tenants.create("acme", contact_email="no", region="?", plan="", status="active", age=3)  # type: ignore[call-arg]
    found = {problem.path: problem.message for problem in refused.value.problems}
    assert set(found) == {"contact_email", "region", "plan", "status", "age"}
    assert found["status"] == "is set by suspend and resume"
    with pytest.raises(InvalidInput) as refused:
        await room.tenants.list(status="gone", limit=0)
    assert [problem.path for problem in refused.value.problems] == ["status", "limit"]
    with pytest.raises(InvalidInput):
        await room.tenants.list(cursor="x")
    with pytest.raises(InvalidInput):
        await room.tenants.suspend("acme", "")


async def test_only_the_platforms_administrators_change_tenants_and_a_tenant_sees_itself(room: Strongroom) -> None:
    await room.tenants.create("acme")
    await room.tenants.create("other")
    own = Context("acme", "key:1", {"tenant": "acme", "admin": True, "scope": "admin"})
    reading = Context(None, "key:2", {"admin": True, "scope": "read"})
    nobody = Context(None, "user:1", {})
    assert (await room.tenants.get("acme", context=own)).id == "acme"
    assert [tenant.id for tenant in (await room.tenants.list(context=own)).items] == ["acme"]
    with pytest.raises(Denied):
        await room.tenants.get("other", context=own)
    denials = (await room.audit.list(action="deny", collection="tenants")).items
    assert [(record.actor, record.entity_id) for record in denials] == [("key:1", "other")]
    assert [tenant.id for tenant in (await room.tenants.list(context=reading)).items] == ["acme", "other"]
    with pytest.raises(Denied):
        await room.tenants.list(context=nobody)
    for context in (own, reading, nobody):
        for call in (
            room.tenants.create("third", context=context),
            room.tenants.update("acme", context=context, plan="x"),
            room.tenants.suspend("acme", "x", context=context),
            room.tenants.resume("acme", context=context),
            room.tenants.delete("acme", "x", context=context),
        ):
            with pytest.raises(Denied):
                await call


async def test_a_repeated_call_is_answered_as_the_first_one(room: Strongroom) -> None:
    first = await room.tenants.create("acme", plan="gold", idempotency_key="k1")
    await room.tenants.update("acme", plan="silver")
    again = await room.tenants.create("acme", plan="gold", idempotency_key="k1")
    assert (again.plan, again.created_at) == ("gold", first.created_at)
    suspended = await room.tenants.suspend("acme", "x", idempotency_key="k2")
    await room.tenants.resume("acme")
    again = await room.tenants.suspend("acme", "x", idempotency_key="k2")
    assert (again.status, again.suspended_at) == ("suspended", suspended.suspended_at)
    assert (await room.tenants.get("acme")).status == "active"
    assert (await room.database.get(system_context(), Tenant, "acme")).status == "active"
