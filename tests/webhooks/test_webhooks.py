"""Webhook endpoints: fields, visibility, secrets, signatures, and the subscriptions that the ledger reads."""

from __future__ import annotations

import base64
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strongroom import Limit, Strongroom
from strongroom.context import Context
from strongroom.errors import Conflict, Denied, InvalidInput, NotFound, StoreError
from strongroom.events.outbox import Event, event
from strongroom.keys.hasher import Hasher
from strongroom.limits.windows import Calendar, Total
from strongroom.pepper import Pepper
from strongroom.webhooks.endpoints import MAX_PER_TENANT, Webhooks
from strongroom.webhooks.model import Webhook
from strongroom.webhooks.signatures import (
    InvalidSignature,
    new_secret,
    secret_bytes,
    sign,
    verify_signature,
)
from tests.helpers.faulty_store import FaultyStore
from tests.helpers.stores import new_url, opened, rolling
from tests.helpers.waiting import wait_until

URL = "https://203.0.114.7/hook"
"""A public address, so that no test asks a resolver."""
ACME = Context("acme", "key:a", {"admin": True, "scope": "admin", "tenant": "acme"})
WRITER = Context(None, "key:w", {"admin": True, "scope": "write"})


# --- Signatures -----------------------------------------------------------------------------------------------

SECRET = "whsec_AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="
VECTORS = [
    ("evt_1", 1_700_000_000, b'{"a":1}', "v1,hUVxIYXs8Zy9GDiZD1uQbBwXoZGMAB6RVLdZZ3ffmek="),
    ("evt_2", 0, b"", "v1,6cigECKcJE1QsaZjGOQchuERBDeADtS42j1whWIKGK4="),
    ("msg.with.dots", 1_700_000_001, "äöü €".encode(), "v1,eHe4mi06qbjC2UI/m19cho3DQvSaaHd67c80esdMW6Y="),
]
"""Made with another implementation: `openssl dgst -sha256 -mac HMAC -macopt hexkey:… -binary | base64`."""


@pytest.mark.parametrize(("id", "timestamp", "body", "expected"), VECTORS)
def test_a_signature_equals_the_specifications_example(id: str, timestamp: int, body: bytes, expected: str) -> None:
    headers = sign([secret_bytes(SECRET)], id, timestamp, body)
    assert headers == {"webhook-id": id, "webhook-timestamp": str(timestamp), "webhook-signature": expected}
    assert verify_signature(SECRET, headers, body, now_s=timestamp) == id


@given(st.binary(max_size=200), st.integers(0, 10**11), st.binary(min_size=24, max_size=64))
def test_only_the_signed_content_verifies(body: bytes, timestamp: int, key: bytes) -> None:
    secret = "whsec_" + base64.b64encode(key).decode()
    headers = sign([key], "evt_x", timestamp, body)
    assert verify_signature(secret, headers, body, now_s=timestamp) == "evt_x"
    altered: list[tuple[Any, dict[str, str], bytes]] = [
        (new_secret(), headers, body),
        (secret, {**headers, "webhook-id": "evt_y"}, body),
        (secret, {**headers, "webhook-timestamp": str(timestamp + 1)}, body),
        (secret, headers, body + b" "),
        (secret, {**headers, "webhook-signature": headers["webhook-signature"].replace("v1,", "v2,")}, body),
        (secret, {**headers, "webhook-signature": "v1,"}, body),
    ]
    for wrong in altered:
        with pytest.raises(InvalidSignature):
            verify_signature(*wrong, now_s=timestamp)


@pytest.mark.parametrize("name", ["webhook-id", "webhook-timestamp", "webhook-signature"])
def test_a_missing_header_is_named(name: str) -> None:
    headers = sign([secret_bytes(SECRET)], "evt_1", 5, b"")
    del headers[name]
    with pytest.raises(InvalidSignature, match=name):
        verify_signature(SECRET, headers, b"", now_s=5)


@pytest.mark.parametrize("timestamp", ["", "x", "-5", "1.5", "٣", "9" * 13])
def test_an_invalid_timestamp_is_refused(timestamp: str) -> None:
    headers = {**sign([secret_bytes(SECRET)], "evt_1", 5, b""), "webhook-timestamp": timestamp}
    with pytest.raises(InvalidSignature, match="webhook-timestamp"):
        verify_signature(SECRET, headers, b"", now_s=5)


def test_a_webhook_older_than_the_tolerance_is_refused() -> None:
    headers = sign([secret_bytes(SECRET)], "evt_1", 1_000, b"x")
    named = {name.title(): value for name, value in headers.items()}  # header names in any case
    assert verify_signature(SECRET, named, "x", now_s=1_300) == "evt_1"
    assert verify_signature(SECRET, named, "x", now_s=700) == "evt_1"
    for now_s, when in ((1_301, "301 s old"), (699, "301 s in the future")):
        with pytest.raises(InvalidSignature, match=when):
            verify_signature(SECRET, named, b"x", now_s=now_s)
    assert verify_signature(SECRET, named, b"x", now_s=1_301, tolerance_s=301) == "evt_1"


@pytest.mark.parametrize("secret", ["", "whsec_", "AAAA", "whsec_AAAA", "whsec_" + "A" * 100, "whsec_" + "*" * 44])
def test_an_invalid_secret_is_refused_without_showing_it(secret: str) -> None:
    with pytest.raises(ValueError, match="24 to 64 random bytes") as caught:
        verify_signature(secret, {}, b"")
    assert len(secret) < 10 or secret not in str(caught.value)


# --- Endpoints ------------------------------------------------------------------------------------------------


async def test_an_endpoint_is_created_read_listed_changed_and_deleted(room: Strongroom) -> None:
    made = await room.webhooks.create(url=URL, tenant="acme", events=["limit.threshold"], description="ops")
    webhook = made.webhook
    assert made.secret.startswith("whsec_")
    assert (webhook.tenant, webhook.url, webhook.events) == ("acme", URL, ["limit.threshold"])
    assert (webhook.thresholds, webhook.enabled, webhook.allow_private) == ([50, 80, 100], True, False)
    assert await room.webhooks.get(webhook.id) == webhook
    assert (await room.webhooks.list(tenant="acme")).items == [webhook]
    assert (await room.webhooks.list(tenant="globex")).items == []
    changed = await room.webhooks.update(webhook.id, thresholds=[90, 10, 90], enabled=False)
    assert (changed.thresholds, changed.enabled, changed.description) == ([10, 90], False, "ops")
    with pytest.raises(Conflict):
        await room.webhooks.update(webhook.id, enabled=True, expected=webhook.version)
    await room.webhooks.delete(webhook.id)
    with pytest.raises(NotFound):
        await room.webhooks.get(webhook.id)


async def test_every_problem_of_an_endpoint_is_reported_at_once(room: Strongroom) -> None:
    with pytest.raises(InvalidInput) as caught:
        await room.webhooks.create(  # type: ignore[call-arg]
            url=5, tenant="", events=["key.exploded"], thresholds=[0, "x", 1_001], min_window_s=-1, enabled="yes",  # type: ignore[arg-type, list-item]
            description="d" * 1_001, secret="whsec_short", colour="red",
        )  # fmt: skip
    paths = {problem.path.split(".")[0] for problem in caught.value.problems}
    assert paths == {
        "url", "tenant", "events", "thresholds", "min_window_s", "enabled", "description", "secret", "colour"
    }  # fmt: skip
    assert "whsec_short" not in str(caught.value)


@pytest.mark.parametrize("url", ["https://10.0.0.1/", "https://169.254.169.254/", "https://localhost/", "http://a.b/"])
async def test_a_private_address_is_refused_with_the_field_url(room: Strongroom, url: str) -> None:
    made = await room.webhooks.create(url=URL)
    for call in (room.webhooks.create(url=url), room.webhooks.update(made.webhook.id, url=url)):
        with pytest.raises(InvalidInput) as caught:
            await call
        assert [problem.path for problem in caught.value.problems] == ["url"]


async def test_only_an_administrator_bound_to_no_tenant_allows_private_addresses(room: Strongroom) -> None:
    made = await room.webhooks.create(url="http://127.0.0.1:1/", tenant="acme", allow_private=True)
    for context in (ACME, WRITER):
        with pytest.raises(Denied, match="allow_private"):
            await room.webhooks.create(url="http://10.0.0.1/", tenant="acme", allow_private=True, context=context)
        with pytest.raises(Denied, match="allow_private"):  # it is private already: another one may not be chosen
            await room.webhooks.update(made.webhook.id, url="http://10.0.0.1/", context=context)
    with pytest.raises(Denied, match="tenant"):
        await room.webhooks.create(url=URL, tenant="*", context=WRITER)
    # What does not concern the address is theirs to change; so is to give the right up.
    assert not (await room.webhooks.update(made.webhook.id, enabled=False, context=ACME)).enabled
    freed = await room.webhooks.update(made.webhook.id, url=URL, allow_private=False, context=ACME)
    assert not freed.allow_private


async def test_a_tenant_sees_and_changes_only_its_endpoints(room: Strongroom) -> None:
    other = (await room.webhooks.create(url=URL, tenant="globex")).webhook
    everyone = (await room.webhooks.create(url=URL, tenant="*")).webhook
    mine = (await room.webhooks.create(url=URL, tenant="acme", context=ACME)).webhook
    assert (await room.webhooks.list(context=ACME)).items == [mine]
    assert (await room.webhooks.list(tenant="globex", context=ACME)).items == []
    for webhook in (other, everyone):
        for call in (
            room.webhooks.get(webhook.id, context=ACME),
            room.webhooks.update(webhook.id, enabled=False, context=ACME),
            room.webhooks.delete(webhook.id, context=ACME),
            room.webhooks.rotate_secret(webhook.id, context=ACME),
            room.deliveries.test(webhook.id, context=ACME),
            room.deliveries.list(webhook.id, context=ACME),
        ):
            with pytest.raises(NotFound):
                await call
    with pytest.raises(Denied):
        await room.webhooks.create(url=URL, tenant="globex", context=ACME)


async def test_the_number_of_endpoints_of_a_tenant_is_bounded(room: Strongroom) -> None:
    for _ in range(MAX_PER_TENANT):
        await room.webhooks.create(url=URL, tenant="acme")
    with pytest.raises(InvalidInput, match="the most that a tenant may have"):
        await room.webhooks.create(url=URL, tenant="acme")
    await room.webhooks.create(url=URL, tenant="globex")


# --- Secrets --------------------------------------------------------------------------------------------------


async def test_a_secret_is_shown_once_and_stored_only_encrypted(room: Strongroom, store: FaultyStore) -> None:
    made = await room.webhooks.create(url=URL, tenant="acme")
    rotated = await room.webhooks.rotate_secret(made.webhook.id)
    page = await room.webhooks.list()
    stored = await store.get("webhooks", None, made.webhook.id)
    journal = await room.store.changes(None)
    seen = f"{made} {rotated} {page} {stored} {journal.records}"
    for secret in (made.secret, rotated.secret):
        assert secret not in seen
        assert str(secret_bytes(secret)) not in seen
    records = [record for record in journal.records if record.collection == "webhooks"]
    assert [(record.action, record.tenant, record.after and record.after["secret"]) for record in records] == [
        ("create", "acme", "***"),
        ("update", "acme", "***"),
    ]


async def test_a_caller_may_choose_the_secret(room: Strongroom) -> None:
    made = await room.webhooks.create(url=URL, secret=SECRET)
    assert made.secret == SECRET
    assert room.webhooks.secrets.signing(made.webhook) == [secret_bytes(SECRET)]


async def test_both_secrets_sign_during_the_overlap_of_a_rotation(room: Strongroom) -> None:
    made = await room.webhooks.create(url=URL)
    second = await room.webhooks.rotate_secret(made.webhook.id, overlap_s=60)
    headers = sign(room.webhooks.secrets.signing(second.webhook), "evt_1", 5, b"x")
    for secret in (made.secret, second.secret, [new_secret(), made.secret]):
        assert verify_signature(secret, headers, b"x", now_s=5) == "evt_1"
    third = await room.webhooks.rotate_secret(made.webhook.id, overlap_s=0)
    assert room.webhooks.secrets.signing(third.webhook) == [secret_bytes(third.secret)]
    for overlap_s in (-1, 7 * 86_400 + 1, 1.5, True):
        with pytest.raises(InvalidInput, match="overlap_s"):
            await room.webhooks.rotate_secret(made.webhook.id, overlap_s=overlap_s)  # type: ignore[arg-type]


async def test_secrets_survive_a_pepper_rotation_and_a_missing_pepper_is_reported(room: Strongroom) -> None:
    made = await room.webhooks.create(url=URL)
    await room.rotate_pepper()
    assert room.webhooks.secrets.signing(made.webhook) == [secret_bytes(made.secret)]
    stranger = Webhooks(
        room.database,
        lambda: Hasher([Pepper("x", b"y" * 32)]),
        room.clock,
        room.feed,
        None,  # type: ignore[arg-type]
    )
    with pytest.raises(StoreError, match="rotate the secret"):
        stranger.secrets.signing(made.webhook)


async def test_a_retried_create_returns_the_same_endpoint_and_secret(room: Strongroom) -> None:
    first = await room.webhooks.create(url=URL, tenant="acme", idempotency_key="i")
    again = await room.webhooks.create(url=URL, tenant="acme", idempotency_key="i")
    assert (again.webhook.id, again.secret) == (first.webhook.id, first.secret)
    assert len((await room.webhooks.list()).items) == 1
    with pytest.raises(Conflict):
        await room.webhooks.create(url=URL + "2", tenant="acme", idempotency_key="i")
    rotated = await room.webhooks.rotate_secret(first.webhook.id, idempotency_key="r")
    assert (await room.webhooks.rotate_secret(first.webhook.id, idempotency_key="r")).secret == rotated.secret
    for _ in range(2):
        await room.webhooks.delete(first.webhook.id, idempotency_key="d")
    with pytest.raises(NotFound):
        await room.webhooks.delete(first.webhook.id, idempotency_key="e")


# --- What the ledger asks -------------------------------------------------------------------------------------

TOKENS = rolling("tokens", 1_000, 3_600)


async def test_the_ledger_sees_changed_thresholds_at_once(room: Strongroom) -> None:
    def asked(tenant: str = "acme") -> object:
        return room.webhooks.subscriptions.thresholds(tenant, TOKENS)

    assert asked() == ()
    first = (await room.webhooks.create(url=URL, tenant="acme", thresholds=[80])).webhook
    everyone = (await room.webhooks.create(url=URL, tenant="*", thresholds=[90, 100])).webhook
    await room.webhooks.create(url=URL, tenant="acme", events=["key.leaked"], thresholds=[1])
    assert asked() == (80, 90, 100)
    assert asked("globex") == (90, 100)
    await room.webhooks.update(first.id, thresholds=[50])
    assert asked() == (50, 90, 100)
    await room.webhooks.update(first.id, enabled=False)
    assert asked() == (90, 100)
    await room.webhooks.delete(everyone.id)
    assert asked() == ()


@pytest.mark.parametrize(
    ("limit", "told"),
    [
        (rolling("tokens", 5, 3_599), False),
        (rolling("tokens", 5, 3_600), True),
        (Limit(resource="tokens", limit=5, window=Calendar(unit="minute")), False),
        (Limit(resource="tokens", limit=5, window=Calendar(unit="day")), True),
        (Limit(resource="tokens", limit=5, window=Total()), True),
    ],
)
async def test_min_window_s_excludes_limits_with_shorter_windows(tmp_path: Path, limit: Limit, told: bool) -> None:
    async with opened(new_url("json-memory", tmp_path)) as (room, _):
        made = await room.webhooks.create(url=URL, tenant="acme", min_window_s=3_600)
        assert bool(room.webhooks.subscriptions.thresholds("acme", limit)) is told
        data = {"threshold": 50, "window": limit.window.model_dump(mode="json")}
        assert made.webhook.wants(event("limit.threshold", "acme", data)) is told


async def test_other_nodes_follow_endpoints_and_a_new_node_reads_them(
    room: Strongroom, store: FaultyStore, url_of_any: str
) -> None:
    async with opened(url_of_any, beside=store) as (other, _):
        made = (await room.webhooks.create(url=URL, tenant="acme", thresholds=[70])).webhook
        await wait_until(lambda: other.webhooks.subscriptions.thresholds("acme", TOKENS) == (70,))
        await room.webhooks.update(made.id, thresholds=[60])
        await wait_until(lambda: other.webhooks.subscriptions.thresholds("acme", TOKENS) == (60,))
        async with opened(url_of_any, beside=store) as (third, _):
            assert third.webhooks.subscriptions.thresholds("acme", TOKENS) == (60,)
        await room.webhooks.delete(made.id)
        await wait_until(lambda: other.webhooks.subscriptions.thresholds("acme", TOKENS) == ())


@pytest.mark.parametrize(
    ("events", "type", "only", "wanted"),
    [
        (["*"], "key.leaked", None, True),
        (["key.leaked"], "key.leaked", None, True),
        (["limit.threshold"], "key.leaked", None, False),
        (["limit.threshold"], "webhook.test", "whk_1", True),
        (["*"], "webhook.test", "whk_2", False),
    ],
)
def test_an_endpoint_receives_the_events_it_subscribed_to(
    events: list[str], type: str, only: str | None, wanted: bool
) -> None:
    webhook = Webhook(id="whk_1", tenant="acme", url=URL, events=events, secret=b"")
    assert webhook.wants(event(type, "acme", {}, only=only)) is wanted


def test_an_events_body_has_type_timestamp_tenant_and_data() -> None:
    made = event("key.leaked", "acme", {"cost": Decimal("0.10"), "n": 1}, now_us=1_700_000_000_123_456)
    assert made.body == (
        '{"type":"key.leaked","timestamp":"2023-11-14T22:13:20.123456Z","tenant":"acme","data":{"cost":0.10,"n":1}}'
    )
    assert json.loads(made.body)["data"]["cost"] == 0.1
    with pytest.raises(InvalidInput, match="data: found"):
        event("key.leaked", "acme", {"text": "x" * 65_536})
    assert isinstance(made, Event)
