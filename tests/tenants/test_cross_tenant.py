"""BDD.12.14.14: attempts to reach another tenant are denied on every store, and each is a security event."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from strongroom import Entity, Query, Strongroom
from strongroom.context import Context
from strongroom.entities import Aggregate, Where
from strongroom.errors import Denied
from strongroom.tenants import Role, User
from tests.helpers.server_app import TOKENS, serving
from tests.helpers.stores import rolling


class Note(Entity, collection="notes"):
    text: str


async def test_bdd_12_14_14_a_cross_tenant_access_attempt_is_denied_on_every_store(url: str) -> None:
    """Every operation of a caller of one tenant on another tenant's data: it is denied, changes nothing, is in the
    journal of the tenant that was asked for, with who asked and for what, and is counted."""
    async with Strongroom.open(url, entities=[Note]) as room:
        acme, database = room.tenant("acme"), room.database
        note = await acme.create(Note(id="n", text="theirs"))
        await room.tenant("evil").create(Note(id="n", text="own"))
        eve = Context("acme", "key:eve", {"tenant": "evil", "admin": True, "scope": "admin"}, "request-1")
        with_eve = room.tenant("acme", actor="key:eve", claims=eve.claims)

        async def planned(tx: Any) -> None:
            await tx.create(Note(text="x"))

        attempts: dict[str, Callable[[], Awaitable[Any]]] = {
            "get": lambda: database.get(eve, Note, "n"),
            "get of none": lambda: database.get_or_none(eve, Note, "nothing"),
            "list": lambda: database.find(eve, Note),
            "filter": lambda: database.find(eve, Note, Query(Where("text", "==", "theirs"))),
            "select": lambda: database.reads.select(eve, Note, Query()),
            "aggregate": lambda: database.aggregate(eve, Note, Aggregate("count")),
            "create": lambda: database.create(eve, Note(text="x")),
            "replace": lambda: database.replace(eve, Note(id="n", text="x")),
            "update": lambda: database.update(eve, Note, "n", {"text": "x"}),
            "delete": lambda: database.delete(eve, Note, "n"),
            "transaction": lambda: database.transaction(eve, planned),
            "handle": lambda: with_eve.get(Note, "n"),
            "role": lambda: database.create(eve, Role(id="owner", scopes=["admin"])),
            "user": lambda: database.create(eve, User(email="eve@example.com", roles=["owner"])),
            "key": lambda: room.keys.create(name="k", tenant="acme", context=eve_at("acme")),
            "quota": lambda: room.quotas.put(
                kind="tenant", tenant="acme", limits=[rolling("tokens", 1)], context=eve_at("evil")
            ),
            "webhook": lambda: room.webhooks.create(url="https://example.com/", tenant="acme", context=eve_at("evil")),
            "tenant": lambda: room.tenants.get("acme", context=eve_at("evil")),
            "audit": lambda: room.audit.list(tenant="acme", context=eve_at("evil")),
        }

        def eve_at(tenant: str) -> Context:
            return Context(tenant, eve.actor, eve.claims, eve.request_id)

        journal_before = len((await room.audit.list(tenant="acme", limit=1000)).items)
        for name, attempt in attempts.items():
            counted = sum(database.denials.cross_tenant.values())
            with pytest.raises(Denied) as denied:
                await attempt()
            assert "evil" in denied.value.message, (name, "it says whose caller it is")
            assert sum(database.denials.cross_tenant.values()) == counted + 1, (name, "it is counted")
        assert (await acme.get(Note, "n")) == note, "nothing was changed"
        assert len((await acme.find(Note)).items) == 1
        await database.denials.close()  # writes the counts
        records = (await room.audit.list(tenant="acme", limit=1000)).items
        events = [record for record in records if record.action == "deny"]
        assert len(records) - journal_before == len(events), "and nothing else was journalled"
        assert sum((record.after or {}).get("count", 1) for record in events) == len(attempts)
        assert {(record.actor, record.tenant) for record in events} == {("key:eve", "acme")}
        assert {record.collection for record in events} == {
            "notes", "roles", "users", "api_keys", "quotas", "webhooks", "tenants", "journal",
        }  # fmt: skip


async def test_bdd_12_14_14_over_http_every_route_that_names_another_tenant_is_denied_and_counted(url: str) -> None:
    async with serving(url) as served:
        key = await served.make_key(tenant="acme", limits=[TOKENS])
        made = await served.post("/v1/tenants/acme/users", {"email": "ann@example.com"})
        evil = await served.manager("admin", "evil")
        one = f"/v1/tenants/acme/users/{made.json['id']}"
        denials = served.room.database.denials
        for method, path, body in (
            ("GET", "/v1/tenants/acme/users", None),
            ("GET", one, None),
            ("POST", "/v1/tenants/acme/users", {"email": "eve@example.com"}),
            ("PUT", one, {"email": "eve@example.com"}),
            ("PATCH", one, {"display_name": "eve"}),
            ("DELETE", one, None),
            ("GET", "/v1/tenants/acme/users:watch", None),
            ("GET", "/v1/tenants/acme", None),
            ("POST", "/v1/keys", {"name": "k", "tenant": "acme"}),
            ("PUT", "/v1/quotas/tenant/acme", {"limits": [TOKENS]}),
            ("POST", "/v1/webhooks", {"url": "https://example.com/", "tenant": "acme"}),
            ("GET", "/v1/audit?tenant=acme", None),
        ):
            counted = sum(denials.cross_tenant.values())
            answer = await asyncio.wait_for(served.call(method, path, body, key=evil), 20)
            assert (answer.status, answer.code) == (403, "denied"), (method, path, answer)
            assert sum(denials.cross_tenant.values()) == counted + 1, (method, path)
        assert (await served.get(one)).json == made.json
        # What another tenant has is not even said to exist, where the path does not name the tenant.
        assert (await served.get(f"/v1/keys/{key['id']}", key=evil)).status == 404
        verified = await served.post("/v1/keys/verify", {"key": key["key"]}, key=evil)
        assert verified.json["code"] == "NOT_FOUND"
        events = (await served.get("/v1/audit?tenant=acme&action=deny&limit=1000")).json["items"]
        assert {event["collection"] for event in events} >= {"users", "tenants", "api_keys", "quotas", "webhooks"}
        assert "strongroom_cross_tenant_attempts_total" in (await served.get("/metrics")).answer.text


async def test_a_scope_that_is_too_small_is_a_security_event_too() -> None:
    async with serving() as served:
        key = await served.make_key(tenant="acme")
        reader = await served.manager("read", "acme")
        auditor = await served.make_key(tenant="acme", permissions=["strongroom:auditor"])
        for method, path, body in (
            ("POST", "/v1/keys/verify", {"key": key["key"]}),
            ("POST", "/v1/keys", {"name": "k"}),
            ("DELETE", f"/v1/keys/{key['id']}", None),
            ("POST", "/v1/writes", {"allowed": False, "reason": "x"}),
        ):
            answer = await served.call(method, path, body, key=reader)
            assert (answer.status, answer.code) == (403, "denied"), path
        assert (await served.get("/v1/keys", key=auditor["key"])).status == 403
        events = (await served.get("/v1/audit?tenant=acme&action=deny")).json["items"]
        assert {(event["after"]["operation"], event["collection"]) for event in events} == {
            ("POST", "/v1/keys/verify"), ("POST", "/v1/keys"), ("DELETE", "/v1/keys/{id}"), ("POST", "/v1/writes"),
            ("GET", "other"),
        }  # fmt: skip
        assert not served.room.database.denials.cross_tenant, "its own tenant"
        for _ in range(30):
            await served.post("/v1/keys", {"name": "k"}, key=reader)
        assert len((await served.get("/v1/audit?tenant=acme&action=deny")).json["items"]) == len(events), "bounded"
