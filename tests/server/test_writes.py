"""Writes off and suspended tenants over HTTP: what is refused, with which sentence, and what `/readyz` says."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.helpers.server_app import TOKENS, Served, serving


async def off(served: Served, **fields: Any) -> None:
    answer = await served.post("/v1/writes", {"allowed": False, "reason": "a rollback", **fields})
    assert answer.status == 200, answer


async def test_writes_are_turned_off_and_on_again() -> None:
    async with serving() as served:
        body = {"text": "x"}
        key = await served.make_key(tenant="acme", limits=[TOKENS])
        answer = await served.post("/v1/writes", {"allowed": False, "tenant": None, "reason": "a rollback"})
        assert answer.status == 200
        assert {**answer.json, "by": None, "changed_at": None} == {
            "tenant": None, "allowed": False, "usage": True, "reason": "a rollback", "by": None, "changed_at": None,
        }  # fmt: skip
        refused = await served.post(
            "/v1/tenants/acme/policies", {"policy_type": "t", "policy_name": "n", "rules": body}
        )
        assert (refused.status, refused.code) == (503, "writes_off")
        assert refused.json["detail"] == "writes of all tenants are off: a rollback"
        assert refused.headers["retry-after"]
        assert (await served.post("/v1/keys", {"name": "k"})).code == "writes_off"
        assert (await served.get(f"/v1/keys/{key['id']}")).status == 200
        assert (await served.get("/v1/audit?tenant=acme")).status == 200
        assert (await served.post("/v1/keys/verify", {"key": key["key"]})).json["valid"]
        assert (await served.post("/v1/usage", {"key": key["key"], "cost": {"tokens": 1}})).status == 200
        status = (await served.get("/v1/writes")).json
        assert (status["allowed"], status["usage"], status["items"], status["migration"]) == (False, True, [], None)
        assert (await served.post("/v1/writes", {"allowed": True})).json["allowed"] is True
        assert (await served.post("/v1/keys", {"name": "k"})).status == 201


async def test_with_usage_off_verifications_are_answered_with_503_and_writes_off() -> None:
    async with serving() as served:
        key = await served.make_key(tenant="acme", limits=[TOKENS])
        assert (await served.post("/v1/keys/verify", {"key": key["key"]})).json["valid"]
        await off(served, tenant="acme", usage=False)
        for path, body in (
            ("/v1/keys/verify", {"key": key["key"]}),
            ("/v1/keys/verify:batch", {"items": [{"key": key["key"]}]}),
            ("/v1/usage", {"key": key["key"], "cost": {"tokens": 1}}),
            ("/v1/usage:batch", {"items": [{"key": key["key"], "cost": {"tokens": 1}}]}),
            ("/v1/reservations", {"key": key["key"], "cost": {"tokens": 1}}),
        ):
            answer = await served.post(path, body)
            assert (answer.status, answer.code) == (503, "writes_off"), path
        assert [one["tenant"] for one in (await served.get("/v1/writes")).json["items"]] == ["acme"]


async def test_readyz_shows_that_writes_are_off_and_stays_ready() -> None:
    async with serving() as served:
        assert (await served.get("/readyz")).json["dependencies"]["writes"]["status"] == "ok"
        await served.make_key(tenant="acme")
        await served.make_key(tenant="other")
        await off(served, tenant="acme")
        await served.post("/v1/tenants/other/suspend", {"reason": "unpaid"})
        shown = (await served.get("/readyz")).json["dependencies"]["writes"]
        assert (shown["status"], shown["kind"]) == ("ok", "switch")
        assert (shown["details"]["tenants_off"], shown["details"]["tenants_suspended"]) == (1, 1)
        await off(served, usage=False)
        answer = await served.get("/readyz")
        shown = answer.json["dependencies"]["writes"]
        assert (answer.status, shown["status"]) == (200, "degraded")
        assert (shown["details"]["allowed"], shown["details"]["usage"]) == (False, False)
        assert shown["details"]["reason"] == "writes of all tenants are off: a rollback"
        scraped = (await served.get("/metrics")).answer.text.splitlines()
        for line in ("strongroom_writes_off 1.0", "strongroom_tenants_off 1.0", "strongroom_tenants_suspended 1.0"):
            assert line in scraped
        assert "details" not in (await served.get("/readyz", key=None)).json["dependencies"]["writes"]


async def test_only_administrators_of_all_tenants_turn_writes_off() -> None:
    async with serving() as served:
        own = await served.make_key(tenant="acme", permissions=["strongroom:admin"])
        reader = await served.make_key(tenant="*", permissions=["strongroom:write"])
        for key in (own, reader):
            answer = await served.post("/v1/writes", {"allowed": False, "reason": "x"}, key=key["key"])
            assert (answer.status, answer.code) == (403, "denied")
        assert (await served.get("/v1/writes", key=own["key"])).status == 200
        wrong = await served.post("/v1/writes", {"allowed": "no", "tenant": "*", "usage": 1, "x": 1})
        assert (wrong.status, sorted(wrong.paths)) == (422, ["allowed", "tenant", "usage", "x"])
        assert (await served.post("/v1/writes", {"allowed": False})).paths == ["reason"]
        assert (await served.post("/v1/writes", {"allowed": False, "reason": "x", "tenant": "acem"})).status == 404


async def test_a_suspended_tenants_keys_verify_as_disabled_on_every_path() -> None:
    async with serving() as served:
        limited = await served.make_key(tenant="acme", limits=[TOKENS])
        free = await served.make_key(tenant="acme")
        other = await served.make_key(tenant="other")
        for key in (limited, free, other):
            assert (await served.post("/v1/keys/verify", {"key": key["key"]})).json["valid"], "now it is in memory"
        assert (await served.post("/v1/tenants/acme/suspend", {"reason": "unpaid"})).status == 200
        for key in (limited, free):
            answer = (await served.post("/v1/keys/verify", {"key": key["key"]})).json
            assert (answer["valid"], answer["code"]) == (False, "DISABLED")
            assert answer["message"] == "the tenant 'acme' is suspended: unpaid"
            assert (await served.post("/v1/keys/verify", {"key": key["key"], "peek": True})).json["code"] == "DISABLED"
            held = (await served.post("/v1/reservations", {"key": key["key"], "cost": {"tokens": 1}})).json
            assert held["code"] == "DISABLED"
        batch = await served.post(
            "/v1/keys/verify:batch", {"items": [{"key": k["key"]} for k in (limited, other, free)]}
        )
        assert [one["code"] for one in batch.json["items"]] == ["DISABLED", "VALID", "DISABLED"]
        stats = await served.get("/stats", key=limited["key"])
        assert (stats.status, stats.code) == (403, "tenant_suspended")
        assert (await served.post("/v1/tenants/acme/resume")).status == 200
        assert (await served.post("/v1/keys/verify", {"key": limited["key"]})).json["valid"]


async def test_management_callers_of_a_suspended_tenant_are_refused_with_a_sentence() -> None:
    async with serving() as served:
        own = await served.make_key(tenant="acme", permissions=["strongroom:admin"])
        assert (await served.get("/v1/keys", key=own["key"])).status == 200
        await served.post("/v1/tenants/acme/suspend", {"reason": "unpaid"})
        for answer in (
            await served.get("/v1/keys", key=own["key"]),
            await served.post("/v1/keys", {"name": "k", "tenant": "acme"}, key=own["key"]),
            await served.post("/v1/keys/verify", {"key": own["key"]}, key=own["key"]),
        ):
            assert (answer.status, answer.code) == (403, "tenant_suspended")
            assert answer.json["detail"] == "the tenant 'acme' is suspended: unpaid"
        written = await served.post("/v1/keys", {"name": "k", "tenant": "acme"})
        assert (written.status, written.code) == (403, "tenant_suspended"), "nobody writes for a suspended tenant"
        assert (await served.post("/v1/tenants/acme/users", {"email": "ann@example.com"})).code == "tenant_suspended"
        assert (await served.get("/v1/keys?tenant=acme")).status == 200, "its data can still be read"
        await served.post("/v1/tenants/acme/resume")
        assert (await served.get("/v1/keys", key=own["key"])).status == 200


@pytest.mark.parametrize("limits", ["durable", "leased"])
async def test_a_suspension_reaches_cached_keys_and_leases_at_once(limits: str) -> None:
    async with serving(limits=limits) as served:
        key = await served.make_key(tenant="acme", limits=[TOKENS])
        for _ in range(20):
            assert (await served.post("/v1/keys/verify", {"key": key["key"]})).json["valid"]
            await asyncio.sleep(0)
        held = (await served.post("/v1/reservations", {"key": key["key"], "cost": {"tokens": 5}})).json
        assert held["valid"]
        await served.room.tenants.suspend("acme")
        assert (await served.post("/v1/keys/verify", {"key": key["key"]})).json["code"] == "DISABLED"
        settled = await served.post(f"/v1/reservations/{held['reservation_id']}/settle", {"cost": {"tokens": 3}})
        assert settled.status == 200, "what was used before is charged"
