"""`GET /stats`: the statistics of seed 004 for the holder of a key."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import time_machine

from tests.helpers.server_app import TOKENS, serving

NOW = datetime(2030, 1, 1, 12, 0, 30, tzinfo=UTC)


async def test_the_fields_are_seed_004s() -> None:
    with time_machine.travel(NOW, tick=False) as clock:
        async with serving() as served:
            made = await served.make_key(
                name="worker", metadata={"model": "glm"}, limits=[TOKENS], expires_at="2031-01-01T00:00:00Z"
            )
            fresh = (await served.get("/stats", key=made["key"])).json
            assert fresh["last_used"] is None
            assert fresh["current_usage"] == {
                "tokens_used_in_current_window": 0,
                "window_started_at": "2030-01-01T12:00:30Z",
                "window_ends_at": "2030-01-01T17:00:30Z",
                "remaining_tokens": 1000,
            }
            await served.verify(made["key"], cost={"tokens": 250})
            clock.shift(timedelta(hours=1))
            answer = await served.get("/stats", key=made["key"])
            assert made["key"] not in answer.answer.text
            assert answer.json == {
                "key": made["display"],
                "name": "worker",
                "model": "glm",
                "token_limit_per_5h": 1000,
                "expiry_date": "2031-01-01T00:00:00Z",
                "created_at": "2030-01-01T12:00:30Z",
                "last_used": "2030-01-01T12:00:30Z",
                "is_expired": False,
                "current_usage": {
                    "tokens_used_in_current_window": 250,
                    "window_started_at": "2030-01-01T12:01:00Z",  # counted by the minute, freed a minute's end later
                    "window_ends_at": "2030-01-01T17:01:00Z",
                    "remaining_tokens": 750,
                },
                "total_lifetime_tokens": 250,
            }
            clock.shift(timedelta(hours=5))
            assert (await served.get("/stats", key=made["key"])).json["current_usage"]["remaining_tokens"] == 1000


@pytest.mark.parametrize(
    ("limits", "limit", "ends"),
    [
        ([], None, "2030-01-01T17:00:30Z"),
        ([{**TOKENS, "resource": "requests"}], None, "2030-01-01T17:00:30Z"),
        ([{**TOKENS, "window": {"kind": "rolling", "seconds": 60}, "limit": 5}, TOKENS], 1000, "2030-01-01T17:00:30Z"),
        ([{**TOKENS, "window": {"kind": "calendar", "unit": "day"}}], 1000, "2030-01-02T00:00:00Z"),
        ([{**TOKENS, "window": {"kind": "total"}}], 1000, None),
    ],
)
async def test_stats_show_the_limit_that_seed_004_means(limits: list[Any], limit: int | None, ends: str | None) -> None:
    with time_machine.travel(NOW, tick=False):
        async with serving() as served:
            made = await served.make_key(limits=limits)
            body = (await served.get("/stats", key=made["key"])).json
            assert body["token_limit_per_5h"] == body["current_usage"]["remaining_tokens"] == limit
            assert body["current_usage"]["window_ends_at"] == ends


async def test_an_expired_key_reads_its_stats_and_a_disabled_key_does_not() -> None:
    async with serving() as served:
        expired = await served.make_key()
        await served.call("PATCH", f"/v1/keys/{expired['id']}", {"expires_at": "2020-01-01T00:00:00Z"})
        assert (await served.get("/stats", key=expired["key"])).json["is_expired"]
        disabled = await served.make_key()
        await served.post(f"/v1/keys/{disabled['id']}/disable")
        for key in (None, "unknown", disabled["key"], ""):
            assert (await served.get("/stats", key=key)).status == 401, key
