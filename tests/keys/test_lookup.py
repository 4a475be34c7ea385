"""Imported keys with another system's hash: found by one read, compared off the event loop, upgraded once."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import threading
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import apsw
import bcrypt
import pytest
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from django.contrib.auth.hashers import BCryptSHA256PasswordHasher, PBKDF2PasswordHasher, PBKDF2SHA1PasswordHasher
from rest_framework_api_key.crypto import KeyGenerator

from strongroom import ApiKey, Database, Strongroom
from strongroom.context import system_context
from strongroom.errors import TooManyRequests, Unavailable
from strongroom.keys import foreign_hash as keyhash
from strongroom.keys import slow_hash as slowcheck
from strongroom.keys.hasher import HINT_SLOTS, Hasher
from strongroom.keys.import_source import KeySource
from strongroom.keys.transfer.record_file import KeyRecord, RecordReader
from strongroom.keys.transfer.record_import import RecordImport
from strongroom.pepper import Pepper
from tests.conftest import backend_of
from tests.helpers.faulty_store import Fault, FaultyStore
from tests.helpers.stores import new_url, opened, rolling
from tests.helpers.waiting import wait_until

SYSTEM = system_context()
TEXT = "abcdefgh.0123456789abcdefghijklmnopqrstuv"
SECRET = b"the other system's secret"


async def imported(room: Strongroom, *rows: dict[str, Any], secret: bytes | None = None) -> list[KeyRecord]:
    """Import rows as the command line does, and wait until this process knows how they are looked up."""
    lines = [json.dumps({"name": "worker", **row}).encode() for row in rows]
    reader = RecordReader("default", time.time_ns() // 1_000, with_secret=secret is not None)
    records = []
    for record, findings in reader.read(lines):
        assert isinstance(record, KeyRecord), findings
        records.append(record)
    job = RecordImport(room.database, room.keys.hasher, SYSTEM, hmac_secret=secret)
    await job.apply(await job.plan(records), update=False)
    sources = (await room.database.find(SYSTEM, KeySource)).items
    await wait_until(
        lambda: len(room.keys.hasher.imported.secrets) + len(room.keys.hasher.imported.rules) == len(sources)
    )
    return records


HASHES = {
    "sha256 hex": {"hash": hashlib.sha256(TEXT.encode()).hexdigest()},
    "sha512 of djangorestframework-api-key 3": {"hashed_key": KeyGenerator().hash(TEXT), "prefix": "abcdefgh"},
    "hmac": {"hash": "hmac-sha256:" + hmac.digest(SECRET, TEXT.encode(), "sha256").hex()},
    "salted sha256": {"hash": "sha256$pepper$" + hashlib.sha256(f"pepper{TEXT}".encode()).hexdigest(), "hint": "abcd"},
    "pbkdf2": {"hash": PBKDF2PasswordHasher().encode(TEXT, "salt", 20), "prefix": "abcdefgh"},
    "pbkdf2 sha1": {"hash": PBKDF2SHA1PasswordHasher().encode(TEXT, "salt", 20), "hint": "abcdefgh.0"},
    "pbkdf2 in the id, as djangorestframework-api-key once had it": {
        "id": "abcdefgh." + PBKDF2PasswordHasher().encode(TEXT, "salt", 20)
    },
    "bcrypt": {"hash": bcrypt.hashpw(TEXT.encode(), bcrypt.gensalt(4)).decode(), "prefix": "abcdefgh"},
    "bcrypt_sha256": {"hash": BCryptSHA256PasswordHasher().encode(TEXT, bcrypt.gensalt(4)), "prefix": "abcdefgh"},
    "argon2, without any hint": {
        "hash": Argon2id(
            salt=b"somesalt", length=32, iterations=1, lanes=1, memory_cost=64
        ).derive_phc_encoded(TEXT.encode()),
        "hint": "",
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", HASHES)
async def test_each_kind_of_hash_is_found_by_one_read_and_upgraded_at_the_first_use(
    room: Strongroom, store: FaultyStore, kind: str, url_of_any: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedded = not url_of_any.startswith("postgresql")
    monkeypatch.setattr(Database, "embedded", embedded)  # FaultyStore calls every store so
    (record,) = await imported(room, {**HASHES[kind], "limits": [rolling("requests", 9).model_dump()]}, secret=SECRET)
    before = await room.keys.get(record.id)
    assert (before.sealed, room.keys.hasher.is_current(before.hash)) == (None, False)

    store.reads.clear()
    for wrong in (TEXT + "x", TEXT[:-1] + "w", "other" + TEXT):
        assert (await room.keys.verify(wrong)).code == "NOT_FOUND"
    # One read for each; an embedded store, where a read is no trip, is asked for a hash as ours are before.
    assert [name for _, name in store.reads] == ["api_keys"] * (6 if embedded else 3)

    answer = await room.keys.verify(TEXT)
    assert (answer.code, answer.key_id, answer.limits[0].used) == ("VALID", record.id, 1)
    after = await room.keys.get(record.id)
    assert room.keys.hasher.is_current(after.hash)
    assert after.verifier is None
    assert room.keys.hasher.unseal(after.sealed or b"") == hashlib.sha256(TEXT.encode()).digest()
    assert (await room.keys.verify(TEXT + "x")).code == "NOT_FOUND"
    assert (await room.keys.verify(TEXT)).limits[0].used == 2


async def test_imported_keys_are_found_on_firestore_too(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    async with Strongroom.open(backend_of("firestore", tmp_path, request).new_url()) as room:
        for kind in ("hmac", "bcrypt"):
            text = kind + TEXT
            made = hmac.digest(SECRET, text.encode(), "sha256").hex()
            hash = f"hmac-sha256:{made}" if kind == "hmac" else bcrypt.hashpw(text.encode(), bcrypt.gensalt(4)).decode()
            (record,) = await imported(room, {"hash": hash, "hint": kind}, secret=SECRET)
            assert (await room.keys.verify(text + "x")).code == "NOT_FOUND"
            assert (await room.keys.verify(text)).key_id == record.id
            assert room.keys.hasher.is_current((await room.keys.get(record.id)).hash)
            rotated = await room.keys.rotate(record.id, overlap_s=60)
            assert (await room.keys.verify(text)).key_id == record.id
            assert (await room.keys.verify(rotated.text)).key_id == record.id


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that a room opened from now on compares with slow hashes, in order."""
    compared: list[str] = []
    matches = keyhash.matches

    def counted(verifier: str, text: str) -> bool:
        assert threading.current_thread() is not threading.main_thread(), "the event loop waits for a hash"
        compared.append(text)
        return matches(verifier, text)

    monkeypatch.setattr(slowcheck.SlowHashPool.__init__, "__defaults__", (counted,))
    return compared


@pytest.fixture(params=["json-memory", "sqlite"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return new_url(request.param, tmp_path)


async def test_djangorestframework_api_key_173_the_second_verification_does_no_password_hashing(
    compared: list[str], url: str
) -> None:
    """There, each request takes the 0.35 to 0.5 s of a password's hash."""
    began = time.process_time()
    hash = PBKDF2PasswordHasher().encode(TEXT, "salt")  # with as many iterations as Django takes
    hashing_s = time.process_time() - began
    async with Strongroom.open(url) as room:
        await imported(room, {"hash": hash, "prefix": "abcdefgh"})
        assert (await room.keys.verify(TEXT)).valid
        assert compared == [TEXT]
        began = time.process_time()
        for _ in range(100):
            assert (await room.keys.verify(TEXT)).valid
        assert compared == [TEXT]
        assert time.process_time() - began < hashing_s, "a hundred verifications take less than one password's hash"


async def test_a_hash_is_upgraded_for_every_process(compared: list[str], tmp_path: Path) -> None:
    url = new_url("sqlite", tmp_path)
    async with AsyncExitStack() as stack:
        nodes = [await stack.enter_async_context(Strongroom.open(url)) for _ in range(2)]
        await imported(nodes[0], {**HASHES["bcrypt"]})
        assert (await nodes[0].keys.verify(TEXT)).valid
        assert (await nodes[1].keys.verify(TEXT)).valid
    async with Strongroom.open(url) as room:
        assert (await room.keys.verify(TEXT)).valid
    assert compared == [TEXT]


async def test_many_first_uses_of_one_key_at_once_are_one_hash(compared: list[str], url: str) -> None:
    async with Strongroom.open(url) as room:
        await imported(room, {**HASHES["pbkdf2"], "limits": [rolling("requests", 30).model_dump()]})
        answers = await asyncio.gather(*(room.keys.verify(TEXT) for _ in range(50)))
        assert sum(answer.valid for answer in answers) == 30
        assert compared == [TEXT]


async def test_a_cancelled_caller_does_not_cancel_a_shared_comparison(compared: list[str], url: str) -> None:
    async with Strongroom.open(url) as room:
        await imported(room, {"hash": PBKDF2PasswordHasher().encode(TEXT, "salt", 300_000), "prefix": "abcdefgh"})
        gone, stays = (asyncio.create_task(room.keys.verify(TEXT)) for _ in range(2))
        await wait_until(lambda: compared)
        gone.cancel()
        assert (await stays).valid
        assert compared == [TEXT]


async def test_guessing_with_a_known_hint_cannot_exhaust_the_cpu(
    compared: list[str], url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slowcheck, "GUESSES_PER_S", 0.0)
    other = "zyxwvuts." + TEXT[9:]
    async with Strongroom.open(url) as room:
        await imported(
            room,
            {**HASHES["pbkdf2"]},
            {"hash": PBKDF2PasswordHasher().encode(other, "salt", 20), "prefix": "zyxwvuts"},
        )
        refused = 0
        for number in range(slowcheck.GUESSES + 20):
            try:
                assert (await room.keys.verify(f"abcdefgh.{number}")).code == "NOT_FOUND"
            except TooManyRequests:
                refused += 1
        assert (len(compared), refused) == (slowcheck.GUESSES, 20)
        # Wrong texts that were seen cost nothing, nor do hints that no key has; other keys are not concerned.
        assert (await room.keys.verify("abcdefgh.0")).code == "NOT_FOUND"
        assert (await room.keys.verify("nobodys1.0")).code == "NOT_FOUND"
        assert len(compared) == slowcheck.GUESSES
        assert (await room.keys.verify(other)).valid
        # The holder of the key waits like everyone, and is let in once guesses are admitted again.
        with pytest.raises(TooManyRequests):
            await room.keys.verify(TEXT)
        monkeypatch.setattr(slowcheck, "GUESSES_PER_S", 1_000.0)
        assert await wait_until(lambda: _is_valid(room, TEXT))


async def _is_valid(room: Strongroom, text: str) -> bool:
    return (await room.keys.verify(text)).valid


async def test_the_queue_for_slow_hashes_is_bounded_and_the_rest_is_told_to_retry(
    compared: list[str], url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slowcheck, "MAX_WAITING", 3)
    texts = [f"hint{number:04d}.secret" for number in range(40)]
    async with Strongroom.open(url) as room:
        await imported(
            room,
            *(
                {"hash": PBKDF2PasswordHasher().encode(text, f"salt{text}", 60_000), "prefix": text[:8]}
                for text in texts
            ),
        )
        answers = await asyncio.gather(*(room.keys.verify(text) for text in texts), return_exceptions=True)
        done = [answer for answer in answers if not isinstance(answer, BaseException)]
        assert all(answer.valid for answer in done)
        assert len(done) == slowcheck.THREADS + 3
        assert {type(answer) for answer in answers if isinstance(answer, BaseException)} == {TooManyRequests}
        for text in texts:
            assert (await room.keys.verify(text)).valid


async def test_the_event_loop_continues_while_slow_hashes_are_compared(url: str) -> None:
    async with Strongroom.open(url) as room:
        issued = await room.keys.create(name="ours")
        await imported(room, {"hash": PBKDF2PasswordHasher().encode(TEXT, "salt", 2_000_000), "prefix": "abcdefgh"})
        await room.keys.verify(issued.text)
        slow = asyncio.create_task(room.keys.verify(TEXT))
        count = 0
        while not slow.done():
            assert (await room.keys.verify(issued.text)).valid
            count += 1
            await asyncio.sleep(0)
        assert (await slow).valid
        assert count > 100


async def test_a_bounded_number_of_keys_may_share_a_hint(compared: list[str], url: str) -> None:
    texts = [f"abcdefgh.{number}{TEXT}" for number in range(HINT_SLOTS)]
    rows = [{"hash": PBKDF2PasswordHasher().encode(text, "salt", 20), "prefix": "abcdefgh"} for text in texts]
    async with Strongroom.open(url) as room:
        records = await imported(room, *rows)
        for text, record in zip(texts, records, strict=True):
            assert (await room.keys.verify(text)).key_id == record.id
        assert len(compared) <= sum(range(HINT_SLOTS + 1))
        one_more = [{"hash": PBKDF2PasswordHasher().encode("abcdefgh.x", "salt", 20), "prefix": "abcdefgh"}]
        (late,) = await imported(room, *one_more)  # those that were used have left their place
        assert (await room.keys.verify("abcdefgh.x")).key_id == late.id


async def test_a_secret_rotated_before_its_first_use_works_through_the_overlap(
    compared: list[str], room: Strongroom
) -> None:
    (record,) = await imported(room, {**HASHES["argon2, without any hint"]})
    rotated = await room.keys.rotate(record.id, overlap_s=3600)
    assert (await room.keys.verify(rotated.text)).key_id == record.id
    assert (await room.keys.verify(TEXT)).key_id == record.id
    assert (await room.keys.verify(rotated.text)).valid
    key = await room.keys.get(record.id)
    assert room.keys.hasher.is_current(key.previous_hash or "")
    assert key.verifier is None
    assert compared == [TEXT]
    await room.keys.rotate(record.id)
    assert (await room.keys.verify(TEXT)).code == "NOT_FOUND"


async def test_a_key_that_is_rotated_while_its_hash_is_compared_keeps_its_new_secret(
    room: Strongroom, store: FaultyStore
) -> None:
    """A write-back must not bring an old text back."""
    (record,) = await imported(room, {**HASHES["bcrypt"], "limits": [rolling("requests", 9).model_dump()]})
    rotated: list[Any] = []

    async def rotate(method: str, collection: str) -> None:
        if method == "find" and collection == "api_keys" and not rotated:
            store.after_read = None
            rotated.append(await room.keys.rotate(record.id))

    store.after_read = rotate
    assert (await room.keys.verify(TEXT)).code == "NOT_FOUND"
    assert (await room.keys.verify(rotated[0].text)).key_id == record.id
    assert (await room.keys.verify(TEXT)).code == "NOT_FOUND"


async def test_an_imported_key_disabled_or_deleted_before_its_first_use_is_refused(
    compared: list[str], room: Strongroom
) -> None:
    (record,) = await imported(room, {**HASHES["bcrypt"], "enabled": False})
    assert (await room.keys.verify(TEXT)).code == "DISABLED"
    await room.keys.delete(record.id)
    assert (await room.keys.verify(TEXT)).code == "NOT_FOUND"


async def test_a_hash_upgrade_that_cannot_be_written_is_retried_and_the_key_works(
    compared: list[str], room: Strongroom, store: FaultyStore
) -> None:
    (record,) = await imported(room, {**HASHES["bcrypt"]})
    store.fault = lambda number, batch: Fault("before", Unavailable("read-only"))
    known = await room.keys.authenticate(TEXT)
    assert known is not None
    assert known.id == record.id
    store.fault = lambda number, batch: None
    room.keys.cache.forget(record.id)
    assert (await room.keys.verify(TEXT)).valid
    assert room.keys.hasher.is_current((await room.keys.get(record.id)).hash)
    assert compared == [TEXT]  # what was proven is remembered


async def test_hmac_keys_outlive_a_rotation_of_the_pepper_and_a_restart(tmp_path: Path) -> None:
    url = new_url("sqlite", tmp_path)
    async with Strongroom.open(url) as room:
        (record,) = await imported(room, {**HASHES["hmac"]}, secret=SECRET)
        await room.rotate_pepper()
    assert SECRET not in _all_of(tmp_path)  # it is encrypted, in every part of the store
    async with Strongroom.open(url) as room:
        assert SECRET.decode() not in repr(room.keys.hasher.imported)
        assert (await room.keys.verify(TEXT)).key_id == record.id


def _all_of(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.iterdir())


async def test_a_store_without_imports_looks_up_no_hints() -> None:
    hasher = Hasher([Pepper("000001", b"o" * 32)])
    assert hasher.hints(TEXT) == []
    assert len(hasher.candidates(TEXT)) == 3


async def test_an_unknown_secret_is_looked_up_by_index_on_the_calling_thread(tmp_path: Path) -> None:
    url = new_url("sqlite", tmp_path)
    async with opened(url) as (room, store):
        await imported(room, {**HASHES["hmac"]}, {**HASHES["bcrypt"]}, {**HASHES["salted sha256"]}, secret=SECRET)
        store.reads.clear()
        assert (await room.keys.verify("nobodys1.text")).code == "NOT_FOUND"
        assert [method for method, collection in store.reads if collection == "api_keys"] == ["find"] * 2
        read = room.keys.verify("nobodys2.text")
        with pytest.raises(StopIteration):  # on the calling thread: it does not even give way to the event loop
            read.send(None)
        await room.keys.create(name="k")
    connection = apsw.Connection(str(tmp_path / "store.db"))
    plan = [
        row[3]
        for row in connection.execute(
            "EXPLAIN QUERY PLAN SELECT * FROM api_keys"
            " WHERE (hash IN (?, ?) OR previous_hash IN (?, ?)) ORDER BY id LIMIT 4",
            ("a", "b", "a", "b"),
        )
    ]
    assert not [step for step in plan if step.startswith("SCAN")], plan
    assert len([step for step in plan if "USING INDEX" in step]) == 2
    connection.close()


async def test_no_answer_contains_a_keys_hash(room: Strongroom) -> None:
    (record,) = await imported(room, {**HASHES["bcrypt"]})
    key = await room.keys.get(record.id)
    verifier = key.verifier or "?"
    assert verifier.startswith("$2b$")
    assert verifier not in repr(key)
    cursor = None
    while (page := await room.store.changes(cursor)).records:
        cursor = page.cursor
        for change in page.records:
            assert verifier not in repr(change.after)
    assert isinstance(key, ApiKey)


async def test_stored_hashes_are_compared_in_constant_time_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `hmac.compare_digest` says decides, whatever the store has found."""
    async with Strongroom.open("json://:memory:") as room:
        issued = await room.keys.create(name="k")
        answers: list[bool] = []

        def compared(one: bytes, other: bytes) -> bool:
            answers.append(one == other)
            return False

        with monkeypatch.context() as patched:
            patched.setattr(hmac, "compare_digest", compared)
            assert await room.keys.identify(issued.text) is None
        assert True in answers, "the stored hash was not compared"
        room.keys.changed(issued.key.id)
        assert await room.keys.identify(issued.text) is not None
