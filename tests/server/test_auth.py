"""Authorisation over HTTP: scopes, tenants, and keys that change while they are in use."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import httpx
import pytest
import time_machine

from strongroom.errors import ConfigError
from strongroom.server import adminkey
from strongroom.server.auth import MAX_CALLERS, Scope, scope_of
from tests.helpers.server_app import ADMIN, TOKENS, serving
from tests.helpers.stores import STORES, new_url


@pytest.mark.parametrize(
    "header",
    [
        "",
        "Bearer",
        "Bearer ",
        "Basic dXNlcjpwYXNz",
        "Bearer unknown",
        "Bearer \xff\xfe",
        "bearer" + " " * 600 + "x",
        "x" * 9000,
    ],
)
async def test_without_a_known_key_every_path_of_v1_answers_401(header: str) -> None:
    async with serving() as served:
        as_it_is: Any = header.encode("latin-1")
        for method, path in [
            ("GET", "/v1/keys"), ("POST", "/v1/keys"), ("POST", "/v1/keys/verify"), ("POST", "/v1/usage"),
            ("GET", "/v1/tenants/acme/policies"), ("GET", "/v1/nothing"), ("DELETE", "/v1/keys/admin"),
        ]:  # fmt: skip
            answer = await served.call(method, path, b"{}", key=None, Authorization=as_it_is)
            assert answer.status == 401, (method, path, answer)
            assert answer.headers["www-authenticate"].startswith('Bearer realm="strongroom"')


async def test_an_ordinary_key_manages_nothing_even_with_a_wildcard_permission() -> None:
    async with serving() as served:
        for permissions in ([], ["chat:write"], ["*"], ["strong*"], ["s*"]):
            text = (await served.make_key(permissions=permissions))["key"]
            assert (await served.get("/v1/keys", key=text)).status == 403, permissions
            assert (await served.verify(text, key=text)).status == 403, permissions
    assert scope_of(["*", "strongroom:*", "strongroom"]) is Scope.NONE


async def test_each_scope_includes_the_lower_scopes_and_no_more() -> None:
    async with serving() as served:
        subject = await served.make_key()
        reads = [("GET", "/v1/keys"), ("GET", f"/v1/keys/{subject['id']}"), ("GET", f"/v1/keys/{subject['id']}/stats"),
                 ("GET", "/v1/tenants/acme/policies")]  # fmt: skip
        writes = [
            ("POST", "/v1/keys", {"name": "n"}), ("PATCH", f"/v1/keys/{subject['id']}", {"name": "n"}),
            ("POST", f"/v1/keys/{subject['id']}/rotate", None), ("POST", f"/v1/keys/{subject['id']}/disable", None),
            ("POST", f"/v1/keys/{subject['id']}/enable", None), ("POST", "/v1/keys/verify", {"key": "x"}),
            ("POST", "/v1/keys/verify:batch", {"items": [{"key": "x"}]}),
            ("POST", "/v1/usage", {"key_id": subject["id"], "cost": {"tokens": 1}}),
            ("PUT", "/v1/tenants/acme/policies/p", {"policy_type": "t", "policy_name": "n"}),
            ("PATCH", "/v1/tenants/acme/policies/p", {"enabled": False}),
            ("DELETE", "/v1/tenants/acme/policies/p", None),
        ]  # fmt: skip
        for scope in ("read", "write", "admin"):
            text = await served.manager(scope)
            for method, path in reads:
                assert (await served.call(method, path, key=text)).status == 200, (scope, path)
            for method, path, body in writes:
                answer = await served.call(method, path, body, key=text)
                assert (answer.status == 403) == (scope == "read"), (scope, method, path, answer)


async def test_a_caller_cannot_grant_more_than_it_has() -> None:
    async with serving() as served:
        writer, admin = await served.manager("write"), await served.manager("admin")
        plain = (await served.make_key())["id"]
        reader = await served.make_key(permissions=["strongroom:read"], tenant="acme")
        everywhere = await served.make_key(tenant="*")
        for fields in (
            {"permissions": ["strongroom:read"]}, {"permissions": ["a", "strongroom:admin"]}, {"tenant": "*"},
        ):  # fmt: skip
            assert (await served.post("/v1/keys", {"name": "n", **fields}, key=writer)).status == 403, fields
            assert (await served.post("/v1/keys", {"name": "n", **fields}, key=admin)).status == 201, fields
        for unknown in ("strongroom:anything", "strongroom:*"):  # no scope is called so
            for caller in (writer, admin):
                made = await served.post("/v1/keys", {"name": "n", "permissions": [unknown]}, key=caller)
                assert (made.status, made.paths) == (422, ["permissions"]), unknown
        escalation = {"permissions": ["strongroom:admin"]}
        assert (await served.call("PATCH", f"/v1/keys/{plain}", escalation, key=writer)).status == 403
        for key in (reader, everywhere):
            for method, path, body in (
                ("PATCH", "", {"name": "mine"}), ("DELETE", "", None), ("POST", "/rotate", None),
                ("POST", "/disable", None), ("POST", "/enable", None),
            ):  # fmt: skip
                answer = await served.call(method, f"/v1/keys/{key['id']}{path}", body, key=writer)
                assert answer.status == 403, (method, path, answer)
        assert (await served.get("/v1/keys", key=reader["key"])).status == 200, "it was touched"


async def test_every_route_keeps_a_tenants_management_key_in_its_tenant() -> None:
    async with serving() as served:
        theirs = await served.make_key(tenant="theirs", limits=[TOKENS])
        await served.call("PUT", "/v1/tenants/theirs/policies/p", {"policy_type": "t", "policy_name": "n"})
        ours = await served.manager("admin", "ours")
        for method, path, body in (
            ("GET", f"/v1/keys/{theirs['id']}", None), ("GET", f"/v1/keys/{theirs['id']}/stats", None),
            ("PATCH", f"/v1/keys/{theirs['id']}", {"name": "x"}), ("DELETE", f"/v1/keys/{theirs['id']}", None),
            ("POST", f"/v1/keys/{theirs['id']}/rotate", None), ("POST", f"/v1/keys/{theirs['id']}/disable", None),
            ("POST", "/v1/usage", {"key_id": theirs["id"], "cost": {"tokens": 1}}),
            ("POST", "/v1/usage", {"key": theirs["key"], "cost": {"tokens": 1}}),
        ):  # fmt: skip
            answer = await served.call(method, path, body, key=ours)
            assert answer.status == 404, (method, path, answer)  # not 403: whether it exists is not theirs to know
        for method, path, body in (
            ("GET", "/v1/tenants/theirs/policies", None), ("GET", "/v1/tenants/theirs/policies/p", None),
            ("GET", "/v1/tenants/theirs/policies:watch", None), ("GET", "/v1/tenants/%74heirs/policies", None),
            ("POST", "/v1/tenants/theirs/policies", {"policy_type": "t", "policy_name": "n"}),
            ("PUT", "/v1/tenants/theirs/policies/p", {"policy_type": "t", "policy_name": "n"}),
            ("PATCH", "/v1/tenants/theirs/policies/p", {"enabled": False}),
            ("DELETE", "/v1/tenants/theirs/policies/p", None),
            ("POST", "/v1/keys", {"name": "n", "tenant": "theirs"}), ("POST", "/v1/keys", {"name": "n", "tenant": "*"}),
        ):  # fmt: skip
            answer = await served.call(method, path, body, key=ours)
            assert answer.status == 403, (method, path, answer)
        for name in ("theirs", None):
            listed = await served.get("/v1/keys" + (f"?tenant={name}" if name else ""), key=ours)
            assert theirs["id"] not in [item["id"] for item in listed.json["items"]]
        assert (await served.verify(theirs["key"], key=ours)).json["code"] == "NOT_FOUND"
        batch = await served.post("/v1/keys/verify:batch", {"items": [{"key": theirs["key"]}]}, key=ours)
        assert batch.json["items"][0]["code"] == "NOT_FOUND"
        stats = await served.get(f"/v1/keys/{theirs['id']}/stats")
        assert stats.json["count"] == 0, "a stranger debited the key"
        assert (await served.make_key(tenant="ours"))["tenant"] == "ours"
        made = await served.post("/v1/keys", {"name": "n"}, key=ours)
        assert made.json["tenant"] == "ours", "a bound caller's key is its own tenant's"


async def test_a_denial_of_another_tenant_is_journalled_with_its_actor_and_request() -> None:
    async with serving() as served:
        made = await served.make_key(tenant="ours", permissions=["strongroom:read"])
        await served.post("/v1/tenants/theirs/policies", {"policy_type": "t", "policy_name": "n"})
        answer = await served.get("/v1/tenants/theirs/policies", key=made["key"], X_Request_Id="trace-17")
        assert answer.status == 403
        assert answer.json["request_id"] == answer.headers["x-request-id"] == "trace-17"
        records = (await served.room.store.changes(None, tenant="theirs")).records[1:]
        assert [(r.action, r.actor, r.request_id) for r in records] == [("deny", f"key:{made['id']}", "trace-17")]


@pytest.mark.parametrize("path", ["/v1/keys", "/v1/tenants/acme/policies", "/v1/keys/verify", "/v1/keys/leaked"])
async def test_a_management_key_with_allowed_addresses_works_only_from_these(path: str) -> None:
    async with serving(proxies=[ip_network("10.0.0.0/8")]) as served:
        made = await served.make_key(allowed_ips=["192.0.2.0/24"], permissions=["strongroom:write"], tenant="*")

        async def status(peer: str | None, *forwarded: str) -> int:
            headers = [("Authorization", f"Bearer {made['key']}"), *(("X-Forwarded-For", one) for one in forwarded)]
            async with httpx.AsyncClient(transport=served.transport(peer), base_url="http://strongroom") as client:
                if path.startswith("/v1/keys/"):
                    body = b"[]" if path.endswith("leaked") else b'{"key": "x"}'
                    return (await client.post(path, content=body, headers=headers)).status_code
                return (await client.get(path, headers=headers)).status_code

        for _ in range(2):  # unknown to the server, then known
            assert await status("192.0.2.7") == 200
            assert await status("::ffff:192.0.2.7") == 200
            assert await status("198.51.100.1") == 403
            assert await status(None) == 403
            assert await status("10.1.1.1", "192.0.2.7") == 200
            assert await status("10.1.1.1", "203.0.113.1, 192.0.2.7", "10.2.2.2") == 200
            assert await status("10.1.1.1", "192.0.2.7, 203.0.113.1") == 403
            assert await status("10.1.1.1", "nonsense") == 403
            assert await status("198.51.100.1", "192.0.2.7") == 403, "believed a header that anyone can send"


async def test_a_key_cannot_lock_itself_out_with_its_allowed_addresses() -> None:
    async with serving() as served:
        for outside in (["192.0.2.1"], ["192.0.2.0/24", "::1"]):
            refused = await served.call("PATCH", "/v1/keys/admin", {"allowed_ips": outside})
            assert (refused.status, refused.paths) == (422, ["allowed_ips"]), refused
            assert "127.0.0.1" in refused.json["errors"][0]["message"]
        for within in (["127.0.0.0/8", "192.0.2.1"], []):
            assert (await served.call("PATCH", "/v1/keys/admin", {"allowed_ips": within})).status == 200
        assert (await served.get("/v1/keys")).status == 200


async def test_new_allowed_addresses_of_a_key_apply_at_once() -> None:
    async with serving() as served:
        made = await served.make_key(tenant="*", permissions=["strongroom:read"])
        assert (await served.get("/v1/keys", key=made["key"])).status == 200
        await served.call("PATCH", f"/v1/keys/{made['id']}", {"allowed_ips": ["192.0.2.1"]})
        refused = await served.get("/v1/keys", key=made["key"])
        assert refused.status == 403
        assert "127.0.0.1" in refused.json["detail"]
        await served.call("PATCH", f"/v1/keys/{made['id']}", {"allowed_ips": []})
        assert (await served.get("/v1/keys", key=made["key"])).status == 200


@pytest.mark.parametrize("kind", STORES)
async def test_the_last_administrators_key_cannot_be_removed_over_http(kind: str, tmp_path: Path) -> None:
    async with serving(new_url(kind, tmp_path)) as served:
        other = await served.make_key(tenant="acme", permissions=["strongroom:admin"])  # of one tenant only
        disabled = await served.make_key(tenant="*", permissions=["strongroom:admin"])
        await served.post(f"/v1/keys/{disabled['id']}/disable")
        past = "2020-01-01T00:00:00Z"
        for act in (
            served.call("DELETE", "/v1/keys/admin"),
            served.call("DELETE", "/v1/keys/admin?purge=true"),
            served.post("/v1/keys/admin/disable"),
            served.call("PATCH", "/v1/keys/admin", {"permissions": ["strongroom:write"]}),
            served.call("PATCH", "/v1/keys/admin", {"expires_at": past}),
        ):
            refused = await act
            assert (refused.status, refused.code) == (409, "conflict"), refused
            assert "last administrator of all tenants" in refused.json["detail"]
        for action in ("disable", "delete", "purge"):
            bulk = await served.post("/v1/keys:bulk", {"action": action, "ids": ["admin", other["id"]]})
            assert [failure["id"] for failure in bulk.json["failed"]] == ["admin"], bulk
        assert (await served.call("PATCH", "/v1/keys/admin", {"description": "ours"})).status == 200
        await served.post(f"/v1/keys/{disabled['id']}/enable")
        assert (await served.call("DELETE", "/v1/keys/admin")).status == 204


async def test_two_administrators_that_remove_each_other_leave_one() -> None:
    async with serving() as served:
        other = await served.make_key(tenant="*", permissions=["strongroom:admin"])
        answers = await asyncio.gather(
            served.call("DELETE", f"/v1/keys/{other['id']}"),
            served.call("DELETE", "/v1/keys/admin", key=other["key"]),
        )
        assert sorted(answer.status for answer in answers) == [204, 409]


async def test_a_management_key_that_is_disabled_deleted_or_rotated_is_refused_at_once_here() -> None:
    async with serving() as served:
        for act in ("disable", "rotate", "delete"):
            made = await served.make_key(permissions=["strongroom:write"])
            assert (await served.verify("x", key=made["key"])).status == 200
            if act == "delete":
                assert (await served.call("DELETE", f"/v1/keys/{made['id']}")).status == 204
            else:
                assert (await served.post(f"/v1/keys/{made['id']}/{act}")).status == 200
            assert (await served.verify("x", key=made["key"])).status == 401, act
            assert (await served.get("/v1/keys", key=made["key"])).status == 401, act


async def test_a_management_key_that_loses_its_permission_loses_it_at_once() -> None:
    async with serving() as served:
        made = await served.make_key(permissions=["strongroom:write"])
        assert (await served.verify("x", key=made["key"])).status == 200
        await served.call("PATCH", f"/v1/keys/{made['id']}", {"permissions": ["strongroom:read"]})
        assert (await served.verify("x", key=made["key"])).status == 403


async def test_a_management_key_expires_to_the_microsecond_although_it_is_cached() -> None:
    moment = datetime(2030, 1, 1, tzinfo=UTC)
    with time_machine.travel(moment - timedelta(milliseconds=400), tick=False) as clock:
        async with serving() as served:
            made = await served.make_key(permissions=["strongroom:write"], expires_at=moment.isoformat())
            assert (await served.verify("x", key=made["key"])).status == 200
            clock.move_to(moment - timedelta(microseconds=1))
            assert (await served.verify("x", key=made["key"])).status == 200
            clock.move_to(moment)
            assert (await served.verify("x", key=made["key"])).status == 401
            assert (await served.get("/v1/keys", key=made["key"])).status == 401
            clock.move_to(moment - timedelta(seconds=1))  # the clock is set back: what it says now is what counts
            assert (await served.verify("x", key=made["key"])).status == 200


async def test_the_previous_secret_of_a_management_key_works_until_its_overlap_ends() -> None:
    moment = datetime(2030, 1, 1, tzinfo=UTC)
    with time_machine.travel(moment, tick=False) as clock:
        async with serving() as served:
            made = await served.make_key(permissions=["strongroom:write"])
            await served.post(f"/v1/keys/{made['id']}/rotate", {"overlap_s": 60})
            assert (await served.verify("x", key=made["key"])).status == 200
            clock.shift(timedelta(seconds=61))
            assert (await served.verify("x", key=made["key"])).status == 401


async def test_unknown_bearer_tokens_leave_nothing_in_memory() -> None:
    async with serving() as served:
        before = await served.room.store.changes("end")
        callers = served.app.services.authenticator._callers
        for number in range(300):
            assert (await served.verify("x", key=f"guess number {number}")).status == 401
        assert len(callers) == 0
        assert (await served.room.store.changes("end")).cursor == before.cursor
        assert MAX_CALLERS <= 100_000


async def test_the_administrators_key_of_the_configuration_wins_over_what_is_stored() -> None:
    async with serving() as served:
        other = "another-administrator's-key-of-enough-characters"
        await asyncio.gather(*(adminkey.ensure(served.room, other) for _ in range(8)))
        assert (await served.get("/v1/keys", key=other)).status == 200
        assert (await served.get("/v1/keys", key=ADMIN)).status == 401
        await served.post("/v1/keys/admin/disable", key=other)
        await served.call("PATCH", "/v1/keys/admin", {"permissions": []}, key=other)
        await adminkey.ensure(served.room, other)
        assert (await served.get("/v1/keys", key=other)).status == 200, "not made usable again"


async def test_an_administrators_key_is_made_once_and_only_if_there_is_none() -> None:
    async with serving() as served:
        assert await adminkey.ensure(served.room, None) is None
        await served.room.keys.delete("admin")  # as whoever has the store may
        made = [text for text in await asyncio.gather(*(adminkey.ensure(served.room, None) for _ in range(5))) if text]
        assert len(made) == 1, "several processes at once each showed a key"
        assert (await served.get("/v1/keys", key=made[0])).status == 200


async def test_an_administrators_key_that_is_another_keys_text_stops_the_start() -> None:
    async with serving() as served:
        text = (await served.make_key())["key"]
        with pytest.raises(ConfigError, match="another key has this secret"):
            await adminkey.ensure(served.room, text)
