"""Tenants over HTTP: who may do what, hostile names, preconditions, exports, deletions, and seed 003's collections."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote

import pytest

from strongroom.access import ALL_TENANTS
from strongroom.context import MAX_TENANT_BYTES, name_problem
from strongroom.server.routes import tenants as tenant_routes
from strongroom.testing.storage.samples import HOSTILE_NAMES
from tests.helpers.server_app import TOKENS, serving


def path_of(name: str, rest: str = "") -> str:
    """A tenant's path. Dots are encoded too: else a client would take `..` for the parent."""
    return f"/v1/tenants/{quote(name, safe='').replace('.', '%2E')}{rest}"


async def test_a_tenant_is_created_changed_suspended_resumed_and_deleted() -> None:
    async with serving() as served:
        served.room.tenants.deletions.settle_s = 0
        made = await served.post("/v1/tenants", {"id": "acme", "name": "Acme Inc.", "plan": "gold"})
        assert made.status == 201, made
        assert made.headers["location"] == "/v1/tenants/acme"
        assert (made.json["id"], made.json["status"], made.json["plan"]) == ("acme", "active", "gold")
        again = await served.post("/v1/tenants", {"id": "acme"})
        assert (again.status, again.code) == (409, "already_exists")
        shown = await served.get("/v1/tenants/acme")
        assert shown.json == made.json
        etag = shown.headers["etag"]
        assert (await served.get("/v1/tenants/acme", If_None_Match=etag)).status == 304
        changed = await served.call("PATCH", "/v1/tenants/acme", {"plan": "silver"}, If_Match=etag)
        assert (changed.status, changed.json["plan"], changed.json["name"]) == (200, "silver", "Acme Inc.")
        assert (await served.call("PATCH", "/v1/tenants/acme", {"plan": "x"}, If_Match=etag)).status == 412
        suspended = await served.post("/v1/tenants/acme/suspend", {"reason": "unpaid"})
        assert (suspended.json["status"], suspended.json["reason"]) == ("suspended", "unpaid")
        assert (await served.get("/v1/tenants?status=suspended")).json["items"] == [suspended.json]
        resumed = await served.post("/v1/tenants/acme/resume")
        assert (resumed.json["status"], resumed.json["reason"]) == ("active", None)
        assert (await served.post("/v1/tenants/acme/suspend")).json["reason"] is None, "a reason is not needed"
        gone = await served.call("DELETE", "/v1/tenants/acme?reason=the%20end")
        assert gone.status == 200, gone
        assert (gone.json["tenant"], gone.json["reason"], gone.json["counts"]) == ("acme", "the end", {})
        assert (await served.get("/v1/tenants/acme")).status == 404
        assert (await served.call("DELETE", "/v1/tenants/acme")).status == 404


async def test_names_in_use_are_listed_and_the_name_may_stand_in_the_path() -> None:
    async with serving() as served:
        assert (await served.make_key(tenant="with keys"))["tenant"] == "with keys"
        assert (await served.post("/v1/tenants/with%20data/users", {"email": "ann@example.com"})).status == 201
        assert (await served.post("/v1/tenants/made", {"name": "Made"})).status == 201
        assert (await served.post("/v1/tenants/bare")).status == 201
        assert (await served.post("/v1/tenants/one", {"id": "two"})).paths == ["id"]
        found: list[Any] = []
        cursor = ""
        while True:
            page = (await served.get(f"/v1/tenants?limit=2{cursor}")).json
            found += page["items"]
            if page["next_cursor"] is None:
                break
            cursor = f"&cursor={page['next_cursor']}"
        assert [item["id"] for item in found] == ["bare", "made", "with data", "with keys"]
        implicit = await served.get("/v1/tenants/with%20keys")
        assert (implicit.json["version"], implicit.json["created_at"], implicit.json["status"]) == (0, None, "active")
        assert "etag" not in implicit.headers
        made = await served.call("PATCH", "/v1/tenants/with%20keys", {"plan": "gold"})
        assert made.json["version"] > 0


async def test_a_hostile_name_works_in_every_path_or_gets_a_problem() -> None:
    async with serving() as served:
        served.room.tenants.deletions.settle_s = 0
        taken = []
        for name in HOSTILE_NAMES:
            made = await served.post("/v1/tenants", {"id": name})
            if name == ALL_TENANTS or name_problem(name, MAX_TENANT_BYTES):
                assert (made.status, made.paths) == (422, ["id"]), (name, made)
                continue
            taken.append(name)
            assert made.status == 201, (name, made)
            assert (await served.get(path_of(name))).json["id"] == name
            assert (await served.post(path_of(name, "/suspend"), {"reason": "x"})).json["status"] == "suspended"
            assert (await served.post(path_of(name, "/resume"))).json["status"] == "active"
            assert (await served.post(path_of(name, "/users"), {"email": "ann@example.com"})).status == 201
            exported = await served.get(path_of(name, "/export"))
            assert json.loads(exported.answer.text.splitlines()[0])["tenant"] == name
        assert len(taken) > len(HOSTILE_NAMES) // 2
        listed = (await served.get("/v1/tenants?limit=1000")).json["items"]
        assert [item["id"] for item in listed] == sorted(taken)
        for name in taken:
            gone = await served.call("DELETE", path_of(name))
            assert (gone.json["tenant"], gone.json["counts"]) == (name, {"users": 1})
        assert (await served.get("/v1/tenants")).json["items"] == []


@pytest.mark.parametrize("name", ["*", " a", "a\x00", "x" * 129, ""])
async def test_a_name_that_no_tenant_can_have_gets_a_problem(name: str) -> None:
    async with serving() as served:
        refused = await served.post("/v1/tenants", {"id": name, "contact_email": "no"})
        assert (refused.status, set(refused.paths)) == (422, {"id", "contact_email"})
        if name:
            for method, rest in (("GET", ""), ("PATCH", ""), ("DELETE", ""), ("POST", "/suspend"), ("GET", "/export")):
                answer = await served.call(method, path_of(name, rest), {} if method == "PATCH" else None)
                assert answer.status in (404, 422), (method, rest, answer)


async def test_wrong_input_names_every_problem() -> None:
    async with serving() as served:
        await served.post("/v1/tenants", {"id": "acme"})
        wrong = {"contact_email": 5, "region": "?", "plan": "", "status": "suspended", "version": 3, "x": 1}
        refused = await served.call("PATCH", "/v1/tenants/acme", wrong)
        assert refused.paths == ["contact_email", "plan", "region", "status", "version", "x"]
        assert (await served.post("/v1/tenants/acme/suspend", {"reason": "", "x": 1})).paths == ["reason", "x"]
        assert (await served.post("/v1/tenants/acme/resume", {"x": 1})).paths == ["x"]
        assert (await served.get("/v1/tenants?limit=0&status=gone")).paths == ["limit", "status"]
        assert (await served.get("/v1/tenants?cursor=x")).paths == ["cursor"]
        assert (await served.post("/v1/tenants", b"[]")).status == 422
        assert (await served.call("DELETE", "/v1/tenants/acme?reason=")).paths == ["reason"]


async def test_only_administrators_of_the_platform_change_tenants() -> None:
    async with serving() as served:
        for name in ("acme", "other"):
            await served.post("/v1/tenants", {"id": name})
        own = await served.manager("admin", "acme")
        writer, reader = await served.manager("write"), await served.manager("read")
        assert (await served.get("/v1/tenants/acme", key=own)).json["id"] == "acme"
        assert [item["id"] for item in (await served.get("/v1/tenants", key=own)).json["items"]] == ["acme"]
        assert (await served.get("/v1/tenants/other", key=own)).status == 403
        assert (await served.get("/v1/tenants/nobody", key=own)).status == 403, "whether it exists is not told"
        assert (await served.get("/v1/tenants/acme/export", key=own)).status == 200
        assert (await served.get("/v1/tenants/other/export", key=own)).status == 403
        assert (await served.get("/v1/tenants/acme/export", key=reader)).status == 403
        assert len((await served.get("/v1/tenants", key=reader)).json["items"]) == 2
        for key in (own, writer, reader):
            for method, path, given in (
                ("POST", "/v1/tenants", {"id": "third"}),
                ("POST", "/v1/tenants/third", None),
                ("PATCH", "/v1/tenants/acme", {"plan": "x"}),
                ("POST", "/v1/tenants/acme/suspend", {"reason": "x"}),
                ("POST", "/v1/tenants/acme/resume", None),
                ("DELETE", "/v1/tenants/acme", None),
            ):
                answer = await served.call(method, path, given, key=key)
                assert (answer.status, answer.code) == (403, "denied"), (method, path)
        assert (await served.get("/v1/tenants/acme")).json["status"] == "active"
        denials = (await served.get("/v1/audit?action=deny&collection=tenants")).json["items"]
        assert {record["entity_id"] for record in denials} >= {"other"}


async def test_a_repeated_call_with_an_idempotency_key_gets_the_first_answer() -> None:
    async with serving() as served:
        served.room.tenants.deletions.settle_s = 0
        first = await served.post("/v1/tenants", {"id": "acme", "plan": "gold"}, Idempotency_Key="1")
        again = await served.post("/v1/tenants", {"plan": "gold", "id": "acme"}, Idempotency_Key="1")
        assert (again.status, again.json) == (201, first.json)
        assert (await served.post("/v1/tenants", {"id": "acme"}, Idempotency_Key="1")).status == 409
        suspended = await served.post("/v1/tenants/acme/suspend", {"reason": "x"}, Idempotency_Key="2")
        await served.post("/v1/tenants/acme/resume")
        assert (
            await served.post("/v1/tenants/acme/suspend", {"reason": "x"}, Idempotency_Key="2")
        ).json == suspended.json
        assert (await served.get("/v1/tenants/acme")).json["status"] == "active"
        gone = await served.call("DELETE", "/v1/tenants/acme", Idempotency_Key="3")
        again = await served.call("DELETE", "/v1/tenants/acme", Idempotency_Key="3")
        assert (again.status, again.json) == (200, gone.json)


async def test_an_export_is_streamed_as_json_lines() -> None:
    async with serving() as served:
        await served.post("/v1/tenants", {"id": "acme"})
        for number in range(300):
            user = {"email": f"u{number}@example.com", "metadata": {"x": "y" * 500}}
            assert (await served.post("/v1/tenants/acme/users", user)).status == 201
        await served.make_key(tenant="acme", limits=[TOKENS])
        answer = await served.get("/v1/tenants/acme/export")
        assert answer.headers["content-type"] == "application/x-ndjson"
        assert "content-length" not in answer.headers
        lines = [json.loads(line) for line in answer.answer.text.splitlines()]
        assert lines[-1]["type"] == "end"
        assert lines[-1]["counts"]["users"] == 300
        assert (await served.get("/v1/tenants/nobody/export")).status == 404


async def test_a_deletion_that_takes_long_is_accepted_and_completed_later(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving() as served:
        served.room.tenants.deletions.settle_s = 0
        await served.make_key(tenant="acme")
        monkeypatch.setattr(tenant_routes, "DELETE_WITHIN_S", 0.0)
        accepted = await served.call("DELETE", "/v1/tenants/acme?reason=x")
        assert (accepted.status, accepted.json["status"]) == (202, "deleting")
        assert (await served.call("PATCH", "/v1/tenants/acme", {"plan": "x"})).status == 409
        monkeypatch.setattr(tenant_routes, "DELETE_WITHIN_S", 60.0)
        assert (await served.call("DELETE", "/v1/tenants/acme")).json["counts"] == {"api_keys": 1}


GOOD = {
    "users": {"email": "Ann@Example.com", "display_name": "Ann", "roles": ["owner"]},
    "service_accounts": {"name": "importer", "roles": ["owner"]},
    "roles": {"id": "owner", "scopes": ["read", "write"], "permissions": ["costs:read"]},
    "configurations": {"id": "billing.currency", "value": {"code": "EUR"}},
    "cloud_accounts": {"provider": "aws", "account_id": "123456789012", "credentials": "s3cret"},
}
WRONG = {
    "users": ({"email": "x", "status": "gone", "roles": ["1"], "age": 3}, ["age", "email", "roles.0", "status"]),
    "service_accounts": ({"roles": "x", "status": 1}, ["name", "roles", "status"]),
    "roles": ({"scopes": ["root"], "permissions": ["strongroom:admin"]}, ["id", "permissions.0", "scopes.0"]),
    "configurations": ({"id": "/", "value": 5, "schema_version": 0}, ["id", "schema_version", "value"]),
    "cloud_accounts": (
        {"provider": "aws", "account_id": "1", "role_arn": "x", "client_id": "y"},
        ["account_id", "client_id", "role_arn"],
    ),
}


@pytest.mark.parametrize("collection", GOOD)
async def test_schema_validation_rejects_invalid_payloads_with_detailed_errors(collection: str) -> None:
    """Seed 003, section 8.1, over HTTP: all errors at once, each with what was expected."""
    async with serving() as served:
        made = await served.post(f"/v1/tenants/acme/{collection}", GOOD[collection])
        assert made.status == 201, made
        assert "s3cret" not in made.answer.text
        fields, paths = WRONG[collection]
        refused = await served.post(f"/v1/tenants/acme/{collection}", fields)
        assert (refused.status, refused.code, refused.paths) == (422, "invalid_input", paths)
        assert all("expected" in e["message"] or "is" in e["message"] for e in refused.json["errors"])
        assert (await served.get(f"/v1/tenants/acme/{collection}")).json["items"] == [made.json]


@pytest.mark.parametrize("collection", GOOD)
async def test_bdd_12_14_14_a_cross_tenant_access_attempt_is_denied(collection: str) -> None:
    async with serving() as served:
        made = await served.post(f"/v1/tenants/acme/{collection}", GOOD[collection])
        other = await served.manager("admin", "other")
        one = f"/v1/tenants/acme/{collection}/{made.json['id']}"
        for method, path, given in (
            ("GET", f"/v1/tenants/acme/{collection}", None),
            ("GET", one, None),
            ("POST", f"/v1/tenants/acme/{collection}", GOOD[collection]),
            ("PUT", one, GOOD[collection]),
            ("PATCH", one, {}),
            ("DELETE", one, None),
        ):
            answer = await served.call(method, path, given, key=other)
            assert (answer.status, answer.code) == (403, "denied"), (method, path)
        assert (await served.get(one)).json == made.json
        denials = (await served.get(f"/v1/audit?tenant=acme&action=deny&collection={collection}")).json["items"]
        assert denials, "the attempt is in the journal of the tenant that was asked for"


async def test_a_writer_cannot_give_itself_a_wider_role() -> None:
    async with serving() as served:
        writer, admin = await served.manager("write", "acme"), await served.manager("admin", "acme")
        role = {"id": "mine", "scopes": ["admin"]}
        assert (await served.post("/v1/tenants/acme/roles", role, key=writer)).status == 403
        assert (await served.call("PUT", "/v1/tenants/acme/roles/mine", role, key=writer)).status == 403
        assert (await served.post("/v1/tenants/acme/roles", role, key=admin)).status == 201
        assert (await served.call("PATCH", "/v1/tenants/acme/roles/mine", {"scopes": []}, key=writer)).status == 403
        assert (await served.call("DELETE", "/v1/tenants/acme/roles/mine", key=writer)).status == 403
        # A user's roles are its rights at sign-in.
        assert (await served.post("/v1/tenants/acme/users", GOOD["users"], key=writer)).status == 403
        assert (await served.post("/v1/tenants/acme/users", GOOD["users"], key=admin)).status == 201
