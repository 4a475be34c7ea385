"""Job leases: one holder at a time, growing fencing tokens, a fenced stale holder; and jobs continue."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from strongroom import Database, Registry
from strongroom.app import SYSTEM_ENTITIES
from strongroom.context import system_context
from strongroom.errors import Conflict, Unavailable
from strongroom.jobs import job_lease as leases
from strongroom.jobs.job_lease import AcquiredLease, JobLease, JobLeaseLost, JobLeases
from strongroom.storage import open_store
from tests.helpers.faulty_store import Fault, FaultyStore
from tests.helpers.job_lease_worker import WORK, Trail
from tests.helpers.paths import ROOT
from tests.helpers.stores import STORES, new_url
from tests.helpers.waiting import PATIENCE_S

SYSTEM = system_context()


class SetClock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.us = 1_800_000_000_000_000

    def now_us(self) -> int:
        return self.us

    def shift(self, seconds: float) -> None:
        self.us += round(seconds * 1_000_000)


@dataclass
class Nodes:
    store: FaultyStore
    database: Database
    clock: SetClock

    def node(self, holder: str, lease_s: float = 10) -> JobLeases:
        return JobLeases(self.database, self.clock, holder=holder, lease_s=lease_s)

    async def lease(self) -> JobLease:
        return await self.database.get(SYSTEM, JobLease, WORK)


@pytest.fixture(params=STORES)
async def nodes(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Nodes]:
    store = FaultyStore(await open_store(new_url(request.param, tmp_path)))
    registry = Registry((*SYSTEM_ENTITIES, Trail))
    await store.prepare(registry.collections)
    yield Nodes(store, Database(store, registry), SetClock())
    await store.close()


async def write(nodes: Nodes, lease: AcquiredLease, text: str) -> None:
    async def body(tx: Any) -> None:
        tx.guard = lease.guard
        await tx.create(Trail(id=text))

    await nodes.database.transaction(SYSTEM, body)


async def test_one_node_has_the_lease_until_it_is_released_or_expires(nodes: Nodes) -> None:
    a, b = nodes.node("a"), nodes.node("b")
    first = await a.acquire(WORK)
    assert first is not None
    assert await b.acquire(WORK) is None
    nodes.clock.shift(9.9)
    assert await b.acquire(WORK) is None
    await first.save("half")
    nodes.clock.shift(9.9)
    assert await b.acquire(WORK) is None, "it was renewed"
    await first.release(done=False)
    second = await b.acquire(WORK)
    assert second is not None
    assert (second.token, second.position) == (first.token + 1, "half")
    nodes.clock.shift(10)
    third = await a.acquire(WORK)
    assert third is not None
    assert third.token == second.token + 1


async def test_of_many_concurrent_acquires_one_succeeds(nodes: Nodes) -> None:
    for round_ in range(10):
        acquired = await asyncio.gather(*(nodes.node(f"n{number}").acquire(WORK) for number in range(8)))
        (lease,) = [lease for lease in acquired if lease is not None]
        assert lease.token == round_ + 1
        nodes.clock.shift(11)


async def test_an_expired_holder_is_fenced_once_another_acquired_the_lease(nodes: Nodes) -> None:
    paused = await nodes.node("a").acquire(WORK)
    assert paused is not None
    nodes.clock.shift(11)
    await write(nodes, paused, "late, but nobody else has it")
    other = await nodes.node("b").acquire(WORK)
    assert other is not None
    with pytest.raises(Conflict):
        await write(nodes, paused, "fenced")
    with pytest.raises(JobLeaseLost):
        await paused.save("mine")
    with pytest.raises(JobLeaseLost):
        await paused.release(done=True)
    await write(nodes, other, "other")
    assert await nodes.database.get_or_none(SYSTEM, Trail, "fenced") is None
    assert (await nodes.lease()).done_at is None


async def test_a_node_reacquires_its_own_lease_after_a_lost_answer(nodes: Nodes) -> None:
    a = nodes.node("a")
    first = len(nodes.store.batches)
    nodes.store.fault = lambda number, batch: Fault("after", Unavailable("lost")) if number == first else None
    with pytest.raises(Unavailable):
        await a.acquire(WORK)
    assert (await nodes.lease()).holder == "a"
    assert await nodes.node("b").acquire(WORK) is None
    lease = await a.acquire(WORK)
    assert lease is not None
    assert lease.token == 2


async def test_a_job_runs_once_a_period_however_many_nodes_look(nodes: Nodes) -> None:
    done = []

    async def work(lease: AcquiredLease) -> None:
        done.append(lease.token)
        await asyncio.sleep(0)

    everyone = [nodes.node(f"n{number}") for number in range(5)]
    for period in range(1, 6):
        for _ in range(3):
            waits = await asyncio.gather(*(node.run_once(WORK, 60, work) for node in everyone))
            assert all(0 <= wait <= 60 for wait in waits)
            assert len(done) == period
        nodes.clock.shift(59)
        assert [await node.run_once(WORK, 60, work) for node in everyone] == [pytest.approx(1)] * 5
        assert len(done) == period
        nodes.clock.shift(1)


async def test_a_failed_job_is_due_again_at_once(nodes: Nodes) -> None:
    async def fail(lease: AcquiredLease) -> None:
        await lease.save("so far")
        raise RuntimeError("a bug")

    seen = []

    async def work(lease: AcquiredLease) -> None:
        seen.append(lease.position)

    with pytest.raises(RuntimeError):
        await nodes.node("a").run_once(WORK, 60, fail)
    await nodes.node("b").run_once(WORK, 60, work)
    assert seen == ["so far"]


async def test_a_node_that_finds_the_lease_taken_looks_again_at_its_expiry(nodes: Nodes) -> None:
    assert await nodes.node("a").acquire(WORK) is not None
    nodes.clock.shift(4)

    async def work(lease: AcquiredLease) -> None:
        raise AssertionError("it is held")

    assert await nodes.node("b").run_once(WORK, 60, work) == pytest.approx(6)


async def test_a_repeated_job_continues_after_any_failure_and_reports_it(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "FIRST_LOOK_S", 0)
    monkeypatch.setattr(leases, "RETRY_S", 0)
    a = nodes.node("a")
    failures: list[Exception] = [Unavailable("gone"), RuntimeError("a bug"), Conflict("x")]
    finished = asyncio.Event()

    async def work(lease: AcquiredLease) -> None:
        if failures:
            raise failures.pop(0)
        finished.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(a.repeat(WORK, 0.01, work))
    await asyncio.wait_for(finished.wait(), PATIENCE_S)
    assert a.jobs[WORK].error == "Conflict: x"
    task.cancel()
    await asyncio.wait([task])
    assert (await nodes.lease()).holder == "", "a node that is stopped gives the lease back"


@pytest.mark.parametrize("seed", range(5))
async def test_the_fencing_tokens_of_successful_writes_never_decrease(nodes: Nodes, seed: int) -> None:
    """Nodes that stall at any moment, and write whenever they come to."""
    chance = random.Random(seed)
    everyone = [nodes.node(f"n{number}") for number in range(4)]
    acquired: list[AcquiredLease] = []
    written: list[int] = []
    for number in range(150):
        nodes.clock.shift(chance.choice([0, 0, 1, 4, 11]))
        lease = await chance.choice(everyone).acquire(WORK)
        if lease is not None:
            acquired.append(lease)
        chosen = chance.choice(acquired)
        try:
            await write(nodes, chosen, f"d{number}")
        except Conflict:
            continue
        written.append(chosen.token)
    assert written == sorted(written)
    assert len(set(written)) > 5


# --- Processes ------------------------------------------------------------------------------------------------

LEASE_S = 3.0


class Node:
    """A process that runs tests.helpers.job_lease_worker."""

    def __init__(self, url: str, holder: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.job_lease_worker", url, holder, str(LEASE_S)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def step(self) -> int:
        """One step of the work; the token it was done under."""
        self.go()
        found = self.line()
        while not found.startswith(("step", "fenced")):
            found = self.line()
        word, _, token = found.partition(" ")
        assert word == "step"
        return int(token)


@contextmanager
def node(url: str, holder: str) -> Iterator[Node]:
    made = Node(url, holder)
    try:
        yield made
    finally:
        made.process.kill()
        made.process.communicate()


async def _trail(url: str) -> list[int]:
    store = await open_store(url)
    try:
        registry = Registry((*SYSTEM_ENTITIES, Trail))
        await store.prepare(registry.collections)
        return (await Database(store, registry).get(SYSTEM, Trail, "trail")).tokens
    finally:
        await store.close()


@pytest.fixture
async def url(tmp_path: Path) -> str:
    url = new_url("sqlite", tmp_path)
    store = await open_store(url)
    registry = Registry((*SYSTEM_ENTITIES, Trail))
    await store.prepare(registry.collections)
    await Database(store, registry).create(SYSTEM, Trail(id="trail"))
    await store.close()
    return url


@pytest.mark.server
async def test_another_node_takes_over_from_a_killed_node_within_the_lease(url: str) -> None:
    with node(url, "a") as a:
        assert a.line() == "holds 1"
        assert a.step() == 1
        with node(url, "b") as b:
            a.process.kill()
            killed = time.monotonic()
            assert b.line() == "holds 2"
            # It looks again when the lease is over; the rest is for a process to start on a busy machine.
            assert time.monotonic() - killed < LEASE_S + PATIENCE_S
            assert b.step() == 2
    assert await _trail(url) == [1, 2]


@pytest.mark.server
async def test_a_holder_that_was_stopped_past_its_expiry_is_fenced_when_it_resumes(url: str) -> None:
    with node(url, "a") as a:
        assert a.line() == "holds 1"
        assert a.step() == 1
        while a.line() != "ready 1":
            pass
        os.kill(a.process.pid, signal.SIGSTOP)
        with node(url, "b") as b:
            assert b.line() == "holds 2"
            assert b.step() == 2
            os.kill(a.process.pid, signal.SIGCONT)
            a.go()
            assert a.line() == "fenced 1"
            assert b.step() == 2
    assert await _trail(url) == [1, 2, 2]


@pytest.mark.server
async def test_of_two_processes_one_runs_the_job(url: str) -> None:
    with node(url, "a") as a, node(url, "b") as b:
        # Whoever has it renews it with each step; the other says nothing, as long as that goes on.
        os.set_blocking(b.process.stdout.fileno(), False)  # type: ignore[union-attr]
        os.set_blocking(a.process.stdout.fileno(), False)  # type: ignore[union-attr]
        first = await _first_of(a, b)
        other = b if first is a else a
        os.set_blocking(first.process.stdout.fileno(), True)  # type: ignore[union-attr]
        for _ in range(6):
            assert first.step() == 1
            await asyncio.sleep(LEASE_S / 4)
        assert other.line() == ""
    assert await _trail(url) == [1] * 6


async def _first_of(*nodes: Node) -> Node:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        for found in nodes:
            if found.line():
                return found
        await asyncio.sleep(0.02)
    pytest.fail("nobody took the lease")
