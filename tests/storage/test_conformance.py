"""Every backend runs the whole storage suite: see strongroom.testing.storage."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import strongroom.testing.storage
from strongroom.testing.storage import SUITE
from tests.conftest import missing

globals().update({suite.__name__: suite for suite in SUITE})


def test_the_storage_suite_includes_every_test_class() -> None:
    package = strongroom.testing.storage
    modules = [importlib.import_module(f"{package.__name__}.{m.name}") for m in pkgutil.iter_modules(package.__path__)]
    written = {
        name
        for module in modules
        for name, value in vars(module).items()
        if name.startswith("Test") and isinstance(value, type) and value.__module__ == module.__name__
    }
    assert written == {suite.__name__ for suite in SUITE}


THIRD_PARTY_STORE = """
from strongroom.storage.jsonfile.store import JsonStore

class TheirStore(JsonStore):
    async def get(self, collection, tenant, id):
        found = await super().get(collection, tenant, id)
        return found if found is None or not BROKEN else {**found, "version": found["version"] + 1}

BROKEN = False

async def open_store(url):
    store = TheirStore(url.removeprefix("their://"))
    await store.open()
    return store
"""
THIRD_PARTY_TESTS = """
import itertools
import pytest
from strongroom.testing.storage import Backend, SUITE

globals().update({suite.__name__: suite for suite in SUITE})

@pytest.fixture
def backend(tmp_path):
    numbers = itertools.count()
    return Backend(new_url=lambda: f"their://{tmp_path}/{next(numbers)}.json", opener="their_store:open_store")
"""


def test_a_third_party_backend_runs_the_suite_with_one_fixture_and_it_finds_a_fault(tmp_path: Path) -> None:
    (tmp_path / "test_their_store.py").write_text(THIRD_PARTY_TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nasyncio_mode = auto\npythonpath = .\n")

    def run(store: str, topics: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "their_store.py").write_text(store)
        arguments = ["-q", "-p", "no:cacheprovider", "-p", "no:anyio", "-p", "no:schemathesis", "-k", topics]
        return subprocess.run(
            [sys.executable, "-m", "pytest", *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
        )

    sound = run(THIRD_PARTY_STORE, "TestProcesses or TestVersions or TestReopening")
    assert sound.returncode == 0, sound.stdout
    assert "skipped" not in sound.stdout
    broken = run(THIRD_PARTY_STORE.replace("BROKEN = False", "BROKEN = True"), "TestVersions")
    assert broken.returncode == 1, broken.stdout
    assert "test_each_change_gives_a_greater_version" in broken.stdout


def test_a_missing_server_skips_here_and_fails_where_everything_is_required(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("STRONGROOM_REQUIRE", raising=False)
    with pytest.raises(pytest.skip.Exception, match="PostgreSQL is missing: install it"):
        missing("PostgreSQL", "install it")
    monkeypatch.setenv("STRONGROOM_REQUIRE", "all")
    with pytest.raises(pytest.fail.Exception, match="PostgreSQL is missing: install it"):
        missing("PostgreSQL", "install it")
