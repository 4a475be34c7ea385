"""`POST /v1/usage`: what has happened is counted, whatever the limits say."""

from __future__ import annotations

from typing import Any

import pytest

from tests.serving import TOKENS, serving


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
async def test_the_same_usage_again_counts_once(header: bool) -> None:
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
    ],
)
async def test_everything_that_is_wrong_is_told_at_once(body: dict[str, Any], paths: list[str]) -> None:
    async with serving() as served:
        answer = await served.post("/v1/usage", body)
        assert (answer.status, answer.paths) == (422, paths), answer


async def test_an_unknown_key_and_two_idempotency_keys_that_differ_are_refused() -> None:
    async with serving() as served:
        assert (await served.post("/v1/usage", {"key": "nothing", "cost": {"tokens": 1}})).status == 404
        body = {"key_id": "admin", "cost": {"tokens": 1}, "idempotency_key": "a"}
        assert (await served.post("/v1/usage", body, Idempotency_Key="b")).paths == ["idempotency_key"]
