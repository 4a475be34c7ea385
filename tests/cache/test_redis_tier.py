"""Redis as the second tier: shared by nodes, separated by tenant and store; a faulty Redis only costs speed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import redis.asyncio

from strongroom import Strongroom
from strongroom.cache import read_through as cache_module
from strongroom.cache import redis_tier as _cache_redis
from strongroom.errors import ConfigError
from strongroom.state.model import ENTITIES, Action, Policy
from tests.cache.test_read_through import PENDING, policy, reads
from tests.helpers.faulty_store import FaultyStore
from tests.helpers.servers.redis import Proxy, RedisServer, proxy_before, redis_server, redis_url
from tests.helpers.stores import new_url, opened
from tests.helpers.waiting import PATIENCE_S, wait_until

connect: Any = redis.asyncio.from_url
"""Its own types leave open whether an answer is bytes."""

__all__ = ["redis_server", "redis_url"]
pytestmark = pytest.mark.server
Node = tuple[Strongroom, FaultyStore]


def connected(room: Strongroom) -> bool:
    return room.cache is not None and room.cache.redis_state == "closed"


@asynccontextmanager
async def nodes(folder: Path, url: str, count: int, *, wait: bool = True) -> AsyncIterator[list[Node]]:
    """So many nodes on one SQLite file and one Redis."""
    store_url = new_url("sqlite", folder)
    async with AsyncExitStack() as stack:
        opened_nodes = [
            await stack.enter_async_context(opened(store_url, entities=ENTITIES, cache=url)) for _ in range(count)
        ]
        if wait:
            for room, _ in opened_nodes:
                await wait_until(lambda room=room: connected(room))  # type: ignore[misc]
        yield opened_nodes


@asynccontextmanager
async def node_behind(proxy: Proxy, folder: Path) -> AsyncIterator[Node]:
    async with nodes(folder, f"redis://127.0.0.1:{proxy.port}", 1) as [node]:
        yield node


async def told(*rooms: Strongroom) -> None:
    """Wait until every node was told of all that was committed so far."""
    marks: list[set[str]] = []
    for room in rooms:
        seen: set[str] = set()
        room.feed.on_record(lambda record, seen=seen: seen.add(record.entity_id))  # type: ignore[misc]
        marks.append(seen)
    last = await rooms[0].tenant("told").create(policy(id=f"told{time.monotonic_ns()}"))
    await wait_until(lambda: all(last.id in seen for seen in marks))


# --- Shared ---------------------------------------------------------------------------------------------------


async def test_a_document_that_one_node_cached_is_not_read_by_another(redis_url: str, tmp_path: Path) -> None:
    async with nodes(tmp_path, redis_url, 2) as [(here, here_store), (there, there_store)]:
        made = await here.tenant("acme").create(policy())
        await told(here, there)
        assert await here.tenant("acme").get(Policy, "p") == made
        assert here.cache is not None
        assert there.cache is not None
        counters = here.cache.stats
        await wait_until(lambda: counters.fills)
        before = reads(there_store)
        assert await there.tenant("acme").get(Policy, "p") == made
        assert await there.tenant("acme").get(Policy, "p") == made
        assert reads(there_store) == before
        assert (there.cache.stats.redis_hits, there.cache.stats.local_hits) == (1, 1)
        assert reads(here_store) == 1


async def test_concurrent_reads_on_four_nodes_are_one_read_of_the_store(redis_url: str, tmp_path: Path) -> None:
    async with nodes(tmp_path, redis_url, 4) as four:
        rooms = [room for room, _ in four]
        await rooms[0].tenant("acme").create(policy())
        await told(*rooms)
        before = sum(reads(store) for _, store in four)
        waiting = [room.tenant("acme").get(Policy, "p") for room in rooms for _ in range(50)]
        assert {found.policy_name for found in await asyncio.gather(*waiting)} == {"n"}
        assert sum(reads(store) for _, store in four) - before == 1


async def test_a_fill_that_does_not_finish_delays_other_nodes_only_briefly(redis_url: str, tmp_path: Path) -> None:
    async with nodes(tmp_path, redis_url, 2) as [(here, here_store), (there, _)]:
        await here.tenant("acme").create(policy())
        await told(here, there)
        held = asyncio.Event()

        async def hold(method: str, collection: str) -> None:
            await held.wait()

        here_store.before_read = hold
        before = reads(here_store)
        slow = asyncio.create_task(here.tenant("acme").get(Policy, "p"))
        await wait_until(lambda: reads(here_store) > before)
        async with asyncio.timeout(_cache_redis.LEASE_S):
            assert (await there.tenant("acme").get(Policy, "p")).policy_name == "n"
        assert there.cache is not None
        counters = there.cache.stats
        await wait_until(lambda: counters.fills == 1)
        held.set()
        assert (await slow).policy_name == "n"
        assert here.cache is not None
        refused = here.cache.stats
        await wait_until(lambda: refused.fills_refused == 1)


async def test_cached_absences_are_shared_and_end_when_another_node_creates_the_document(
    redis_url: str, tmp_path: Path
) -> None:
    async with nodes(tmp_path, redis_url, 2) as [(here, _), (there, there_store)]:
        assert await here.tenant("acme").get_or_none(Policy, "p") is None
        assert here.cache is not None
        counters = here.cache.stats
        await wait_until(lambda: counters.fills)
        assert await there.tenant("acme").get_or_none(Policy, "p") is None
        assert reads(there_store) == 0
        await here.tenant("acme").create(policy())
        await told(here, there)
        assert (await there.tenant("acme").get(Policy, "p")).policy_name == "n"


async def test_keys_and_lifetimes_in_redis_are_those_of_seed_002(redis_url: str, tmp_path: Path) -> None:
    async with nodes(tmp_path, redis_url, 1) as [(room, _)], connect(redis_url) as client:
        acme = room.tenant("acme")
        await acme.create(policy())
        await acme.create(Action(action_type="t", source_service="billing"))
        await told(room)
        await acme.get(Policy, "p")
        await acme.find(Action, PENDING)
        assert room.cache is not None
        counters = room.cache.stats
        await wait_until(lambda: counters.fills == 2)
        assert room.cache._redis is not None
        prefix = room.cache._redis._prefix
        lives = {key.decode().removeprefix(prefix): await client.ttl(key) for key in await client.keys(f"{prefix}*")}
        assert set(lives) == {"acme:policy:p", "acme:actions:s"}
        assert 290 <= lives["acme:policy:p"] <= 300
        assert 50 <= lives["acme:actions:s"] <= 60


# --- Never old ------------------------------------------------------------------------------------------------


async def test_a_write_is_seen_by_the_other_node_within_a_second_and_never_goes_back(
    redis_url: str, tmp_path: Path
) -> None:
    """Readers hammer both nodes while one writes ever greater numbers: no reader ever sees a smaller one again."""
    async with nodes(tmp_path, redis_url, 2) as [(here, _), (there, _)]:
        acme = here.tenant("acme")
        await acme.create(policy(rules={"n": 0}))
        written = 0
        done = False
        late: list[float] = []

        async def write() -> None:
            nonlocal written, done
            for number in range(1, 120):
                await acme.update(Policy, "p", {"rules": {"n": number}})
                written = number
                if number % 20 == 0:
                    began = time.monotonic()

                    async def seen(number: int = number) -> bool:
                        return bool((await there.tenant("acme").get(Policy, "p")).rules["n"] >= number)

                    await wait_until(seen)
                    late.append(time.monotonic() - began)
            done = True

        async def read(room: Strongroom) -> int:
            last = 0
            while not done:
                least = written if room is here else 0  # one's own writes are seen at once
                found = (await room.tenant("acme").get(Policy, "p")).rules["n"]
                assert found >= max(last, least), "an old value came back"
                last = found
                await asyncio.sleep(0)
            return last

        await asyncio.gather(write(), *(read(room) for room in (here, there) for _ in range(4)))
        assert max(late) < 1.0


async def test_an_invalidation_through_redis_does_not_wait_for_the_journal(
    redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis pushes to a node what another removed of that which it has read."""
    monkeypatch.setattr(cache_module, "MAX_BEHIND_S", 60)
    async with nodes(tmp_path, redis_url, 2) as [(here, _), (there, _)]:
        await here.tenant("acme").create(policy(policy_name="old"))
        await told(here, there)
        await there.tenant("acme").get(Policy, "p")
        assert there.cache is not None
        counters = there.cache.stats
        await wait_until(lambda: counters.fills)
        await there.feed.close()  # it will not hear of anything any more
        await here.tenant("acme").update(Policy, "p", {"policy_name": "new"})

        async def seen() -> bool:
            return (await there.tenant("acme").get(Policy, "p")).policy_name == "new"

        await wait_until(seen)


@pytest.mark.parametrize("step", ["get", "claim"])
async def test_an_entry_that_changes_on_its_way_from_redis_is_not_cached(
    redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    async with nodes(tmp_path, redis_url, 1) as [(room, _)]:
        acme = room.tenant("acme")
        await acme.create(policy(policy_name="old"))
        await told(room)
        await acme.get(Policy, "p")
        assert room.cache is not None
        assert room.cache._redis is not None
        counters = room.cache.stats
        await wait_until(lambda: counters.fills)
        room.cache._local.clear()
        original = getattr(room.cache._redis, step)

        async def overtaken(*arguments: Any) -> Any:
            found = await original(*arguments)
            await acme.update(Policy, "p", {"policy_name": "new"})
            return found

        async def nothing(*_: Any) -> bytes:
            return b""

        with monkeypatch.context() as patched:
            if step == "claim":  # another node has filled it between the two
                patched.setattr(room.cache._redis, "get", nothing)
            patched.setattr(room.cache._redis, step, overtaken)
            await acme.get(Policy, "p")
        assert counters.redis_hits == 1
        assert (await acme.get(Policy, "p")).policy_name == "new"


async def test_an_idle_node_processes_thousands_of_invalidations(redis_url: str, tmp_path: Path) -> None:
    async with nodes(tmp_path, redis_url, 1) as [(room, _)], connect(redis_url) as client:
        assert room.cache is not None
        assert room.cache._redis is not None
        acme, prefix = room.tenant("acme"), room.cache._redis._prefix
        ids = [f"p{number}" for number in range(3_000)]
        counters = room.cache.stats
        for begin in range(0, len(ids), 50):
            await asyncio.gather(*(acme.get_or_none(Policy, id) for id in ids[begin : begin + 50]))
        await wait_until(lambda: counters.fills > len(ids) - 500)  # on a busy machine some answers come too late
        assert len(room.cache._local) > len(ids) - 500
        pipeline = client.pipeline(transaction=False)
        for id in ids:
            pipeline.delete(f"{prefix}acme:policy:{id}")
        await pipeline.execute()
        await wait_until(lambda: room.cache is not None and len(room.cache._local) <= 500)
        assert counters.connections == 1


async def test_a_crash_between_a_commit_and_its_invalidation_leaves_nothing_old(redis_url: str, tmp_path: Path) -> None:
    """A node dies after its commit; nobody else runs. The next one does not believe what stands in Redis."""
    async with nodes(tmp_path, redis_url, 1) as [(room, _)]:
        await room.tenant("acme").create(policy(policy_name="old"))
        await told(room)
        await room.tenant("acme").get(Policy, "p")
        assert room.cache is not None
        counters = room.cache.stats
        await wait_until(lambda: counters.fills)
        await room.cache.close()
        await room.feed.close()
        await room.tenant("acme").update(Policy, "p", {"policy_name": "new"})
    async with nodes(tmp_path, redis_url, 1) as [(room, _)]:
        assert (await room.tenant("acme").get(Policy, "p")).policy_name == "new"
        assert room.cache is not None
        assert room.cache.stats.unusable == 1


async def test_an_invalidation_that_one_node_cannot_send_still_reaches_the_others(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    """The writer is cut off from Redis, the reader is not."""
    async with proxy_before(redis_server.port) as proxy:
        store_url = new_url("sqlite", tmp_path)
        options: dict[str, Any] = {"entities": ENTITIES}
        cut_off = f"redis://127.0.0.1:{proxy.port}"
        async with (
            opened(store_url, cache=cut_off, **options) as (writer, _),
            opened(store_url, cache=redis_server.url, **options) as (reader, _),
        ):
            await wait_until(lambda: connected(writer) and connected(reader))
            await writer.tenant("acme").create(policy(policy_name="old"))
            await told(writer, reader)
            await reader.tenant("acme").get(Policy, "p")
            assert reader.cache is not None
            counters = reader.cache.stats
            await wait_until(lambda: counters.fills)
            proxy.silent = True
            await writer.tenant("acme").update(Policy, "p", {"policy_name": "new"})
            assert (await writer.tenant("acme").get(Policy, "p")).policy_name == "new"

            async def seen() -> bool:
                return (await reader.tenant("acme").get(Policy, "p")).policy_name == "new"

            await wait_until(seen)
            assert (await writer.tenant("acme").get(Policy, "p")).policy_name == "new"
            proxy.silent = False
            await wait_until(lambda: connected(writer))
            assert (await writer.tenant("acme").get(Policy, "p")).policy_name == "new"


async def test_a_redis_restored_from_an_old_snapshot_is_not_trusted(redis_server: RedisServer, tmp_path: Path) -> None:
    async with nodes(tmp_path, redis_server.url, 1) as [(room, _)]:
        acme = room.tenant("acme")
        await acme.create(policy(policy_name="old"))
        await told(room)
        await acme.get(Policy, "p")
        assert room.cache is not None
        counters = room.cache.stats
        await wait_until(lambda: counters.fills)
        async with connect(redis_server.url) as client:
            await client.save()
        await acme.update(Policy, "p", {"policy_name": "new"})
        redis_server.kill()
        await wait_until(lambda: not connected(room))
        redis_server.start()
        async with connect(redis_server.url) as client:
            assert room.cache._redis is not None
            assert b"old" in await client.get(room.cache._redis._prefix + "acme:policy:p")
        await wait_until(lambda: connected(room))
        room.cache.local_entries = 0
        room.cache._local.clear()
        assert (await acme.get(Policy, "p")).policy_name == "new"
        assert counters.unusable == 1


# --- Without Redis --------------------------------------------------------------------------------------------


async def answers_while(room: Strongroom, writes: int = 20) -> None:
    """Reads and writes go on, and every read sees the write before it."""
    acme = room.tenant("acme")
    for number in range(writes):
        await acme.replace(policy(rules={"n": number}))
        found = await asyncio.gather(*(acme.get(Policy, "p") for _ in range(5)))
        assert [one.rules["n"] for one in found] == [number] * 5


async def test_a_killed_redis_that_returns_is_used_again(redis_server: RedisServer, tmp_path: Path) -> None:
    async with nodes(tmp_path, redis_server.url, 2) as [(here, _), (there, _)]:
        await answers_while(here)
        redis_server.kill()
        await answers_while(here)
        await wait_until(lambda: here.cache is not None and here.cache.redis_state == "open")
        await answers_while(here)
        redis_server.start()
        await wait_until(lambda: connected(here) and connected(there))
        await answers_while(there)
        assert here.cache is not None
        assert here.cache.stats.connections == 2


async def test_a_missing_redis_does_not_delay_the_start(tmp_path: Path) -> None:
    folder = tmp_path / "redis"
    folder.mkdir()
    server = RedisServer(folder)
    async with nodes(tmp_path, server.url, 1, wait=False) as [(room, _)]:
        await answers_while(room)
        server.start()
        try:
            await wait_until(lambda: connected(room))
            await answers_while(room)
        finally:
            server.kill()


async def test_a_flush_of_redis_under_load_returns_nothing_stale(redis_server: RedisServer, tmp_path: Path) -> None:
    async with (
        nodes(tmp_path, redis_server.url, 1) as [(room, _)],
        connect(redis_server.url) as client,
    ):
        assert room.cache is not None
        room.cache.local_entries = 0
        for _ in range(10):
            await answers_while(room, 3)
            await client.flushall()
        counters = room.cache.stats
        fills = counters.fills
        await told(room)
        await room.tenant("acme").get(Policy, "p")
        await wait_until(lambda: counters.fills > fills)  # it is used again
        hits = counters.redis_hits
        await room.tenant("acme").get(Policy, "p")
        assert counters.redis_hits == hits + 1


async def test_a_redis_that_does_not_answer_costs_a_reader_one_short_wait(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    async with proxy_before(redis_server.port) as proxy, node_behind(proxy, tmp_path) as (room, store):
        assert room.cache is not None
        room.cache.local_entries = 0
        await answers_while(room, 3)
        proxy.silent = True
        before = reads(store)
        began = time.monotonic()
        async with asyncio.timeout(PATIENCE_S):
            assert (await room.tenant("acme").get(Policy, "p")).rules == {"n": 2}
        assert time.monotonic() - began >= 0.05
        assert room.cache.redis_state in ("stalled", "open")
        errors = room.cache.stats.redis_errors
        await asyncio.gather(*(room.tenant("acme").get(Policy, "p") for _ in range(100)))
        assert room.cache.stats.redis_errors == errors, "others waited for it as well"
        assert reads(store) > before
        await answers_while(room)
        await wait_until(lambda: room.cache is not None and room.cache.redis_state == "open")
        await answers_while(room)
        proxy.silent = False
        await wait_until(lambda: connected(room))
        await answers_while(room)


async def test_a_slow_redis_is_waited_for_within_the_bound_and_keeps_its_connection(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    async with proxy_before(redis_server.port) as proxy, node_behind(proxy, tmp_path) as (room, _):
        assert room.cache is not None
        room.cache.local_entries = 0
        await answers_while(room, 3)
        proxy.delay_s = 0.1
        await answers_while(room, 5)
        proxy.delay_s = 0.0
        await wait_until(lambda: connected(room))
        await answers_while(room, 3)
        assert room.cache.stats.connections == 1


async def test_a_full_redis_only_loses_cache_entries(redis_server: RedisServer, tmp_path: Path) -> None:
    async with (
        nodes(tmp_path, redis_server.url, 1) as [(room, _)],
        connect(redis_server.url) as client,
    ):
        assert room.cache is not None
        room.cache.local_entries = 0
        await answers_while(room, 3)
        await client.config_set("maxmemory-policy", "noeviction")
        await client.config_set("maxmemory", "1")
        await answers_while(room)
        assert room.cache.stats.redis_errors > 0
        await client.config_set("maxmemory", "0")
        await answers_while(room, 3)


@pytest.mark.parametrize("found", ["garbage", "empty", "list", "other key", "old format", "truncated"])
async def test_a_value_in_redis_that_is_no_entry_is_replaced(redis_url: str, tmp_path: Path, found: str) -> None:
    async with nodes(tmp_path, redis_url, 1) as [(room, _)], connect(redis_url) as client:
        assert room.cache is not None
        assert room.cache._redis is not None
        room.cache.local_entries = 0
        acme, counters = room.tenant("acme"), room.cache.stats
        prefix = room.cache._redis._prefix
        await acme.create(policy())
        await acme.create(policy(id="q", policy_name="other"))
        await told(room)
        await acme.get(Policy, "p")
        await acme.get(Policy, "q")
        await wait_until(lambda: counters.fills == 2)
        key = f"{prefix}acme:policy:p"
        good = await client.get(key)
        if found == "list":
            await client.delete(key)
            await client.rpush(key, "x")
        else:
            values: dict[str, bytes] = {
                "garbage": b"\x00\xff" * 100,
                "empty": b"",
                "other key": await client.get(f"{prefix}acme:policy:q"),
                "old format": b"E0" + good[2:],
                "truncated": good[:-3],
            }
            await client.set(key, values[found])
        assert (await acme.get(Policy, "p")).policy_name == "n"
        await wait_until(lambda: counters.fills == 3)
        assert (await acme.get(Policy, "p")).policy_name == "n"
        assert (await client.get(key))[22:] == good[22:]


async def test_flushed_redis_scripts_are_loaded_again(redis_server: RedisServer, tmp_path: Path) -> None:
    async with (
        nodes(tmp_path, redis_server.url, 1) as [(room, _)],
        connect(redis_server.url) as client,
    ):
        await answers_while(room, 3)
        await client.script_flush()
        await answers_while(room)
        assert room.cache is not None
        counters = room.cache.stats
        await wait_until(lambda: counters.connections == 2 and connected(room))
        await answers_while(room, 3)


# --- Apart ----------------------------------------------------------------------------------------------------

HOSTILE = ["acme", "acme:policy", "acme:policy:p", ":", "acme%3Apolicy", "*", "acme\nx", "policy", "é", "p"]


async def test_no_tenant_reads_the_document_of_another_through_redis(redis_url: str, tmp_path: Path) -> None:
    async with nodes(tmp_path, redis_url, 1) as [(room, _)]:
        assert room.cache is not None
        room.cache.local_entries = 0
        for tenant in HOSTILE:
            for id in HOSTILE:
                await room.tenant(tenant).create(policy(id=id, rules={"of": tenant, "id": id}))
        await told(room)

        async def all_are_their_own() -> bool:
            for tenant in HOSTILE:
                for id in HOSTILE:
                    assert (await room.tenant(tenant).get(Policy, id)).rules == {"of": tenant, "id": id}
            return room.cache is not None and room.cache.stats.redis_hits >= len(HOSTILE) ** 2

        await wait_until(all_are_their_own)  # on a busy machine some answers of Redis come too late


async def test_two_stores_on_one_redis_share_no_entries(redis_url: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    async with (
        nodes(tmp_path / "a", redis_url, 1) as [(here, _)],
        nodes(tmp_path / "b", redis_url, 1) as [(there, _)],
    ):
        await here.tenant("acme").create(policy())
        await told(here)
        await here.tenant("acme").get(Policy, "p")
        assert await there.tenant("acme").get_or_none(Policy, "p") is None


async def test_a_copy_of_a_store_shares_no_entries_with_it(redis_url: str, tmp_path: Path) -> None:
    async with nodes(tmp_path, redis_url, 1) as [(room, _)]:
        await room.tenant("acme").create(policy())
        assert room.cache is not None
        assert room.cache._redis is not None
        original = room.cache._redis._prefix
    (tmp_path / "copy").mkdir()
    (tmp_path / "store.db").rename(tmp_path / "copy" / "store.db")
    async with nodes(tmp_path / "copy", redis_url, 1) as [(room, _)]:
        assert room.cache is not None
        assert room.cache._redis is not None
        assert room.cache._redis._prefix != original


# --- Errors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["http://localhost", "redis://localhost:nonsense/0", "localhost:6379", ""])
async def test_an_invalid_redis_url_is_refused_without_its_password(tmp_path: Path, url: str) -> None:
    with pytest.raises(ConfigError, match="cache: expected redis://"):
        async with Strongroom.open(new_url("json-memory", tmp_path), cache=url):
            pytest.fail("it opened")


async def test_a_password_is_never_logged(
    redis_server: RedisServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    async with connect(redis_server.url) as client:
        await client.config_set("requirepass", "another one")
    url = f"redis://:hunter2hunter2@127.0.0.1:{redis_server.port}/0"
    async with nodes(tmp_path, url, 1, wait=False) as [(room, _)]:
        await wait_until(lambda: "without Redis" in caplog.text)
        await answers_while(room, 2)
    redis_server.kill()
    async with nodes(tmp_path, url, 1, wait=False) as [(room, _)]:
        await wait_until(lambda: caplog.text.count("without Redis") >= 2)
    assert "hunter2" not in caplog.text
