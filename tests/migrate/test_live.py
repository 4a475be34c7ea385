"""Migrating a store in use: no acknowledged write is lost, and none is taken after the switch-over, despite kill -9."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from strongroom import Limit, Rolling, Strongroom
from strongroom import migrate as library
from strongroom.app import SYSTEM_ENTITIES
from strongroom.entities.entity import Registry
from strongroom.entities.query import Query
from strongroom.errors import Conflict, InvalidInput, NotFound, Unavailable
from strongroom.migrate import Options, Phase, streams
from strongroom.migrate import follow as following_module
from strongroom.migrate import run as run_module
from strongroom.migrate.state import fence, now_us
from strongroom.storage import open_store
from strongroom.storage.port import Append, Batch, Create, Delete, Patch, Put, Store
from strongroom.testing.storage.samples import COLLECTIONS, item, record, sample, shared
from tests.conftest import backend_of
from tests.helpers.faulty_store import FaultyStore
from tests.helpers.migrate_writer import Paper
from tests.helpers.paths import HELPERS
from tests.helpers.waiting import PATIENCE_S, wait_until
from tests.migrate.test_migrate import add, assert_equal, filled, held, journal, of_tenants

WRITER = HELPERS / "migrate_writer.py"
WORKER = HELPERS / "migrate_worker.py"
ALL = Registry((*SYSTEM_ENTITIES, Paper)).collections
LIVE = Options(source="a", target="b", live=True, batch=50)
SWITCH = Options(source="a", target="b", live=True, switch=True, batch=50)


@pytest.fixture
def urls(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], str]:
    """A new store's URL, by its kind."""
    asked = getattr(request.node, "callspec", None)
    made = {}
    if asked is not None and "postgres" in asked.params.values():
        made["postgres"] = backend_of("postgres", tmp_path, request)  # here, since what starts it runs a loop

    def new(kind: str) -> str:
        if kind not in made:
            made[kind] = backend_of(kind, tmp_path, request)
        return made[kind].new_url()

    return new


@pytest.fixture
def briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other process has to learn of anything, so nobody waits for one."""
    monkeypatch.setattr(run_module, "NOTICE_S", 0.02)


@asynccontextmanager
async def stores(*urls: str) -> AsyncIterator[list[Store]]:
    opened = []
    try:
        for url in urls:
            opened.append(await open_store(url))
        yield opened
    finally:
        for store in opened:
            await store.close()


# --- A writer beside it -----------------------------------------------------------------------------------------


@dataclass
class Told:
    """What one writer process was promised."""

    values: dict[tuple[str, str], int | None] = field(default_factory=dict)
    tokens: int = 0
    refused: int = 0
    lines: int = 0
    after_refusal: list[str] = field(default_factory=list)

    def add(self, line: str) -> None:
        self.lines += 1
        word, *rest = line.split()
        if word == "refused":
            self.refused += 1
            return
        match word:
            case "e" | "d":
                tenant = f"t{int(rest[0].partition('-')[0]) % 2}"
                self.values[tenant, rest[0]] = int(rest[1]) if word == "e" else None
            case "v":
                self.tokens += int(rest[0])
            case "failed":
                pytest.fail(line)


@asynccontextmanager
async def writing(url: str, text: str, writers: int = 4) -> AsyncIterator[tuple[asyncio.subprocess.Process, Told]]:
    """A process that writes until it is told to stop by a line."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(WRITER), url, text, str(writers),
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, env=environment,
    )  # fmt: skip
    told = Told()

    async def listen() -> None:
        assert process.stdout
        async for line in process.stdout:
            told.add(line.decode().strip())

    heard = asyncio.ensure_future(listen())
    try:
        await wait_until(lambda: told.lines > 50)
        yield process, told
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        await heard


async def ended(process: asyncio.subprocess.Process) -> None:
    assert process.stdin
    process.stdin.write(b"stop\n")
    await process.stdin.drain()
    assert await asyncio.wait_for(process.wait(), 2 * PATIENCE_S) == 0


async def key_in(url: str) -> tuple[str, str]:
    async with Strongroom.open(url, entities=[Paper]) as room:
        limit = Limit(resource="tokens", limit=10**9, window=Rolling(seconds=18_000))
        issued = await room.keys.create(name="k", limits=[limit])
        return issued.key.id, issued.text


async def check_told(url: str, id: str, text: str, told: Told) -> None:
    """Everything that was acknowledged is in the store, and no more of what the writers alone write."""
    async with Strongroom.open(url, entities=[Paper]) as room:
        for (tenant, paper), value in told.values.items():
            found = await room.tenant(tenant).get_or_none(Paper, paper)
            assert (found.value if found is not None else None) == value, f"{tenant}/{paper}"
        stats = await room.keys.stats(id)
        assert stats.totals["tokens"] == told.tokens
        assert (await room.keys.verify(text, cost={"tokens": 1})).valid


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("sqlite", "postgres"),
        pytest.param("sqlite", "sqlite", marks=pytest.mark.soak),
        pytest.param("postgres", "json", marks=pytest.mark.soak),
        pytest.param("postgres", "postgres", marks=pytest.mark.soak),
    ],
)
async def test_a_live_migration_moves_every_acknowledged_write(
    urls: Callable[[str], str], source: str, target: str
) -> None:
    one, other = urls(source), urls(target)
    id, text = await key_in(one)
    async with writing(one, text, 2) as (process, told):
        async with stores(one, other) as (a, b):
            ready = await library.migrate(a, b, ALL, LIVE)
            assert (ready.phase, ready.is_done) == (Phase.FOLLOWING, False)
            assert "ready to switch over" in ready.notes[-1]
            before = told.lines
            await wait_until(lambda: told.lines > before + 50)
            assert told.refused == 0
            report = await library.migrate(a, b, ALL, SWITCH)
            assert (report.is_done, report.equal) == (True, True)
            assert report.pause_s is not None
            assert report.followed > 0
            after = told.tokens, dict(told.values)
            refused = told.refused
            await wait_until(lambda: told.refused > refused + 2)
            assert (told.tokens, told.values) == after, "something was taken after the switch-over"
            assert of_tenants(await journal(b)) == of_tenants(await journal(a))
            assert (await a.get("papers", "t0", "nope")) is None, "the source can be read all the time"
        await ended(process)
    await check_told(other, id, text, told)


async def test_an_aborted_switch_over_lets_the_source_take_writes_again(
    urls: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = urls("sqlite"), urls("sqlite")
    id, text = await key_in(one)
    async with writing(one, text, 2) as (process, told):
        async with stores(one, other) as (a, b):

            async def fails(*_: Any) -> None:
                raise Conflict("stopped in the middle")

            with monkeypatch.context() as patch:
                patch.setattr(run_module, "reconcile", fails)
                with pytest.raises(Conflict, match="stopped in the middle"):
                    await library.migrate(a, b, ALL, SWITCH)
            await wait_until(lambda: told.refused > 0)
            report = await library.abort(a, b, ALL, LIVE)
            assert report.phase == Phase.FOLLOWING
            before = told.lines
            await wait_until(lambda: told.lines - told.refused > before)
            assert (await library.migrate(a, b, ALL, SWITCH)).is_done
            with pytest.raises(Conflict, match="is done"):
                await library.abort(a, b, ALL, LIVE)
        await ended(process)
    await check_told(other, id, text, told)


@pytest.mark.usefixtures("briefly")
async def test_a_rollback_after_the_switch_over_gives_the_source_its_writes_back(urls: Callable[[str], str]) -> None:
    one, other = urls("sqlite"), urls("sqlite")
    _, text = await key_in(one)
    async with stores(one, other) as (a, b):
        assert (await library.migrate(a, b, ALL, SWITCH)).is_done
    with pytest.raises(Unavailable, match=r"^the data moves to another store: writes are off here$"):
        async with Strongroom.open(one, entities=[Paper]) as room:
            await room.tenant("acme").create(Paper())
    async with stores(one, other) as (a, b):
        report = await library.roll_back(a, b, ALL, SWITCH)
        assert report.phase == Phase.ROLLED_BACK
        assert report.documents == 0
    async with Strongroom.open(one, entities=[Paper]) as room:
        await room.tenant("acme").create(Paper())
        assert (await room.keys.verify(text)).valid


async def test_the_target_takes_no_writes_until_it_is_whole(urls: Callable[[str], str]) -> None:
    one, other = urls("sqlite"), urls("sqlite")
    await key_in(one)
    async with stores(one, other) as (a, b):
        await library.migrate(a, b, ALL, LIVE)
        async with Strongroom.open(other, entities=[Paper]) as room:
            with pytest.raises(Unavailable, match=r"^a migration into this store is under way$"):
                await room.tenant("acme").create(Paper())
            assert (await library.migrate(a, b, ALL, SWITCH)).is_done
            await wait_until(lambda: room.database.writes.refusal is None)
            await room.tenant("acme").create(Paper())


# --- Following, step by step ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("briefly")
async def test_changes_behind_the_copy_are_followed_including_deletions_and_swaps(urls: Callable[[str], str]) -> None:
    """Unique values change hands while the copy stands: the target must let go in the same order, or make way."""
    async with stores(urls("sqlite"), urls("sqlite")) as (one, other):
        await filled(one, 6)
        await one.prepare([*COLLECTIONS, *(c for c in ALL if c.name == "store_state")])
        assert (await library.migrate(one, other, COLLECTIONS, LIVE)).phase == Phase.FOLLOWING
        await add(one, "acme", Put("items", "i0", item("free", code=None)))
        for id, code in (("i1", "c0"), ("i2", "c1"), ("i0", "c2"), ("new", "c9")):
            await add(one, "acme", Put("items", id, item("moved", code=code)), Append(record(id), 0))
        await add(one, "acme", Delete("items", "i4"), Append(record("i4", action="delete"), 0))
        report = await library.migrate(one, other, COLLECTIONS, SWITCH)
        assert (report.is_done, report.followed) == (True, 5)
        await assert_equal(one, other)


@pytest.mark.usefixtures("briefly")
async def test_usage_rolled_up_into_keys_behind_the_copy_is_moved(urls: Callable[[str], str]) -> None:
    one, other = urls("sqlite"), urls("sqlite")
    await key_in(one)
    async with stores(one, other) as (a, b):
        assert (await library.migrate(a, b, ALL, LIVE)).phase == Phase.FOLLOWING
        (key,) = await a.find("api_keys", None, Query())
        roll_up = Patch("api_keys", key["id"], {"usage_count": 7}, key["version"])
        await a.commit(Batch(None, (roll_up,), await a.now_us()))
        assert (await library.migrate(a, b, ALL, SWITCH)).is_done
        (moved,) = await b.find("api_keys", None, Query())
        assert moved["usage_count"] == 7


@pytest.mark.usefixtures("briefly")
async def test_records_too_large_for_one_batch_are_followed_in_several_batches(urls: Callable[[str], str]) -> None:
    async with stores(urls("sqlite"), urls("sqlite")) as (one, other):
        await filled(one, 2)
        await one.prepare([*COLLECTIONS, *(c for c in ALL if c.name == "store_state")])
        assert (await library.migrate(one, other, COLLECTIONS, LIVE)).phase == Phase.FOLLOWING
        for n in range(6):
            halves = sample(note="x" * 700_000)
            await add(one, "acme", Append(record(f"{n}", id=f"large-{n}", before=halves, after=halves)))
        assert (await library.migrate(one, other, COLLECTIONS, SWITCH)).is_done
        await assert_equal(one, other)


@pytest.mark.usefixtures("briefly")
async def test_a_unique_value_that_moves_during_the_copy_is_moved_without_a_conflict(
    urls: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy has read the old holder, and comes to the new one: the old one makes way, and is followed back."""
    monkeypatch.setattr(streams, "FIRST_PAGE", 4)
    monkeypatch.setattr(streams, "_page_limit", lambda page: 4)
    async with stores(urls("sqlite"), urls("sqlite")) as (one, other):
        await filled(one, 9, ["acme"])
        await one.prepare([*COLLECTIONS, *(c for c in ALL if c.name == "store_state")])
        source = FaultyStore(one)
        moved = False

        async def move(method: str, collection: str) -> None:
            nonlocal moved
            if (method, collection) == ("find", "items") and not moved:
                moved = True
                free = Put("items", "i0", item("free"))
                taken = Put("items", "i8", item("taken", code="c0"))
                await add(one, "acme", free, Append(record("i0"), 0), taken, Append(record("i8"), 2))

        source.after_read = move
        report = await library.migrate(source, other, COLLECTIONS, replace(SWITCH, batch=6))
        assert (moved, report.is_done, report.followed) == (True, True, 2)
        await assert_equal(one, other)


class Busy(FaultyStore):
    """A source in which something happens whenever a page has been read: the copy never sees one moment."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.chance = random.Random(7)
        self.left = 60
        self.one_at_a_time = asyncio.Lock()
        self.after_read = self.change

    async def change(self, method: str, collection: str) -> None:
        async with self.one_at_a_time:
            if collection == "items" and self.left:
                self.left -= 1
                await self.shuffle()

    async def shuffle(self) -> None:
        """Two documents take two codes, from whoever has them."""
        one, other = self.chance.sample(range(12), 2)
        free = [Put("items", f"i{n}", item(f"free {self.left}")) for n in (one, other)]
        codes = self.chance.sample(range(12), 2)
        holders = [d for d in await self.store.find("items", "acme", Query()) if d["code"] in {f"c{n}" for n in codes}]
        gone = [Delete("items", d["id"]) for d in holders if d["id"] not in (f"i{one}", f"i{other}")]
        taken = [
            Put("items", f"i{n}", item(f"taken {self.left}", code=f"c{c}"))
            for n, c in zip((one, other), codes, strict=True)
        ]
        changes: list[Create | Put | Delete] = [*free, *gone, *taken]
        told = [Append(record(c.id, id=f"{self.left}-{n}"), None) for n, c in enumerate(changes)]
        await self.store.commit(Batch("acme", (*changes, *told), now_us()))


@pytest.mark.usefixtures("briefly")
async def test_a_copy_of_a_constantly_changing_store_ends_equal(urls: Callable[[str], str]) -> None:
    async with stores(urls("sqlite"), urls("sqlite")) as (one, other):
        await filled(one, 12)
        await one.prepare([*COLLECTIONS, *(c for c in ALL if c.name == "store_state")])
        busy = Busy(one)
        options = Options(source="a", target="b", live=True, switch=True, batch=4)
        report = await library.migrate(busy, other, COLLECTIONS, options)
        assert busy.left == 0
        assert (report.is_done, report.equal) == (True, True)
        await assert_equal(one, other)


@pytest.mark.usefixtures("briefly")
async def test_late_writes_of_a_process_that_missed_the_fence_are_reported_and_copied(
    urls: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with stores(urls("sqlite"), urls("sqlite")) as (one, other):
        await filled(one, 3)
        await one.prepare([*COLLECTIONS, *(c for c in ALL if c.name == "store_state")])
        quiet = run_module._until_quiet

        async def late(run: Any) -> None:
            await quiet(run)
            await add(one, "acme", Put("items", "i1", item("after all")))  # without a record, as usage is written
            await add(one, None, Create("shared", "late", shared("late")))

        monkeypatch.setattr(run_module, "_until_quiet", late)
        report = await library.migrate(one, other, COLLECTIONS, SWITCH)
        assert (report.is_done, report.equal, report.late) == (True, True, 2)
        await assert_equal(one, other)


@pytest.mark.usefixtures("briefly")
async def test_a_source_that_keeps_taking_writes_fails_the_switch_over_with_a_reason(
    urls: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "MAX_NOTICE_S", 0.1)
    async with stores(urls("sqlite"), urls("sqlite")) as (one, other):
        await filled(one, 3)
        await one.prepare([*COLLECTIONS, *(c for c in ALL if c.name == "store_state")])
        numbers = itertools.count()
        original = following_module.follow

        async def follow(run: Any, **options: Any) -> int:
            await add(one, "acme", Append(record("x", id=f"busy-{next(numbers)}")))
            return await original(run, **options)

        monkeypatch.setattr(run_module, "follow", follow)
        with pytest.raises(Unavailable, match="is still written to"):
            await library.migrate(one, other, COLLECTIONS, SWITCH)
        monkeypatch.setattr(run_module, "follow", original)
        assert (await library.migrate(one, other, COLLECTIONS, SWITCH)).is_done


@pytest.mark.usefixtures("briefly")
async def test_a_live_source_of_an_older_version_or_with_writes_off_is_refused(urls: Callable[[str], str]) -> None:
    async with stores(urls("sqlite"), urls("sqlite")) as (one, other):
        await filled(one, 3)
        with pytest.raises(InvalidInput, match="never opened by a version that supports"):
            await library.migrate(one, other, COLLECTIONS, LIVE)
        await one.prepare([*COLLECTIONS, *(c for c in ALL if c.name == "store_state")])
        await one.commit(Batch(None, fence(False, "moved to elsewhere"), now_us()))
        with pytest.raises(InvalidInput, match="moved to elsewhere"):
            await library.migrate(one, other, COLLECTIONS, LIVE)
        with pytest.raises(NotFound):
            await library.abort(one, other, COLLECTIONS, LIVE)
        assert (await library.migrate(one, other, COLLECTIONS, Options())).is_done, "it is quiet, so it can be moved"


# --- kill -9 ----------------------------------------------------------------------------------------------------


async def killed(arguments: list[str], after_calls: int) -> int:
    """A process that migrates, and kills itself at its write number `after_calls`; its exit status."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(WORKER), *arguments, str(after_calls), env=environment
    )
    with suppress(TimeoutError):
        return await asyncio.wait_for(process.wait(), 60)
    process.kill()
    pytest.fail("the migration did not end")


async def killed_until_done(urls: Callable[[str], str], chance: random.Random, *, undo: bool) -> None:
    one, other = urls("sqlite"), urls("sqlite")
    async with stores(one) as (a,):
        await filled(a, 30)
        before = await held(a)
    statuses: list[int] = []
    while 0 not in statuses and len(statuses) < 40:
        statuses.append(await killed([one, other, "migrate"], chance.randint(6, 30)))
        assert statuses[-1] in (0, -signal.SIGKILL)
        if undo and len(statuses) == 2:
            break
    async with stores(one, other) as (a, b):
        await a.prepare(COLLECTIONS)
        assert await held(a) == before, "the source is not as it was"
        if undo:
            report = await library.roll_back(a, b, COLLECTIONS, Options(source=one, target=other))
            assert report.phase == Phase.ROLLED_BACK
            assert await held(b) == {}
            report = await library.migrate(a, b, COLLECTIONS, Options(source=one, target=other))
            assert report.equal
        await b.prepare(COLLECTIONS)
        await assert_equal(a, b)


@pytest.mark.parametrize(("seed", "undo"), [(1, False), (2, True)])
async def test_a_migration_killed_at_random_resumes_or_is_rolled_back(
    urls: Callable[[str], str], seed: int, undo: bool
) -> None:
    await killed_until_done(urls, random.Random(seed), undo=undo)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(3, 43))
async def test_a_migration_killed_many_times_resumes_or_is_rolled_back(urls: Callable[[str], str], seed: int) -> None:
    await killed_until_done(urls, random.Random(seed), undo=seed % 2 == 0)


@pytest.mark.usefixtures("briefly")
async def test_a_migration_killed_with_the_fence_up_is_aborted_or_resumes(urls: Callable[[str], str]) -> None:
    """The switch-over is killed behind the write that turns the source's writes off."""
    for way in ("abort", "resume"):
        one, other = urls("sqlite"), urls("sqlite")
        async with stores(one) as (a,):
            await filled(a, 3)
            await a.prepare([*COLLECTIONS, *(c for c in ALL if c.name == "store_state")])
        assert await killed([one, other, "fence"], 1) == -signal.SIGKILL
        with pytest.raises(Unavailable, match="the data moves to"):
            async with Strongroom.open(one) as room:
                await room.keys.create(name="refused")
        options = Options(source=one, target=other, live=True, switch=True)
        async with stores(one, other) as (a, b):
            if way == "abort":
                await library.abort(a, b, COLLECTIONS, options)
            else:
                assert (await library.migrate(a, b, COLLECTIONS, options)).is_done
                await assert_equal(a, b)
        if way == "abort":
            async with Strongroom.open(one) as room:
                await room.keys.create(name="taken")
