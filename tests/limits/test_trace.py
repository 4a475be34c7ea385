"""A real LLM trace replayed over HTTP: every decision equals that of a plain list of all usage.

STRONGROOM_TRACE=FILE replays another trace with the same columns (`make soak`), for example the whole trace.
"""

from __future__ import annotations

import asyncio
import csv
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import time_machine
import uvicorn

from strongroom import IssuedKey, Strongroom
from strongroom.context import us_from_utc
from strongroom.server import adminkey
from strongroom.server.app import build
from tests.helpers.paths import DATA
from tests.helpers.stores import new_url, rolling
from tests.helpers.waiting import wait_until

EXCERPT = DATA / "llm" / "azure_llm_trace_2023_code_first_1500.csv"
ADMIN = "an administrator's key, 32 or more characters"
WINDOW_S = 18_000
BUCKET_US = 60 * 1_000_000  # what the documentation states for five hours
WINDOW_US = WINDOW_S * 1_000_000
LIMITS = {"scarce": 40_000, "tight": 150_000, "fair": 300_000, "ample": 5_000_000}
REQUESTS = 40


@dataclass(frozen=True)
class Request:
    at: datetime
    context: int
    generated: int


def trace(path: Path, scale: int) -> list[Request]:
    """The requests, the time between them stretched `scale` times, so that five hours pass several times."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    times = [datetime.fromisoformat(row["TIMESTAMP"][:26]).replace(tzinfo=UTC) for row in rows]
    return [
        Request(times[0] + (at - times[0]) * scale, int(row["ContextTokens"]), int(row["GeneratedTokens"]))
        for at, row in zip(times, rows, strict=True)
    ]


@dataclass
class Used:
    """All that one key used of one resource: the independent computation."""

    limit: int
    events: list[tuple[int, int]] = field(default_factory=list)

    def sliding(self, now: int, window: int) -> int:
        return sum(units for at, units in self.events if at > now - window)

    def bucketed(self, now: int) -> int:
        return sum(units for at, units in self.events if now < (at // BUCKET_US + 1) * BUCKET_US + WINDOW_US)

    def forget(self, now: int) -> None:
        """Drop what can count no more, so that a long trace stays quick."""
        self.events = [event for event in self.events if event[0] > now - 2 * WINDOW_US]

    def check(self, now: int, asked: int, exceeded: bool, told: dict[str, Any]) -> None:
        exact = self.sliding(now, WINDOW_US)
        widened = self.sliding(now, WINDOW_US + BUCKET_US)
        assert exceeded or exact + asked <= self.limit, "over-admitted"
        assert not exceeded or widened + asked > self.limit, "denied more than a bucket early"
        assert exceeded == (self.bucketed(now) + asked > self.limit)
        used = self.bucketed(now) + (0 if not told["valid"] else asked)
        assert told["status"]["used"] == used
        assert told["status"]["remaining"] == max(0, self.limit - used)


@asynccontextmanager
async def served(room: Strongroom) -> AsyncIterator[httpx.AsyncClient]:
    """The real server, in this process so that its clock can be moved, on a free port."""
    config = uvicorn.Config(build(room), host="127.0.0.1", port=0, lifespan="off", log_config=None, ws="none")
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve())
    await wait_until(lambda: server.started or task.done())
    port = server.servers[0].sockets[0].getsockname()[1]
    headers = {"Authorization": f"Bearer {ADMIN}"}
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=30) as client:
            yield client
    finally:
        server.should_exit = True
        await task


async def post(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> dict[str, Any]:
    response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def replay(url: str, requests: list[Request]) -> dict[str, dict[str, int]]:
    """Each request is verified for its context tokens before, and its answer's tokens are recorded after."""
    counts = {name: {"VALID": 0, "USAGE_EXCEEDED": 0, "RATE_LIMITED": 0} for name in LIMITS}
    with time_machine.travel(requests[0].at, tick=False) as clock:
        async with Strongroom.open(url) as room:
            await adminkey.ensure(room, ADMIN)
            keys: dict[str, IssuedKey] = {}
            for name, limit in LIMITS.items():
                limits = [rolling("tokens", limit, WINDOW_S)]
                if name == "ample":
                    limits.append(rolling("requests", REQUESTS, WINDOW_S))
                keys[name] = await room.keys.create(name=name, limits=limits)
            tokens = {name: Used(limit) for name, limit in LIMITS.items()}
            calls = Used(REQUESTS)
            async with served(room) as client:
                for number, request in enumerate(requests):
                    name = list(LIMITS)[number % len(LIMITS)]
                    clock.move_to(request.at)
                    now = us_from_utc(request.at)
                    cost = {"tokens": request.context, "requests": 1}
                    answer = await post(client, "/v1/keys/verify", {"key": keys[name].text, "cost": cost})
                    told = [{"valid": answer["valid"], "status": status} for status in answer["limits"]]
                    tokens[name].forget(now)
                    tokens[name].check(now, request.context, told[0]["status"].get("exceeded", False), told[0])
                    if name == "ample":
                        calls.check(now, 1, told[1]["status"].get("exceeded", False), told[1])
                    counts[name][answer["code"]] += 1
                    assert answer["valid"] == (not any(t["status"].get("exceeded") for t in told))
                    if not answer["valid"]:
                        _check_retry(answer, now, tokens[name], request.context)
                        continue
                    tokens[name].events.append((now, request.context))
                    if name == "ample":
                        calls.events.append((now, 1))
                    done = {"key": keys[name].text, "cost": {"tokens": request.generated}}
                    recorded = await post(client, "/v1/usage", done)
                    tokens[name].events.append((now, request.generated))
                    assert recorded["limits"][0]["used"] == tokens[name].bucketed(now)
    return counts


def _check_retry(answer: dict[str, Any], now: int, used: Used, asked: int) -> None:
    """The time after which it says it would be admitted is the first at which the list says so."""
    if not answer["limits"][0].get("exceeded"):
        return  # the requests denied it
    if asked > used.limit:
        assert answer["retry_after_s"] is None
        return
    frees = now + round(answer["retry_after_s"] * 1_000_000)
    assert used.bucketed(frees) + asked <= used.limit
    if len(answer["limits"]) == 1:
        assert used.bucketed(frees - 1) + asked > used.limit


async def test_every_decision_along_a_real_trace_equals_a_brute_force_model(tmp_path: Path) -> None:
    requests = trace(EXCERPT, 120)
    assert requests[-1].at - requests[0].at > timedelta(hours=20)
    counts = await replay(new_url("sqlite", tmp_path), requests)
    for name in ("scarce", "tight", "fair"):  # each was both admitted and denied, many times
        assert min(counts[name]["VALID"], counts[name]["USAGE_EXCEEDED"]) > 20, counts
    assert min(counts["ample"]["VALID"], counts["ample"]["RATE_LIMITED"]) > 20, counts


@pytest.mark.soak
async def test_every_decision_along_the_whole_trace_equals_a_brute_force_model(tmp_path: Path) -> None:
    path = os.environ.get("STRONGROOM_TRACE")
    requests = trace(Path(path) if path else EXCERPT, 30)
    await replay(new_url("sqlite", tmp_path), requests)
