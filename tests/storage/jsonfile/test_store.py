"""The JSON store: a readable file, no partial write, no loss through damage; one process; group commit."""

# ruff: noqa: ASYNC240  (a test may block its own loop for the moment that it looks at a file)

from __future__ import annotations

import asyncio
import errno
import json
import os
import stat
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from strongroom.entities.query import Query
from strongroom.errors import (
    Gone,
    InvalidInput,
    StorageFull,
    StoreError,
    StrongroomError,
    Unavailable,
)
from strongroom.storage.jsonfile.store import JsonStore
from strongroom.storage.port import Append, Check, Create, Delete, Put
from strongroom.testing.storage.samples import COLLECTIONS, NOW, batch, item, record, sample, shared
from tests.helpers.waiting import PATIENCE_S, tear_down_the_loop, wait_until


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.json"


@pytest.fixture
async def store(path: Path) -> AsyncIterator[JsonStore]:
    store = await opened(path)
    yield store
    await store.close()


async def opened(path: Path) -> JsonStore:
    store = JsonStore(str(path))
    await store.open()
    await store.prepare(COLLECTIONS)
    return store


async def labels(store: JsonStore) -> list[str]:
    return [d["label"] for d in await store.find("items", "acme", Query())]


class Disk:
    """What the store asks of the disk, in order; any step can be made to fail or to wait."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[str] = []
        self.failing: dict[str, BaseException] = {}
        self.gate: threading.Event | None = None
        self.waiting = threading.Event()
        real_fsync, real_replace = os.fsync, os.replace

        def fsync(descriptor: int) -> None:
            kind = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
            self.step(f"fsync {kind}", lambda: real_fsync(descriptor))

        def replace(source: str, target: str) -> None:
            self.step("rename", lambda: real_replace(source, target))

        monkeypatch.setattr(os, "fsync", fsync)
        monkeypatch.setattr(os, "replace", replace)

    def step(self, name: str, work: Callable[[], None]) -> None:
        self.steps.append(name)
        if self.gate is not None:
            self.waiting.set()
            assert self.gate.wait(PATIENCE_S)
        if name in self.failing:
            raise self.failing[name]
        work()


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


# --- The file -------------------------------------------------------------------------------------------------


async def test_the_file_is_readable_by_people(path: Path, store: JsonStore) -> None:
    """JSON with a section a tenant and a line a document, so that a difference shows what changed."""
    await store.commit(batch("acme", Create("items", "a", item("é", code="$x")), Append(record("a"), 0)))
    await store.commit(batch("other", Create("samples", "b", sample(blob=b"hi", extra={"$k": 1}))))
    await store.commit(batch(None, Create("shared", "s", shared("all"))))
    text = path.read_text(encoding="utf-8")
    data = json.loads(text)
    assert data["strongroom"] == 2
    assert data["tenants"].keys() == {"acme", "other"}
    assert data["tenants"]["acme"]["items"]["a"]["label"] == "é"
    assert data["tenants"]["other"]["samples"]["b"]["blob"] == {"$bytes": "aGk="}
    assert data["tenants"]["other"]["samples"]["b"]["extra"] == {"$$k": 1}
    assert data["global"]["shared"]["s"]["label"] == "all"
    assert data["schema"]["items"]["fields"]["code"] == "text"
    assert [line["entity_id"] for line in data["journal"]] == ["a"]
    before = set(text.splitlines())
    await store.commit(batch("acme", Create("items", "c", item("second"))))
    added = set(path.read_text(encoding="utf-8").splitlines()) - before
    assert [line for line in added if "second" in line]
    assert len(added) <= 2, "the new document's line, and the one before it that got a comma"


async def test_the_file_is_private_to_its_owner_and_keeps_its_mode(path: Path, store: JsonStore) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o640)
    await store.commit(batch("acme", Create("items", "a", item())))
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


async def test_a_link_to_the_file_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "real" / "store.json")
    store = await opened(link)
    await store.commit(batch("acme", Create("items", "a", item())))
    await store.close()
    assert link.is_symlink()
    assert "acme" in (tmp_path / "real" / "store.json").read_text()


async def test_a_new_store_makes_its_folder(tmp_path: Path) -> None:
    store = await opened(tmp_path / "new" / "folder" / "store.json")
    await store.close()
    assert (tmp_path / "new" / "folder" / "store.json").exists()


async def test_an_impossible_path_raises_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "store.json", tmp_path):
        with pytest.raises(StrongroomError) as caught:
            await JsonStore(str(path)).open()
        assert isinstance(caught.value, Unavailable)
        assert str(path) in caught.value.message


# --- Damage ---------------------------------------------------------------------------------------------------


async def refused(path: Path, content: bytes) -> StoreError:
    """The error that opening this content gives; the content stays, and the lock does not."""
    path.write_bytes(content)
    for _ in range(2):
        with pytest.raises(StoreError) as caught:
            await JsonStore(str(path)).open()
        assert str(path) in caught.value.message
        assert path.read_bytes() == content, "what was there is not overwritten"
    return caught.value


async def whole(path: Path) -> bytes:
    store = await opened(path)
    await store.commit(batch("acme", Create("items", "a", item("é", code="c")), Append(record("a", after={"a": 1}), 0)))
    await store.commit(batch("acme", Create("samples", "a", sample(price=None, blob=b"x"))))
    await store.commit(batch(None, Create("shared", "a", shared())))
    await store.close()
    return path.read_bytes()


async def test_a_file_cut_off_anywhere_is_refused(path: Path) -> None:
    content = await whole(path)
    assert content.endswith(b"]}\n")
    for end in range(0, len(content) - 2, 7):
        error = await refused(path, content[:end])
        assert "damaged at" in error.message


async def test_damaged_json_is_refused_with_its_line_and_column(path: Path) -> None:
    content = await whole(path)
    lines = content.split(b"\n")
    lines[3] = b'"items": {"scope": oops}'
    assert "damaged at line 4 column 20" in (await refused(path, b"\n".join(lines))).message


async def test_invalid_utf8_is_refused_with_its_byte(path: Path) -> None:
    content = await whole(path)
    place = content.index("é".encode())
    assert f"at byte {place}" in (await refused(path, content.replace("é".encode(), b"\xff"))).message


async def test_foreign_json_is_refused(path: Path) -> None:
    for content in (b"{}", b"[]", b"1", b"null", b'"strongroom"', b'{"strongroom": "1"}', b'{"strongroom": true}'):
        assert "not a Strongroom store" in (await refused(path, content)).message
    assert "nested too deeply" in (await refused(path, b'{"strongroom": ' + b"[" * 100_000)).message


async def test_a_later_format_is_refused(path: Path) -> None:
    content = await whole(path)
    later = content.replace(b'"strongroom": 2', b'"strongroom": 3')
    assert "has format 3, this version of Strongroom reads formats 1 to 2" in (await refused(path, later)).message


async def test_a_file_of_format_1_is_read(path: Path) -> None:
    content = await whole(path)
    old = b"".join(line for line in content.splitlines(True) if not line.startswith((b'"last_sequence"', b'"floors"')))
    new_fields = b', "salt": {"$bytes": ""}, "claims": null, "rules": null'.replace(b" ", b"")
    assert new_fields in old
    path.write_bytes(old.replace(b'"strongroom": 2', b'"strongroom": 1').replace(new_fields, b""))
    store = await opened(path)
    try:
        (found,) = (await store.changes(None)).records
        assert (found.entity_id, found.sequence, found.salt, found.claims) == ("a", 1, b"", None)
        await store.commit(batch("acme", Append(record("b"))))
        assert [one.sequence for one in (await store.changes(None)).records] == [1, 2]
    finally:
        await store.close()
    assert json.loads(path.read_bytes())["strongroom"] == 2


async def test_a_dropped_record_leaves_a_gap_and_no_other_record_may(path: Path) -> None:
    store = await opened(path)
    await store.commit(batch("acme", *(Append(record(name)) for name in "abc")))
    assert await store.drop("acme", 2) == 2
    await store.close()
    store = await opened(path)
    assert [row[0] for row in (await store.rows()).rows] == [3]
    await store.close()
    data = json.loads(path.read_bytes())
    path.write_text(json.dumps({**data, "floors": []}))
    assert "journal record 1: ValueError: found sequence 3" in (await refused(path, path.read_bytes())).message
    path.write_text(json.dumps({**data, "last_sequence": 2}))
    assert "last_sequence: ValueError: found 2" in (await refused(path, path.read_bytes())).message


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda data: data.pop("schema"), "top level"),
        (lambda data: data.update(schema=[]), "global/shared"),
        (lambda data: data["schema"].pop("items"), "tenants/acme/items"),
        (lambda data: data.update(tenants=[]), "tenants"),
        (lambda data: data.update(deleted_version="x"), "top level"),
        (lambda data: data["tenants"]["acme"]["items"].update(b={}), "tenants/acme/items/b"),
        (lambda data: data["tenants"]["acme"]["items"].update(b=data["tenants"]["acme"]["items"]["a"]), "items/b"),
        (lambda data: data["tenants"]["acme"]["items"]["a"].pop("code"), "items/a"),
        (lambda data: data["tenants"]["acme"]["items"]["a"].update(more=1), "items/a"),
        (lambda data: data["tenants"]["acme"]["samples"]["a"].update(blob={"$bytes": "?"}), "samples/a"),
        (lambda data: data["tenants"]["acme"]["samples"]["a"].update(price={"$decimal": "x"}), "samples/a"),
        (lambda data: data["tenants"]["acme"]["samples"]["a"].update(created_at={"$time": "noon"}), "samples/a"),
        (lambda data: data["tenants"]["acme"]["items"]["a"].update(used="1"), "items/a: ValueError: used: found str"),
        (lambda data: data["tenants"]["acme"]["items"]["a"].update(version=None), "items/a: ValueError: version"),
        (lambda data: data["tenants"]["acme"]["samples"]["a"].update(flag=1), "samples/a: ValueError: flag: found int"),
        (lambda data: data["journal"].append({}), "journal record 2"),
        (lambda data: data["journal"].append(data["journal"][0]), "journal record 2"),
        (lambda data: data["journal"][0].update(sequence=2), "journal record 1"),
    ],
)
async def test_a_malformed_part_is_refused_with_its_position(
    path: Path, change: Callable[[dict[str, Any]], object], place: str
) -> None:
    data = json.loads(await whole(path))
    change(data)
    error = await refused(path, json.dumps(data).encode())
    assert place in error.message


# --- Writing --------------------------------------------------------------------------------------------------


async def test_a_write_is_the_new_file_its_fsync_the_rename_and_the_folders_fsync(
    path: Path, store: JsonStore, disk: Disk
) -> None:
    await store.commit(batch("acme", Create("items", "a", item())))
    assert disk.steps == ["fsync file", "rename", "fsync folder"]
    assert not path.with_name("store.json.new").exists()


@pytest.mark.parametrize("step", ["fsync file", "rename", "fsync folder"])
async def test_a_crash_at_any_step_leaves_the_old_or_the_new_file(
    path: Path, store: JsonStore, disk: Disk, step: str
) -> None:
    """What the file holds at each step is what a process that dies there leaves behind."""
    await store.commit(batch("acme", Create("items", "a", item("old"))))
    left: list[bytes] = []
    disk.failing[step] = OSError(errno.EIO, "gone")
    with pytest.raises(Unavailable):
        await store.commit(batch("acme", Put("items", "a", item("new")), Create("items", "b", item("new"))))
    left.append(path.read_bytes())
    disk.failing.clear()
    await store.close()
    path.with_name("store.json.new").write_bytes(left[0][:100])  # as a killed process leaves it
    again = await opened(path)
    assert await labels(again) in (["old"], ["new", "new"])
    assert not path.with_name("store.json.new").exists()
    await again.commit(batch("acme", Create("items", "c", item("later"))))
    await again.close()


@pytest.mark.parametrize(
    ("code", "kind"), [(errno.ENOSPC, StorageFull), (errno.EDQUOT, StorageFull), (errno.EIO, Unavailable)]
)
@pytest.mark.parametrize("step", ["fsync file", "rename"])
async def test_a_failed_write_changes_nothing_and_the_next_one_is_tried(
    path: Path, store: JsonStore, disk: Disk, step: str, code: int, kind: type[StrongroomError]
) -> None:
    await store.commit(batch("acme", Create("items", "a", item("old", code="c")), Append(record("1"))))
    before = path.read_bytes()
    disk.failing[step] = OSError(code, os.strerror(code))
    outcomes = await asyncio.gather(
        store.commit(batch("acme", Create("items", "b", item("lost", code="d")), Append(record("2")))),
        store.commit(batch("acme", Delete("items", "a"))),
        store.commit(batch("acme", Create("items", "a", item()))),
        return_exceptions=True,
    )
    assert [type(outcome) for outcome in outcomes] == [kind] * 3
    assert str(path) in str(outcomes[0])
    assert path.read_bytes() == before
    assert not path.with_name("store.json.new").exists(), "what was half written takes up no room"
    assert await labels(store) == ["old"], "reads go on, and see nothing of it"
    assert len((await store.changes(None)).records) == 1
    disk.failing.clear()
    committed = await store.commit(batch("acme", Create("items", "b", item("again", code="d")), Append(record("2"))))
    assert (committed.versions, committed.sequence) == ((NOW, 0), 2)
    assert not path.with_name("store.json.new").exists()


async def test_a_full_disk_fails_a_prepare_too_and_the_declarations_stay(path: Path, disk: Disk) -> None:
    store = JsonStore(str(path))
    await store.open()
    await store.prepare(COLLECTIONS[1:2])
    disk.failing["fsync file"] = OSError(errno.ENOSPC, "full")
    with pytest.raises(StorageFull):
        await store.prepare(COLLECTIONS)
    assert await store.get("items", "acme", "a") is None
    with pytest.raises(InvalidInput):
        await store.get("samples", "acme", "a")
    disk.failing.clear()
    assert len(await store.prepare(COLLECTIONS)) == 2
    await store.close()


async def test_after_a_folder_that_cannot_be_synced_nothing_is_written_until_the_store_is_opened_again(
    path: Path, store: JsonStore, disk: Disk
) -> None:
    """An fsync that failed once may report success the second time and still have lost the data."""
    disk.failing["fsync folder"] = OSError(errno.EIO, "gone")
    refused = store.commit(batch("acme", Check("items", "a", 7)))
    with pytest.raises(Unavailable, match="open the store again") as caught:
        await store.commit(batch("acme", Create("items", "a", item())))
    assert caught.value.details["outcome"] == "unknown"
    with pytest.raises(Unavailable) as caught:
        await refused
    assert "outcome" not in caught.value.details, "it would have been refused whatever became of the others"
    disk.failing.clear()
    disk.steps.clear()
    with pytest.raises(Unavailable, match="open the store again") as caught:
        await store.commit(batch("acme", Create("items", "b", item())))
    assert "outcome" not in caught.value.details
    assert disk.steps == []
    assert await store.find("items", "acme", Query()) == []
    health = await store.check()
    assert not health.ok
    assert "open the store again" in health.details["problem"]
    await store.close()
    await store.open()
    await store.prepare(COLLECTIONS)
    assert await store.find("items", "acme", Query(fields=())) == [{"id": "a"}], "it was in place after all"
    await store.commit(batch("acme", Create("items", "b", item())))


async def test_waiting_commits_share_one_write_and_become_visible_once_durable(store: JsonStore, disk: Disk) -> None:
    disk.gate = threading.Event()
    first = asyncio.ensure_future(store.commit(batch("acme", Create("items", "first", item("first")))))
    await wait_until(disk.waiting.is_set)
    others = [asyncio.ensure_future(store.commit(batch("acme", Create("items", f"{n}", item())))) for n in range(50)]
    await asyncio.sleep(0)
    assert await store.find("items", "acme", Query()) == [], "reads go on, and see what is committed"
    assert (await store.changes("end")).cursor == "0"
    assert not first.done()
    disk.gate.set()
    await asyncio.gather(first, *others)
    assert disk.steps.count("rename") == 2, "one for the first, one for all that waited"
    assert len(await store.find("items", "acme", Query())) == 51


async def test_a_batch_that_changes_nothing_writes_nothing(store: JsonStore, disk: Disk) -> None:
    await store.commit(batch("acme"))
    await store.prepare(COLLECTIONS)
    await store.prepare(COLLECTIONS, mode="plan")
    with pytest.raises(StrongroomError):
        await store.commit(batch("acme", Create("items", "a", item()), Create("items", "a", item())))
    assert disk.steps == []


async def test_a_cancelled_writer_answers_every_waiting_caller(path: Path, disk: Disk) -> None:
    store = await opened(path)
    disk.gate = threading.Event()
    pending = [asyncio.ensure_future(store.commit(batch("acme", Create("items", f"{n}", item())))) for n in range(3)]
    await wait_until(disk.waiting.is_set)
    pending.append(asyncio.ensure_future(store.commit(batch("acme", Create("items", "late", item())))))
    tear_down_the_loop()
    outcomes = await asyncio.gather(*pending, return_exceptions=True)
    disk.gate.set()
    assert all(isinstance(outcome, Unavailable) for outcome in outcomes), outcomes
    with pytest.raises(Unavailable):
        await store.commit(batch("acme", Create("items", "after", item())))
    await store.close()


async def test_a_rename_whose_answer_was_lost_is_found_to_be_done(
    path: Path, store: JsonStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.replace

    def lost(source: str, target: str) -> None:
        real(source, target)
        raise OSError(errno.EIO, "the server's answer was lost")

    monkeypatch.setattr(os, "replace", lost)
    await store.commit(batch("acme", Create("items", "a", item("a"))))
    assert await labels(store) == ["a"]


# --- One process ----------------------------------------------------------------------------------------------


async def test_a_second_open_is_refused_with_one_sentence_that_names_the_file(path: Path, store: JsonStore) -> None:
    with pytest.raises(Unavailable) as caught:
        await JsonStore(str(path)).open()
    assert caught.value.message.startswith(f"{path} is in use")
    assert "\n" not in caught.value.message
    code = (
        "import asyncio, sys; from strongroom.storage import open_store\n"
        "try: asyncio.run(open_store(sys.argv[1]))\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    arguments = [sys.executable, "-c", code, f"json:///{path}"]
    process = await asyncio.to_thread(subprocess.run, arguments, capture_output=True, text=True, check=True)
    assert process.stdout.strip() == f"Unavailable {caught.value.message}"
    await store.commit(batch("acme", Create("items", "a", item())))


async def test_a_store_that_could_not_be_opened_does_not_keep_the_lock(path: Path) -> None:
    path.write_text("damaged")
    with pytest.raises(StoreError):
        await JsonStore(str(path)).open()
    path.unlink()
    await (await opened(path)).close()


async def test_a_store_in_memory_writes_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk: Disk) -> None:
    monkeypatch.chdir(tmp_path)
    store = JsonStore(None)
    await store.open()
    await store.prepare(COLLECTIONS)
    await store.commit(batch("acme", Create("items", "a", item())))
    assert not store.capabilities.persistent
    assert (await store.check()).details["path"] == ":memory:"
    await store.close()
    assert disk.steps == []
    assert list(tmp_path.iterdir()) == []


async def test_a_tenants_collection_cannot_be_reached_without_a_tenant(store: JsonStore) -> None:
    with pytest.raises(InvalidInput, match="tenant"):
        await store.get("items", None, "a")
    with pytest.raises(InvalidInput, match="tenant"):
        await store.commit(batch(None, Create("items", "a", item())))
    await store.commit(batch("acme", Create("shared", "a", shared())))
    assert await store.get("shared", "other", "a") is not None


async def test_a_cursor_beyond_the_end_is_refused(store: JsonStore) -> None:
    """It is from a longer journal: an older copy of the file was put back, and what it would skip is not known."""
    await store.commit(batch("acme", Append(record("1"))))
    with pytest.raises(Gone):
        await store.changes("2")
