"""docs/architecture.md is true: its picture has the imports, its walks have the files that a trip passes, in order."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, MutableMapping
from pathlib import Path
from typing import Any

import grimp
import pytest

from strongroom import Entity, Strongroom
from strongroom.server.app import build
from tests.helpers.paths import DOCS
from tests.helpers.trips import files_entered

PAGE = (DOCS / "architecture.md").read_text()
STEPS_AT_MOST = 13
"""Half of the 27 files of the first version's verification."""
WARM_UP = 20


class Note(Entity, collection="notes"):
    text: str


def documented(trip: str) -> tuple[list[str], list[str]]:
    """The files of a trip's steps, and the files of which its steps ask something."""
    section = PAGE.partition(f"## {trip}")[2].partition("\n## ")[0]
    steps = re.findall(r"^\| \d+ \| `([\w/]+\.py)` \|", section, re.MULTILINE)
    helpers = re.search(r"^\*\*Helpers\*\*(.*?)^$", section, re.MULTILINE | re.DOTALL)
    return steps, re.findall(r"`([\w/]+\.py)`", helpers[1]) if helpers else []


@pytest.fixture
async def room(tmp_path: Path) -> AsyncIterator[Strongroom]:
    async with Strongroom.open(f"sqlite:///{tmp_path}/trips.db", entities=[Note]) as room:
        yield room


async def test_a_durable_verification_passes_the_files_of_the_first_trip(room: Strongroom) -> None:
    admin = await room.keys.create(name="admin", tenant="*", permissions=["strongroom:admin"])
    limit = {"resource": "tokens", "limit": 10**9, "window": {"kind": "rolling", "seconds": 18_000}}
    key = await room.keys.create(name="worker", tenant="acme", limits=[limit])
    server = build(room)
    body = json.dumps({"key": key.text, "cost": {"tokens": 250}}).encode()
    headers = [
        (b"host", b"localhost"),
        (b"authorization", f"Bearer {admin.text}".encode()),
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": "/v1/keys/verify", "raw_path": b"/v1/keys/verify", "query_string": b"", "headers": headers,
        "client": ("127.0.0.1", 1), "server": ("localhost", 80),
    }  # fmt: skip

    async def verify() -> None:
        sent: list[MutableMapping[str, Any]] = []

        async def receive() -> MutableMapping[str, Any]:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: MutableMapping[str, Any]) -> None:
            sent.append(message)

        await server(dict(scope), receive, send)
        assert b'"valid":true' in sent[-1]["body"]

    for _ in range(WARM_UP):
        await verify()
    _compare(await files_entered(verify), "Trip 1")


async def test_the_write_of_an_entity_passes_the_files_of_the_second_trip(room: Strongroom) -> None:
    acme = room.tenant("acme")

    async def create() -> None:
        await acme.create(Note(text="hello"))

    for _ in range(WARM_UP):
        await create()
    _compare(await files_entered(create), "Trip 2")


def _compare(entered: list[str], trip: str) -> None:
    steps, helpers = documented(trip)
    assert 5 < len(steps) <= STEPS_AT_MOST
    assert [file for file in entered if file in steps] == steps
    assert set(entered) <= {*steps, *helpers}, "a trip passes a file that the page does not name"


def test_each_arrow_of_the_picture_is_an_import_and_the_arrows_lead_to_every_import() -> None:
    arrows = set(re.findall(r"^    (\w+) --> (\w+)$", PAGE, re.MULTILINE))
    packages = {name for arrow in arrows for name in arrow}
    graph = grimp.build_graph("strongroom", cache_dir=None)
    imports = set()
    for module in graph.modules - {"strongroom"}:
        for other in graph.find_modules_directly_imported_by(module) - {"strongroom"}:
            pair = module.split(".")[1], other.split(".")[1]
            if pair[0] != pair[1] and packages.issuperset(pair):
                imports.add(pair)
    assert arrows <= imports
    assert imports <= {(one, below) for one in packages for below in _below(one, arrows)}


def _below(package: str, arrows: set[tuple[str, str]]) -> set[str]:
    found: set[str] = set()
    waiting = [package]
    while waiting:
        one = waiting.pop()
        more = {lower for upper, lower in arrows if upper == one} - found
        found |= more
        waiting += more
    return found
