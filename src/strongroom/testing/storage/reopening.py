"""Opening, closing and reopening: committed documents survive, and sequences and versions do not repeat."""

from __future__ import annotations

import asyncio
import time

import pytest

from ...entities import Query
from ...errors import AlreadyExists, BoundExceeded, StrongroomError
from ...storage.port import Add, Append, Create, Delete, Patch, Store
from .backend import Backend
from .journal import PATIENCE_S, tail
from .preconditions import refused
from .samples import (
    COLLECTIONS,
    EDGES,
    NOW,
    batch,
    identical,
    item,
    record,
    sample,
    shared,
)

DAY_US = 86_400_000_000
UNDECIDED_ROUNDS = 6


async def prepared(backend: Backend, url: str) -> Store:
    store = await backend.open(url)
    await store.prepare(COLLECTIONS)
    return store


class TestReopening:
    async def test_committed_documents_survive_reopening(self, backend: Backend) -> None:
        url = backend.new_url()
        store = await prepared(backend, url)
        persistent = store.capabilities.persistent
        for name, values in EDGES.items():
            await store.commit(
                batch("acme", *(Create("samples", f"{name}-{n}", sample(**{name: v})) for n, v in enumerate(values)))
            )
        await store.commit(batch("é/'", Create("items", "a/b", item("é", code="c", used=3)), Append(record("a/b"), 0)))
        await store.commit(batch("é/'", Create("shared", "x", shared("global"))))
        await store.commit(batch("é/'", Create("items", "gone", item()), Delete("items", "gone")))
        held = [
            await store.find("samples", "acme", Query(limit=1000)),
            await store.find("items", "é/'", Query()),
            await store.find("shared", None, Query()),
        ]
        records, _ = await tail(store, 1)
        await store.close()

        store = await backend.open(url)
        try:
            changes = await store.prepare(COLLECTIONS)
            again = [
                await store.find("samples", "acme", Query(limit=1000)),
                await store.find("items", "é/'", Query()),
                await store.find("shared", None, Query()),
            ]
            if not persistent:
                assert len(changes) == len(COLLECTIONS)
                assert again == [[], [], []]
                return
            assert changes == ()
            assert identical(again, held)
            assert (await tail(store, 1))[0] == records
            await refused(store, AlreadyExists, Create("items", "a/b", item()), tenant="é/'")
            await refused(store, AlreadyExists, Create("items", "new", item(code="c")), tenant="é/'")
            await refused(store, BoundExceeded, Add("items", "a/b", "used", 1, at_most=3), tenant="é/'")
        finally:
            await store.close()

    async def test_sequences_versions_and_cursors_continue_after_reopening(self, backend: Backend) -> None:
        url = backend.new_url()
        versions: list[int] = []
        sequences: list[int] = []
        cursor = None
        for life in range(4):
            store = await prepared(backend, url)
            if not store.capabilities.persistent:
                cursor = None
                versions.clear()
                sequences.clear()
            now_us = NOW - 1_000_000 * life  # the clock goes back with every reopening
            committed = await store.commit(
                batch("acme", Create("items", "x", item()), Append(record(f"{life}"), 0), now_us=now_us)
            )
            versions.append(committed.versions[0])
            committed = await store.commit(batch("acme", Patch("items", "x", {"label": "b"}), now_us=now_us))
            versions.append(committed.versions[0])
            await store.commit(batch("acme", Delete("items", "x"), now_us=now_us))
            found, cursor = await tail(store, 1, after=cursor)
            assert [one.entity_id for one in found] == [f"{life}"], "a kept cursor gives what is new, and all of it"
            sequences += [one.sequence for one in found]
            await store.close()
        assert versions == sorted(set(versions))
        assert sequences == sorted(set(sequences))

    async def test_closing_commits_pending_batches(self, backend: Backend) -> None:
        url = backend.new_url()
        store = await prepared(backend, url)
        persistent = store.capabilities.persistent
        pending = [store.commit(batch("acme", Create("items", f"{n}", item()))) for n in range(50)]
        await store.close()
        store = await prepared(backend, url)  # at once, because closing waited for them
        try:
            assert len(await store.find("items", "acme", Query())) == (50 if persistent else 0)
        finally:
            await store.close()
        committed = await asyncio.gather(*pending)
        assert all(len(one.versions) == 1 and one.versions[0] > 0 for one in committed)

    async def test_closing_twice_is_allowed_and_a_closed_store_raises(self, backend: Backend) -> None:
        store = await prepared(backend, backend.new_url())
        assert (await store.check()).ok
        await store.close()
        await store.close()
        with pytest.raises(StrongroomError):
            await store.get("items", "acme", "x")
        with pytest.raises(StrongroomError):
            await store.commit(batch("acme", Create("items", "x", item())))
        with pytest.raises(StrongroomError):
            await store.changes(None)
        assert not (await store.check()).ok

    async def test_a_store_that_is_not_prepared_raises(self, backend: Backend) -> None:
        store = await backend.open(backend.new_url())
        with pytest.raises(StrongroomError):  # opened, but not prepared
            await store.get("items", "acme", "x")
        await store.close()

    async def test_two_stores_have_nothing_in_common(self, backend: Backend) -> None:
        first, second = await prepared(backend, backend.new_url()), await prepared(backend, backend.new_url())
        try:
            await first.commit(batch("acme", Create("items", "x", item()), Append(record("x"), 0)))
            assert await second.get("items", "acme", "x") is None
            assert (await second.changes(None)).records == ()
        finally:
            await first.close()
            await second.close()

    async def test_the_store_has_a_clock(self, backend: Backend) -> None:
        url = backend.new_url()
        store = await prepared(backend, url)
        try:
            moments = [await store.now_us() for _ in range(3)]
            assert moments == sorted(moments)
            assert abs(moments[0] - time.time_ns() // 1_000) < DAY_US, "an emulator or a container may be a little off"
            await asyncio.sleep(0.02)
            assert await store.now_us() - moments[0] >= 10_000, "it does not stand still"
        finally:
            await store.close()

    async def test_a_commit_that_fails_is_not_applied_unless_its_outcome_is_unknown(self, backend: Backend) -> None:
        """The store's own tasks are cancelled during commits, as an ending event loop does."""
        for turns in range(UNDECIDED_ROUNDS):
            url = backend.new_url()
            store = await prepared(backend, url)
            others = asyncio.all_tasks()
            await store.commit(batch("acme", Create("items", "first", item())))
            given = [
                store.commit(batch("acme", Create("items", f"{n}", item()), Append(record(f"{n}"), 0)))
                for n in range(3)
            ]
            commits = asyncio.gather(*given, return_exceptions=True)
            for _ in range(turns):
                await asyncio.sleep(0)
            for task in asyncio.all_tasks() - others:
                task.cancel()
            async with asyncio.timeout(PATIENCE_S):
                answers = await commits
            if store.capabilities.persistent:
                await store.close()
                store = await prepared(backend, url)
            try:
                for n, answer in enumerate(answers):
                    there = await store.get("items", "acme", f"{n}") is not None
                    if isinstance(answer, StrongroomError) and answer.details.get("outcome") == "unknown":
                        continue
                    assert there == (not isinstance(answer, BaseException)), (turns, answer)
            finally:
                await store.close()
