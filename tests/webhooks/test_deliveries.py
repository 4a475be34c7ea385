"""Deliveries: no event is lost or delivered under two ids, whatever receivers, networks, names and nodes do."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from strongroom import Strongroom
from strongroom.context import system_context, utc_from_us
from strongroom.errors import ConfigError, Conflict, NotFound, Unavailable
from strongroom.events.outbox import NAME as EVENTS
from strongroom.events.outbox import Event, event, put
from strongroom.webhooks import deliveries
from strongroom.webhooks import delivery_attempt as attempts
from strongroom.webhooks.deliveries import MAX_SENDING_EACH
from strongroom.webhooks.delivery_attempt import MAX_ATTEMPTS, Delivery, backoff_s
from strongroom.webhooks.http_sender import MAX_RESPONSE_BYTES, HttpSender, SendResult
from strongroom.webhooks.model import IssuedWebhook
from strongroom.webhooks.signatures import verify_signature
from tests.conftest import backend_of
from tests.helpers.faulty_store import Fault, FaultyStore
from tests.helpers.paths import ROOT
from tests.helpers.servers.proxy import Proxy
from tests.helpers.stores import new_url
from tests.helpers.waiting import PATIENCE_S, wait_until
from tests.helpers.webhook_receiver import (
    FAST,
    OK,
    Receiver,
    certificate,
    delivering,
    hang,
    receiving,
    status,
)

IMPATIENT = partial(HttpSender, connect_timeout_s=1.5, total_timeout_s=1.5)
PATIENT = replace(FAST, backoff_s=3_600.0)
"""Nothing is tried a second time while a test runs."""


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as receiver:
        yield receiver


@pytest.fixture
async def both(tmp_path: Path) -> AsyncIterator[tuple[Strongroom, FaultyStore]]:
    async with delivering(new_url("sqlite", tmp_path), sender=IMPATIENT) as both:
        yield both


async def endpoint(room: Strongroom, receiver: Receiver, **more: Any) -> IssuedWebhook:
    fields = {"url": receiver.url, "tenant": "acme", "allow_private": True, **more}
    return await room.webhooks.create(**fields)


async def emit(room: Strongroom, tenant: str = "acme", **data: Any) -> str:
    """Commit an event as a transaction does; its id."""
    made = event("key.leaked", tenant, {"key_id": "key_1", **data})
    await room.database.transaction(system_context(tenant), lambda tx: tx.create(made))
    return made.id


async def only(room: Strongroom, made: IssuedWebhook) -> Delivery:
    (delivery,) = (await room.deliveries.list(made.webhook.id)).items
    return delivery


async def ended(room: Strongroom, made: IssuedWebhook) -> Delivery:
    """The endpoint's one delivery, once it is delivered or dead."""

    async def done() -> Delivery | None:
        items = (await room.deliveries.list(made.webhook.id)).items
        return items[0] if items and items[0].state != "pending" else None

    ended: Delivery = await wait_until(done)
    return ended


# --- The plain way --------------------------------------------------------------------------------------------


async def test_an_event_is_delivered_signed_at_once_to_each_subscribed_endpoint(
    url_of_any: str, receiver: Receiver
) -> None:
    async with delivering(url_of_any, timing=replace(FAST, poll_s=60, first_look_s=60)) as (room, _):
        one = await endpoint(room, receiver, url=receiver.url + "/one")
        two = await endpoint(room, receiver, url=receiver.url + "/two", tenant="*", events=["key.leaked"])
        await endpoint(room, receiver, url=receiver.url + "/other", tenant="globex")
        await endpoint(room, receiver, url=receiver.url + "/deaf", events=["limit.threshold"])
        await endpoint(room, receiver, url=receiver.url + "/off", enabled=False)
        id = await emit(room)
        await wait_until(lambda: room.deliveries.attempts.counts["delivered"] == 2)
        assert sorted(arrived.path for arrived in receiver.arrived) == ["/hook/one", "/hook/two"]
        for arrived, made in zip(sorted(receiver.arrived, key=lambda a: a.path), (one, two), strict=True):
            assert verify_signature(made.secret, arrived.headers, arrived.body) == id
            assert arrived.headers["content-type"] == "application/json"
            assert json.loads(arrived.body)["data"] == {"key_id": "key_1"}
            assert (await only(room, made)).state == "delivered"


async def test_an_event_that_was_not_committed_is_not_delivered(
    room: Strongroom, store: FaultyStore, receiver: Receiver
) -> None:
    await endpoint(room, receiver)
    store.fault = lambda number, batch: Fault("before", Unavailable("the store is away"))
    with pytest.raises(Unavailable):
        await emit(room)
    store.fault = lambda number, batch: None
    id = await emit(room)
    await wait_until(lambda: room.deliveries.attempts.counts["delivered"])
    assert receiver.ids == [id]


async def test_an_event_whose_commit_answer_was_lost_is_delivered(
    room: Strongroom, store: FaultyStore, receiver: Receiver
) -> None:
    await endpoint(room, receiver)
    store.fault = lambda number, batch: Fault("after", Unavailable("the answer was lost", outcome="unknown"))
    with pytest.raises(Unavailable):
        await emit(room)
    store.fault = lambda number, batch: None
    await wait_until(lambda: receiver.arrived)
    await wait_until(lambda: room.deliveries.attempts.counts["delivered"])
    assert len(receiver.arrived) == 1


async def test_an_endpoint_receives_no_event_from_long_before_its_creation(
    room: Strongroom, receiver: Receiver
) -> None:
    old = event("key.leaked", "acme", {})
    hour_ago_us = room.clock.now_us() - 3_600_000_000
    await room.database.commit_counters([put(old)], hour_ago_us)
    made = await endpoint(room, receiver)
    id = await emit(room)
    await wait_until(lambda: taken_up(room, old.id))
    await ended(room, made)
    assert receiver.ids == [id]


async def taken_up(room: Strongroom, event_id: str) -> bool:
    return (await room.database.get(system_context(), Event, event_id)).due_at is None


async def test_an_event_put_into_a_batch_is_delivered(room: Strongroom, receiver: Receiver) -> None:
    to = await endpoint(room, receiver)
    made = event("key.leaked", "acme", {})
    await room.database.commit_counters([put(made)], room.clock.now_us())
    room.deliveries.wake([made.id])
    done = await ended(room, to)
    assert (done.state, done.event_id, receiver.ids) == ("delivered", made.id, [made.id])


# --- Receivers that fail --------------------------------------------------------------------------------------


async def slow(writer: asyncio.StreamWriter) -> None:
    """Answer a byte at a time, for ever."""
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n")
    while True:
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(0.05)


async def close(writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


@pytest.mark.parametrize(
    ("answer", "said", "code"),
    [
        (status(500), "answered 500", 500),
        (status(302, "location: http://127.0.0.1:1/"), "answered 302: redirects are not followed", 302),
        (status(404), "answered 404", 404),
        (b"not HTTP at all\r\n\r\n", "no whole answer", None),
        (close, "no whole answer", None),
        (hang, "no answer within 1.5 s", None),
        (slow, "no answer within 1.5 s", None),
    ],
)
async def test_a_failed_attempt_is_stored_and_retried_under_the_same_event_id(
    room: Strongroom, receiver: Receiver, answer: Any, said: str, code: int | None
) -> None:
    made = await endpoint(room, receiver)
    room.deliveries.attempts.timing = PATIENT
    receiver.answers = [answer]
    id = await emit(room)

    async def failed() -> bool:
        items = (await room.deliveries.list(made.webhook.id)).items
        return bool(items) and items[0].attempts == 1

    await wait_until(failed)
    delivery = await only(room, made)
    assert (delivery.state, delivery.last_status) == ("pending", code)
    assert said in str(delivery.last_error)

    async def failing() -> bool:
        return (await room.webhooks.get(made.webhook.id)).failing_since is not None

    await wait_until(failing)
    await room.deliveries.redrive(delivery.id)
    assert (await ended(room, made)).state == "delivered"
    assert receiver.ids == [id, id]
    assert receiver.arrived[0].body == receiver.arrived[1].body
    assert len(receiver.arrived) == receiver.connections == 2  # the redirect was not followed, nothing else was sent

    async def healed() -> bool:
        return (await room.webhooks.get(made.webhook.id)).failing_since is None

    await wait_until(healed)


async def test_a_huge_response_is_accepted_and_not_read_to_its_end(room: Strongroom, receiver: Receiver) -> None:
    written = 0
    cut = asyncio.Event()

    async def huge(writer: asyncio.StreamWriter) -> None:
        nonlocal written
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000000000\r\n\r\n")
        try:
            while True:
                writer.write(b"x" * 65_536)
                await writer.drain()
                written += 65_536
        except ConnectionError:
            cut.set()

    receiver.answer = huge
    made = await endpoint(room, receiver)
    await emit(room)
    assert (await ended(room, made)).last_status == 200
    await asyncio.wait_for(cut.wait(), PATIENCE_S)
    assert written < 100 * MAX_RESPONSE_BYTES


async def test_a_retry_waits_for_the_receivers_retry_after(room: Strongroom, receiver: Receiver) -> None:
    receiver.answer = status(429, "retry-after: 3600")
    made = await endpoint(room, receiver)
    await emit(room)
    await wait_until(lambda: room.deliveries.attempts.counts["failed"])
    delivery = await only(room, made)
    assert delivery.due_at is not None
    assert delivery.last_attempt_at is not None
    assert delivery.due_at - delivery.last_attempt_at == timedelta(seconds=3_600)


def test_retries_continue_for_about_a_day() -> None:
    waits = [backoff_s(attempts) for attempts in range(1, MAX_ATTEMPTS)]
    assert waits[:4] == [5, 20, 80, 320]
    assert waits == sorted(waits)
    assert 24 * 3_600 <= sum(waits) <= 27 * 3_600


# --- Dead letters ---------------------------------------------------------------------------------------------


async def test_after_the_last_attempt_a_delivery_is_a_dead_letter_and_can_be_redriven(
    room: Strongroom, receiver: Receiver
) -> None:
    receiver.answer = status(503)
    made = await endpoint(room, receiver)
    with patch.object(attempts, "MAX_ATTEMPTS", 3):
        id = await emit(room)
        dead = await ended(room, made)
        assert (dead.state, dead.attempts, dead.due_at, dead.last_error) == ("dead", 3, None, "answered 503")
        assert [one.id for one in (await room.deliveries.list(made.webhook.id, state="dead")).items] == [dead.id]
        assert (await room.deliveries.list(made.webhook.id, state="delivered")).items == []
        receiver.answer = OK
        again = await room.deliveries.redrive(dead.id)
        assert (again.state, again.attempts) == ("pending", 0)
        done = await ended(room, made)
    assert (done.state, done.attempts, done.last_error) == ("delivered", 1, None)
    assert receiver.ids == [id] * 4


async def test_a_receiver_that_was_down_gets_the_events_it_missed(room: Strongroom, receiver: Receiver) -> None:
    async with Proxy(receiver.port) as proxy:
        made = await endpoint(room, receiver, url=f"http://127.0.0.1:{proxy.port}/")
        proxy.refuse()
        ids = [await emit(room, number=number) for number in range(5)]
        await wait_until(lambda: room.deliveries.attempts.counts["failed"] >= 5)
        assert receiver.arrived == []
        proxy.heal()
        await wait_until(lambda: room.deliveries.attempts.counts["delivered"] == 5)
    assert sorted(receiver.ids) == sorted(ids)
    assert (await room.webhooks.get(made.webhook.id)).enabled


async def test_a_missing_delivery_event_or_endpoint_cannot_be_redriven(room: Strongroom, receiver: Receiver) -> None:
    with pytest.raises(NotFound):
        await room.deliveries.redrive("dlv_none")
    made = await endpoint(room, receiver)
    await emit(room)
    delivery = await ended(room, made)
    await room.webhooks.update(made.webhook.id, enabled=False)
    with pytest.raises(Conflict, match="enable it first"):
        await room.deliveries.redrive(delivery.id)
    await room.webhooks.update(made.webhook.id, enabled=True)
    await room.store.store.store.commit(_removal(delivery.event_id))  # type: ignore[attr-defined]
    with pytest.raises(NotFound, match="not kept any more"):
        await room.deliveries.redrive(delivery.id)


def _removal(event_id: str) -> Any:
    from strongroom.storage.port import Batch, Delete

    return Batch(None, (Delete(EVENTS, event_id),), 1)


async def test_pending_deliveries_of_a_disabled_or_removed_endpoint_become_dead_letters(
    room: Strongroom, receiver: Receiver
) -> None:
    room.deliveries.attempts.timing = replace(FAST, backoff_s=0.3)
    receiver.answer = status(500)
    disabled, removed = [await endpoint(room, receiver) for _ in range(2)]
    await emit(room)
    await wait_until(lambda: room.deliveries.attempts.counts["failed"] == 2)
    await room.webhooks.update(disabled.webhook.id, enabled=False)
    await room.webhooks.delete(removed.webhook.id)
    dead = await ended(room, disabled)
    assert (dead.state, dead.last_error) == ("dead", "the webhook is disabled")
    await wait_until(lambda: room.deliveries.attempts.counts["dead"] == 2)


async def test_an_endpoint_that_fails_for_days_is_disabled_and_the_journal_says_so(
    room: Strongroom, receiver: Receiver
) -> None:
    room.deliveries.attempts.timing = replace(FAST, disable_after=timedelta(seconds=0.2))
    receiver.answer = status(500)
    made = await endpoint(room, receiver)
    await emit(room)

    async def disabled() -> bool:
        return not (await room.webhooks.get(made.webhook.id)).enabled

    await wait_until(disabled)
    webhook = await room.webhooks.get(made.webhook.id)
    assert "every attempt failed since 20" in str(webhook.disabled_reason)
    records = [r for r in (await room.store.changes(None)).records if r.collection == "webhooks"]
    assert [(r.action, r.actor, r.tenant) for r in records][-1] == ("update", "system:webhooks", "acme")
    enabled = await room.webhooks.update(made.webhook.id, enabled=True)
    assert (enabled.failing_since, enabled.disabled_reason) == (None, None)


async def test_an_endpoint_that_answers_410_is_disabled_at_once(room: Strongroom, receiver: Receiver) -> None:
    receiver.answer = status(410)
    made = await endpoint(room, receiver)
    await emit(room)
    assert (await ended(room, made)).state == "dead"

    async def disabled() -> bool:
        return not (await room.webhooks.get(made.webhook.id)).enabled

    await wait_until(disabled)
    assert len(receiver.arrived) == 1


# --- Tests ----------------------------------------------------------------------------------------------------


async def test_a_test_event_is_one_attempt_at_the_endpoint_and_returns_its_result(
    room: Strongroom, receiver: Receiver
) -> None:
    made = await endpoint(room, receiver, events=["key.leaked"], enabled=False)
    await endpoint(room, receiver, tenant="*")
    good = await room.deliveries.test(made.webhook.id)
    assert (good.state, good.last_status, good.event_type) == ("delivered", 200, "webhook.test")
    receiver.answer = status(500)
    bad = await room.deliveries.test(made.webhook.id)
    assert (bad.state, bad.last_error, bad.attempts) == ("dead", "answered 500", 1)
    assert receiver.ids == [good.event_id, bad.event_id]
    with pytest.raises(NotFound):
        await room.deliveries.test("whk_none")


# --- Addresses ------------------------------------------------------------------------------------------------


def resolving(*answers: Sequence[str]) -> Callable[[str, int], Any]:
    """A resolver that gives these answers, one a question, the last one for ever; it counts in `asked`."""
    left = list(answers)

    async def resolver(host: str, port: int) -> Sequence[str]:
        resolver.asked.append(host)  # type: ignore[attr-defined]
        return left.pop(0) if len(left) > 1 else left[0]

    resolver.asked = []  # type: ignore[attr-defined]
    return resolver


async def test_a_name_that_resolves_to_a_private_address_later_is_not_reached(
    tmp_path: Path, receiver: Receiver
) -> None:
    resolver = resolving(["8.8.8.8"], ["127.0.0.1"])
    sender = partial(HttpSender, resolver=resolver)
    async with delivering(new_url("json-memory", tmp_path), timing=PATIENT, sender=sender) as (room, _):
        made = await room.webhooks.create(url=f"https://hooks.example:{receiver.port}/", tenant="acme")
        await emit(room)
        await wait_until(lambda: room.deliveries.attempts.counts["failed"])
        assert "found the address 127.0.0.1, expected a public address" in str((await only(room, made)).last_error)
    assert receiver.connections == 0
    assert len(resolver.asked) == 2  # type: ignore[attr-defined]


async def test_the_connection_goes_to_the_checked_address_and_the_name_stays_in_tls_and_host(tmp_path: Path) -> None:
    server, client = certificate(tmp_path, "hooks.example")
    resolver = resolving(["127.0.0.1"], ["127.0.0.1"], ["10.255.255.1"])
    async with receiving(server, host="hooks.example") as receiver:
        sender = partial(HttpSender, resolver=resolver, tls=client)
        async with delivering(new_url("json-memory", tmp_path), timing=PATIENT, sender=sender) as (room, _):
            made = await endpoint(room, receiver)
            id = await emit(room)
            assert (await ended(room, made)).state == "delivered"
        (arrived,) = receiver.arrived
        assert (arrived.id, arrived.sni) == (id, "hooks.example")
        assert arrived.headers["host"] == f"hooks.example:{receiver.port}"
    assert len(resolver.asked) == 2  # type: ignore[attr-defined]


@pytest.mark.parametrize("trusted", [True, False])
async def test_an_invalid_certificate_fails_the_attempt(tmp_path: Path, trusted: bool) -> None:
    server, client = certificate(tmp_path, "other.example")
    sender = partial(HttpSender, resolver=resolving(["127.0.0.1"]), tls=client if trusted else None)
    async with (
        receiving(server, host="hooks.example") as receiver,
        delivering(new_url("json-memory", tmp_path), timing=PATIENT, sender=sender) as (room, _),
    ):
        made = await endpoint(room, receiver)
        await emit(room)
        await wait_until(lambda: room.deliveries.attempts.counts["failed"])
        assert "certificate" in str((await only(room, made)).last_error).lower()
        assert receiver.arrived == []


async def test_the_next_address_is_tried_when_one_does_not_answer(tmp_path: Path, receiver: Receiver) -> None:
    sender = partial(HttpSender, resolver=resolving(["127.0.0.2", "127.0.0.1"]))
    async with delivering(new_url("json-memory", tmp_path), sender=sender) as (room, _):
        made = await endpoint(room, receiver, url=f"http://hooks.example:{receiver.port}/")
        await emit(room)
        assert (await ended(room, made)).attempts == 1


async def test_a_proxy_of_the_environment_is_ignored(
    room: Strongroom, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    made = await endpoint(room, receiver)
    await emit(room)
    assert (await ended(room, made)).attempts == 1


# --- Many at once ---------------------------------------------------------------------------------------------


async def test_an_endpoint_that_hangs_does_not_block_others(room: Strongroom, receiver: Receiver) -> None:
    receiver.answer = hang
    async with receiving() as good:
        await endpoint(room, receiver)
        for _ in range(30):
            await emit(room)
        made = await endpoint(room, good, tenant="globex")
        for _ in range(10):
            await emit(room, "globex")

        async def delivered() -> bool:
            return len((await room.deliveries.list(made.webhook.id, state="delivered")).items) == 10

        await wait_until(delivered)
        assert len(set(good.ids)) == 10
    assert receiver.most_inside == MAX_SENDING_EACH
    assert good.most_inside <= MAX_SENDING_EACH


async def test_many_events_are_each_delivered_once(tmp_path: Path, receiver: Receiver) -> None:
    # The sender is patient: what a busy machine answers late would be sent again, as it should be.
    async with delivering(new_url("sqlite", tmp_path)) as (room, _):
        for path in ("a", "b", "c"):
            await endpoint(room, receiver, url=f"{receiver.url}/{path}")
        ids = await asyncio.gather(*(emit(room, number=number) for number in range(100)))
        await wait_until(lambda: room.deliveries.attempts.counts["delivered"] == 300)
    assert sorted((one.path, one.id) for one in receiver.arrived) == sorted(
        (f"/hook/{path}", id) for id in ids for path in ("a", "b", "c")
    )


async def test_queued_deliveries_of_a_busy_endpoint_are_sent_once_it_has_room(
    tmp_path: Path, receiver: Receiver
) -> None:
    room_again = asyncio.Event()

    async def answer_later(writer: asyncio.StreamWriter) -> None:
        await room_again.wait()
        writer.write(OK)
        await writer.drain()

    receiver.answer = answer_later
    # A search that finds an endpoint busy puts its deliveries off for about the time that one attempt may take.
    patient = partial(HttpSender, total_timeout_s=3_600.0)
    async with delivering(new_url("sqlite", tmp_path), sender=patient) as (room, _):
        made = await endpoint(room, receiver)
        ids = [await emit(room, number=number) for number in range(3 * MAX_SENDING_EACH)]

        async def put_off() -> bool:
            now = utc_from_us(room.clock.now_us())
            return all(one.due_at and one.due_at > now for one in (await room.deliveries.list(made.webhook.id)).items)

        await wait_until(put_off)
        await wait_until(lambda: receiver.inside == MAX_SENDING_EACH)
        room_again.set()
        await wait_until(lambda: room.deliveries.attempts.counts["delivered"] == len(ids))
        assert sorted(receiver.ids) == sorted(ids)


# --- Nodes ----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["sqlite", "postgres", "firestore"])
def shared_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A store that several processes use at once."""
    return backend_of(request.param, tmp_path, request).new_url()


async def test_of_two_nodes_one_delivers_each_event(shared_url: str, receiver: Receiver) -> None:
    async with delivering(shared_url) as (one, store), delivering(shared_url, beside=store) as (two, _):
        await endpoint(one, receiver)
        ids = [await emit(node) for node in (one, two) * 5]
        await wait_until(
            lambda: one.deliveries.attempts.counts["delivered"] + two.deliveries.attempts.counts["delivered"] == 10
        )
        assert sorted(receiver.ids) == sorted(ids)


async def test_any_node_retries_a_failed_attempt(shared_url: str, receiver: Receiver) -> None:
    receiver.answers = [status(500)]
    async with delivering(shared_url, timing=replace(FAST, backoff_s=1.0)) as (one, store):
        made = await endpoint(one, receiver)
        id = await emit(one)
        await wait_until(lambda: one.deliveries.attempts.counts["failed"])
        await one.deliveries.close()
        async with delivering(shared_url, beside=store) as (two, _):
            assert (await ended(two, made)).attempts == 2
    assert receiver.ids == [id, id]


@pytest.mark.server
@pytest.mark.parametrize("when", ["before", "during"])
async def test_a_process_killed_between_commit_and_delivery_leaves_the_event_to_another(
    tmp_path: Path, receiver: Receiver, when: str
) -> None:
    url = new_url("sqlite", tmp_path)
    async with delivering(url) as (room, _):
        made = await endpoint(room, receiver)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.helpers.webhook_worker", url, when,
        stdout=asyncio.subprocess.PIPE, cwd=ROOT,
    )  # fmt: skip
    assert process.stdout is not None
    lines = [(await process.stdout.readline()).decode() for _ in range(1 if when == "before" else 2)]
    process.kill()
    await process.wait()
    ids = {line.split()[1] for line in lines}
    assert len(ids) == 1, lines
    async with delivering(url) as (room, _):
        # Its attempt may still be taken to be under way: the claim lapses first.
        done = await ended(room, made)
        assert (done.state, done.attempts) == ("delivered", 1)
        assert receiver.ids == [done.event_id] == [*ids]


async def test_a_node_that_stops_releases_its_unfinished_deliveries(tmp_path: Path, receiver: Receiver) -> None:
    url = new_url("sqlite", tmp_path)
    receiver.answers = [hang]
    with patch.object(deliveries, "CLOSE_TIMEOUT_S", 0.05):
        async with delivering(url, timing=replace(FAST, claim_margin_s=3_600)) as (room, _):
            made = await endpoint(room, receiver)
            id = await emit(room)
            await wait_until(lambda: receiver.inside == 1)
    async with delivering(url) as (room, _):
        done = await ended(room, made)
        assert (done.state, done.attempts) == ("delivered", 1), "the interrupted attempt does not count"
    assert receiver.ids == [id, id]


async def test_an_attempt_that_outlived_its_claim_does_not_overwrite_a_later_result(
    room: Strongroom, receiver: Receiver
) -> None:
    made = await endpoint(room, receiver)
    await emit(room)
    await ended(room, made)
    late = await only(room, made)
    await room.deliveries.redrive(late.id)
    done = await ended(room, made)
    await room.deliveries.attempts.record(late, None, SendResult(None, "too late"))
    assert await only(room, made) == done


async def test_deliveries_continue_after_the_store_was_unavailable(
    room: Strongroom, store: FaultyStore, receiver: Receiver
) -> None:
    made = await endpoint(room, receiver)
    id = await emit(room)
    await ended(room, made)
    second = event("key.leaked", "acme", {})
    await room.database.commit_counters([put(second)], room.clock.now_us())
    store.fault = lambda number, batch: Fault("before", Unavailable("the store is away"))
    before = len(store.batches)
    await wait_until(lambda: len(store.batches) > before + 2)
    store.fault = lambda number, batch: None
    await wait_until(lambda: set(receiver.ids) == {id, second.id})
    await wait_until(lambda: room.deliveries.attempts.counts["delivered"] == 2)
    found = (await room.deliveries.list(made.webhook.id)).items
    assert [(one.event_id, one.state, one.attempts) for one in found] == [
        (second.id, "delivered", 1), (id, "delivered", 1),
    ]  # fmt: skip


# --- Without httpx --------------------------------------------------------------------------------------------


async def test_without_httpx_endpoints_are_kept_and_nothing_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "httpx", None)
    async with delivering(new_url("json-memory", tmp_path)) as (room, _):
        made = await room.webhooks.create(url="https://203.0.114.7/", tenant="acme")
        await emit(room)
        with pytest.raises(ConfigError, match=re.escape("pip install 'strongroom[client]'")):
            await room.deliveries.test(made.webhook.id)
        assert (await room.deliveries.list(made.webhook.id)).items == []


def test_the_library_imports_without_httpx() -> None:
    code = "import sys; sys.modules['httpx'] = None; import strongroom.app, strongroom.webhooks.deliveries"
    subprocess.run([sys.executable, "-c", code], check=True)
