"""The deletion of a tenant through kill -9: it goes on, and counts each document once."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from strongroom import Strongroom
from strongroom.entities import Query
from strongroom.tenants import User
from tests.conftest import backend_of
from tests.helpers.paths import HELPERS

USERS = 300


@pytest.fixture(params=["sqlite", "json", "postgres", "firestore"])
def durable_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a new store that outlives its process, of each kind in turn."""
    return backend_of(request.param, tmp_path, request).new_url()


def kill_after_two_steps(url: str) -> None:
    """Let a process begin, or continue, the deletion, and kill it in the middle."""
    command = [sys.executable, str(HELPERS / "tenant_deletion_worker.py"), url, "acme"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        assert worker.stdout.readline() == "step\n"
        worker.stdin.write("\n")
        worker.stdin.flush()
        assert worker.stdout.readline() == "step\n"
        worker.kill()


async def test_a_deletion_that_is_killed_twice_goes_on_and_counts_each_document_once(durable_url: str) -> None:
    async with Strongroom.open(durable_url) as room:
        for number in range(USERS):
            await room.tenant("acme").create(User(email=f"u{number}@example.com"))
        await room.keys.create(name="k", tenant="acme")
    for _ in range(2):
        await asyncio.to_thread(kill_after_two_steps, durable_url)
    async with Strongroom.open(durable_url) as room:
        room.tenants.deletions.settle_s = 0
        assert (await room.tenants.get("acme")).status == "deleting"
        left = len(await room.store.find("users", "acme", Query(limit=USERS)))
        assert 0 < left < USERS
        statement = await room.tenants.delete("acme")
        assert statement is not None
        assert (statement.counts, statement.reason) == ({"users": USERS, "api_keys": 1}, "the end")
        assert (await room.tenants.list()).items == []
