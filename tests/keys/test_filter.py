"""Filters of keys: by state, group, permission, expiry, last use and a part of the name, the same on every backend."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from strongroom import Strongroom, system_context
from strongroom.cli import main
from strongroom.errors import InvalidInput
from strongroom.keys import ApiKey, queries
from strongroom.keys.bulk import Bulk
from strongroom.keys.filter import KeyFilter
from tests.helpers.server_app import ADMIN, serving

NOW = datetime.now(UTC)
DAY = timedelta(days=1)
KEYS: list[dict[str, Any]] = [
    {"name": "Billing Worker", "groups": ["pool"], "permissions": ["chat:write"]},
    {"name": "billing nightly", "groups": ["pool"], "enabled": False, "last_used": NOW - 9 * DAY},
    {"name": "STRASSE", "expires_at": NOW - DAY, "last_used": NOW - 3 * DAY},
    {"name": "straße 5", "expires_at": NOW + DAY, "groups": ["other"], "permissions": ["chat:write", "chat:read"]},
    {"name": "worker", "enabled": False, "expires_at": NOW - DAY, "permissions": ["chat:read"], "last_used": NOW},
    {"name": "plain", "groups": ["pool", "other"], "permissions": ["chat:read"], "expires_at": NOW + 9 * DAY},
]
FILTERS: list[tuple[dict[str, Any], set[str]]] = [
    ({"name_contains": "WORK"}, {"Billing Worker", "worker"}),
    ({"name_contains": "strasse"}, {"STRASSE", "straße 5"}),
    ({"state": "active"}, {"Billing Worker", "straße 5", "plain"}),
    ({"state": "disabled"}, {"billing nightly", "worker"}),
    ({"state": "expired"}, {"STRASSE"}),
    ({"group": "pool"}, {"Billing Worker", "billing nightly", "plain"}),
    ({"permission": "chat:read"}, {"straße 5", "worker", "plain"}),
    ({"group": "other", "permission": "chat:write"}, {"straße 5"}),
    ({"expires_before": NOW}, {"STRASSE", "worker"}),
    ({"expires_after": NOW, "expires_before": NOW + 2 * DAY}, {"straße 5"}),
    ({"used_after": NOW - 4 * DAY}, {"STRASSE", "worker"}),
    ({"used_before": NOW - 4 * DAY}, {"billing nightly", "Billing Worker", "straße 5", "plain"}),
    ({"group": "pool", "state": "active", "name_contains": "billing"}, {"Billing Worker"}),
    ({"name_prefix": "billing", "name_contains": "night"}, {"billing nightly"}),
    ({"tenant": "elsewhere", "name_contains": "worker"}, set()),
]


async def filled(room: Strongroom) -> None:
    for fields in KEYS:
        made = {name: fields[name] for name in ("name", "groups", "permissions") if name in fields}
        issued = await room.keys.create(**made)
        later = ("enabled", "expires_at", "last_used")
        stored: dict[str, Any] = {name: fields[name] for name in later if name in fields}
        if stored:
            await room.database.update(system_context(), ApiKey, issued.key.id, stored)


async def all_pages(room: Strongroom, limit: int, **given: Any) -> list[str]:
    found, cursor = [], None
    while True:
        page = await room.keys.list(limit=limit, cursor=cursor, **given)
        assert len(page.items) <= limit
        found += [key.name for key in page.items]
        cursor = page.next_cursor
        if cursor is None:
            return found


async def test_each_filter_finds_its_keys_page_by_page_and_counts_them(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queries, "LOOK_AT", 4)
    async with Strongroom.open(url) as room:
        await filled(room)
        for given, expected in FILTERS:
            for limit in (1, 2, 100):
                found = await all_pages(room, limit, **given)
                assert (len(found), set(found)) == (len(expected), expected), (given, limit)
            assert await room.keys.count(KeyFilter(**given)) == len(expected), given


async def test_bulk_changes_use_the_same_filters() -> None:
    async with Strongroom.open("json://:memory:") as room:
        await filled(room)
        work = Bulk("disable", KeyFilter(name_contains="WORKER", state="active"))
        changed = [step.changed async for step in room.keys.bulk(work)]
        assert sum(changed) == 1
        assert set(await all_pages(room, 10, state="disabled")) == {"Billing Worker", "billing nightly", "worker"}


async def test_an_invalid_filter_is_refused_with_its_problem() -> None:
    async with Strongroom.open("json://:memory:") as room:
        with pytest.raises(InvalidInput) as caught:
            await room.keys.list(state="asleep", used_before=datetime(2027, 1, 1))  # type: ignore[arg-type]  # noqa: DTZ001
        assert {problem.path for problem in caught.value.problems} == {"state", "used_before"}


async def test_the_filters_work_over_http() -> None:
    async with serving() as served:
        await filled(served.room)
        for given, expected in FILTERS:
            query = {name: value.isoformat() if isinstance(value, datetime) else value for name, value in given.items()}
            answer = await served.client.get("/v1/keys", params=query, headers={"Authorization": f"Bearer {ADMIN}"})
            assert answer.status_code == 200, answer.text
            found = {item["name"] for item in answer.json()["items"] if item["tenant"] != "*"}
            assert found == expected, given
        wrong = await served.get("/v1/keys?state=asleep&name_contains=")
        assert wrong.paths == ["name_contains", "state"]
        bulk = await served.post("/v1/keys:bulk", {"action": "disable", "filter": {"group": "pool"}, "dry_run": True})
        assert bulk.json["changed"] == 2


def test_the_filters_work_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = f"sqlite:///{tmp_path}/store.db"
    for name in ("Billing Worker", "other"):
        assert main(["keys", "create", "--name", name, "--group", name.lower().split()[0], "--store", store]) == 0
    capsys.readouterr()
    for options in (["--name-contains", "WORK"], ["--in-group", "billing"]):
        assert main(["keys", "list", *options, "--store", store]) == 0
        text = capsys.readouterr().out
        assert "Billing Worker" in text
        assert "other" not in text
    assert main(["keys", "list", "--state", "expired", "--store", store]) == 0
    assert "Billing Worker" not in capsys.readouterr().out
    assert main(["keys", "list", "--state", "asleep", "--store", store]) == 2
