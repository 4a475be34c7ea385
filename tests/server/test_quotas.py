"""`/v1/quotas`: put, show, list, change, delete and statistics; preconditions, retries, authorisation."""

from __future__ import annotations

from collections.abc import AsyncIterator
from decimal import Decimal
from typing import Any

import pytest

from tests.helpers.server_app import Served, serving

USER = "/v1/quotas/user/acme/u1"
TENANT = "/v1/quotas/tenant/acme"


def tokens(limit: int = 100, **more: Any) -> dict[str, Any]:
    return {"resource": "tokens", "limit": limit, "window": {"kind": "rolling", "seconds": 60}, **more}


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with serving() as served:
        yield served


async def test_a_quota_is_put_shown_changed_listed_and_removed(served: Served) -> None:
    made = await served.call("PUT", USER, {"limits": [tokens()], "description": "u1's"})
    assert made.status == 201
    quota = made.json
    assert {name: quota[name] for name in ("tenant", "kind", "name", "description")} == {
        "tenant": "acme", "kind": "user", "name": "u1", "description": "u1's"
    }  # fmt: skip
    assert quota["limits"] == [tokens()]
    assert made.headers["etag"] == f'"{quota["version"]}"'

    shown = await served.get(USER)
    assert (shown.status, shown.json, shown.headers["etag"]) == (200, quota, made.headers["etag"])
    assert (await served.get(USER, if_none_match=made.headers["etag"])).status == 304

    replaced = await served.call("PUT", USER, {"limits": []})
    assert (replaced.status, replaced.json["limits"], replaced.json["description"]) == (200, [], None)
    changed = await served.call("PATCH", USER, {"limits": [tokens(7)]})
    assert (changed.status, changed.json["limits"][0]["limit"]) == (200, 7)

    await served.call("PUT", TENANT, {"limits": []})
    assert [item["id"] for item in (await served.get("/v1/quotas")).json["items"]] == ["tenant:4:acme", quota["id"]]
    assert [item["kind"] for item in (await served.get("/v1/quotas?kind=user&tenant=acme")).json["items"]] == ["user"]
    page = (await served.get("/v1/quotas?limit=1")).json
    rest = (await served.get(f"/v1/quotas?limit=1&cursor={page['next_cursor']}")).json
    assert [item["kind"] for item in (*page["items"], *rest["items"])] == ["tenant", "user"]

    assert (await served.call("DELETE", USER)).status == 204
    for method in ("GET", "DELETE"):
        assert (await served.call(method, USER)).status == 404
    assert (await served.call("PATCH", USER, {"description": "gone"})).status == 404
    assert (await served.get(USER + "/stats")).status == 404


async def test_every_window_is_accepted_and_returned_unchanged(served: Served) -> None:
    limits = [
        tokens(models=["gpt-*"], routes=["/chat"]),
        {"resource": "concurrency", "limit": 3, "window": {"kind": "total"}},
        {
            "resource": "cost",
            "limit": 25,
            "window": {"kind": "total", "refill": {"amount": 1, "unit": "week", "timezone": "Europe/Berlin"}},
        },
        {"resource": "tokens", "limit": 9, "window": {"kind": "total", "refill": {"amount": 2, "seconds": 3600}}},
        {"resource": "tokens", "limit": 9, "window": {"kind": "calendar", "unit": "day", "timezone": "Asia/Tokyo"}},
    ]
    put = await served.call("PUT", TENANT, {"limits": limits})
    assert put.status == 201
    assert put.json["limits"] == limits
    assert (await served.get(TENANT)).json["limits"] == limits
    left_out = await served.call("PUT", TENANT, {"limits": [{"resource": "concurrency", "limit": 3}]})
    assert left_out.json["limits"] == [limits[1]]


async def test_amounts_of_money_keep_all_their_digits(served: Served) -> None:
    body = (
        b'{"limits": [{"resource": "cost", "limit": 123456789.123456789, "window": {"kind": "total", "refill":'
        b' {"amount": 98765432.123456789, "unit": "month"}}}]}'
    )
    (limit,) = (await served.call("PUT", TENANT, body)).json["limits"]
    assert limit["limit"] == Decimal("123456789.123456789")
    assert limit["window"]["refill"]["amount"] == Decimal("98765432.123456789")


async def test_statistics_show_what_all_keys_of_the_subject_used(served: Served) -> None:
    await served.call("PUT", TENANT, {"limits": [tokens(1000)]})
    await served.call("PUT", "/v1/quotas/group/acme/stats", {"limits": [tokens(500)]})
    for name in ("one", "two"):
        key = await served.make_key(name=name, tenant="acme", groups=["stats"])
        assert (await served.verify(key["key"], cost={"tokens": 30})).json["valid"]
    for path, limit in ((TENANT, 1000), ("/v1/quotas/group/acme/stats", 500)):
        stats = (await served.get(path + "/stats")).json
        (status,) = stats["limits"]
        assert (status["limit"], status["used"], status["remaining"]) == (limit, 60, limit - 60)
        assert (status["recorded"], status["reserved"], status["leased"]) == (60, 0, 0)
        assert stats["totals"]["tokens"] == 60
    assert (await served.get("/v1/quotas/group/acme/stats")).json["kind"] == "group"  # a group may be called so


async def test_names_with_slashes_are_sent_encoded(served: Served) -> None:
    made = await served.call("PUT", "/v1/quotas/user/a%2Fb/c%2Fd", {"limits": []})
    assert (made.json["tenant"], made.json["name"]) == ("a/b", "c/d")
    assert (await served.get("/v1/quotas/user/a%2Fb/c%2Fd/stats")).json["name"] == "c/d"
    assert (await served.call("DELETE", "/v1/quotas/user/a%2Fb/c%2Fd", if_match="*")).status == 204


async def test_preconditions_are_enforced(served: Served) -> None:
    made = await served.call("PUT", USER, {"limits": []}, if_none_match="*")
    assert made.status == 201
    assert (await served.call("PUT", USER, {"limits": []}, if_none_match="*")).status == 412
    changed = await served.call("PATCH", USER, {"description": "x"}, if_match=made.headers["etag"])
    assert changed.status == 200
    for method, body in (("PUT", {"limits": []}), ("PATCH", {"description": "y"}), ("DELETE", None)):
        assert (await served.call(method, USER, body, if_match=made.headers["etag"])).status == 412
    assert (await served.call("PUT", "/v1/quotas/user/acme/none", {"limits": []}, if_match="*")).status == 412
    assert (await served.call("DELETE", USER, if_match=changed.headers["etag"])).status == 204


async def test_idempotent_retries_change_nothing(served: Served) -> None:
    first = await served.call("PUT", USER, {"limits": [tokens()]}, idempotency_key="k1")
    again = await served.call("PUT", USER, {"limits": [tokens()]}, idempotency_key="k1")
    assert first.json == again.json
    assert (await served.call("PUT", USER, {"limits": []}, idempotency_key="k1")).status == 409
    for _ in range(2):
        assert (await served.call("PATCH", USER, {"description": "x"}, idempotency_key="k2")).json["description"] == "x"
    for _ in range(2):
        assert (await served.call("DELETE", USER, idempotency_key="k3")).status == 204


async def test_every_problem_is_reported_at_once(served: Served) -> None:
    body = {
        "tenant": "other",
        "more": 1,
        "description": 5,
        "limits": [
            {"resource": "T", "limit": -1, "window": {"kind": "sliding"}},
            {"resource": "tokens", "limit": 1, "window": {"kind": "calendar", "unit": "year", "timezone": "Mars"}},
            {"resource": "tokens", "limit": 1, "window": {"kind": "rolling", "seconds": 5, "refill": {"amount": 1}}},
        ],
    }
    answer = await served.call("PUT", USER, body)
    assert answer.status == 422
    assert answer.paths == [
        "description", "limits.0.limit", "limits.0.resource", "limits.0.window.kind", "limits.1.window.timezone",
        "limits.1.window.unit", "limits.2.window.refill", "more", "tenant",
    ]  # fmt: skip
    messages = {item["path"]: item["message"] for item in answer.json["errors"]}
    assert messages["limits.2.window.refill"] == "a refill needs a window of kind total"


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        ("/v1/quotas/team/acme", "kind"),
        ("/v1/quotas/team/acme/u1", "kind"),
        ("/v1/quotas/user/acme", "name"),
        ("/v1/quotas/tenant/acme/u1", "name"),
        (f"/v1/quotas/user/acme/{'x' * 600}", "name"),
    ],
)
async def test_a_path_without_a_valid_subject_is_refused(served: Served, path: str, wrong: str) -> None:
    for method, body in (("GET", None), ("PUT", {"limits": []}), ("PATCH", {"description": "x"}), ("DELETE", None)):
        answer = await served.call(method, path, body)
        assert (answer.status, answer.paths) == (422, [wrong])
    assert (await served.call("POST", path)).status == 405


async def test_a_list_names_unknown_parameters(served: Served) -> None:
    answer = await served.get("/v1/quotas?kind=team&limit=0&more=1")
    assert (answer.status, answer.paths) == (422, ["kind", "limit", "more"])


async def test_a_caller_bound_to_a_tenant_sees_and_sets_only_its_quotas(served: Served) -> None:
    await served.call("PUT", TENANT, {"limits": [tokens(5)]})
    await served.call("PUT", "/v1/quotas/user/globex/u1", {"limits": []})
    key = await served.manager("write", "acme")
    assert (await served.call("PUT", USER, {"limits": [tokens()]}, key=key)).status == 201
    seen = (await served.get("/v1/quotas", key=key)).json["items"]
    assert [(item["kind"], item["tenant"]) for item in seen] == [("tenant", "acme"), ("user", "acme")]
    assert (await served.get("/v1/quotas?tenant=globex", key=key)).json["items"] == []
    for method, body in (("GET", None), ("PATCH", {"description": "x"}), ("DELETE", None)):
        assert (await served.call(method, "/v1/quotas/user/globex/u1", body, key=key)).status == 404
    assert (await served.call("PUT", "/v1/quotas/user/globex/u1", {"limits": []}, key=key)).status == 403
    for method, change in (("PUT", {"limits": []}), ("PATCH", {"limits": []}), ("DELETE", None)):
        assert (await served.call(method, TENANT, change, key=key)).status == 403
    assert (await served.get(TENANT, key=key)).json["limits"][0]["limit"] == 5


async def test_reading_needs_read_and_writing_needs_write(served: Served) -> None:
    await served.call("PUT", USER, {"limits": []})
    reader = await served.manager("read")
    assert (await served.get(USER, key=reader)).status == 200
    for method, body in (("PUT", {"limits": []}), ("PATCH", {}), ("DELETE", None)):
        assert (await served.call(method, USER, body, key=reader)).status == 403
    plain = (await served.make_key())["key"]
    for path in ("/v1/quotas", USER, USER + "/stats"):
        assert (await served.get(path, key=plain)).status == 403
        assert (await served.get(path, key=None)).status == 401
