"""`/v1/keys`: create, show, list, change, rotate, delete; statistics."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import pytest

from tests.helpers.server_app import TOKENS, serving

FULL: dict[str, Any] = {
    "name": "billing worker",
    "tenant": "acme",
    "user_id": "u1",
    "permissions": ["chat:write"],
    "expires_at": "2037-01-01T00:00:00Z",
    "metadata": {"model": "m", "ratio": 0.1},
    "allowed_ips": ["10.0.0.0/8"],
    "limits": [
        TOKENS,
        {"resource": "requests", "limit": 60, "window": {"kind": "anchored", "seconds": 60}},
        {
            "resource": "images",
            "limit": 5,
            "window": {"kind": "calendar", "unit": "month", "timezone": "Europe/Berlin"},
        },
        {"resource": "cost", "limit": 12.5, "window": {"kind": "total"}},
    ],
}


async def test_a_key_is_created_with_every_field_and_its_secret_is_shown_once() -> None:
    async with serving() as served:
        made = await served.post("/v1/keys", FULL)
        assert made.status == 201
        body = made.json
        text = body.pop("key")
        assert {name: body[name] for name in FULL} == json.loads(json.dumps(FULL), parse_float=Decimal)
        assert made.headers["etag"] == f'"{body["version"]}"'
        shown = await served.get(f"/v1/keys/{body['id']}")
        assert shown.json == body
        listed = await served.get("/v1/keys?tenant=acme&user_id=u1")
        assert listed.json == {"items": [body], "next_cursor": None}
        for answer in (shown, listed):
            assert text not in answer.answer.text
            assert not {"hash", "sealed", "previous_hash", "key"} & set(shown.json)


async def test_money_keeps_all_its_digits() -> None:
    async with serving() as served:
        limit = b'{"resource": "cost", "limit": 123456789.123456789, "window": {"kind": "total"}}'
        made = await served.post("/v1/keys", b'{"name": "n", "limits": [' + limit + b"]}")
        assert made.json["limits"][0]["limit"] == Decimal("123456789.123456789")
        answer = await served.post(
            "/v1/keys/verify", b'{"key": "' + made.json["key"].encode() + b'", "cost": {"cost": 0.000000001}}'
        )
        assert answer.json["limits"][0]["remaining"] == Decimal("123456789.123456788")


async def test_every_problem_of_a_new_key_is_reported_at_once() -> None:
    wrong = {
        "name": "", "tenant": 5, "user_id": 7, "permissions": ["white space"], "expires_at": 1893456000,
        "metadata": [], "allowed_ips": ["10.0.0.0/99"], "colour": "red",
        "limits": [{"resource": "Tokens", "limit": -1, "window": {"kind": "rolling", "seconds": 0}}],
    }  # fmt: skip
    async with serving() as served:
        answer = await served.post("/v1/keys", wrong)
        assert answer.status == 422
        paths = {path.split(".")[0] for path in answer.paths}
        assert paths == set(wrong), answer
        assert {"limits.0.resource", "limits.0.limit", "limits.0.window.seconds"} <= set(answer.paths)


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"expires_at": "2030-01-01T00:00:00"}, "expires_at"),
        ({"expires_at": "soon"}, "expires_at"),
        ({"limits": [{**TOKENS, "limit": True}]}, "limits.0.limit"),
        ({"limits": [{**TOKENS, "limit": "1000"}]}, "limits.0.limit"),
        ({"limits": [{**TOKENS, "limit": 0.5}]}, "limits.0.limit"),
        ({"limits": [{**TOKENS, "limit": 10**30}]}, "limits.0.limit"),
        ({"limits": [TOKENS, TOKENS]}, "limits"),
        ({"prefix": "Not A Prefix"}, "prefix"),
        ({"metadata": {"x": "y" * 20_000}}, "metadata"),
        ({"context": "x"}, "context"),
        ({"id": "mine"}, "id"),
        ({"hash": "x"}, "hash"),
    ],
)
async def test_an_invalid_field_is_named(fields: dict[str, Any], path: str) -> None:
    async with serving() as served:
        answer = await served.post("/v1/keys", {"name": "n", **fields})
        assert answer.status == 422, answer
        assert [p for p in answer.paths if p.startswith(path)] == answer.paths != [], answer
        key = await served.make_key()
        changed = await served.call("PATCH", f"/v1/keys/{key['id']}", fields)
        assert changed.status == 422, changed


async def test_a_change_keeps_other_fields_and_checks_if_match() -> None:
    async with serving() as served:
        made = await served.make_key(**FULL)
        path = f"/v1/keys/{made['id']}"
        changed = await served.call("PATCH", path, {"name": "other", "user_id": None}, If_Match=f'"{made["version"]}"')
        assert changed.status == 200
        assert (changed.json["name"], changed.json["user_id"]) == ("other", None)
        assert changed.json["limits"] == made["limits"]
        assert changed.json["version"] > made["version"]
        for stale in (f'"{made["version"]}"', '"0"', '"x"', 'W/"5"'):
            for method, route, body in (
                ("PATCH", path, {"name": "no"}),
                ("DELETE", path, None),
                ("POST", path + "/rotate", None),
            ):
                answer = await served.call(method, route, body, If_Match=stale)
                assert (answer.status, answer.code) == (412, "precondition_failed"), (method, stale, answer)
        both = f'"{made["version"]}", "{changed.json["version"]}"'
        assert (await served.call("PATCH", path, {"name": "third"}, If_Match=both)).status == 200
        assert (await served.call("PATCH", path, {"name": "fourth"}, If_Match="*")).status == 200
        assert (await served.call("PATCH", path, {"name": "x"}, If_Match="17")).status == 422
        assert (await served.get(path)).json["name"] == "fourth"


async def test_an_unchanged_key_is_answered_304() -> None:
    async with serving() as served:
        made = await served.make_key()
        path = f"/v1/keys/{made['id']}"
        again = await served.get(path, If_None_Match=f'"{made["version"]}"')
        assert (again.status, again.answer.content) == (304, b"")
        assert (await served.get(path, If_None_Match='"1"')).status == 200


async def test_a_page_leads_to_the_next_and_newest_come_first() -> None:
    async with serving() as served:
        made = [(await served.make_key(tenant="acme"))["id"] for _ in range(5)]
        found: list[str] = []
        path = "/v1/keys?tenant=acme&limit=2"
        cursor = ""
        for _ in range(3):
            page = (await served.get(path + cursor)).json
            found += [item["id"] for item in page["items"]]
            cursor = f"&cursor={page['next_cursor']}"
        assert found == made[::-1]
        assert page["next_cursor"] is None


@pytest.mark.parametrize(
    ("query", "paths"),
    [("limit=0", ["limit"]), ("limit=1001&cursor=x&colour=red", ["colour", "limit"]), ("cursor=x", ["cursor"])],
)
async def test_an_invalid_list_request_is_refused(query: str, paths: list[str]) -> None:
    async with serving() as served:
        answer = await served.get(f"/v1/keys?{query}")
        assert (answer.status, answer.paths) == (422, paths)


async def test_a_key_is_rotated_disabled_enabled_and_deleted() -> None:
    async with serving() as served:
        made = await served.make_key(limits=[TOKENS])
        path, old = f"/v1/keys/{made['id']}", made["key"]
        await served.verify(old, cost={"tokens": 400})
        rotated = (await served.post(f"{path}/rotate", {"overlap_s": 3600})).json
        assert rotated["id"] == made["id"]
        assert rotated["previous_until"] is not None
        new = rotated["key"]
        assert new != old
        for text in (old, new):
            answer = await served.verify(text, cost={"tokens": 100})
            assert answer.json["valid"], "the old secret works through its overlap"
        assert answer.json["limits"][0]["used"] == 600, "both texts share the limits"
        assert (await served.post(f"{path}/rotate")).status == 200
        assert (await served.verify(new)).json["code"] == "NOT_FOUND"
        current = (await served.post(f"{path}/rotate", {})).json["key"]
        for _ in range(2):  # idempotent
            assert not (await served.post(f"{path}/disable")).json["enabled"]
        assert (await served.verify(current)).json["code"] == "DISABLED"
        assert (await served.post(f"{path}/enable")).json["enabled"]
        assert (await served.verify(current)).json["code"] == "VALID"
        assert (await served.call("DELETE", path)).status == 204
        assert (await served.verify(current)).json["code"] == "NOT_FOUND"
        for method, route in (("GET", path), ("DELETE", path), ("GET", path + "/stats"), ("POST", path + "/disable")):
            assert (await served.call(method, route)).status == 404
        body: Any
        for body in ({"overlap_s": -1}, {"overlap_s": "60"}, {"overlap_s": 10**9}, {"overlap": 5}, []):
            assert (await served.post("/v1/keys/admin/rotate", body)).status == 422, body


async def test_a_retried_write_with_its_idempotency_key_happens_once() -> None:
    async with serving() as served:
        first, again = [await served.post("/v1/keys", FULL, Idempotency_Key="k1") for _ in range(2)]
        assert (first.status, again.status) == (201, 201)
        assert first.json == again.json, "the repeat gives the same key and text"
        assert len((await served.get("/v1/keys?tenant=acme")).json["items"]) == 1
        other = await served.post("/v1/keys", {**FULL, "name": "other"}, Idempotency_Key="k1")
        assert (other.status, other.code) == (409, "conflict")
        path = f"/v1/keys/{first.json['id']}"
        rotated = [(await served.post(f"{path}/rotate", Idempotency_Key="k2")).json["key"] for _ in range(2)]
        assert rotated[0] == rotated[1]
        match = {"If_Match": (await served.get(path)).headers["etag"]}
        changed = [await served.call("PATCH", path, {"name": "x"}, Idempotency_Key="k3", **match) for _ in range(2)]
        assert [c.status for c in changed] == [200, 200], "the repeat meets the version that its own first call made"
        assert changed[0].json == changed[1].json
        removed = [await served.call("DELETE", path, Idempotency_Key="k4") for _ in range(2)]
        assert [r.status for r in removed] == [204, 204]
        assert (await served.call("DELETE", path, Idempotency_Key="k5")).status == 404
        for wrong in ("", "x" * 256):
            assert (await served.post("/v1/keys", FULL, Idempotency_Key=wrong)).status == 422


async def test_statistics_show_the_usage() -> None:
    async with serving() as served:
        made = await served.make_key(limits=[TOKENS], tenant="acme")
        await served.verify(made["key"], cost={"tokens": 300, "images": 2})
        await served.verify(made["key"], cost={"tokens": 100})
        stats = (await served.get(f"/v1/keys/{made['id']}/stats")).json
        assert (stats["count"], stats["expired"], stats["tenant"]) == (2, False, "acme")
        assert stats["totals"] == {"images": 2, "tokens": 400}
        assert stats["last_used_at"] is not None
        (limit,) = stats["limits"]
        assert (limit["used"], limit["remaining"], limit["window"]) == (400, 600, TOKENS["window"])


async def test_a_batch_is_answered_in_order_and_an_invalid_item_debits_nothing() -> None:
    async with serving() as served:
        made = await served.make_key(limits=[TOKENS])
        ask = {"key": made["key"], "cost": {"tokens": 400}}
        answer = await served.post("/v1/keys/verify:batch", {"items": [ask, {"key": "unknown"}, ask, ask]})
        codes = [item["code"] for item in answer.json["items"]]
        assert codes == ["VALID", "NOT_FOUND", "VALID", "USAGE_EXCEEDED"]
        assert [i["limits"][0]["used"] for i in answer.json["items"] if i["limits"]] == [400, 800, 800]
        wrong = await served.post(
            "/v1/keys/verify:batch",
            {"items": [{**ask, "cost": {"tokens": 1}}, {"key": 5, "cost": {"tokens": -1}}, 7], "x": 1},
        )
        assert wrong.paths == ["items.1.cost.tokens", "items.1.key", "items.2", "x"]
        body: Any
        for body in ({}, {"items": []}, {"items": {}}, {"items": [ask] * 1001}):
            assert (await served.post("/v1/keys/verify:batch", body)).status == 422
        stats = (await served.get(f"/v1/keys/{made['id']}/stats")).json
        assert stats["totals"] == {"tokens": 800}
        once = {"items": [{**ask, "cost": {"tokens": 10}}] * 2}
        for _ in range(2):
            await served.post("/v1/keys/verify:batch", once, Idempotency_Key="b1")
        stats = (await served.get(f"/v1/keys/{made['id']}/stats")).json
        assert stats["totals"] == {"tokens": 820}, "each item of a batch is debited once"


# --- The life of a key ----------------------------------------------------------------------------------------


async def test_a_key_has_an_owner_an_environment_and_what_it_is_for() -> None:
    fields = {
        "description": "nightly jobs", "owner": "ops@acme", "environment": "test", "groups": ["trial"],
        "allowed_models": ["small", "large-*"], "allowed_routes": ["GET /v1/*"], "rotate_every_s": 86_400,
        "rotation_overlap_s": 3_600,
    }  # fmt: skip
    async with serving() as served:
        made = await served.make_key(**fields)
        assert {name: made[name] for name in fields} == fields
        assert made["key"].startswith("sr_test_SR1")
        assert made["display"].startswith("sr_test_SR1")
        assert (made["unclaimed"], made["deleted_at"], made["leaked_at"]) == (False, None, None)
        assert made["next_rotation_at"] is not None
        path = f"/v1/keys/{made['id']}"
        changed = await served.call("PATCH", path, {"owner": None, "allowed_models": [], "rotate_every_s": None})
        assert (changed.json["owner"], changed.json["allowed_models"]) == (None, [])
        assert (changed.json["next_rotation_at"], changed.json["rotation_overlap_s"]) == (None, None)
        refused = await served.call("PATCH", path, {"environment": "live"})
        assert refused.paths == ["environment"], "a text says which it is: it cannot change"
        listed = await served.get("/v1/keys?environment=test&name_prefix=a%20k")
        assert [item["id"] for item in listed.json["items"]] == [made["id"]]
        assert (await served.get("/v1/keys?owner=ops@acme")).json["items"] == []
        wrong = await served.get("/v1/keys?environment=prod&created_after=2026-01-01&deleted=perhaps")
        assert wrong.paths == ["created_after", "deleted", "environment"]


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"environment": "prod"}, "environment"),
        ({"owner": ""}, "owner"),
        ({"owner": "x" * 201}, "owner"),
        ({"description": "x" * 2001}, "description"),
        ({"groups": ["g"] * 17}, "groups"),
        ({"groups": [""]}, "groups"),
        ({"allowed_models": ["a*b"]}, "allowed_models"),
        ({"allowed_models": [f"m{n}" for n in range(101)]}, "allowed_models"),
        ({"allowed_routes": ["x" * 201]}, "allowed_routes"),
        ({"allowed_routes": ["a\tb"]}, "allowed_routes"),
        ({"rotate_every_s": 60}, "rotate_every_s"),
        ({"rotation_overlap_s": 3600}, "rotation_overlap_s"),
        ({"rotate_every_s": 86_400, "rotation_overlap_s": 86_400}, "rotation_overlap_s"),
        ({"allowed_ips": ["10.0.0.1/0.0.0.0"]}, "allowed_ips"),
        ({"allowed_ips": ["10.0.0.0/255.0.0.0"]}, "allowed_ips"),
        ({"unclaimed": "x"}, "unclaimed"),
        ({"deleted_at": None}, "deleted_at"),
    ],
)
async def test_an_invalid_life_cycle_field_is_named(fields: dict[str, Any], path: str) -> None:
    async with serving() as served:
        answer = await served.post("/v1/keys", {"name": "n", **fields})
        assert (answer.status, answer.paths) == (422, [path]), answer
        made = await served.make_key()
        changed = await served.call("PATCH", f"/v1/keys/{made['id']}", fields)
        assert (changed.status, changed.paths) == (422, [path]), changed


async def test_an_overlap_over_the_maximum_is_a_problem_document() -> None:
    async with serving() as served:
        made = await served.make_key()
        answer = await served.post(f"/v1/keys/{made['id']}/rotate", {"overlap_s": 30 * 86_400 + 1})
        assert (answer.status, answer.paths) == (422, ["overlap_s"])
        assert (await served.verify(made["key"])).json["valid"]


async def test_a_held_secret_is_claimed_once_or_again_with_its_idempotency_key() -> None:
    async with serving() as served:
        made = await served.make_key(limits=[TOKENS])
        path = f"/v1/keys/{made['id']}"
        held = (await served.post(f"{path}/rotate", {"overlap_s": 60, "hold": True})).json
        assert (held["key"], held["unclaimed"]) == (None, True)
        reader = await served.manager("read")
        assert (await served.post(f"{path}/claim", key=reader)).status == 403
        claimed = [(await served.post(f"{path}/claim", Idempotency_Key="c")).json for _ in range(2)]
        assert claimed[0]["key"] == claimed[1]["key"]
        assert claimed[0]["unclaimed"] is False
        for text in (made["key"], claimed[0]["key"]):
            assert (await served.verify(text)).json["valid"]
        again = await served.post(f"{path}/claim")
        assert (again.status, again.code) == (409, "conflict")


async def test_a_deleted_key_is_hidden_can_be_restored_and_is_purged() -> None:
    async with serving() as served:
        made = await served.make_key(limits=[TOKENS])
        path = f"/v1/keys/{made['id']}"
        await served.verify(made["key"], cost={"tokens": 400})
        assert (await served.call("DELETE", path)).status == 204
        assert (await served.verify(made["key"])).json["code"] == "NOT_FOUND"
        assert (await served.post("/v1/usage", {"key": made["key"], "cost": {"tokens": 1}})).status == 404
        for method, route in (("GET", path), ("PATCH", path), ("DELETE", path), ("POST", path + "/rotate")):
            assert (await served.call(method, route, {} if method != "GET" else None)).status == 404, (method, route)
        assert made["id"] not in [item["id"] for item in (await served.get("/v1/keys")).json["items"]]
        (listed,) = (await served.get("/v1/keys?deleted=true")).json["items"]
        assert listed == (await served.get(path + "?deleted=true")).json
        assert listed["deleted_at"] is not None
        restored = await served.post(path + "/restore")
        assert (restored.status, restored.json["deleted_at"]) == (200, None)
        assert (await served.post(path + "/restore")).status == 200
        answer = (await served.verify(made["key"], cost={"tokens": 100})).json
        assert answer["limits"][0]["used"] == 500, "what it had used is still counted"
        for _ in range(2):
            assert (await served.call("DELETE", path + "?purge=true", Idempotency_Key="p")).status == 204
        assert (await served.get(path + "?deleted=true")).status == 404
        assert (await served.post(path + "/restore")).status == 404
        assert (await served.call("DELETE", path + "?purge=perhaps")).paths == ["purge"]


async def test_a_bulk_change_proceeds_in_steps() -> None:
    async with serving() as served:
        made = [await served.make_key(tenant="acme", owner="ops") for _ in range(5)]
        work = {"action": "disable", "filter": {"tenant": "acme"}, "limit": 2}
        dry = (await served.post("/v1/keys:bulk", {**work, "dry_run": True})).json
        assert (dry["dry_run"], dry["looked_at"], dry["changed"]) == (True, 2, 2)
        cursor, changed = None, 0
        for _ in range(3):
            step = (await served.post("/v1/keys:bulk", {**work, "cursor": cursor})).json
            cursor, changed = step["next_cursor"], changed + step["changed"]
        assert (cursor, changed) == (None, 5)
        again = (await served.post("/v1/keys:bulk", {"action": "disable", "filter": {"owner": "ops"}})).json
        assert (again["changed"], again["unchanged"]) == (0, 5)
        limit = {"resource": "cost", "limit": 0.123456789, "window": {"kind": "total"}}
        ids = [made[0]["id"], "none"]
        update = {"action": "update", "ids": ids, "changes": {"limits": [limit], "metadata": {"ratio": 0.5}}}
        step = (await served.post("/v1/keys:bulk", update)).json
        assert (step["changed"], [failure["id"] for failure in step["failed"]]) == (1, ["none"])
        key = (await served.get(f"/v1/keys/{ids[0]}")).json
        assert (key["limits"][0]["limit"], key["metadata"]) == (Decimal("0.123456789"), {"ratio": Decimal("0.5")})


async def test_only_administrators_change_management_keys_in_bulk() -> None:
    async with serving() as served:
        writer = await served.manager("write")
        plain = await served.make_key()
        step = (
            await served.post("/v1/keys:bulk", {"action": "delete", "filter": {"name_prefix": "a"}}, key=writer)
        ).json
        assert step["changed"] == 1
        assert {failure["code"] for failure in step["failed"]} == {"denied"}
        assert (await served.get(f"/v1/keys/{plain['id']}")).status == 404
        assert (
            await served.post("/v1/keys:bulk", {"action": "disable", "ids": ["x"]}, key=await served.manager("read"))
        ).status == 403
        bound = await served.manager("admin", tenant="acme")
        other = await served.make_key(tenant="globex")
        mine = await served.make_key(tenant="acme")
        step = (
            await served.post("/v1/keys:bulk", {"action": "disable", "ids": [other["id"], mine["id"]]}, key=bound)
        ).json
        assert ([f["code"] for f in step["failed"]], step["changed"]) == (["not_found"], 1)


@pytest.mark.parametrize(
    ("body", "paths"),
    [
        ({"action": "disable"}, ["filter"]),
        ({"action": "disable", "filter": {}}, ["filter"]),
        ({"action": "disable", "filter": {"deleted": False}}, ["filter"]),
        ({"action": "disable", "filter": {"colour": "red"}}, ["filter.colour"]),
        ({"action": "explode", "filter": {"tenant": "a"}, "limit": 501}, ["action", "limit"]),
        ({"action": "disable", "filter": {"tenant": "a"}, "ids": ["b"]}, ["filter"]),
        ({"action": "disable", "ids": []}, ["ids"]),
        ({"action": "disable", "filter": {"tenant": "a"}, "cursor": "x"}, ["cursor"]),
        ({"action": "disable", "ids": ["a"], "changes": {"owner": "x"}}, ["changes"]),
        ({"action": "update", "ids": ["a"]}, ["changes"]),
        ({"action": "update", "ids": ["a"], "changes": {"permissions": ["x"]}}, ["changes.permissions"]),
        ({"action": "update", "ids": ["a"], "changes": {"owner": 5, "expires_at": 5}},
         ["changes.expires_at", "changes.owner"]),
        ({"action": "update", "filter": {}, "changes": {"limits": 5}}, ["changes.limits", "filter"]),
    ],
)  # fmt: skip
async def test_an_invalid_bulk_change_is_refused(body: dict[str, Any], paths: list[str]) -> None:
    async with serving() as served:
        answer = await served.post("/v1/keys:bulk", body)
        assert (answer.status, answer.paths) == (422, paths), answer


async def test_only_an_administrator_of_all_tenants_rotates_the_pepper() -> None:
    async with serving() as served:
        made = await served.make_key()
        for scope, tenant in (("write", "*"), ("admin", "acme")):
            manager = await served.manager(scope, tenant)
            assert (await served.post("/v1/keys:rotate-pepper", key=manager)).status == 403
        before = served.room.keys.hasher.current_id
        assert (await served.post("/v1/keys:rotate-pepper")).status == 204
        assert served.room.keys.hasher.current_id != before
        assert (await served.verify(made["key"])).json["valid"]
