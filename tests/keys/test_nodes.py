"""Many nodes: four server processes on one store, under load, killed in turn together with the store.

No acknowledged write is lost, no limit is exceeded, every node sees a revocation within a second, and a node without
its database recovers by itself.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from strongroom.errors import Unavailable
from strongroom.journal import feed as changes
from strongroom.keys.cache import TRUSTED_FOR_S
from strongroom.server.auth import TRUSTED_FOR_S as CALLER_TRUSTED_FOR_S
from strongroom.storage.port import ChangesPage
from tests.helpers.server_app import ADMIN
from tests.helpers.server_process import start
from tests.helpers.servers import free_port, postgres
from tests.helpers.stores import new_url, opened
from tests.helpers.waiting import PATIENCE_S, wait_until

NODES = 4
CALLERS = 12
LIMITS = (150, 400, 100_000)
REVOKED_WITHIN_S = 1.0
HEADERS = {"Authorization": f"Bearer {ADMIN}"}


# --- A fleet of servers ---------------------------------------------------------------------------------------


@dataclass
class Node:
    """One server process, always at the same port."""

    url: str
    folder: Path
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[str] | None = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        settings = {"STRONGROOM_STORE": self.url, "STRONGROOM_PORT": str(self.port), "STRONGROOM_ADMIN_KEY": ADMIN}
        self.process = start(self.folder, **settings, STRONGROOM_LOG_LEVEL="error")

    def kill(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            _, said = self.process.communicate()
            print(said)  # what a test that fails is to be understood by
            self.process = None


class Fleet:
    """The nodes, and what they were asked and answered."""

    def __init__(self, url: str, folder: Path) -> None:
        self.nodes = [Node(url, folder) for _ in range(NODES)]
        self.client = httpx.AsyncClient(headers=HEADERS, timeout=PATIENCE_S)
        self.admitted: Counter[str] = Counter()
        """Units of each key that were acknowledged."""
        self.unknown: Counter[str] = Counter()
        """Units of each key whose answer was lost, or an error."""
        self.written: dict[str, int] = {}
        """The version that each acknowledged entity was given."""
        self.answered = 0

    async def ready(self, timeout_s: float = 60) -> None:
        for node in self.nodes:

            async def is_ready(node: Node = node) -> bool:
                answer = await self.ask(node, "GET", "/readyz")
                return answer is not None and answer.status_code == 200

            await wait_until(is_ready, timeout_s)

    async def ask(self, node: Node, method: str, path: str, body: Any = None) -> httpx.Response | None:
        """One request; None if there was no answer."""
        try:
            return await self.client.request(method, node.address + path, json=body)
        except httpx.TransportError:
            return None

    async def must(self, method: str, path: str, body: Any = None) -> Any:
        answer = await self.ask(self.nodes[0], method, path, body)
        assert answer is not None
        assert answer.status_code < 300, answer.text
        return answer.json()

    async def key(self, *limits: int) -> Any:
        limited = [{"resource": "tokens", "limit": limit, "window": {"kind": "total"}} for limit in limits]
        return await self.must("POST", "/v1/keys", {"name": "k", "limits": limited})

    async def verify(self, node: Node, key: Any, tokens: int) -> str:
        """One verification, and its bookkeeping; the code, or `lost`."""
        body = {"key": key["key"], "cost": {"tokens": tokens}}
        answer = await self.ask(node, "POST", "/v1/keys/verify", body)
        if answer is None or answer.status_code != 200:
            self.unknown[key["id"]] += tokens
            if answer is not None:
                assert answer.status_code in (429, 503), answer.text
                assert "retry-after" in answer.headers
            return "lost"
        self.answered += 1
        code: str = answer.json()["code"]
        if code == "VALID":
            self.admitted[key["id"]] += tokens
        return code

    async def write(self, node: Node, id: str) -> None:
        body = {"policy_type": "t", "policy_name": id}
        answer = await self.ask(node, "PUT", f"/v1/tenants/acme/policies/{id}", body)
        if answer is not None and answer.status_code in (200, 201):
            self.answered += 1
            self.written[id] = answer.json()["version"]
        elif answer is not None:
            assert answer.status_code in (429, 503), answer.text

    @asynccontextmanager
    async def load(self, keys: list[Any], seed: int) -> AsyncIterator[None]:
        """Callers that verify and write at any node, until the end of the block."""
        stopping = asyncio.Event()
        numbers = itertools.count()

        async def caller(number: int) -> None:
            chance = random.Random(seed * 1_000 + number)
            while not stopping.is_set():
                node = chance.choice(self.nodes)
                if chance.random() < 0.2:
                    await self.write(node, f"p{next(numbers)}")
                elif await self.verify(node, chance.choice(keys), chance.choice([1, 2, 5])) == "lost":
                    await asyncio.sleep(0.05)

        callers = [asyncio.create_task(caller(number)) for number in range(CALLERS)]
        try:
            yield
        finally:
            stopping.set()
            await asyncio.gather(*callers)

    async def progress(self, answers: int, timeout_s: float = 60) -> None:
        """Wait for so many more answers."""
        goal = self.answered + answers
        await wait_until(lambda: self.answered >= goal, timeout_s)

    async def check_books(self, keys: list[Any]) -> None:
        for key, limit in zip(keys, LIMITS, strict=True):
            for node in self.nodes:
                answer = await self.ask(node, "GET", f"/v1/keys/{key['id']}/stats")
                assert answer is not None
                used = answer.json()["totals"].get("tokens", 0)
                known, unknown = self.admitted[key["id"]], self.unknown[key["id"]]
                assert known <= used <= known + unknown, "an acknowledged debit was lost, or one made up"
                assert used <= limit, "over-admitted"
        for id, version in self.written.items():
            answer = await self.ask(self.nodes[0], "GET", f"/v1/tenants/acme/policies/{id}")
            assert answer is not None
            assert answer.status_code == 200, f"{id} was acknowledged and is lost"
            assert answer.json()["version"] == version

    async def close(self) -> None:
        for node in self.nodes:
            node.kill()
        await self.client.aclose()


@asynccontextmanager
async def fleet_on(url: str, folder: Path) -> AsyncIterator[Fleet]:
    fleet = Fleet(url, folder)
    try:
        for node in fleet.nodes:  # at once, on a store that has no schema yet
            node.start()
        await fleet.ready()
        yield fleet
    finally:
        await fleet.close()


@pytest.fixture
def own_postgres(tmp_path: Path) -> Iterator[postgres.OwnServer]:
    own = postgres.OwnServer(tmp_path)
    own.start()
    own.server.execute(*postgres.APP_ROLE)
    yield own
    own.remove()


async def revoke(fleet: Fleet) -> float:
    """Disable a key without limits, which every node has in memory; the seconds until the last node knew."""
    key = await fleet.key()
    for node in fleet.nodes:
        await wait_until(lambda node=node: _is(fleet, node, key, "VALID"))  # type: ignore[misc]
    await fleet.must("POST", f"/v1/keys/{key['id']}/disable")
    revoked = time.monotonic()
    last_valid = revoked

    async def until_known(node: Node) -> None:
        nonlocal last_valid
        while True:
            asked = time.monotonic()
            if await _is(fleet, node, key, "DISABLED"):
                return
            last_valid = max(last_valid, asked)
            assert asked - revoked < 10, "the node never learns of it"

    await asyncio.gather(*map(until_known, fleet.nodes))
    return last_valid - revoked


async def _is(fleet: Fleet, node: Node, key: Any, code: str) -> bool:
    answer = await fleet.ask(node, "POST", "/v1/keys/verify", {"key": key["key"]})
    return answer is not None and answer.status_code == 200 and answer.json()["code"] == code


async def scenario(fleet: Fleet, own: postgres.OwnServer | None, *, rounds: int, seed: int) -> None:
    """Load; in each round a node is killed and started again, then the database, with another node started while it is
    gone."""
    chance = random.Random(seed)
    keys = [await fleet.key(limit) for limit in LIMITS]
    async with fleet.load(keys, seed):
        await fleet.progress(150)
        for _ in range(rounds):
            assert await revoke(fleet) < REVOKED_WITHIN_S
            victim = chance.choice(fleet.nodes)
            victim.kill()
            await fleet.progress(50)
            victim.start()
            await fleet.ready()
            await fleet.progress(50)
            if own is not None:
                await asyncio.to_thread(own.kill)
                late = chance.choice(fleet.nodes)
                late.kill()
                late.start()
                await wait_until(lambda late=late: _lives_without_its_database(fleet, late))  # type: ignore[misc]
                await asyncio.to_thread(own.start)
                await fleet.ready()
                await fleet.progress(50)
    await fleet.check_books(keys)
    for _ in range(LIMITS[0]):  # to the end of what is left
        if await fleet.verify(chance.choice(fleet.nodes), keys[0], 1) == "USAGE_EXCEEDED":
            break
    else:
        pytest.fail("more was admitted than the limit")
    await fleet.check_books(keys)


async def _lives_without_its_database(fleet: Fleet, node: Node) -> bool:
    alive = await fleet.ask(node, "GET", "/healthz")
    if alive is None:
        return False
    ready = await fleet.ask(node, "GET", "/readyz")
    verified = await fleet.ask(node, "POST", "/v1/keys/verify", {"key": "any"})
    assert alive.status_code == 200
    assert ready is not None
    assert ready.status_code == 503
    assert verified is not None
    assert verified.status_code == 503
    assert int(verified.headers["retry-after"]) >= 1
    return True


@pytest.mark.server
async def test_four_killed_nodes_on_one_postgresql_lose_nothing_and_never_exceed_a_limit(
    own_postgres: postgres.OwnServer, tmp_path: Path
) -> None:
    async with fleet_on(own_postgres.server.url("nodes", connect_timeout_s=2), tmp_path) as fleet:
        await scenario(fleet, own_postgres, rounds=1, seed=1)


@pytest.mark.server
async def test_workers_that_start_without_their_database_create_the_first_key_when_it_comes(
    own_postgres: postgres.OwnServer, tmp_path: Path
) -> None:
    own_postgres.kill()
    port = free_port()
    url = own_postgres.server.url("workers", connect_timeout_s=2)
    process = start(tmp_path, STRONGROOM_STORE=url, STRONGROOM_PORT=str(port), STRONGROOM_WORKERS="2")

    async def status(path: str) -> int:
        """By a connection of its own each time, so that both workers get some."""
        try:
            async with httpx.AsyncClient(timeout=PATIENCE_S) as client:
                return (await client.get(f"http://127.0.0.1:{port}{path}")).status_code
        except httpx.TransportError:
            return 0

    async def lives() -> bool:
        return await status("/healthz") == 200

    async def is_ready() -> bool:
        return await status("/readyz") == 200

    try:
        await wait_until(lives, 60)
        assert await status("/readyz") == 503
        await asyncio.to_thread(own_postgres.start)
        for _ in range(10):
            await wait_until(is_ready, 60)
        process.send_signal(signal.SIGTERM)
        out, err = await asyncio.to_thread(process.communicate, None, 30)
        lines = out.split()
        assert [line for line in lines if line.startswith("sr_admin_")] == lines[-1:], (out, err)
        assert process.returncode == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(3))
async def test_four_killed_nodes_on_postgresql_for_minutes_lose_nothing(
    own_postgres: postgres.OwnServer, tmp_path: Path, seed: int
) -> None:
    async with fleet_on(own_postgres.server.url("nodes", connect_timeout_s=2), tmp_path) as fleet:
        await scenario(fleet, own_postgres, rounds=8, seed=seed)


@pytest.mark.soak
async def test_four_killed_nodes_on_one_sqlite_file_for_minutes_lose_nothing(tmp_path: Path) -> None:
    async with fleet_on(new_url("sqlite", tmp_path), tmp_path) as fleet:
        await scenario(fleet, None, rounds=8, seed=7)


# --- A node whose feed of changes is broken -------------------------------------------------------------------


async def test_a_node_with_a_broken_feed_sees_a_revocation_within_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert TRUSTED_FOR_S + CALLER_TRUSTED_FOR_S <= REVOKED_WITHIN_S
    assert changes.POLL_S < TRUSTED_FOR_S
    url = new_url("sqlite", tmp_path)
    async with opened(url) as (here, store), opened(url) as (there, _):

        async def broken(after: str | None, **options: Any) -> ChangesPage:
            raise Unavailable("the journal cannot be read")

        free = await there.keys.create(name="free")
        manager = await there.keys.create(name="manager", tenant="*", permissions=["strongroom:read"])
        assert (await here.keys.verify(free.text)).valid
        assert await here.keys.authenticate(manager.text) is not None
        monkeypatch.setattr(store, "changes", broken)
        await there.keys.disable(free.key.id)
        await there.keys.disable(manager.key.id)
        revoked = time.monotonic()
        last_valid = revoked
        while True:
            asked = time.monotonic()
            answers = (await here.keys.verify(free.text)).valid, await here.keys.authenticate(manager.text) is not None
            if not any(answers):
                break
            last_valid = asked
            assert asked - revoked < 10, "it never learns of it"
            await asyncio.sleep(0.01)
        assert last_valid - revoked <= TRUSTED_FOR_S
        assert here.feed.behind_s > 0


async def test_a_node_with_a_broken_feed_still_answers_for_unchanged_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(new_url("sqlite", tmp_path)) as (room, store):

        async def broken(after: str | None, **options: Any) -> ChangesPage:
            raise Unavailable("the journal cannot be read")

        free = await room.keys.create(name="free")
        assert (await room.keys.verify(free.text)).valid
        monkeypatch.setattr(store, "changes", broken)
        await wait_until(lambda: room.feed.behind_s > 2 * TRUSTED_FOR_S)
        store.reads.clear()
        for _ in range(50):
            assert (await room.keys.verify(free.text)).valid
        reads = [collection for _, collection in store.reads].count("api_keys")
        assert 1 <= reads <= 5, "it is read again now and then, not each time"
