"""The client of the HTTP API, asynchronous and synchronous: each test runs on both, against a real server."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import msgspec
import pydantic
import pytest

from strongroom.client import (
    AlreadyExists,
    Ask,
    Conflict,
    Denied,
    InvalidInput,
    Limit,
    NoAnswer,
    NotFound,
    PreconditionFailed,
    Problem,
    Refill,
    Sighting,
    TenantSuspended,
    Unauthenticated,
    Used,
    Window,
    WritesOff,
)
from tests.helpers.clients import Connector, Told, scripted, shop
from tests.helpers.server_app import ADMIN
from tests.helpers.server_process import Running
from tests.helpers.servers.proxy import Proxy
from tests.helpers.waiting import PATIENCE_S, wait_until

pytestmark = [pytest.mark.server, pytest.mark.xdist_group("client")]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server process with a collection that has every kind of field."""
    with shop(tmp_path_factory.mktemp("client")) as process:
        yield process


@pytest.fixture(params=["async", "sync"])
async def connect(request: pytest.FixtureRequest) -> AsyncIterator[Connector]:
    connector = Connector(request.param)
    yield connector
    await connector.close()


@pytest.fixture
def url(server: Running) -> str:
    return f"http://127.0.0.1:{server.port}"


@pytest.fixture
def client(connect: Connector, url: str) -> Any:
    return connect(url, ADMIN)


@pytest.fixture
def tenant(request: pytest.FixtureRequest) -> str:
    """A tenant that no other test uses."""
    return str(request.node.name)


@pytest.fixture
async def proxy(server: Running) -> AsyncIterator[Proxy]:
    async with Proxy(server.port) as proxy:
        yield proxy


async def all_of(items: Any) -> list[Any]:
    return [item async for item in items]


# --- Keys -------------------------------------------------------------------------------------------------------


async def test_a_key_is_created_changed_and_deleted(client: Any, tenant: str) -> None:
    expires = datetime(2040, 1, 1, tzinfo=UTC)
    limits = [Limit("tokens", 1_000, Window.rolling(3_600)), Limit("cost", Decimal("0.25"), Window.calendar("day"))]
    issued = await client.keys.create(
        "worker", tenant=tenant, user_id="u1", permissions=["chat:write"], metadata={"a": [1, None]},
        allowed_ips=["10.0.0.0/8"], limits=limits, expires_at=expires,
    )  # fmt: skip
    key = issued.key
    assert issued.text.startswith("sr_")
    assert (key.name, key.tenant, key.user_id, key.permissions) == ("worker", tenant, "u1", ["chat:write"])
    assert key.limits == limits
    assert key.expires_at == expires
    assert key.created_at.utcoffset() == timedelta(0)
    assert await client.keys.get(key.id) == key
    assert [one.id for one in await all_of(client.keys.list(tenant=tenant, user_id="u1"))] == [key.id]

    changed = await client.keys.update(key.id, name="renamed", user_id=None, limits=key.limits[:1])
    assert (changed.name, changed.user_id, changed.limits) == ("renamed", None, limits[:1])
    assert changed.permissions == ["chat:write"]
    with pytest.raises(PreconditionFailed):
        await client.keys.update(key.id, name="late", expected=key.version)
    assert not (await client.keys.disable(key.id)).enabled
    assert (await client.keys.verify(issued.text)).code == "DISABLED"
    assert (await client.keys.enable(key.id)).enabled

    rotated = await client.keys.rotate(key.id, overlap_s=60)
    assert rotated.key.id == key.id
    for text in (issued.text, rotated.text):
        answer = await client.keys.verify(text, cost={"tokens": 10}, permission="chat:write", ip="10.1.2.3")
        assert answer.valid
        assert (await client.keys.verify(text, cost={"tokens": 10}, ip="10.1.2.3", peek=True)).valid  # counts nothing
    stats = await client.keys.stats(key.id)
    assert (stats.totals, stats.limits[0].used, stats.count) == ({"tokens": 20}, 20, 2)
    assert await client.keys.delete(key.id) is None
    assert (await client.keys.verify(rotated.text)).code == "NOT_FOUND"
    with pytest.raises(NotFound):
        await client.keys.get(key.id)
    assert (await client.keys.get(key.id, deleted=True)).deleted_at is not None
    assert [one.id for one in await all_of(client.keys.list(tenant=tenant, deleted=True))] == [key.id]
    assert (await client.keys.restore(key.id)).deleted_at is None
    assert (await client.keys.verify(rotated.text, ip="10.1.2.3")).valid
    await client.keys.delete(key.id, purge=True)
    with pytest.raises(NotFound):
        await client.keys.restore(key.id)


async def test_a_held_rotation_is_claimed_once(client: Any) -> None:
    issued = await client.keys.create("held")
    held = await client.keys.rotate(issued.key.id, overlap_s=60, hold=True)
    assert (held.text, held.key.unclaimed) == ("", True)
    claimed = await client.keys.claim(issued.key.id, idempotency_key=f"claim {issued.key.id}")
    again = await client.keys.claim(issued.key.id, idempotency_key=f"claim {issued.key.id}")
    assert again.text == claimed.text
    assert (await client.keys.verify(claimed.text)).valid
    assert not claimed.key.unclaimed
    with pytest.raises(Conflict):
        await client.keys.claim(issued.key.id)


async def test_lists_continue_from_page_to_page(client: Any, tenant: str) -> None:
    made = [(await client.keys.create(f"k{n}", tenant=tenant)).key.id for n in range(7)]
    listed = [key.id async for key in client.keys.list(tenant=tenant, page_size=3)]
    assert listed == made[::-1]
    first = await client.keys.page(tenant=tenant, limit=5)
    rest = await client.keys.page(tenant=tenant, limit=5, cursor=first.next_cursor)
    assert [key.id for key in first.items + rest.items] == listed
    assert rest.next_cursor is None


async def test_money_is_exact(client: Any) -> None:
    limit = Limit("cost", Decimal("0.3"), Window.total())
    text = (await client.keys.create("spender", limits=[limit])).text
    await client.keys.verify(text, cost={"cost": Decimal("0.1")})
    answer = await client.keys.verify(text, cost={"cost": 0.2})
    assert (answer.valid, answer.limits[0].used, answer.limits[0].remaining) == (True, Decimal("0.3"), 0)
    assert not (await client.keys.verify(text, cost={"cost": Decimal("0.000000001")})).valid
    usage = await client.usage.record(key=text, cost={"cost": Decimal("999999.123456789")})
    assert usage.limits[0].used == Decimal("999999.423456789")


async def test_a_denial_names_its_limit_and_when_to_retry(client: Any) -> None:
    text = (await client.keys.create("limited", limits=[Limit("requests", 1, Window.rolling(60))])).text
    assert (await client.keys.verify(text)).valid
    denied = await client.keys.verify(text)
    assert (denied.valid, denied.code, denied.limits[0].exceeded) == (False, "RATE_LIMITED", True)
    assert 0 < denied.retry_after_s <= 61
    assert denied.limits[0].window == Window.rolling(60)
    assert denied.limits[0].resets_at > datetime.now(UTC)


async def test_a_batch_is_answered_in_order(client: Any) -> None:
    text = (await client.keys.create("batch", limits=[Limit("tokens", 10, Window.total())])).text
    asks = [Ask(key=text, cost={"tokens": 6}), {"key": text, "cost": {"tokens": 11}}, Ask(key="unknown")]
    answers = await client.keys.verify_batch(asks)
    assert [answer.code for answer in answers] == ["VALID", "USAGE_EXCEEDED", "NOT_FOUND"]


async def test_usage_is_recorded_past_a_limit_and_once_for_one_idempotency_key(client: Any) -> None:
    issued = await client.keys.create("used", limits=[Limit("tokens", 10, Window.total())])
    for _ in range(2):
        recorded = await client.usage.record(
            key_id=issued.key.id, cost={"tokens": 25}, idempotency_key=f"op {issued.key.id}"
        )
        assert (recorded.key_id, recorded.limits[0].used) == (issued.key.id, 25)
    with pytest.raises(Conflict):
        await client.usage.record(key_id=issued.key.id, cost={"tokens": 26}, idempotency_key=f"op {issued.key.id}")


async def test_a_batch_of_usage_is_recorded_whole_or_not_at_all(client: Any) -> None:
    ids = [(await client.keys.create(f"k{n}", limits=[Limit("tokens", 10, Window.total())])).key.id for n in range(2)]
    items = [Used(key_id=ids[n % 2], cost={"tokens": n}) for n in range(10)]
    for _ in range(2):
        batch = await client.usage.record_many(items, idempotency_key=f"batch {ids[0]}")
    assert batch.recorded == 10
    assert [(one.key_id, one.limits[0].used) for one in batch.keys] == [(ids[0], 20), (ids[1], 25)]
    with pytest.raises(InvalidInput) as caught:
        await client.usage.record_many(
            [{"key_id": ids[0], "cost": {"tokens": 1}}, {"key_id": "key_x", "cost": {"t": -1}}]
        )
    assert {problem.path.split(".")[1] for problem in caught.value.problems} == {"1"}
    assert (await client.keys.stats(ids[0])).limits[0].used == 20


async def test_a_key_reads_its_own_statistics(client: Any, connect: Connector, url: str) -> None:
    issued = await client.keys.create("own", limits=[Limit("tokens", 100, Window.rolling(18_000))])
    await client.keys.verify(issued.text, cost={"tokens": 7})
    for stats in (await client.stats(issued.text), await connect(url, issued.text).stats()):
        assert (stats.key, stats.total_lifetime_tokens, stats.token_limit_per_5h) == (issued.key.display, 7, 100)
        assert stats.current_usage.remaining_tokens == 93


async def test_health_and_openapi_are_readable(client: Any, connect: Connector, url: str) -> None:
    assert await connect(url).alive()
    ready = await client.ready()
    assert (ready.ready, ready.status, ready.dependencies["store"].status) == (True, "ready", "ok")
    assert "strongroom_" in await client.metrics()
    assert "/v1/keys" in (await client.openapi())["paths"]


async def test_a_bulk_change_proceeds_in_steps(client: Any, tenant: str) -> None:
    ids = [(await client.keys.create(f"k{n}", tenant=tenant)).key.id for n in range(5)]
    dry = await all_of(client.keys.bulk("disable", where={"tenant": tenant}, dry_run=True))
    assert (sum(step.changed for step in dry), dry[0].dry_run) == (5, True)
    steps = await all_of(client.keys.bulk("disable", where={"tenant": tenant}, page_size=2))
    assert len(steps) >= 3
    assert (sum(step.looked_at for step in steps), sum(step.changed for step in steps)) == (5, 5)
    assert not any([key.enabled async for key in client.keys.list(tenant=tenant)])
    limits = [Limit("cost", Decimal("0.5"), Window.total())]
    (step,) = await all_of(client.keys.bulk("update", ids=[*ids[:1], "key_x"], changes={"limits": limits}))
    assert (step.changed, [one.id for one in step.failed]) == (1, ["key_x"])
    assert (await client.keys.get(ids[0])).limits == limits


async def test_a_quota_is_shared(client: Any, tenant: str) -> None:
    limits = [Limit("tokens", 100, Window.total(Refill(10, unit="day", timezone="Europe/Berlin")))]
    made = await client.quotas.put("group", tenant, "batch/a", limits=limits, expected=0)
    assert (made.kind, made.tenant, made.name, made.limits) == ("group", tenant, "batch/a", limits)
    whole = await client.quotas.put("tenant", tenant, limits=[Limit("requests", 9, Window.rolling(60))])
    assert await client.quotas.get("tenant", tenant) == whole
    texts = [(await client.keys.create(f"k{n}", tenant=tenant, groups=["batch/a"])).text for n in range(2)]
    answers = [await client.keys.verify(text, cost={"tokens": 60, "requests": 1}) for text in texts]
    assert [answer.code for answer in answers] == ["VALID", "USAGE_EXCEEDED"]
    assert [one.subject for one in answers[1].limits if one.exceeded] != ["key"]
    assert (await client.quotas.stats("group", tenant, "batch/a")).limits[0].used == 60
    assert (await client.quotas.stats("tenant", tenant)).totals["requests"] == 1
    changed = await client.quotas.update("group", tenant, "batch/a", description="shared", expected=made.version)
    assert (changed.description, changed.limits) == ("shared", limits)
    with pytest.raises(PreconditionFailed):
        await client.quotas.update("group", tenant, "batch/a", description=None, expected=made.version)
    assert [one.name async for one in client.quotas.list(tenant=tenant, page_size=1)] == ["batch/a", ""]
    await client.quotas.delete("group", tenant, "batch/a")
    with pytest.raises(NotFound):
        await client.quotas.get("group", tenant, "batch/a")


async def test_a_leaked_key_is_handled_by_its_tenants_policy(client: Any, tenant: str) -> None:
    issued = await client.keys.create("leaky", tenant=tenant)
    assert (await client.leaks.policy(tenant)).action == "notify"
    policy = await client.leaks.set_policy(tenant, "disable")
    assert (policy.tenant, policy.action) == (tenant, "disable")
    found = Sighting(token=issued.text, url="https://example.com/x", source="commit")
    labels = await client.leaks.report([found, Sighting(token="sr_unknown")])
    assert [label.label for label in labels] == ["true_positive", "false_positive"]
    assert not (await client.keys.get(issued.key.id)).enabled
    leaks = await all_of(client.leaks.list(tenant=tenant))
    assert [(leak.key_id, leak.url, leak.source) for leak in leaks] == [(issued.key.id, found.url, "commit")]
    assert issued.text not in repr(found) + repr(leaks)


async def test_the_audit_trail_shows_changes(client: Any, tenant: str) -> None:
    issued = await client.keys.create("k", tenant=tenant)
    await client.keys.disable(issued.key.id)
    records = await all_of(client.audit.list(tenant=tenant, entity_id=issued.key.id, page_size=1))
    assert [(one.tenant, one.action) for one in records] == [(tenant, "create"), (tenant, "update")]
    assert records[1].after["enabled"] is False
    since = records[1].at
    assert [one.action for one in await all_of(client.audit.list(tenant=tenant, since=since))] == ["update"]


async def test_records_are_held_redacted_and_kept(client: Any, tenant: str) -> None:
    issued = await client.keys.create("k", tenant=tenant)
    hold = await client.audit.place_legal_hold("case 7", tenant=tenant, collection="api_keys")
    document = {"collection": "api_keys", "entity_id": issued.key.id}
    with pytest.raises(Conflict, match="case 7"):
        await client.audit.redact(tenant, "asked", **document)
    assert [one.id for one in await all_of(client.audit.legal_holds(tenant=tenant, active=True))] == [hold.id]
    lifted = await client.audit.lift_legal_hold(hold.id, "closed")
    assert (lifted.lifted_because, lifted.lifted_at is not None) == ("closed", True)
    assert (await client.audit.redact(tenant, "asked", **document)).records == 1
    assert (await client.audit.set_retention(tenant, days=400, floor_days=183)).days == 400
    with pytest.raises(InvalidInput):
        await client.audit.set_retention(tenant, floor_days=90)
    kept = await client.audit.retention(tenant)
    assert (kept.tenant, kept.days, kept.floor_days) == (tenant, 400, 183)
    general = await client.audit.retention()
    assert (await client.audit.set_retention(floor_days=general.floor_days)).tenant is None


async def test_the_trail_has_checkpoints_and_proofs(client: Any, tenant: str) -> None:
    async def found(tenant: str | None) -> str | None:
        try:
            note: str = await client.audit.checkpoint(tenant)
        except NotFound:
            return None
        return note

    await client.keys.create("k", tenant=tenant)
    note = await wait_until(lambda: found(tenant))
    size = int(note.split("\n")[1])
    proof = await client.audit.inclusion(0, tenant=tenant, size=size)
    assert (proof.index, proof.size) == (0, size)
    assert (await client.audit.consistency(1, size, tenant=tenant)).second_root == proof.root
    assert (await client.audit.inclusion(0)).root == (await client.audit.consistency(1)).second_root
    assert await client.audit.checkpoint() is not None
    with pytest.raises(InvalidInput):
        await client.audit.inclusion(10**6, tenant=tenant)


async def test_a_webhook_is_created_changed_and_deleted(client: Any, tenant: str) -> None:
    async with scripted(Told(500, {}), Told(200, {})) as receiver:
        made = await client.webhooks.create(
            receiver.url, tenant=tenant, events=["key.leaked"], thresholds=[50, 90], allow_private=True
        )
        webhook = made.webhook
        assert made.secret.startswith("whsec_")
        assert made.secret not in repr(made)
        assert (webhook.events, webhook.thresholds, webhook.allow_private) == (["key.leaked"], [50, 90], True)
        assert await client.webhooks.get(webhook.id) == webhook
        tested = await client.webhooks.test(webhook.id)
        assert (tested.webhook_id, tested.last_status) == (webhook.id, 500)
        again = await client.webhooks.redrive(tested.id)
        assert again.event_id == tested.event_id

        async def delivered() -> bool:
            return bool((await client.webhooks.delivery(tested.id)).state == "delivered")

        await wait_until(delivered)
        assert [one.id async for one in client.webhooks.deliveries(webhook.id, state="delivered")] == [tested.id]
    rotated = await client.webhooks.rotate_secret(webhook.id, overlap_s=60)
    assert rotated.secret != made.secret
    changed = await client.webhooks.update(webhook.id, enabled=False, description="off")
    assert (changed.enabled, changed.description, changed.events) == (False, "off", ["key.leaked"])
    assert [one.id async for one in client.webhooks.list(tenant=tenant)] == [webhook.id]
    await client.webhooks.delete(webhook.id)
    with pytest.raises(NotFound):
        await client.webhooks.get(webhook.id)
    with pytest.raises(InvalidInput, match="url"):
        await client.webhooks.create("http://169.254.169.254/", tenant=tenant)


# --- Errors -----------------------------------------------------------------------------------------------------


async def test_every_problem_of_the_input_is_reported_at_once(client: Any) -> None:
    limits = [{"resource": "tokens", "limit": -1, "window": {"kind": "rolling", "seconds": 0}}]
    with pytest.raises(InvalidInput) as caught:
        await client.keys.create("", limits=limits)
    error = caught.value
    assert {p.path for p in error.problems} == {"name", "limits.0.limit", "limits.0.window.seconds"}
    assert all(type(p) is Problem and p.message for p in error.problems)
    assert (error.code, error.details["status"], bool(error.request_id)) == ("invalid_input", 422, True)


async def test_an_invalid_key_and_a_missing_permission_are_distinct_errors(
    connect: Connector, url: str, client: Any
) -> None:
    with pytest.raises(Unauthenticated) as caught:
        await connect(url, "sr_wrong").keys.get("key_x")
    assert "sr_wrong" not in f"{caught.value!r} {caught.value} {caught.value.details}"
    weak = (await client.keys.create("reader", tenant="acme", permissions=["strongroom:read"])).text
    with pytest.raises(Denied):
        await connect(url, weak).keys.create("more", tenant="acme")
    with pytest.raises(NotFound, match="key_x"):
        await client.keys.get("key_x")


# --- Entities ---------------------------------------------------------------------------------------------------


class Stored(msgspec.Struct, kw_only=True):
    id: str = ""
    version: int = 0
    owner: str
    price: Decimal
    photo: bytes = b""
    due: datetime | None = None


@dataclasses.dataclass
class Dated:
    owner: str
    price: Decimal
    photo: bytes = b""
    due: datetime | None = None
    id: str = ""


class Modelled(pydantic.BaseModel):
    id: str = ""
    version: int = 0
    owner: str
    price: Decimal
    due: datetime | None = None


@pytest.mark.parametrize("type_", [Stored, Dated, Modelled])
async def test_documents_keep_the_callers_type_and_every_value(client: Any, type_: Any, tenant: str) -> None:
    orders = client.tenant(tenant).collection("orders", type_)
    due = datetime(2030, 5, 6, 7, 8, 9, 123456, tzinfo=UTC)
    price = Decimal("12345678901234567890.123456789")
    made = await orders.create(type_(owner="o", price=price, due=due))
    assert isinstance(made, type_)
    assert (made.owner, made.price, made.due) == ("o", price, due)
    assert await orders.get(made.id) == made
    again = await orders.put(made.id, made)
    assert again.price == price
    assert [one.price async for one in orders.find(price__ge=price, due=due)].count(price) >= 1
    if type_ is not Modelled:
        photo = bytes(range(256))
        with_photo = await orders.create(type_(owner="p", price=price, photo=photo))
        assert [one.id async for one in orders.find(photo=photo)] == [with_photo.id]
        await orders.delete(with_photo.id)
    await orders.delete(made.id)


async def test_documents_are_dicts_without_a_type(client: Any, tenant: str) -> None:
    orders = client.tenant(tenant).collection("orders")
    made = await orders.create({"id": "o1", "owner": "o", "price": Decimal("1.1"), "token": "hunter2"})
    assert (made["id"], made["price"], made["token"], made["tags"]) == ("o1", "1.1", "***", [])
    with pytest.raises(AlreadyExists):
        await orders.create({"id": "o1", "owner": "o"})
    changed = await orders.update("o1", {"seats": 3}, expected=made["version"])
    assert (changed["seats"], changed["owner"]) == (3, "o")
    with pytest.raises(PreconditionFailed):
        await orders.update("o1", {"seats": 4}, expected=made["version"])
    with pytest.raises(PreconditionFailed):
        await orders.put("o1", {"owner": "p"}, expected=0)
    with pytest.raises(InvalidInput, match="token"):
        await orders.put("o1", changed)  # a masked secret is no secret
    await orders.delete("o1", expected=changed["version"])
    with pytest.raises(NotFound):
        await orders.get("o1")


@pytest.mark.parametrize("id", ["a/b", "..", ".", "a b?c#d%2Fe", "ü€𝄞", "%00x", "a+b&c=d", "x:watch"])
async def test_any_id_reaches_its_document(client: Any, id: str) -> None:
    orders = client.tenant("ac/me ..").collection("orders")
    await orders.put(id, {"owner": id})
    assert (await orders.get(id))["owner"] == id
    assert [one["id"] async for one in orders.find(owner=id)] == [id]
    await orders.delete(id)
    assert [one async for one in orders.find(owner=id)] == []


async def test_find_filters_orders_and_pages(client: Any, tenant: str) -> None:
    orders = client.tenant(tenant).collection("orders")
    for number in range(7):
        await orders.put(f"o{number}", {"owner": "ab"[number % 2], "seats": number, "limit": number, "tags": ["even"][: number % 2 == 0]})  # fmt: skip # noqa: E501

    async def found(**asked: Any) -> str:
        return "".join([one["id"][1] async for one in orders.find(order_by="seats", page_size=2, **asked)])

    assert await found() == "0123456"
    assert await found(owner="a", seats__gt=1) == "246"
    assert await found(seats__in=[1, 5]) == "15"
    assert await found(tags__contains="even") == "0246"
    assert (await found(due=None), await found(due__ne=None)) == ("0123456", "")
    assert await found(limit=3) == "3"  # a field that is called like a parameter
    either = {"or": [{"field": "seats", "op": "==", "value": 1}, {"field": "owner", "op": "==", "value": "a"}]}
    assert await found(where=either) == "01246"
    page = await orders.page(order_by=["-seats"], limit=2, owner="a")
    assert [one["id"] for one in page.items] == ["o6", "o4"]
    page = await orders.page(order_by=["-seats"], limit=2, owner="a", cursor=page.next_cursor)
    assert ([one["id"] for one in page.items], page.next_cursor) == (["o2", "o0"], None)
    with pytest.raises(InvalidInput, match="colour"):
        await found(colour="red")


# --- Streams ----------------------------------------------------------------------------------------------------


async def watched(watch: Any, count: int) -> list[Any]:
    async with asyncio.timeout(PATIENCE_S):
        return [await anext(watch) for _ in range(count)]


async def test_a_watch_delivers_changes_in_order_with_their_documents(client: Any, tenant: str) -> None:
    orders = client.tenant(tenant).collection("orders")
    async with orders.watch() as watch:
        made = await orders.create({"id": "w", "owner": "o", "token": "hunter2"})
        await orders.update("w", {"seats": 2})
        await orders.delete("w")
        created, updated, deleted = await watched(watch, 3)
    assert [change.action for change in (created, updated, deleted)] == ["create", "update", "delete"]
    assert (created.id, created.version, created.after["token"]) == ("w", made["version"], "***")
    assert (updated.before["seats"], updated.after["seats"]) == (1, 2)
    assert created.at.utcoffset() == timedelta(0)


async def test_a_watch_misses_and_repeats_nothing_when_its_connection_is_cut(
    client: Any, connect: Connector, proxy: Proxy, tenant: str
) -> None:
    orders = client.tenant(tenant).collection("orders")
    through = connect(f"http://127.0.0.1:{proxy.port}", ADMIN).tenant(tenant).collection("orders")
    seen: list[str] = []
    async with through.watch() as watch:
        for number in range(12):
            await orders.put(f"o{number}", {"owner": "o"})
            if number % 6 == 1:
                proxy.refuse()
                proxy.heal()
            if number % 4 == 3:
                seen += [change.id for change in await watched(watch, 4)]
    assert seen == [f"o{number}" for number in range(12)]
    assert proxy.accepted >= 3


async def test_a_watch_resumes_from_its_cursor_in_another_client(client: Any, tenant: str) -> None:
    orders = client.tenant(tenant).collection("orders")
    async with orders.watch() as watch:
        await orders.create({"owner": "first"})
        assert [change.after["owner"] for change in await watched(watch, 1)] == ["first"]
        cursor = watch.cursor
    await orders.create({"owner": "second"})
    async with orders.watch(cursor=cursor) as watch:
        assert [change.after["owner"] for change in await watched(watch, 1)] == ["second"]


async def test_a_watch_ends_when_the_server_refuses_it(client: Any, connect: Connector, url: str, tenant: str) -> None:
    issued = await client.keys.create("watcher", tenant=tenant, permissions=["strongroom:read"])
    orders = client.tenant(tenant).collection("orders")
    async with connect(url, issued.text).tenant(tenant).collection("orders").watch() as watch:
        await orders.create({"owner": "o"})
        await watched(watch, 1)
        await client.keys.disable(issued.key.id)
        await orders.create({"owner": "p"})
        with pytest.raises(Unauthenticated):
            await watched(watch, 2)
    for wrong in (
        client.tenant(tenant).collection("nonsense"),
        connect(url, issued.text).tenant(tenant).collection("orders"),
    ):
        with pytest.raises((NotFound, Unauthenticated)):
            await watched(wrong.watch(), 1)


async def test_a_watch_gives_up_after_its_timeout(connect: Connector, proxy: Proxy) -> None:
    proxy.refuse()
    orders = connect(f"http://127.0.0.1:{proxy.port}", ADMIN).tenant("t").collection("orders")
    with pytest.raises(NoAnswer):
        await watched(orders.watch(give_up_after_s=0.3), 1)
    assert proxy.accepted >= 2


# --- Tenants ----------------------------------------------------------------------------------------------------


async def test_a_tenant_is_created_changed_suspended_exported_and_deleted(client: Any, tenant: str) -> None:
    made = await client.tenants.create(tenant, name="Acme Inc.", plan=tenant, metadata={"crm": 17})
    assert (made.id, made.status, made.metadata) == (tenant, "active", {"crm": 17})
    assert await client.tenants.get(tenant) == made
    with pytest.raises(AlreadyExists):
        await client.tenants.create(tenant)
    changed = await client.tenants.update(tenant, name=None, expected=made.version)
    assert (changed.name, changed.plan) == (None, tenant)
    with pytest.raises(PreconditionFailed):
        await client.tenants.update(tenant, plan="x", expected=made.version)
    suspended = await client.tenants.suspend(tenant, "unpaid")
    assert (suspended.status, suspended.reason) == ("suspended", "unpaid")
    assert [one.id async for one in client.tenants.list(status="suspended", plan=tenant)] == [tenant]
    assert (await client.tenants.resume(tenant)).status == "active"
    await client.tenant(tenant).collection("users").create({"email": "ann@example.com"})
    lines = b"".join([piece async for piece in client.tenants.export(tenant)]).splitlines()
    assert msgspec.json.decode(lines[-1])["type"] == "end"
    with pytest.raises(NotFound):
        async for _ in client.tenants.export("nobody"):
            pass
    statement = await client.tenants.delete(tenant, "the end")
    assert (statement.tenant, statement.reason, statement.counts) == (tenant, "the end", {"users": 1})
    with pytest.raises(NotFound):
        await client.tenants.get(tenant)


async def test_writes_of_a_tenant_are_turned_off_and_on(client: Any, tenant: str) -> None:
    await client.tenants.create(tenant)
    made = await client.writes.off("a breach", tenant=tenant, usage=False)
    assert (made.tenant, made.allowed, made.usage, made.reason) == (tenant, False, False, "a breach")
    with pytest.raises(WritesOff, match="a breach"):
        await client.keys.create(name="k", tenant=tenant)
    status = await client.writes.status(tenant)
    assert (status.allowed, status.migration, [one.tenant for one in status.items]) == (True, None, [tenant])
    assert (await client.writes.on(tenant=tenant)).allowed
    assert (await client.writes.status(tenant)).items == []
    await client.tenants.suspend(tenant)
    with pytest.raises(TenantSuspended):
        await client.keys.create(name="k", tenant=tenant)


async def test_a_deletion_that_takes_long_is_awaited(connect: Connector) -> None:
    tenant = b'{"id": "acme", "status": "deleting", "version": 2}'
    statement = (
        b'{"id": "del_1", "tenant": "acme", "actor": "x", "request_id": "r", "started_at": "2026-01-01T00:00:00Z", '
        b'"finished_at": "2026-01-01T00:00:00Z", "counts": {"users": 1}, "note": "n", "signed": false, "version": 1, '
        b'"created_at": "2026-01-01T00:00:00Z", "updated_at": "2026-01-01T00:00:00Z"}'
    )
    async with scripted(Told(202, tenant), Told(202, tenant), Told(200, statement)) as server:
        done = await connect(server.url, "key").tenants.delete("acme")
        assert done.counts == {"users": 1}
        asked = [one.headers["idempotency-key"] for one in server.asked]
        assert len(asked) == 3
        assert len(set(asked)) == 1
