"""`/v1/webhooks` and `/v1/deliveries`: authorisation, invalid input as problem documents, preconditions, retries."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
from prometheus_client.parser import text_string_to_metric_families

import strongroom.app
from strongroom.context import system_context
from strongroom.events.outbox import event
from strongroom.webhooks.deliveries import Deliveries
from strongroom.webhooks.signatures import verify_signature
from tests.helpers.server_app import Served, serving
from tests.helpers.waiting import wait_until
from tests.helpers.webhook_receiver import FAST, Receiver, receiving, status

URL = "https://203.0.114.7/hook"
FULL: dict[str, Any] = {
    "tenant": "acme",
    "url": URL,
    "events": ["limit.threshold", "key.leaked"],
    "thresholds": [75, 100],
    "min_window_s": 3600,
    "description": "on call",
    "enabled": True,
    "allow_private": False,
}


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with serving() as served:
        yield served


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as receiver:
        yield receiver


async def key_of(served: Served, tenant: str, *permissions: str) -> str:
    """The text of a management key of a tenant."""
    made = await served.make_key(tenant=tenant, permissions=[f"strongroom:{name}" for name in permissions])
    return str(made["key"])


async def made(served: Served, **fields: Any) -> dict[str, Any]:
    answer = await served.post("/v1/webhooks", {"url": URL, "tenant": "acme", **fields})
    assert answer.status == 201, answer
    return dict(answer.json)


async def test_a_webhook_is_created_with_every_field_and_its_secret_is_shown_once(served: Served) -> None:
    answer = await served.post("/v1/webhooks", FULL)
    assert answer.status == 201
    body = answer.json
    secret = body.pop("secret")
    assert secret.startswith("whsec_")
    assert {name: body[name] for name in FULL} == FULL
    assert answer.headers["etag"] == f'"{body["version"]}"'
    shown = await served.get(f"/v1/webhooks/{body['id']}")
    listed = await served.get("/v1/webhooks?tenant=acme")
    assert shown.json == body
    assert listed.json == {"items": [body], "next_cursor": None}
    assert (await served.get("/v1/webhooks?tenant=globex")).json["items"] == []
    for one in (shown, listed):
        assert "secret" not in one.answer.text
    same = await served.get(f"/v1/webhooks/{body['id']}", If_None_Match=shown.headers["etag"])
    assert same.status == 304


async def test_a_webhook_is_changed_and_deleted_under_if_match(served: Served) -> None:
    webhook = await made(served)
    path = f"/v1/webhooks/{webhook['id']}"
    old = f'"{webhook["version"]}"'
    changed = await served.call("PATCH", path, {"enabled": False}, If_Match=old)
    assert (changed.status, changed.json["enabled"], changed.json["url"]) == (200, False, URL)
    assert (await served.call("PATCH", path, {"enabled": True}, If_Match=old)).status == 412
    assert (await served.call("DELETE", path, If_Match=old)).status == 412
    assert (await served.call("DELETE", path, Idempotency_Key="d")).status == 204
    assert (await served.call("DELETE", path, Idempotency_Key="d")).status == 204
    assert (await served.get(path)).status == 404


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"url": "https://10.0.0.1/"}, "url"),
        ({"url": "https://169.254.169.254/latest/meta-data"}, "url"),
        ({"url": "https://[::ffff:127.0.0.1]/"}, "url"),
        ({"url": "https://2130706433/"}, "url"),
        ({"url": "https://localhost/"}, "url"),
        ({"url": "http://203.0.114.7/"}, "url"),
        ({"url": "https://me:pass-word@203.0.114.7/"}, "url"),
        ({"url": "https://169.254.169.254/", "allow_private": True}, "url"),
        ({"url": None}, "url"),
        ({"events": []}, "events"),
        ({"events": ["key.exploded"]}, "events"),
        ({"thresholds": [0]}, "thresholds.0"),
        ({"thresholds": list(range(1, 22))}, "thresholds"),
        ({"tenant": "x" * 129}, "tenant"),
        ({"secret": "whsec_short"}, "secret"),
        ({"enabled": "yes"}, "enabled"),
        ({"id": "whk_mine"}, "id"),
    ],
)
async def test_invalid_input_is_a_problem_document_that_names_the_field(
    served: Served, fields: dict[str, Any], path: str
) -> None:
    answer = await served.post("/v1/webhooks", {"url": URL, **fields})
    assert (answer.status, answer.paths) == (422, [path])
    assert "pass-word" not in answer.answer.text
    assert "whsec_short" not in answer.answer.text
    if "tenant" not in fields and "secret" not in fields and "id" not in fields:
        webhook = await made(served)
        changed = await served.call("PATCH", f"/v1/webhooks/{webhook['id']}", fields)
        assert (changed.status, changed.paths) == (422, [path])


async def test_scopes_and_tenants_decide_who_may_manage_webhooks(served: Served) -> None:
    reader = await key_of(served, "acme", "read")
    writer = await key_of(served, "acme", "write")
    local = await key_of(served, "acme", "admin")
    globex = await key_of(served, "globex", "write")
    everywhere = await key_of(served, "*", "write")
    own = (await served.post("/v1/webhooks", {"url": URL}, key=writer)).json
    assert own["tenant"] == "acme"  # its own, where none is named
    path = f"/v1/webhooks/{own['id']}"
    assert (await served.get(path, key=reader)).status == 200
    for method, where, body in (
        ("POST", "/v1/webhooks", {"url": URL}),
        ("PATCH", path, {"enabled": False}),
        ("DELETE", path, None),
        ("POST", f"{path}/test", None),
        ("POST", f"{path}/rotate-secret", None),
        ("POST", "/v1/deliveries/dlv_1/redrive", None),
    ):
        assert (await served.call(method, where, body, key=reader)).status == 403
        assert (await served.call(method, where, body, key=None)).status == 401
        if where != "/v1/webhooks":
            assert (await served.call(method, where, body, key=globex)).status == 404
    assert (await served.get(path, key=globex)).status == 404
    assert (await served.get(f"{path}/deliveries", key=globex)).status == 404
    assert (await served.get("/v1/webhooks", key=globex)).json["items"] == []
    for key in (writer, local, everywhere):
        private = {"url": "http://127.0.0.1:1/", "tenant": "acme", "allow_private": True}
        assert (await served.post("/v1/webhooks", private, key=key)).status == 403
        assert (await served.call("PATCH", path, {"allow_private": True}, key=key)).status == 403
        assert (await served.post("/v1/webhooks", {"url": URL, "tenant": "*"}, key=key)).status == 403
    assert (await served.post("/v1/webhooks", {"url": URL, "tenant": "globex"}, key=writer)).status == 403


async def test_a_retried_create_makes_no_second_webhook(served: Served) -> None:
    first = await served.post("/v1/webhooks", FULL, Idempotency_Key="i")
    again = await served.post("/v1/webhooks", FULL, Idempotency_Key="i")
    assert (again.status, again.json["id"], again.json["secret"]) == (201, first.json["id"], first.json["secret"])
    other = await served.post("/v1/webhooks", {**FULL, "description": "x"}, Idempotency_Key="i")
    assert other.status == 409


async def test_a_secret_is_rotated(served: Served) -> None:
    webhook = await made(served)
    path = f"/v1/webhooks/{webhook['id']}/rotate-secret"
    rotated = await served.post(path, {"overlap_s": 60})
    assert rotated.status == 200
    assert rotated.json["secret"] != webhook["secret"]
    assert rotated.json["previous_until"] is not None
    assert (await served.post(path)).json["previous_until"] is not None
    assert (await served.post(path, {"overlap_s": 0})).json["previous_until"] is None
    too_long = await served.post(path, {"overlap_s": 7 * 86_400 + 1})
    assert (too_long.status, too_long.paths) == (422, ["overlap_s"])
    assert (await served.post("/v1/webhooks/whk_none/rotate-secret")).status == 404


async def test_a_webhook_is_tested_and_its_deliveries_are_listed_and_redriven(
    served: Served, receiver: Receiver
) -> None:
    webhook = await made(served, url=receiver.url, allow_private=True)
    path = f"/v1/webhooks/{webhook['id']}"
    receiver.answers = [status(500)]
    dead = await served.post(f"{path}/test")
    assert (dead.status, dead.json["state"], dead.json["last_error"]) == (200, "dead", "answered 500")
    good = await served.post(f"{path}/test")
    assert (good.json["state"], good.json["last_status"]) == ("delivered", 200)
    verify_signature(webhook["secret"], receiver.arrived[1].headers, receiver.arrived[1].body)
    listed = (await served.get(f"{path}/deliveries")).json
    assert listed["items"] == [good.json, dead.json]
    assert (await served.get(f"{path}/deliveries?state=dead")).json["items"] == [dead.json]
    page = (await served.get(f"{path}/deliveries?limit=1")).json
    following = await served.get(f"{path}/deliveries?limit=1&cursor={page['next_cursor']}")
    assert following.json["items"] == [dead.json]
    wrong = await served.get(f"{path}/deliveries?state=lost")
    assert (wrong.status, wrong.paths) == (422, ["state"])
    one = f"/v1/deliveries/{dead.json['id']}"
    assert (await served.get(one)).json == dead.json
    redriven = await served.post(f"{one}/redrive")
    assert (redriven.status, redriven.json["state"], redriven.json["attempts"]) == (200, "pending", 0)

    async def delivered() -> bool:
        return bool((await served.get(one)).json["state"] == "delivered")

    await wait_until(delivered)
    assert receiver.ids[0] == receiver.ids[2]
    for missing in ("/v1/deliveries/dlv_none", "/v1/webhooks/whk_none/deliveries"):
        assert (await served.get(missing)).status == 404
    for missing in ("/v1/deliveries/dlv_none/redrive", "/v1/webhooks/whk_none/test"):
        assert (await served.post(missing)).status == 404


async def test_a_delivery_of_another_tenants_event_is_seen_by_the_endpoints_owner_only(
    served: Served, receiver: Receiver
) -> None:
    webhook = await made(served, url=receiver.url, tenant="*", allow_private=True)
    acme = await key_of(served, "acme", "admin")
    leaked = event("key.leaked", "acme", {"key_id": "key_1"})
    await served.room.database.transaction(system_context("acme"), lambda tx: tx.create(leaked))
    await wait_until(lambda: receiver.arrived)
    (delivery,) = (await served.get(f"/v1/webhooks/{webhook['id']}/deliveries")).json["items"]
    path = f"/v1/deliveries/{delivery['id']}"
    assert (await served.get(path)).status == 200
    assert (await served.get(path, key=acme)).status == 404
    assert (await served.post(f"{path}/redrive", key=acme)).status == 404


async def test_metrics_count_attempts_by_result_and_pending_deliveries(receiver: Receiver) -> None:
    timing = replace(FAST, backoff_s=3_600.0, count_every_s=0.0)
    with patch.object(strongroom.app, "Deliveries", partial(Deliveries, timing=timing)):
        async with serving() as served:
            found = await attempts(served)
            assert found == {"delivered": 0, "failed": 0, "dead": 0, "waiting": 0}, "told before it ever happened"
            hook = await made(served, url=receiver.url, allow_private=True)

            receiver.answers = [status(500), status(500)]
            await emit(served)
            await emit(served)
            await wait_until(lambda: attempts_are(served, failed=2, waiting=2))

            await emit(served)
            assert (await served.post(f"/v1/webhooks/{hook['id']}/test")).status == 200
            await wait_until(lambda: attempts_are(served, delivered=2, failed=2, waiting=2))

            receiver.answer = status(410)  # gone: the endpoint is disabled, what waits for it is given up once redriven
            await emit(served)
            await wait_until(lambda: attempts_are(served, delivered=2, failed=2, dead=1, waiting=2))


async def emit(served: Served) -> None:
    cause = event("key.leaked", "acme", {"key_id": "key_1"})
    await served.room.database.transaction(system_context("acme"), lambda tx: tx.create(cause))


async def attempts(served: Served) -> dict[str, float]:
    """What the metrics say of webhooks."""
    text = (await served.get("/metrics", key=None)).answer.text
    samples = {s.name + "".join(s.labels.values()): s for f in text_string_to_metric_families(text) for s in f.samples}
    found = {
        name: samples[f"strongroom_webhook_attempts_total{name}"].value for name in ("delivered", "failed", "dead")
    }
    webhooks = [sample for name, sample in samples.items() if name.startswith("strongroom_webhook")]
    assert len(webhooks) == 4, "by nothing that grows with what there is"
    return {**found, "waiting": samples["strongroom_webhook_deliveries_waiting"].value}


async def attempts_are(served: Served, **expected: int) -> bool:
    return {name: count for name, count in (await attempts(served)).items() if count} == expected


async def test_an_invalid_url_is_reported_with_every_other_problem(served: Served) -> None:
    wrong = {"thresholds": [0], "events": ["x"]}
    for url in ("https://10.0.0.1/x", "nonsense", "http://example.com/x"):
        answer = await served.post("/v1/webhooks", {"url": url, **wrong})
        assert (answer.status, sorted(answer.paths)) == (422, ["events", "thresholds.0", "url"])
    hook = await made(served)
    answer = await served.call("PATCH", f"/v1/webhooks/{hook['id']}", {"url": "nonsense", **wrong})
    assert (answer.status, sorted(answer.paths)) == (422, ["events", "thresholds.0", "url"])
    private = await made(served, url="http://10.0.0.1/x", allow_private=True)
    moved = await served.call("PATCH", f"/v1/webhooks/{private['id']}", {"url": "http://10.0.0.2/x"})
    assert moved.status == 200
