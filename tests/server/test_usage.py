"""`POST /v1/usage`: usage is counted whatever the limits are."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.helpers.server_app import TOKENS, serving


async def test_usage_is_recorded_over_a_limit_and_on_a_disabled_key() -> None:
    async with serving() as served:
        made = await served.make_key(limits=[TOKENS])
        await served.post(f"/v1/keys/{made['id']}/disable")
        for reference in ({"key": made["key"]}, {"key_id": made["id"]}):
            answer = await served.post("/v1/usage", {**reference, "cost": {"tokens": 812}})
            assert answer.status == 200
        assert answer.json["key_id"] == made["id"]
        assert (answer.json["limits"][0]["used"], answer.json["limits"][0]["remaining"]) == (1624, 0)


@pytest.mark.parametrize("header", [True, False])
async def test_a_retried_usage_record_counts_once(header: bool) -> None:
    async with serving() as served:
        made = await served.make_key()
        body: dict[str, Any] = {"key_id": made["id"], "cost": {"tokens": 5}}
        for name in ("u1", "u1", "u2"):
            if header:
                await served.post("/v1/usage", body, Idempotency_Key=name)
            else:
                await served.post("/v1/usage", {**body, "idempotency_key": name})
        stats = await served.get(f"/v1/keys/{made['id']}/stats")
        assert (stats.json["totals"], stats.json["count"]) == ({"tokens": 10}, 2)


@pytest.mark.parametrize(
    ("body", "paths"),
    [
        ({}, ["cost", "key"]),
        ({"key": "a", "key_id": "b", "cost": {}}, ["cost", "key"]),
        ({"key": 5, "cost": {"tokens": -1, "x": "y"}, "colour": 1}, ["colour", "cost.tokens", "cost.x", "key"]),
        ({"key_id": "a", "cost": {"tokens": 1}, "idempotency_key": 5}, ["idempotency_key"]),
        ({"key_id": "a", "cost": {"tokens": 1}, "at": "yesterday"}, ["at"]),
        ({"key_id": "a", "cost": {"tokens": 1}, "at": 1_700_000_000}, ["at"]),
        ({"key_id": "a", "cost": {"tokens": 1}, "at": "2026-05-05T12:00:00"}, ["at"]),
    ],
)
async def test_every_problem_is_reported_at_once(body: dict[str, Any], paths: list[str]) -> None:
    async with serving() as served:
        answer = await served.post("/v1/usage", body)
        assert (answer.status, answer.paths) == (422, paths), answer


async def test_an_unknown_key_and_two_idempotency_keys_that_differ_are_refused() -> None:
    async with serving() as served:
        assert (await served.post("/v1/usage", {"key": "nothing", "cost": {"tokens": 1}})).status == 404
        body = {"key_id": "admin", "cost": {"tokens": 1}, "idempotency_key": "a"}
        assert (await served.post("/v1/usage", body, Idempotency_Key="b")).paths == ["idempotency_key"]


# --- Batches ------------------------------------------------------------------------------------------------------


async def test_a_batch_is_added_up_and_counted_in_one_debit_for_each_key() -> None:
    async with serving() as served:
        made = [await served.make_key(limits=[TOKENS]) for _ in range(3)]
        items = [
            {"key" if n % 2 else "key_id": made[n % 3]["key" if n % 2 else "id"], "cost": {"tokens": n}}
            for n in range(30)
        ]
        answer = await served.post("/v1/usage:batch", {"items": items})
        assert (answer.status, answer.json["recorded"]) == (200, 30)
        assert [one["key_id"] for one in answer.json["keys"]] == [one["id"] for one in made]
        sums = [sum(range(start, 30, 3)) for start in range(3)]
        assert [one["limits"][0]["used"] for one in answer.json["keys"]] == sums
        for one, tokens in zip(made, sums, strict=True):
            stats = await served.get(f"/v1/keys/{one['id']}/stats")
            assert (stats.json["totals"], stats.json["count"]) == ({"tokens": tokens}, 10)


async def test_ten_thousand_records_are_a_batch_and_one_more_is_not() -> None:
    async with serving() as served:
        made = await served.make_key(limits=[TOKENS])
        item = {"key_id": made["id"], "cost": {"tokens": 1}}
        answer = await served.post("/v1/usage:batch", {"items": [item] * 10_000})
        assert answer.json["keys"][0]["limits"][0]["used"] == 10_000
        for number in (0, 10_001):
            assert (await served.post("/v1/usage:batch", {"items": [item] * number})).paths == ["items"]
        most = {"key_id": made["id"], "cost": {"tokens": 10**15}}
        for _ in range(2):
            assert (await served.post("/v1/usage:batch", {"items": [most] * 10_000})).status == 200
        assert (await served.verify(made["key"], cost={"tokens": 1})).json["code"] == "USAGE_EXCEEDED"


async def test_a_retried_batch_counts_nothing_twice() -> None:
    async with serving() as served:
        made = [await served.make_key(limits=[TOKENS]) for _ in range(2)]
        items = [{"key_id": one["id"], "cost": {"tokens": 2}, "model": model} for one in made for model in ("a", "b")]
        for _ in range(3):
            answer = await served.post("/v1/usage:batch", {"items": items}, Idempotency_Key="b1")
            assert [one["limits"][0]["used"] for one in answer.json["keys"]] == [4, 4]
        answer = await served.post("/v1/usage:batch", {"items": items}, Idempotency_Key="b2")
        assert [one["limits"][0]["used"] for one in answer.json["keys"]] == [8, 8]
        changed = [{**item, "cost": {"tokens": 3}} for item in items]
        assert (await served.post("/v1/usage:batch", {"items": changed}, Idempotency_Key="b1")).status == 409


async def test_each_record_may_have_an_idempotency_key_of_its_own() -> None:
    async with serving() as served:
        made = await served.make_key(limits=[TOKENS])
        item = {"key_id": made["id"], "cost": {"tokens": 2}}
        items = [{**item, "idempotency_key": name} for name in ("a", "b", "a")] + [item]
        for used in (6, 8):  # `a` and `b` once, the one without a key each time
            answer = await served.post("/v1/usage:batch", {"items": items})
            assert answer.json["keys"][0]["limits"][0]["used"] == used
        single = await served.post("/v1/usage", {**item, "idempotency_key": "a"})
        assert single.json["limits"][0]["used"] == 2, "as it stood when `a` was counted"
        assert (await served.get(f"/v1/keys/{made['id']}/stats")).json["totals"] == {"tokens": 8}
        other = await served.make_key(limits=[TOKENS])
        twice = [{**item, "idempotency_key": "c"}, {**item, "key_id": other["id"], "idempotency_key": "c"}]
        assert (await served.post("/v1/usage:batch", {"items": twice})).paths == ["items.1.idempotency_key"]


async def test_every_problem_of_a_batch_is_reported_and_nothing_is_counted() -> None:
    async with serving() as served:
        made = await served.make_key(tenant="acme", limits=[TOKENS])
        globex = await served.manager("write", "globex")
        right = {"key_id": made["id"], "cost": {"tokens": 1}}
        for wrong, paths in (
            ([{"cost": {"tokens": -1}, "key": "a", "key_id": "b"}, {"colour": 1}, 5],
             ["items.1.cost.tokens", "items.1.key", "items.2.colour", "items.2.cost", "items.2.key", "items.3"]),
            ([{"key": "unknown", "cost": {"tokens": 1}}, {"key_id": "none", "cost": {"tokens": -2}}],
             ["items.1.key", "items.2.cost.tokens"]),
        ):  # fmt: skip
            answer = await served.post("/v1/usage:batch", {"items": [right, *wrong]})
            assert (answer.status, answer.paths) == (422, paths), answer
        answer = await served.post("/v1/usage:batch", {"items": [right]}, key=globex)
        unknown = await served.post("/v1/usage:batch", {"items": [{**right, "key_id": "none"}]}, key=globex)
        assert answer.json["errors"] == unknown.json["errors"]
        assert (await served.post("/v1/usage:batch", {"items": [right], "more": 1})).paths == ["more"]
        assert (await served.post("/v1/usage:batch", b"{")).status == 400
        stats = await served.get(f"/v1/keys/{made['id']}/stats")
        assert (stats.json["totals"], stats.json["count"]) == ({}, 0)


async def test_one_idempotency_key_for_two_amounts_in_a_batch_is_refused_before_anything_is_counted() -> None:
    async with serving() as served:
        made, other = [await served.make_key(limits=[TOKENS]) for _ in range(2)]
        items = [
            {"key_id": made["id"], "cost": {"tokens": 2}, "idempotency_key": "a"},
            {"key_id": other["id"], "cost": {"tokens": 2}},
            {"key": made["key"], "cost": {"tokens": 3}, "idempotency_key": "a"},
        ]
        answer = await served.post("/v1/usage:batch", {"items": items})
        assert (answer.status, answer.paths) == (422, ["items.2.idempotency_key"])
        stats = await served.get(f"/v1/keys/{other['id']}/stats")
        assert stats.json["count"] == 0


async def test_a_partly_counted_batch_names_the_counted_records() -> None:
    async with serving() as served:
        made = await served.make_key(limits=[TOKENS])
        await served.post("/v1/usage", {"key_id": made["id"], "cost": {"tokens": 1}, "idempotency_key": "u"})
        items = [{"key_id": made["id"], "cost": {"tokens": 2}, "idempotency_key": name} for name in ("u", "v")]
        answer = await served.post("/v1/usage:batch", {"items": items})
        assert (answer.status, answer.json["counted"]) == (409, [1])
        assert [(one["code"], one["items"]) for one in answer.json["failed"]] == [("conflict", [0])]


async def test_past_usage_is_counted_in_open_windows_and_refused_otherwise() -> None:
    async with serving() as served:
        made = await served.make_key(limits=[{**TOKENS, "window": {"kind": "rolling", "seconds": 3600}}])
        now = datetime.now(UTC)
        for at, status in ((now - timedelta(minutes=1), 200), (now - timedelta(hours=2), 422)):
            body = {"key_id": made["id"], "cost": {"tokens": 3}, "at": at.isoformat()}
            answer = await served.post("/v1/usage", body)
            assert answer.status == status, answer
            assert status == 200 or answer.paths == ["at"]
            answer = await served.post("/v1/usage:batch", {"items": [body]})
            assert answer.status == status, answer
            assert status == 200 or answer.paths == ["items.0.at"]
        assert (await served.get(f"/v1/keys/{made['id']}/stats")).json["totals"] == {"tokens": 6}
        answer = await served.post("/v1/usage:batch", {"items": [{**body, "at": "soon"}, {**body, "at": 5}]})
        assert (answer.status, answer.paths) == (422, ["items.0.at", "items.1.at"])
