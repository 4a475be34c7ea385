"""A revocation applies everywhere within a second: on another node, in another process, with a broken feed."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from strongroom import Strongroom
from strongroom.errors import Unavailable
from strongroom.storage.port import ChangesPage
from tests.conftest import backend_of
from tests.helpers.paths import ROOT
from tests.helpers.server_process import running
from tests.helpers.stores import opened, rolling
from tests.helpers.waiting import PATIENCE_S

REVOKED_WITHIN_S = 1.0
"""What docs/keys.md states."""
Revoke = Callable[[Strongroom, str], Awaitable[Any]]
WAYS: dict[str, Revoke] = {
    "disable": lambda room, id: room.keys.disable(id),
    "delete": lambda room, id: room.keys.delete(id),
    "purge": lambda room, id: room.keys.delete(id, purge=True),
    "rotate": lambda room, id: room.keys.rotate(id),
    "rotate and hold": lambda room, id: room.keys.rotate(id, hold=True),
}


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A store that two nodes may share."""
    return backend_of(request.param, tmp_path, request).new_url()


async def last_valid(room: Strongroom, text: str, since: float) -> float:
    """For how long after `since` a key was still found valid: until the last call that was answered so had begun."""
    latest = since
    while True:
        began = time.monotonic()
        if not (await room.keys.verify(text)).valid:
            return latest - since
        latest = began
        assert latest - since < 10, "it never learns of it"
        await asyncio.sleep(0.005)


@pytest.mark.parametrize("broken", [False, True], ids=["feed", "broken-feed"])
@pytest.mark.parametrize("leased", [False, True], ids=["free", "leased"])
async def test_a_key_revoked_on_another_node_is_refused_within_a_second(
    url: str, leased: bool, broken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However it is revoked; also by a node that can read keys, but not the journal that tells of their changes. Of a
    key without limits, and of one whose limits are spent from a lease: neither is checked by the store each time."""
    limits = [rolling("requests", 1_000_000)] if leased else []
    async with opened(url, limits="leased") as (here, store), Strongroom.open(url) as there:
        issued = {way: await there.keys.create(name=way, limits=limits) for way in WAYS}
        for key in issued.values():
            assert (await here.keys.verify(key.text)).valid
        if broken:

            async def fail(after: str | None, **options: Any) -> ChangesPage:
                raise Unavailable("the journal cannot be read")

            monkeypatch.setattr(store, "changes", fail)
        for way, revoke in WAYS.items():
            assert (await here.keys.verify(issued[way].text)).valid
            await revoke(there, issued[way].key.id)
            took_s = await last_valid(here, issued[way].text, time.monotonic())
            assert took_s <= REVOKED_WITHIN_S, way


@pytest.mark.server
async def test_a_key_revoked_in_this_process_is_refused_by_a_server_within_a_second(url: str, tmp_path: Path) -> None:
    with running(tmp_path, STRONGROOM_STORE=url) as server, server.client() as client:
        async with Strongroom.open(url) as room:
            issued = [await room.keys.create(name="k") for _ in range(3)]
            managers = [await room.keys.create(name="m", tenant="*", permissions=["strongroom:read"]) for _ in issued]
            for key, manager in zip(issued, managers, strict=True):

                def is_refused(text: str = key.text, bearer: str = manager.text) -> tuple[bool, bool]:
                    valid: bool = client.post("/v1/keys/verify", json={"key": text}).json()["valid"]
                    headers = {"Authorization": f"Bearer {bearer}"}
                    return not valid, client.get("/v1/keys?limit=1", headers=headers).status_code == 401

                assert is_refused() == (False, False)
                await room.keys.delete(key.key.id)
                await room.keys.rotate(manager.key.id)
                revoked = latest = time.monotonic()
                while True:
                    began = time.monotonic()
                    if await asyncio.to_thread(is_refused) == (True, True):
                        break
                    latest = began
                    assert latest - revoked < 10, "it never learns of it"
                assert latest - revoked <= REVOKED_WITHIN_S


@pytest.mark.soak
@pytest.mark.server
def test_the_benchmark_measures_both_stores_with_and_without_a_feed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "--quick", "--only", "revocation", "--json", "--dir", str(tmp_path)]
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=8 * PATIENCE_S)
    assert done.returncode == 0, done.stdout + done.stderr
    (benchmark,) = json.loads(done.stdout)["benchmarks"]
    assert [label.split(":")[0] for label in benchmark["labels"][1:]] == [
        f"{store}, {feed}"
        for store in ("sqlite", "postgresql")
        for feed in ("by the feed of changes", "its feed of changes broken")
    ]
    assert all("p50" in label and "max" in label for label in benchmark["labels"][1:])
