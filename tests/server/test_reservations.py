"""Reservations over HTTP: their life cycle, retries, invalid input as problem documents; and batches of verifications,
which are decided in order."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from strongroom import Strongroom
from strongroom.keys.verification import Verification
from tests.helpers.server_app import TOKENS, serving
from tests.helpers.stores import rolling


async def test_a_reservation_is_made_extended_and_settled() -> None:
    async with serving() as served:
        made = await served.make_key(limits=[TOKENS])
        answer = await served.post("/v1/reservations", {"key": made["key"], "cost": {"tokens": 100}, "ttl_s": 30})
        assert answer.status == 200
        assert (answer.json["valid"], answer.json["state"], answer.json["limits"][0]["reserved"]) == (True, "open", 100)
        path = f"/v1/reservations/{answer.json['reservation_id']}"
        answer = await served.post(f"{path}/extend", {"ttl_s": 60, "cost": {"tokens": 200}, "used": {"tokens": 50}})
        assert (answer.json["charged"], answer.json["limits"][0]["reserved"]) == ({"tokens": 50}, 150)
        assert (await served.post(f"{path}/extend")).status == 200
        for _ in range(2):
            answer = await served.post(f"{path}/settle", {"cost": {"tokens": 1_200}})
            assert (answer.status, answer.json["state"], answer.json["charged"]) == (200, "settled", {"tokens": 1_200})
            assert answer.json["limits"][0]["used"] == 1_200
        assert (await served.post(f"{path}/settle", {"cost": {"tokens": 1}})).code == "conflict"
        assert (await served.post(f"{path}/release")).status == 409
        assert (await served.post(f"{path}/extend")).status == 409
        denied = await served.post("/v1/reservations", {"key": made["key"], "cost": {"tokens": 1}})
        assert (denied.status, denied.json["code"], denied.json["reservation_id"]) == (200, "USAGE_EXCEEDED", None)


async def test_a_retried_reservation_is_created_once() -> None:
    async with serving() as served:
        made = await served.make_key(limits=[TOKENS])
        body = {"key": made["key"], "cost": {"tokens": 100}}
        answers = await asyncio.gather(
            *(served.post("/v1/reservations", body, Idempotency_Key="once") for _ in range(8))
        )
        (id,) = {answer.json["reservation_id"] for answer in answers}
        assert {answer.answer.content for answer in answers} == {answers[0].answer.content}
        stats = await served.get(f"/v1/keys/{made['id']}/stats")
        assert stats.json["limits"][0]["reserved"] == 100
        other = {**body, "cost": {"tokens": 101}}
        assert (await served.post("/v1/reservations", other, Idempotency_Key="once")).status == 409
        assert (await served.post(f"/v1/reservations/{id}/release")).json["state"] == "released"


async def test_money_is_settled_to_its_last_digit() -> None:
    async with serving() as served:
        budget = {"resource": "cost", "limit": 10, "window": {"kind": "total"}}
        made = await served.make_key(limits=[budget])
        body = b'{"key": "%s", "cost": {"cost": 2.000000001}}' % made["key"].encode()
        id = (await served.post("/v1/reservations", body)).json["reservation_id"]
        answer = await served.post(f"/v1/reservations/{id}/settle", b'{"cost": {"cost": 1.123456789}}')
        assert str(answer.json["limits"][0]["used"]) == "1.123456789"


@pytest.mark.parametrize(
    ("body", "paths"),
    [
        ({}, ["key"]),
        (
            {"key": 5, "cost": {"tokens": -1, "concurrency": -1}, "ttl_s": 0, "ip": "x", "colour": 1},
            ["colour", "cost.concurrency", "cost.tokens", "ip", "key", "ttl_s"],
        ),
        ({"key": "a", "ttl_s": 86_401}, ["ttl_s"]),
        ({"key": "a", "ttl_s": "60", "cost": []}, ["cost", "ttl_s"]),
    ],
)
async def test_every_problem_of_a_reservation_is_reported_at_once(body: dict[str, Any], paths: list[str]) -> None:
    async with serving() as served:
        answer = await served.post("/v1/reservations", body)
        assert (answer.status, answer.paths) == (422, paths), answer


@pytest.mark.parametrize(
    ("action", "body", "paths"),
    [
        ("settle", {}, ["cost"]),
        ("settle", {"cost": {"tokens": "x", "concurrency": 1}, "more": 1},
         ["cost.concurrency", "cost.tokens", "more"]),
        ("extend", {"ttl_s": -1, "cost": 5, "used": {"tokens": -1}}, ["cost", "ttl_s", "used.tokens"]),
        ("extend", {"used": {"concurrency": 1}}, ["used.concurrency"]),
    ],
)  # fmt: skip
async def test_every_problem_of_an_extension_or_settlement_is_reported_at_once(
    action: str, body: dict[str, Any], paths: list[str]
) -> None:
    async with serving() as served:
        made = await served.make_key(limits=[TOKENS])
        id = (await served.post("/v1/reservations", {"key": made["key"]})).json["reservation_id"]
        answer = await served.post(f"/v1/reservations/{id}/{action}", body)
        assert (answer.status, answer.paths) == (422, paths), answer


@pytest.mark.parametrize("id", ["rsv_nothing", "rsl_nothing", "x", "%00", "a%2Fb", "x" * 2_000, "%F0%9F%94%91"])
async def test_an_unknown_reservation_is_404(id: str) -> None:
    async with serving() as served:
        for action, body in (("settle", {"cost": {"tokens": 1}}), ("extend", {}), ("release", None)):
            answer = await served.post(f"/v1/reservations/{id}/{action}", body)
            assert answer.status in (404, 422), answer


async def test_another_tenants_reservation_is_404_and_a_reader_is_denied() -> None:
    async with serving() as served:
        made = await served.make_key(tenant="acme", limits=[TOKENS])
        globex, reader = await served.manager("write", "globex"), await served.manager("read")
        body = {"key": made["key"], "cost": {"tokens": 5}}
        assert (await served.post("/v1/reservations", body, key=globex)).json["code"] == "NOT_FOUND"
        assert (await served.post("/v1/reservations", body, key=reader)).status == 403
        id = (await served.post("/v1/reservations", body)).json["reservation_id"]
        for action, more in (("settle", {"cost": {"tokens": 1}}), ("extend", {}), ("release", None)):
            hidden = await served.post(f"/v1/reservations/{id}/{action}", more, key=globex)
            unknown = await served.post(f"/v1/reservations/{id}x/{action}", more, key=globex)
            assert (hidden.status, hidden.json["detail"]) == (404, unknown.json["detail"].replace(f"{id}x", id))
            assert (await served.post(f"/v1/reservations/{id}/{action}", more, key=reader)).status == 403
        stats = await served.get(f"/v1/keys/{made['id']}/stats")
        assert (stats.json["limits"][0]["reserved"], stats.json["limits"][0]["recorded"]) == (5, 0)


# --- Verifications in batches -------------------------------------------------------------------------------------


async def test_a_batch_of_verifications_is_decided_in_the_order_given() -> None:
    """Keys that are known and keys that have to be read first, of which some were made a moment ago."""
    async with serving() as served:
        for _ in range(25):
            made = await served.make_key(limits=[{**TOKENS, "limit": 10}], tenant="acme")
            items = [{"key": made["key"], "cost": {"tokens": tokens}} for tokens in (8, 5, 2, 1)]
            answer = await served.post("/v1/keys/verify:batch", {"items": items})
            assert [item["valid"] for item in answer.json["items"]] == [True, False, True, False]


@pytest.mark.parametrize("limits", ["durable", "leased"])
async def test_a_batch_of_keys_that_share_a_limit_is_decided_in_the_order_given(limits: Any) -> None:
    async with Strongroom.open("json://:memory:", limits=limits) as room:
        await room.quotas.put(kind="tenant", tenant="acme", limits=[rolling("tokens", 100)])
        made = [await room.keys.create(name="k", tenant="acme", limits=[rolling("tokens", 60)]) for _ in range(4)]
        await room.keys.verify(made[1].text, cost={"tokens": 1})
        asks = [{"text": one.text, "cost": {"tokens": 40}} for one in made]
        commits = room.ledger.retries
        answers = await room.keys.verify_many(asks)
        assert [answer.valid for answer in answers] == [True, True, False, False]
        assert room.ledger.retries == commits


async def test_a_batch_decides_a_changed_key_by_its_current_state(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Strongroom.open("json://:memory:") as room:
        made = [await room.keys.create(name="k", limits=[rolling("tokens", 10)]) for _ in range(2)]
        free = await room.keys.create(name="without limits")
        for one in made:
            await room.keys.verify(one.text)
        asks = [{"text": one.text} for one in (*made, free)] + [{"text": "unknown"}]
        changed = room.keys.cache.changed
        monkeypatch.setattr(room.keys.cache, "changed", lambda id: None)  # as on a node that has not heard of it yet
        await room.keys.disable(made[0].key.id)
        answers: list[Verification] = await room.keys.verify_many(asks)
        assert [answer.code for answer in answers] == ["DISABLED", "VALID", "VALID", "NOT_FOUND"]
        monkeypatch.setattr(room.keys.cache, "changed", changed)


async def test_a_batch_checks_models_and_routes() -> None:
    async with serving() as served:
        made = await served.make_key(allowed_models=["big-*"], limits=[{**TOKENS, "models": ["big-1"], "limit": 5}])
        items = [{"key": made["key"], "cost": {"tokens": 4}, "model": model} for model in ("big-1", "big-1", "big-2")]
        answer = await served.post("/v1/keys/verify:batch", {"items": [*items, {"key": made["key"]}]})
        codes = [item["code"] for item in answer.json["items"]]
        assert codes == ["VALID", "USAGE_EXCEEDED", "VALID", "INSUFFICIENT_PERMISSIONS"]
