"""Retention, legal holds and redaction over HTTP."""

from __future__ import annotations

from tests.helpers.server_app import serving


async def test_legal_holds_are_placed_listed_and_lifted_and_block_redaction() -> None:
    async with serving() as served:
        key = await served.make_key(tenant="acme")
        placed = await served.post("/v1/audit/holds", {"tenant": "acme", "reason": "case 7", "collection": "api_keys"})
        assert placed.status == 201
        hold = placed.json
        assert (hold["tenant"], hold["reason"], hold["lifted_at"]) == ("acme", "case 7", None)
        subject = {"collection": "api_keys", "entity_id": key["id"], "reason": "asked"}
        refused = await served.post("/v1/audit/acme/redactions", subject)
        assert (refused.status, refused.code) == (409, "conflict")
        assert "case 7" in refused.json["detail"]
        assert (await served.get("/v1/audit/holds?active=true")).json["items"] == [hold]
        lifted = await served.post(f"/v1/audit/holds/{hold['id']}/lift", {"reason": "closed"})
        assert (lifted.status, lifted.json["lifted_because"]) == (200, "closed")
        assert (await served.get("/v1/audit/holds?active=true")).json["items"] == []
        again = await served.post(f"/v1/audit/holds/{hold['id']}/lift", {"reason": "closed"})
        assert again.status == 409
        done = await served.post("/v1/audit/acme/redactions", subject)
        assert (done.status, done.json["records"]) == (200, 1)
        items = (await served.get("/v1/audit?tenant=acme&action=create")).json["items"]
        (redacted,) = [item for item in items if item["collection"] == "api_keys"]
        assert (redacted["entity_id"], redacted["before"]) == ("", None)
        assert redacted["after"]["redacted"]["reason"] == "asked"


async def test_retention_is_shown_and_changed_and_the_floor_is_never_lowered() -> None:
    async with serving() as served:
        assert (await served.get("/v1/audit/retention")).json == {"tenant": None, "days": 90, "floor_days": 0}
        changed = await served.call("PATCH", "/v1/audit/acme/retention", b'{"days": 400, "floor_days": 183}')
        assert (changed.status, changed.json) == (200, {"tenant": "acme", "days": 400, "floor_days": 183})
        lower = await served.call("PATCH", "/v1/audit/acme/retention", b'{"floor_days": 90}')
        assert (lower.status, lower.json["errors"][0]["path"]) == (422, "floor_days")
        assert (await served.get("/v1/audit/acme/retention")).json["floor_days"] == 183
        auditor = await served.manager("auditor", "acme")
        assert (await served.get("/v1/audit/acme/retention", key=auditor)).status == 200
        assert (await served.get("/v1/audit/beta/retention", key=auditor)).status == 403
        assert (await served.get("/v1/audit/holds", key=auditor)).status == 403


async def test_only_an_administrator_of_all_tenants_changes_anything() -> None:
    async with serving() as served:
        bound = await served.manager("admin", "acme")
        calls = (
            ("POST", "/v1/audit/holds", b'{"reason": "r", "tenant": "acme"}'),
            ("POST", "/v1/audit/acme/redactions", b'{"user": "u", "reason": "r"}'),
            ("PATCH", "/v1/audit/acme/retention", b'{"days": 400}'),
            ("PATCH", "/v1/audit/retention", b'{"days": 400}'),
        )
        for method, path, body in calls:
            assert (await served.call(method, path, body, key=bound)).status == 403, path
        for method, path, body in (
            ("POST", "/v1/audit/holds", b'{"reason": "", "user": ""}'),
            ("POST", "/v1/audit/acme/redactions", b'{"reason": "r"}'),
            ("PATCH", "/v1/audit/acme/retention", b'{"days": 0}'),
        ):
            assert (await served.call(method, path, body)).status == 422, path
        assert (await served.get("/v1/audit/holds")).json["items"] == []
