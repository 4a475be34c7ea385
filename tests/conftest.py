"""Fixtures and policies that all tests share: hypothesis profiles, the backends, waiting, and missing servers."""

from __future__ import annotations

import gc
import itertools
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn
from urllib.parse import quote

import pytest
from _pytest.nodeid import coerce_node_id
from hypothesis import HealthCheck, settings

# The suite is imported by the tests that run it, not here: it asks the hypothesis profile how many examples to take,
# and `--hypothesis-profile` is read after this file.
if TYPE_CHECKING:
    from strongroom import Entity, Strongroom
    from strongroom.testing.storage import Backend
    from tests.helpers.faulty_store import FaultyStore

pytest.register_assert_rewrite("strongroom.testing")

# `--hypothesis-profile=thorough` looks longer, and elsewhere each time; `make soak` takes it.
settings.register_profile(
    "quick",
    max_examples=25,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.register_profile(
    "thorough", settings.get_profile("quick"), max_examples=200, derandomize=False, print_blob=True
)
settings.load_profile("quick")


def pytest_configure() -> None:
    # A shell starts what is in the background with SIGINT ignored, and children inherit that: Ctrl-C would do nothing.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests of a group (`xdist_group`) on one worker: pytest-xdist 3.8 writes the group into an attribute that
    pytest 9.2 does not read any more, so that tests which must not run at once did."""
    if getattr(config.option, "loadgroup", False):
        for item in items:
            group = item.get_closest_marker("xdist_group")
            if group is not None and not item.nodeid.endswith(f"@{group.args[0]}"):
                item._id = coerce_node_id(f"{item.nodeid}@{group.args[0]}")


def pytest_collection_finish() -> None:
    # The tests themselves, and what they import, are there to the end: collections of garbage need not look at them.
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 100)


def missing(what: str, how_to_get_it: str) -> NoReturn:
    """Skip a test whose server or tool is not there. With STRONGROOM_REQUIRE=all, as in CI, that is a failure."""
    message = f"{what} is missing: {how_to_get_it}"
    if os.environ.get("STRONGROOM_REQUIRE") == "all":
        pytest.fail(message)
    pytest.skip(message)


def backend_of(scheme: str, folder: Path, request: pytest.FixtureRequest | None = None) -> Backend:
    """The backend `sqlite`, `json` or `json-memory`, its stores in `folder`; or `postgres` or `firestore`, on the
    server of the run that `request` belongs to."""
    from strongroom.testing.storage import Backend

    if scheme == "postgres":
        from tests.helpers.servers import postgres

        if request is None:
            raise TypeError("backend_of: postgres needs the test's request")
        server = postgres.start(request, "postgres-18", postgres.bundled())
        return Backend(lambda: server.url(postgres.new_schema()))
    if scheme == "firestore":
        from tests.helpers.servers import firestore

        if request is None:
            raise TypeError("backend_of: firestore needs the test's request")
        return Backend(firestore.urls(firestore.start(request)))
    if scheme == "json-memory":
        return Backend(lambda: "json://:memory:")
    numbers = itertools.count()
    return Backend(lambda: f"{scheme}:///{quote(str(folder / f'store-{next(numbers)}.{scheme}'))}")


@pytest.fixture(params=["sqlite", "json", "json-memory", "postgres", "firestore"])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Backend:
    """Every backend in turn; what runs on it promises the same on each."""
    return backend_of(request.param, tmp_path, request)


@pytest.fixture
def url(backend: Backend) -> str:
    """The URL of a new store, on every backend in turn."""
    return backend.new_url()


# --- The core, on every kind of store ---------------------------------------------------------------------------


@pytest.fixture
def entities() -> list[type[Entity]]:
    """The entities of a test's own that `room` knows; a test file may say which."""
    return []


@pytest.fixture(params=["json-memory", "sqlite", "postgres"])
def url_of_any(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty store on each engine in turn; not Firestore: its client's deadlines do not travel in time."""
    if request.param != "postgres":
        yield backend_of(request.param, tmp_path, request).new_url()
        return
    from tests.helpers.servers import postgres
    from tests.helpers.stores import with_schema

    server = postgres.start(request, "postgres-18", postgres.bundled())
    with postgres.lent_schema(server, lambda url: postgres.in_thread(lambda: with_schema(url))) as url:
        yield url


@pytest.fixture
async def both(url_of_any: str, entities: list[type[Entity]]) -> AsyncIterator[tuple[Strongroom, FaultyStore]]:
    """A Strongroom on each engine in turn, and its store, which can be made to fail."""
    from tests.helpers.stores import opened

    async with opened(url_of_any, entities=entities) as both:
        yield both


@pytest.fixture
def room(both: tuple[Strongroom, FaultyStore]) -> Strongroom:
    return both[0]


@pytest.fixture
def store(both: tuple[Strongroom, FaultyStore]) -> FaultyStore:
    return both[1]
