"""Many keys: how fast a file of them is imported and exported, and what a store full of them costs afterwards.

    BENCH_KEYS=1000000 python -m benchmarks --only manykeys

It makes a key file, imports it into a new SQLite store beside a bare floor (apsw, rows as large into the same tables,
1,000 a transaction), then measures on that store: opening it, pages of every list at the front and deep inside, a
verification of keys that no cache has, and the server's memory while ever more keys are verified.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from http.client import HTTPConnection
from pathlib import Path
from random import Random
from typing import Any

import apsw

from strongroom import Strongroom
from strongroom.context import system_context
from strongroom.entities.query import MAX_LIMIT
from strongroom.keys.transfer.key_file_chunks import survey
from strongroom.keys.transfer.key_file_export import Exported, export_rows, file_of
from strongroom.keys.transfer.key_file_import import KeyImport
from strongroom.server.run import collect_rarely

from .harness import Benchmark, Plan, percentiles_us
from .servers import Server, strongroom_server

KEYS = 100_000
QUICK_KEYS = 2_000
FEW = 1_000
FLOOR_KEYS = 100_000
SAMPLE = 500
PAGES = 50
VERIFIED = 100_000
AT_ONCE = 100
ADMIN_KEY = "benchmark-administrator-key-of-32-characters-or-more"
IMPORT_OF_FLOOR = 0.5
"""Keys a second, written, beside the floor's."""
VERIFY_OF_COMMIT = 3
"""A verification of a key that no cache has, beside a bare durable commit of one row that is made in turn with it."""
DEEP_OF_FIRST = 2
"""A page behind half of a list, beside the list's first."""
SERVER_MB = 300


# --- Keys -----------------------------------------------------------------------------------------------------


def text(number: int) -> str:
    """The text of a key."""
    return "bench_" + hashlib.sha256(b"key %d" % number).hexdigest()


def write_file(path: Path, keys: int) -> None:
    """A plain key file: a live window for every third key, one created each second."""
    now = datetime.now(UTC).replace(microsecond=0)
    with path.open("w") as file:
        file.write('{"keys": [\n')
        for number in range(keys):
            row: dict[str, Any] = {
                "key": text(number),
                "name": f"customer {number % 5_000} key {number}",
                "token_limit_per_5h": 100_000,
                "expiry_date": "2099-01-01T00:00:00Z",
                "created_at": _z(now - timedelta(days=1, seconds=keys - number)),
                "last_used": _z(now - timedelta(seconds=number % 86_400)),
                "total_lifetime_tokens": 1_000 + number,
                "usage_windows": [],
            }
            if number % 3 == 0:
                started = now - timedelta(seconds=number % 16_000)
                row["usage_windows"] = [{"window_start": _z(started), "tokens_used": number % 5_000}]
            file.write(json.dumps(row) + (",\n" if number + 1 < keys else "\n"))
        file.write("]}\n")


def _z(moment: datetime) -> str:
    return moment.isoformat().replace("+00:00", "Z")


# --- Each in a process of its own -----------------------------------------------------------------------------


async def import_file(path: str, url: str) -> dict[str, float]:
    """Import a file as the command does; seconds of each step."""
    found: dict[str, float] = {}
    async with Strongroom.open(url) as room:
        await room.feed.close()
        began = time.perf_counter()
        source = survey(Path(path), time.time_ns() // 1_000)
        found["read_s"] = time.perf_counter() - began
        job = KeyImport(
            room.database, room.keys.hasher, source.shape, "acme", system_context(), workers=min(2, os.cpu_count() or 1)
        )
        began = time.perf_counter()
        plan = await job.compare(source)
        await job.carry_out(source, plan, update=False)
        found["write_s"] = time.perf_counter() - began
        began = time.perf_counter()
        sums = await job.check(source, plan, time.time_ns() // 1_000, updated=False)
        found["check_s"] = time.perf_counter() - began
        if not sums.equal or sums.store_keys != source.count:
            raise SystemExit(f"what was imported is not what the file has: {sums}")
    return found


async def export_file(path: str, url: str) -> dict[str, float]:
    """Export all keys, as the command does."""
    async with Strongroom.open(url) as room:
        await room.feed.close()
        began, found = time.perf_counter(), Exported()
        now_us = time.time_ns() // 1_000
        rows = export_rows(found, room.database, room.keys.hasher, "plain", "acme", system_context(), now_us)
        with Path(path).open("wb") as file:  # noqa: ASYNC230 - as the command does it
            async for part in file_of("plain", rows):
                file.write(part)
        return {"seconds": time.perf_counter() - began, "keys": found.count}


async def look(url: str, keys: int) -> dict[str, Any]:
    """What a full store costs: to open it, to list it, to verify a key that is in no cache."""
    began = time.perf_counter()
    async with Strongroom.open(url) as room:
        found: dict[str, Any] = {"open_s": time.perf_counter() - began}
        collect_rarely()  # as the server does when it has started
        (some,) = (await room.keys.list(limit=1)).items
        await room.keys.update(some.id, user_id="u1", owner="o1")
        middle = some.created_at or datetime.now(UTC)
        middle -= timedelta(seconds=keys // 2)
        lists: dict[str, dict[str, Any]] = {
            "all": {},
            "tenant": {"tenant": "acme"},
            "user": {"tenant": "acme", "user_id": "u1"},
            "owner": {"owner": "o1"},
            "created before": {"created_before": middle},
            "created between, of a tenant": {
                "tenant": "acme", "created_after": middle - timedelta(seconds=keys // 4), "created_before": middle,
            },
            "name prefix": {"name_prefix": "customer 7"},
            "name prefix, of a tenant": {"tenant": "acme", "name_prefix": "customer"},
        }  # fmt: skip
        found["lists"] = {name: await _pages(room, filters, keys) for name, filters in lists.items()}
        numbers = Random(1).sample(range(keys), min(2 * SAMPLE, keys))
        calls = [_verifying(room, text(number)) for number in numbers]
        half = len(calls) // 2
        found["verify_ms"] = await _times(calls[:half])
        with closing(apsw.Connection(f"{url.removeprefix('sqlite:///')}.commits")) as bare:
            found["beside_ms"], found["commit_ms"] = await _beside(calls[half:], bare)
        found["unknown_ms"] = await _times([_verifying(room, f"bench_none_{number}") for number in numbers[:half]])
        return found


def _verifying(room: Strongroom, key: str) -> Callable[[], Awaitable[Any]]:
    return lambda: room.keys.verify(key, cost={"tokens": 1})


async def _pages(room: Strongroom, filters: dict[str, Any], keys: int) -> dict[str, Any]:
    """Times of the first page of 100, and of one behind half of the list (of all keys at most)."""
    cursor, passed = None, 0
    first = await _times([lambda: room.keys.list(**filters, limit=100)] * PAGES)
    while passed < keys // 2:
        page = await room.keys.list(**filters, limit=MAX_LIMIT, cursor=cursor)
        if page.next_cursor is None:
            break
        cursor, passed = page.next_cursor, passed + len(page.items)
    deep = await _times([lambda: room.keys.list(**filters, limit=100, cursor=cursor)] * PAGES)
    return {"first": first, "deep": deep, "behind": passed}


async def _beside(calls: list[Callable[[], Awaitable[Any]]], bare: apsw.Connection) -> tuple[list[float], list[float]]:
    """The times of calls, and of bare durable commits of one row that are made in turn with them."""
    bare.execute("PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL").fetchall()
    bare.execute("CREATE TABLE IF NOT EXISTS usage (id INTEGER PRIMARY KEY, state TEXT)").fetchall()

    async def commit() -> None:
        bare.execute("INSERT INTO usage (state) VALUES (?)", ("x" * 200,)).fetchall()

    seconds: tuple[list[float], list[float]] = [], []
    for call in calls:
        for one, into in zip((call, commit), seconds, strict=True):
            began = time.perf_counter()
            await one()
            into.append(time.perf_counter() - began)
    ours, floors = ([(us or 0) / 1_000 for us in percentiles_us(some)] for some in seconds)
    return ours, floors


async def _times(calls: list[Callable[[], Awaitable[Any]]]) -> list[float]:
    """p50 and p99 in milliseconds, one call after the other."""
    seconds = []
    for call in calls:
        began = time.perf_counter()
        await call()
        seconds.append(time.perf_counter() - began)
    return [(us or 0) / 1_000 for us in percentiles_us(seconds)]


def _apart(what: str, *arguments: str) -> dict[str, Any]:
    """One of these functions in a process of its own, so that the memory is its alone; with its peak, in megabytes."""
    command = [sys.executable, "-m", "benchmarks.manykeys", what, *arguments]
    ran = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    answer: dict[str, Any] = json.loads(ran.stdout)
    return answer


def main() -> None:
    """A step, as another process runs it: prints one JSON document."""
    what, *arguments = sys.argv[1:]
    if what == "import":
        found: dict[str, Any] = asyncio.run(import_file(*arguments))
    elif what == "export":
        found = asyncio.run(export_file(*arguments))
    else:
        found = asyncio.run(look(arguments[0], int(arguments[1])))
    found["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(found))


# --- The floor ------------------------------------------------------------------------------------------------


def floor(full: Path, path: Path, keys: int) -> float:
    """Keys a second by bare apsw: rows of `full` with new keys into the same tables, 1,000 a transaction."""
    with closing(apsw.Connection(str(full))) as source, closing(apsw.Connection(str(path))) as target:
        for sql in _texts(source, "SELECT sql FROM sqlite_schema WHERE sql IS NOT NULL AND name NOT LIKE 'sqlite_%'"):
            target.execute(sql).fetchall()
        target.execute("PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL").fetchall()
        tables = [("api_keys", "id"), ("key_usage", "id"), ("_journal", "entity_id")]
        inserts, patterns, names = [], [], []
        for table, id in tables:
            condition = "WHERE collection = 'api_keys' LIMIT 1" if table == "_journal" else "LIMIT 1"
            columns = list(_texts(source, f"SELECT name FROM pragma_table_info('{table}') WHERE name <> 'sequence'"))
            listed = ", ".join(f'"{column}"' for column in columns)
            (row,) = source.execute(f"SELECT {listed} FROM {table} {condition}").fetchall()
            inserts.append(f"INSERT INTO {table} ({listed}) VALUES ({', '.join('?' for _ in columns)})")
            patterns.append(dict(zip(columns, row, strict=True)))
            names.append(id)
        seconds = 0.0
        for begin in range(0, keys, 1_000):
            rows: list[list[tuple[Any, ...]]] = [[], [], []]
            for number in range(begin, min(begin + 1_000, keys)):
                digest = hashlib.sha256(b"floor %d" % number).hexdigest()
                for some, pattern, name in zip(rows, patterns, names, strict=True):
                    new = {name: f"key_{digest[:31]}"}
                    if name == "id" and "hash" in pattern:
                        new |= {"hash": f"000001:{digest[::-1]}", "name": f"customer {number % 5_000} key {number}"}
                    some.append(tuple({**pattern, **new}.values()))
            began = time.perf_counter()
            target.execute("BEGIN IMMEDIATE").fetchall()
            for insert, some in zip(inserts, rows, strict=True):
                target.executemany(insert, some).fetchall()
            target.execute("COMMIT").fetchall()
            seconds += time.perf_counter() - began
        return keys / seconds


def _texts(connection: apsw.Connection, sql: str) -> Iterator[str]:
    for (value,) in connection.execute(sql).fetchall():
        yield str(value)


# --- The server -----------------------------------------------------------------------------------------------


def serve(folder: Path, store: str, keys: int) -> dict[str, Any]:
    """The server's memory on a store: when it has started, and when so many different keys were verified."""
    began = time.perf_counter()
    with strongroom_server(folder, ADMIN_KEY, store) as server:
        started_s = time.perf_counter() - began
        before = _megabytes(server)
        numbers = Random(2).sample(range(keys), min(VERIFIED, keys))
        connection = HTTPConnection("127.0.0.1", server.port, timeout=60)
        headers = {"Authorization": f"Bearer {ADMIN_KEY}", "Content-Type": "application/json"}
        for begin in range(0, len(numbers), AT_ONCE):
            items = [{"key": text(number), "cost": {"tokens": 1}} for number in numbers[begin : begin + AT_ONCE]]
            connection.request("POST", "/v1/keys/verify:batch", json.dumps({"items": items}), headers)
            answer = connection.getresponse()
            body = answer.read()
            if answer.status != 200 or b'"valid":true' not in body:
                raise SystemExit(f"verify:batch answered {answer.status}: {body[:300]!r}")
        connection.close()
        return {"started_s": started_s, "before_mb": before, "after_mb": _megabytes(server), "verified": len(numbers)}


def _megabytes(server: Server) -> float:
    """The resident memory of the server's process."""
    lines = Path(f"/proc/{server.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


# --- The report -----------------------------------------------------------------------------------------------


def run(plan: Plan) -> Benchmark:
    """All of it, one after the other; figures stand beside their targets."""
    keys = QUICK_KEYS if plan.quick else int(os.environ.get("BENCH_KEYS", KEYS))
    folder = Path(plan.folder)
    stores = {count: f"sqlite:///{folder}/{count}.db" for count in {min(FEW, keys), keys}}
    labels, opened, imported = [], {}, dict[str, Any]()
    for count, url in sorted(stores.items()):
        plan.progress(f"importing {count:,} keys")
        file = folder / f"{count}.json"
        write_file(file, count)
        imported = _apart("import", str(file), url)
        plan.progress(f"looking at {count:,} keys")
        opened[count] = _apart("look", url, str(count))
    plan.progress("the floor")
    bare = floor(folder / f"{keys}.db", folder / "floor.db", min(keys, FLOOR_KEYS))
    plan.progress("exporting")
    exported = _apart("export", str(folder / "out.json"), stores[keys])
    plan.progress("the server")
    served = serve(folder / "server", stores[keys], keys)
    labels += _import_labels(keys, imported, bare)
    labels.append(
        f"export: {exported['keys'] / exported['seconds']:,.0f} keys/s; peak memory {exported['peak_mb']:.0f} MB"
    )
    labels += _look_labels(keys, opened, served)
    return Benchmark("manykeys", "keys/s", tuple(labels))


def _import_labels(keys: int, imported: dict[str, Any], bare: float) -> list[str]:
    written, whole = keys / imported["write_s"], keys / sum(imported[f"{n}_s"] for n in ("read", "write", "check"))
    return [
        f"import of {keys:,} keys, written: {written:,.0f} keys/s; bare floor, 1,000 keys a transaction: {bare:,.0f} "
        f"keys/s; {written / bare:.2f} × floor (target {IMPORT_OF_FLOOR:g}: {_met(written / bare >= IMPORT_OF_FLOOR)})",
        f"  read and judged in {imported['read_s']:.1f} s, written in {imported['write_s']:.1f} s, read back and "
        f"compared in {imported['check_s']:.1f} s: {whole:,.0f} keys/s in all; peak memory "
        f"{imported['peak_mb']:.0f} MB",
    ]


def _look_labels(keys: int, opened: dict[int, dict[str, Any]], served: dict[str, Any]) -> list[str]:
    found = opened[keys]
    p50, p99 = found["verify_ms"]
    beside, commit = found["beside_ms"], found["commit_ms"]
    parts = [ours / bare for ours, bare in zip(beside, commit, strict=True)]
    labels = [
        f"cold verify: p50 {p50:.2f} ms, p99 {p99:.2f} ms; in turn with a bare commit of one row by apsw to another "
        f"file: p50 {beside[0]:.2f} against {commit[0]:.2f} ms, p99 {beside[1]:.2f} against {commit[1]:.2f} ms: "
        f"{parts[0]:.1f} and {parts[1]:.1f} × the commit (target at most {VERIFY_OF_COMMIT}: "
        f"{_met(max(parts) <= VERIFY_OF_COMMIT)}); of an unknown key {found['unknown_ms'][0]:.2f} ms",
        "opening the store: " + ", ".join(f"{count:,} keys {one['open_s']:.2f} s" for count, one in opened.items()),
        f"server: {served['before_mb']:.0f} MB when started (in {served['started_s']:.1f} s), "
        f"{served['after_mb']:.0f} MB after {served['verified']:,} different keys were verified "
        f"(target {SERVER_MB} MB: {_met(served['after_mb'] < SERVER_MB)})",
    ]
    for name, one in found["lists"].items():
        part = one["deep"][0] / one["first"][0]
        labels.append(
            f"page of 100, {name}: first p50 {one['first'][0]:.1f} p99 {one['first'][1]:.1f} ms, behind "
            f"{one['behind']:,} p50 {one['deep'][0]:.1f} p99 {one['deep'][1]:.1f} ms: {part:.1f} × the first (target "
            f"at most {DEEP_OF_FIRST}: {_met(part <= DEEP_OF_FIRST)})"
        )
    return labels


def _met(met: bool) -> str:
    return "met" if met else "MISSED"


if __name__ == "__main__":
    main()
