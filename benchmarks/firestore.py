"""`firestore`: the store on Google's emulator, beside the bare Google client on the same one."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from datetime import datetime
from itertools import count, cycle
from typing import Any

from google.auth.credentials import AnonymousCredentials
from google.cloud.firestore import AsyncClient, Increment

from strongroom import Entity, Index, Strongroom
from strongroom.storage import open_store
from strongroom.storage.port import Batch, Create, Put

from .harness import Benchmark, BenchmarkError, Job, Plan, Role, Round, Sample, Target, closed_loop, side_by_side, start
from .notes import DESCRIPTION, TENANT, note

ROWS = 200
WRITERS = 16
START_TIMEOUT_S = 60
GET, BARE_GET = "strongroom's store, await store.get(…)", "bare client, await document.get()"
CREATE, BARE_CREATE = "strongroom's store, a batch of one Create", "bare client, await document.create(…)"
PUT, BARE_PUT = "strongroom's store, a Put with its version", "bare client, update(…, option=last_update_time)"
VERIFY, INCREMENT = "room.keys.verify(…), leased", "bare client, an increment of one document"
VERIFY_OF_FLOOR = 10
"""A leased verification asks Firestore for nothing: one document takes few increments a second."""
AT_LEAST = 1 / 1.15
"""An overhead of at most 15%."""


class BenchNote(Entity, collection="bench_notes", indexes=[Index("status", "-created_at")]):
    """What both store."""

    title: str
    body: str
    status: str
    author: str
    priority: int
    due_at: datetime


def run(plan: Plan) -> Benchmark:
    labels = (
        f"Every document is {DESCRIPTION}. The emulator keeps them in memory, on this machine, and shares its cores "
        "with who measures: it says what the code costs, not what Firestore's network and disks do.",
        "strongroom: by the storage port, with versions, creation and update times; no rules, no journal.",
        "bare client: google-cloud-firestore's AsyncClient, one document a call, timestamps by the caller.",
        "contended limit: one key with one rolling limit of 5 hours, leased; beside it, one document incremented.",
    )
    with ExitStack() as stack:
        try:
            emulator = stack.enter_context(server())
        except BenchmarkError as error:
            plan.progress(str(error))
            return Benchmark("firestore", "operations/s", (*labels, str(error)))
        us = start(stack, plan, "strongroom's store", ours, emulator)
        bare = start(stack, plan, "the bare client", bare_client, emulator)
        limit = start(stack, plan, VERIFY, leased, emulator)
        groups = []
        for title, what, name, bare_name, callers in (
            ("point reads, 1 reader", "get", GET, BARE_GET, 1),
            ("creations, 1 writer", "create", CREATE, BARE_CREATE, 1),
            ("conditional updates, 1 writer", "update", PUT, BARE_PUT, 1),
            (f"creations, {WRITERS} writers", "create", CREATE, BARE_CREATE, WRITERS),
        ):
            pair = (us.contender(name, Role.OURS, what, callers), bare.contender(bare_name, Role.FLOOR, what, callers))
            groups.append(side_by_side(plan, title, pair, [Target(name, of_floor=AT_LEAST)]))
        groups.append(
            side_by_side(
                plan,
                f"one contended limit, {WRITERS} callers",
                (
                    limit.contender(VERIFY, Role.OURS, "verify", WRITERS),
                    bare.contender(INCREMENT, Role.FLOOR, "increment", WRITERS),
                ),
                [Target(VERIFY, of_floor=VERIFY_OF_FLOOR)],
            )
        )
    return Benchmark("firestore", "operations/s", labels, tuple(groups))


@contextmanager
def server() -> Iterator[str]:
    """`host:port` of FIRESTORE_EMULATOR_HOST, or of an emulator started for this."""
    if given := os.environ.get("FIRESTORE_EMULATOR_HOST"):
        yield given
        return
    from tests.helpers.servers import answers, firestore, free_port

    port = free_port()
    try:
        command = firestore.command(port)
    except BaseException as error:  # pytest's skip, outside of a test
        if type(error).__name__ not in ("Skipped", "Failed"):
            raise
        raise BenchmarkError(str(error)) from None
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            while not answers(port):
                if time.monotonic() > deadline or process.poll() is not None:
                    raise BenchmarkError("the Firestore emulator did not start")
                time.sleep(0.05)
            yield f"127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait()


@asynccontextmanager
async def ours(emulator: str) -> AsyncIterator[Round]:
    """For a `Worker`. Jobs: `get`, `create`, `update` (each under the version that the last one made)."""
    collection = BenchNote.__collection__
    name = collection.name
    store = await open_store(f"firestore://bench-ours-{os.getpid()}?emulator={emulator}")
    try:
        await store.prepare([collection])
        versions = {}
        for number in range(ROWS):
            made = await store.commit(Batch(TENANT, (Create(name, str(number), note(number)),), _now_us()))
            versions[str(number)] = made.versions[0]
        turn, numbers = cycle(list(versions)), count(ROWS)

        async def get() -> None:
            assert await store.get(name, TENANT, next(turn)) is not None

        async def create() -> None:
            number = next(numbers)
            await store.commit(Batch(TENANT, (Create(name, str(number), note(number)),), _now_us()))

        async def update() -> None:
            id = next(turn)
            put = Put(name, id, note(next(numbers)), expected=versions[id])
            versions[id] = (await store.commit(Batch(TENANT, (put,), _now_us()))).versions[0]

        yield _measured({"get": get, "create": create, "update": update})
    finally:
        await store.close()


@asynccontextmanager
async def leased(emulator: str) -> AsyncIterator[Round]:
    """For a `Worker`. Job: `verify`: one key with one rolling limit, leased."""
    limit = {"resource": "tokens", "limit": 1_000_000_000_000, "window": {"kind": "rolling", "seconds": 18_000}}
    url = f"firestore://bench-limit-{os.getpid()}?emulator={emulator}"
    async with Strongroom.open(url, limits="leased") as room:
        key = (await room.keys.create(name="bench", limits=[limit])).text

        async def verify() -> None:
            assert (await room.keys.verify(key, cost={"tokens": 250})).valid

        yield _measured({"verify": verify})


@asynccontextmanager
async def bare_client(emulator: str) -> AsyncIterator[Round]:
    """For a `Worker`: the same jobs, by Google's own client."""
    os.environ["FIRESTORE_EMULATOR_HOST"] = emulator
    client = AsyncClient(project=f"bench-bare-{os.getpid()}", credentials=AnonymousCredentials())  # type: ignore[no-untyped-call]
    notes = client.collection("tenants", TENANT, "bench_notes")
    times = {}
    for number in range(ROWS):
        times[str(number)] = (await notes.document(str(number)).create(note(number))).update_time
    turn, numbers = cycle(list(times)), count(ROWS)

    async def get() -> None:
        assert (await notes.document(next(turn)).get()).to_dict() is not None

    async def create() -> None:
        number = next(numbers)
        await notes.document(str(number)).create(note(number))

    async def update() -> None:
        id = next(turn)
        option = client.write_option(last_update_time=times[id])
        times[id] = (await notes.document(id).update(note(next(numbers)), option=option)).update_time

    counter = client.collection("counters").document("one")
    await counter.set({"n": 0})

    async def increment() -> None:
        await counter.update({"n": Increment(1)})

    try:
        yield _measured({"get": get, "create": create, "update": update, "increment": increment})
    finally:
        client.close()  # type: ignore[no-untyped-call]


def _measured(jobs: dict[str, Any]) -> Round:
    async def measure(job: Job) -> Sample:
        return await closed_loop(jobs[job.what], job.seconds, job.callers)

    return measure


def _now_us() -> int:
    return time.time_ns() // 1_000
