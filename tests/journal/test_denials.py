"""Denials in the journal: each kind, bounded, counted, and never creating a tenant."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Annotated, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strongroom import Context, Counter, Entity, Secret, Strongroom
from strongroom.context import system_context
from strongroom.errors import Denied, Unavailable
from strongroom.journal import denials
from strongroom.journal.denials import MAX_KINDS_OF_ACTOR, just_before
from strongroom.journal.records import MAX_ATTEMPTED_BYTES
from strongroom.storage.port import Record
from strongroom.storage.tagged_json import quick_dumps
from tests.helpers.faulty_store import Fault, FaultyStore
from tests.helpers.server_app import serving
from tests.helpers.waiting import wait_until

PATH = "/v1/tenants/{}/policies"


class Note(Entity, collection="notes"):
    text: str = ""
    more: str = ""
    token: Annotated[str | None, Secret()] = None
    used: Annotated[int, Counter()] = 0


@pytest.fixture
def entities() -> list[type[Entity]]:
    return [Note]


def stranger(tenant: str, actor: str = "key:k") -> Context:
    return Context(tenant, actor, {"tenant": "acme"}, "request-1")


async def refused(room: Strongroom, context: Context) -> None:
    with pytest.raises(Denied):
        await room.database.find(context, Note)


async def denied(store: FaultyStore) -> list[Record]:
    return [record for record in (await store.changes(None)).records if record.action == "deny"]


def after(record: Record) -> dict[str, Any]:
    return dict(record.after or {})


async def test_equal_denials_give_one_record_at_once_and_one_with_their_count_a_minute_later(
    room: Strongroom, store: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert denials.PERIOD_S == 60
    await room.tenant("beta").create(Note())
    monkeypatch.setattr(denials, "PERIOD_S", 1.0)
    for _ in range(30):
        await refused(room, stranger("beta"))
    (first,) = await denied(store)
    assert (first.tenant, first.actor, first.request_id) == ("beta", "key:k", "request-1")
    assert "count" not in after(first)

    async def counted() -> bool:
        return len(await denied(store)) == 2

    await wait_until(counted)
    assert after((await denied(store))[1]) == {**after(first), "count": 29}
    await refused(room, stranger("beta"))
    assert len(await denied(store)) == 3, "a new minute begins with a record of its own"


async def test_counted_denials_are_written_before_the_store_closes(url_of_any: str) -> None:
    async with Strongroom.open(url_of_any, entities=[Note]) as room:
        for _ in range(3):
            await refused(room, stranger("beta"))
        await room.database.denials.close()
        records = (await room.store.changes(None)).records
    assert [after(record).get("count", 1) for record in records if record.action == "deny"] == [1, 2]


async def test_a_denial_in_an_unknown_tenant_creates_none_and_is_the_platforms(url: str) -> None:
    async with Strongroom.open(url, entities=[Note]) as room:
        await room.tenant("beta").create(Note())
        for tenant in ("beta", "ghost"):
            await refused(room, stranger(tenant))
        assert await room.store.tenants() == ["beta"]
        records = [record for record in (await room.store.changes(None)).records if record.action == "deny"]
        assert [(record.tenant, after(record).get("tenant")) for record in records] == [("beta", None), (None, "ghost")]
        assert not (await room.store.changes(None, tenant="ghost")).records


async def test_one_actor_cannot_fill_the_journal_with_varied_denials(room: Strongroom, store: FaultyStore) -> None:
    for number in range(5 * MAX_KINDS_OF_ACTOR):
        await refused(room, stranger(f"t{number}"))
    await room.database.denials.close()
    records = await denied(store)
    assert len(records) <= MAX_KINDS_OF_ACTOR + 2
    assert sum(after(record).get("count", 1) for record in records) == 5 * MAX_KINDS_OF_ACTOR


async def test_denials_of_many_actors_are_bounded(
    room: Strongroom, store: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(denials, "MAX_KINDS", 10)
    for number in range(40):
        await refused(room, stranger("beta", f"key:{number}"))
    await room.database.denials.close()
    records = await denied(store)
    assert len(records) <= 12
    assert sum(after(record).get("count", 1) for record in records) == 40


async def test_a_denied_read_of_many_tenants_creates_none() -> None:
    async with serving() as served:
        key = await served.manager("read", "acme")
        for number in range(40):
            answer = await served.get(PATH.format(f"ghost-{number}"), key=key)
            assert answer.status == 403
        assert await served.room.store.tenants() == []
        records = (await served.room.store.changes(None)).records
        assert {record.tenant for record in records if record.action == "deny"} == {None}
        assert sum(record.action == "deny" for record in records) <= MAX_KINDS_OF_ACTOR + 1


async def test_the_record_of_a_denied_write_has_what_it_would_have_written(
    room: Strongroom, store: FaultyStore
) -> None:
    made = await room.tenant("beta").create(Note(text="their text", token="their token"))
    by = stranger("beta")

    async def attempted(count: int, writing: Awaitable[Any]) -> Any:
        with pytest.raises(Denied):
            await writing
        records = await denied(store)
        assert len(records) == count
        assert "token" not in repr(after(records[-1])).replace("'token'", "")
        return after(records[-1]).get("attempted")

    created = await attempted(1, room.database.create(by, Note(text="x", token="a token")))
    assert created == {"text": "x", "more": "", "token": "***", "used": 0}
    changes = {"more": "y", "token": "my token"}
    assert await attempted(2, room.database.update(by, Note, made.id, changes)) == {"more": "y", "token": "***"}
    assert await attempted(3, room.database.delete(by, Note, made.id)) is None
    await refused(room, by)
    assert "attempted" not in after((await denied(store))[-1])


async def test_the_record_of_a_denied_write_is_bounded(room: Strongroom, store: FaultyStore) -> None:
    await room.tenant("beta").create(Note())
    with pytest.raises(Denied):
        await room.database.create(stranger("beta"), Note(text="x" * 100_000, more="é" * 3_000))
    (record,) = await denied(store)
    attempted = after(record)["attempted"]
    assert attempted["text"] == "(100002 bytes were left out)"
    assert attempted["more"] == "é" * 3_000
    assert len(quick_dumps(attempted).encode()) < MAX_ATTEMPTED_BYTES


async def test_a_denial_that_cannot_be_journalled_is_not_counted_as_written(
    room: Strongroom, store: FaultyStore
) -> None:
    commit = store.store.commit

    def fail(batch: Any) -> Any:
        raise OSError("gone")

    store.store.commit = fail  # type: ignore[method-assign]
    with pytest.raises(OSError, match="gone"):
        await room.database.find(stranger("beta"), Note)
    store.store.commit = commit  # type: ignore[method-assign]
    await refused(room, stranger("beta"))
    assert len(await denied(store)) == 1


@given(st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), min_size=1, max_size=30))
def test_the_lookup_of_a_tenant_startsjust_before_its_name(name: str) -> None:
    before = just_before(name)
    assert before.encode() < name.encode()


async def test_existing_tenants_are_distinguished_from_others(room: Strongroom) -> None:
    for tenant in ("a", "ab", "b", "\ue000", "é"):
        await room.database.create(system_context(tenant), Note())
    found = [tenant for tenant in ("a", "ab", "b", "\ue000", "é", "aa", "c", "\x01", "\ud7ff")
             if await room.database.denials._is_tenant(tenant)]  # fmt: skip
    assert found == ["a", "ab", "b", "\ue000", "é"]


async def test_each_denial_is_counted_and_one_of_another_tenants_caller_as_a_cross_tenant_attempt(
    room: Strongroom, store: FaultyStore
) -> None:
    await room.tenant("beta").create(Note())
    for _ in range(5):
        await refused(room, stranger("beta"))
    with pytest.raises(Denied):
        await room.database.find(Context(None, "key:k", {}), Note)
    assert room.database.denials.counts == {("list", "notes"): 6}
    assert room.database.denials.cross_tenant == {"notes": 5}
    assert room.database.denials.failures == 0
    assert len(await denied(store)) == 2


async def test_a_denial_that_cannot_be_recorded_is_counted_and_raised(room: Strongroom, store: FaultyStore) -> None:
    await room.tenant("beta").create(Note())
    store.fault = lambda number, batch: Fault("before", Unavailable("the disk is full"))
    with pytest.raises(Unavailable):
        await room.database.find(stranger("beta"), Note)
    assert room.database.denials.failures == 1
