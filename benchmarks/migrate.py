"""How fast `strongroom migrate` moves API keys with their journal, and that its memory does not grow with their number.

    python -m benchmarks.migrate [KEYS] [--to URL]

Without --to it moves into a new SQLite file and into PostgreSQL: the server that STRONGROOM_BENCH_POSTGRES names (an
empty schema, by its URL), else one of its own, of the tests' binaries.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from strongroom import Limit, Rolling, Strongroom
from strongroom.app import SYSTEM_ENTITIES
from strongroom.entities.entity import Registry
from strongroom.entities.query import Query
from strongroom.journal.records import masked
from strongroom.limits.ledger import KeyUsage
from strongroom.migrate import Options, migrate
from strongroom.storage import open_store
from strongroom.storage.port import Append, Batch, Create, Record

KEYS = 50_000
TENANTS = 100
AT_ONCE = 250
USED = KeyUsage(count=1, state='{"totals":{"tokens":812,"requests":1},"counters":{}}')


async def fill(url: str, keys: int) -> None:
    """A store with so many keys, each made with its journal record and used once."""
    limits = [Limit(resource="tokens", limit=100_000, window=Rolling(seconds=18_000))]
    async with Strongroom.open(url) as room:
        issued = await room.keys.create(name="the pattern", permissions=["chat:write"], limits=limits, user_id="u1")
        (pattern,) = await room.store.find("api_keys", None, Query())
        collection = room.database.registry.by_name["api_keys"].__collection__
        fields = {name: pattern[name] for name in collection.fields}
        used = KeyUsage.__codec__.encode(USED)
        now_us = time.time_ns() // 1_000
        for begin in range(1, keys, AT_ONCE):
            operations: list[Any] = []
            for number in range(begin, min(begin + AT_ONCE, keys)):
                id, tenant = f"key_{number:012d}", f"tenant-{number % TENANTS}"
                document = {**fields, "tenant": tenant, "name": f"key {number}", "hash": f"000001:{number:064x}"}
                told = Record(
                    f"{number:028x}", tenant, now_us, "system", f"{number:028x}", "create", "api_keys", id,
                    after=masked(collection, document),
                )  # fmt: skip
                operations += [Create("api_keys", id, document), Append(told, len(operations))]
            await room.store.commit(Batch(None, tuple(operations), now_us))
            usage = [Create("key_usage", o.id, used) for o in operations if isinstance(o, Create)]
            await room.store.commit(Batch(None, tuple(usage), now_us))
        assert issued.text


async def move(source: str, target: str) -> dict[str, Any]:
    """Migrate; seconds, what was moved, and the peak memory in megabytes at a tenth of the documents and at the end."""
    rss: dict[str, float] = {}

    def watch(what: str, done: int, total: int | None) -> None:
        if what == "copying documents" and total and done >= total // 10 and "tenth" not in rss:
            rss["tenth"] = _peak_mb()

    one, other = await open_store(source), await open_store(target)
    try:
        began = time.process_time()
        report = await migrate(one, other, Registry(SYSTEM_ENTITIES).collections, Options(), watch)
        assert report.is_done and report.equal, report  # noqa: PT018
        return {
            "documents": report.documents,
            "records": report.records,
            "copied_s": report.copied_s,
            "seconds": report.seconds,
            "cpu_s": time.process_time() - began,
            "rss_tenth_mb": rss.get("tenth"),
            "rss_end_mb": _peak_mb(),
        }
    finally:
        await one.close()
        await other.close()


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measured(source: str, target: str) -> dict[str, Any]:
    """`move` in a process of its own, so that the memory is its alone."""
    command = [sys.executable, "-m", "benchmarks.migrate", "--from", source, "--to", target]
    ran = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(ran.stdout)
    return found


@contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """The URL of an empty schema in PostgreSQL."""
    if url := os.environ.get("STRONGROOM_BENCH_POSTGRES"):
        yield url
        return
    servers = importlib.import_module("tests.helpers.servers")
    server = importlib.import_module("tests.helpers.servers.postgres")
    binaries, port = server.bundled(), servers.free_port()
    (folder / "postgres").mkdir()
    data = server.make_cluster(binaries, folder / "postgres")
    process = subprocess.Popen(server.server_command(binaries, data, port), cwd="/", stderr=subprocess.DEVNULL)
    try:
        while not server.accepts(port):
            if process.poll() is not None:
                raise SystemExit("PostgreSQL did not start")
            time.sleep(0.05)
        running = server.Server(port, binaries)
        running.execute(*server.APP_ROLE)
        yield running.url("benchmark")
    finally:
        process.terminate()
        process.wait()


def _print(what: str, found: dict[str, Any]) -> None:
    moved = found["documents"] + found["records"]
    print(
        f"{what}: {found['documents']:,} documents in {found['copied_s']:.1f} s = "
        f"{found['documents'] / found['copied_s']:,.0f} documents/s; "
        f"with {found['records']:,} journal records and everything read back and compared: {found['seconds']:.1f} s = "
        f"{moved / found['seconds']:,.0f} documents and records/s, {found['cpu_s']:.1f} s of processor; "
        f"peak memory {found['rss_tenth_mb'] or 0:.0f} MB at a tenth, {found['rss_end_mb']:.0f} MB at the end"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.migrate", description=__doc__.partition("\n")[0])
    parser.add_argument("keys", nargs="?", type=int, default=KEYS, help=f"how many keys (default {KEYS:,})")
    parser.add_argument("--from", dest="source", help="a store that is there: move it, and print one JSON document")
    parser.add_argument("--to", dest="target", help="the store to move into")
    options = parser.parse_args()
    if options.source:
        print(json.dumps(asyncio.run(move(options.source, options.target))))
        return
    with tempfile.TemporaryDirectory(prefix="strongroom-bench-") as name:
        folder = Path(name)
        source = f"sqlite:///{folder}/source.db"
        began = time.perf_counter()
        asyncio.run(fill(source, options.keys))
        print(f"{options.keys:,} keys made in {time.perf_counter() - began:.1f} s")
        if options.target:
            _print(f"SQLite → {options.target.partition(':')[0]}", measured(source, options.target))
            return
        _print("SQLite → SQLite", measured(source, f"sqlite:///{folder}/target.db"))
        with postgres(folder) as url:
            _print("SQLite → PostgreSQL", measured(source, url))


if __name__ == "__main__":
    main()
