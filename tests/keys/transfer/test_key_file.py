"""Key files: invalid rows are reported, valid rows become working keys, and a repeated import changes nothing."""

from __future__ import annotations

import asyncio
import hashlib
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import time_machine
from hypothesis import given
from hypothesis import strategies as st

from strongroom import Limit, Rolling, Strongroom
from strongroom.context import system_context, us_from_utc
from strongroom.errors import Conflict, InvalidInput
from strongroom.keys.transfer.import_plan import Checksums, Planned, Standing
from strongroom.keys.transfer.key_file import (
    KeyFile,
    KeyFileError,
    KeyRow,
    Shape,
    render_file,
    render_row,
)
from strongroom.keys.transfer.key_file_export import Exported, export_keys
from strongroom.keys.transfer.key_file_import import KeyImport
from strongroom.keys.transfer.key_file_parse import parse
from strongroom.keys.transfer.key_file_rows import FIVE_HOURS, id_of
from tests.helpers.faulty_store import Fault, FaultyStore
from tests.helpers.paths import DATA
from tests.helpers.stores import stored_usage
from tests.helpers.waiting import wait_until

KEY_FILES = DATA / "keys"
NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)
NOW_US = us_from_utc(NOW)
PLAIN = (KEY_FILES / "plain.json").read_bytes()
HASHED = (KEY_FILES / "hashed.json").read_bytes()
BROKEN = (KEY_FILES / "plain_broken.json").read_bytes()
SECRETS: dict[str, str] = json.loads((KEY_FILES / "hashed.secrets.json").read_text())
SYSTEM = system_context()


def plain_row(**fields: Any) -> dict[str, Any]:
    row = {
        "key": "pk_0123456789abcdef0123456789abcdef",
        "name": "worker",
        "token_limit_per_5h": 1_000,
        "expiry_date": "2027-01-01T00:00:00Z",
        "created_at": "2026-01-01T00:00:00Z",
        "last_used": "2026-11-20T11:00:00Z",
        "total_lifetime_tokens": 5_000,
        "usage_windows": [{"window_start": "2026-11-20T11:00:00Z", "tokens_used": 200}],
    }
    return {name: value for name, value in {**row, **fields}.items() if value is not ...}


def hashed_row(**fields: Any) -> dict[str, Any]:
    row = {
        "name": "worker",
        "user_id": "u1",
        "created_at": "2026-10-20T12:00:00+00:00",
        "expires_at": "2026-12-19T12:00:00+00:00",
        "last_used": None,
        "usage_count": 7,
    }
    return {name: value for name, value in {**row, **fields}.items() if value is not ...}


def plain_file(*rows: dict[str, Any]) -> bytes:
    return json.dumps({"keys": rows}).encode()


def parsed(data: bytes) -> KeyFile:
    return parse(data, NOW_US)


def only_problem(row: dict[str, Any]) -> str:
    """The one thing that is wrong with a plain row: `path: message`."""
    file = parsed(plain_file(row))
    assert (file.refused, len(file.problems)) == (1, 1), file.problems
    return f"{file.problems[0].path}: {file.problems[0].message}"


# --- Reading ----------------------------------------------------------------------------------------------------


def test_every_invalid_row_of_the_broken_file_is_named_with_its_problem() -> None:
    file = parsed(BROKEN)
    assert [(p.path, p.message.split(",")[0]) for p in file.problems] == [
        ("keys.1.token_limit_per_5h", "found -5"),
        ("keys.2.expiry_date", 'found "next year"'),
        ("keys.3.key", "is missing"),
        ("keys.4.key", "is the same key as keys.0"),
        ("keys.5.usage_windows.0.tokens_used", "found -1"),
        ("keys.6.token_limit_per_5h", 'found the text "100000"'),
        ("keys.7.total_lifetime_tokens", "found 1e+30"),
        ("keys.8.name", "found an empty text"),
    ]
    assert (file.count, file.refused, len(file.rows)) == (12, 8, 4)
    # The ninth: an offset is valid, and the time it means is told.
    assert "keys.9.expiry_date" in [n.path for n in file.notes if "2026-11-20T05:30:00Z in UTC" in n.message]
    ninth = next(row for row in file.rows if row.path == "keys.9")
    assert ninth.expires_us == us_from_utc(datetime(2026, 11, 20, 5, 30, tzinfo=UTC))


def test_a_report_never_shows_a_key() -> None:
    file = parsed(BROKEN)
    texts = [row["key"] for row in json.loads(BROKEN)["keys"] if "key" in row]
    said = " ".join(f"{f.path} {f.key} {f.name} {f.message}" for f in (*file.problems, *file.notes))
    assert not [text for text in texts if text in said]


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"key": ...}, "keys.0.key: is missing"),
        ({"key": 17}, "keys.0.key: found a number, expected the key's secret"),
        ({"key": ""}, "keys.0.key: found an empty text, expected the key"),
        ({"key": "x" * 513}, "keys.0.key: found 513 characters, expected at most 512"),
        ({"key": "a\tb" * 10}, "keys.0.key: has characters that cannot be part of a key"),
        ({"key": "sr_SR1" + "a" * 49}, "checksum"),
        ({"name": ...}, "keys.0.name: is missing"),
        ({"name": None}, "keys.0.name: found null, expected text"),
        ({"name": 3}, "keys.0.name: found a number, expected text"),
        ({"name": "n" * 201}, "keys.0.name: found 201 characters, expected at most 200"),
        ({"token_limit_per_5h": ...}, "keys.0.token_limit_per_5h: is missing"),
        ({"token_limit_per_5h": True}, "found true or false, expected a number"),
        ({"token_limit_per_5h": 10.5}, "found 10.5, expected a whole number"),
        ({"token_limit_per_5h": 10**15 + 1}, "expected 0 to 1000000000000000"),
        ({"expiry_date": ...}, "keys.0.expiry_date: is missing"),
        ({"expiry_date": "2027-01-01T00:00:00"}, "expected a time such as"),
        ({"expiry_date": "2027-02-29T00:00:00Z"}, "day is out of range for month"),
        ({"expiry_date": 1_800_000_000}, "keys.0.expiry_date: found a number"),
        ({"created_at": None}, "keys.0.created_at: found null, expected a time"),
        ({"created_at": "0001-01-01T00:00:00+05:00"}, "expected a time of the years 1970 to 9999"),
        ({"total_lifetime_tokens": -1}, "keys.0.total_lifetime_tokens: found -1"),
        ({"usage_windows": {}}, "keys.0.usage_windows: found an object, expected a list"),
        ({"usage_windows": [3]}, "keys.0.usage_windows.0: found a number, expected an object"),
        ({"usage_windows": [{"window_start": "2026-11-20T11:00:00Z"}]}, "tokens_used: found nothing"),
        ({"usage_windows": [{"window_start": "2062-11-20T11:00:00Z", "tokens_used": 1}]}, "more than a year ahead"),
        ({"model": ""}, "keys.0.model: found an empty text"),
    ],
    ids=lambda value: json.dumps(value, default=str)[:50] if isinstance(value, dict) else "",
)
def test_the_problem_of_a_row_is_reported(fields: dict[str, Any], problem: str) -> None:
    assert problem in only_problem(plain_row(**fields))


def test_every_problem_of_a_row_is_reported_at_once() -> None:
    file = parsed(plain_file(plain_row(key=..., name="", expiry_date="soon", token_limit_per_5h="9")))
    assert [p.path.removeprefix("keys.0.") for p in file.problems] == [
        "key", "name", "expiry_date", "token_limit_per_5h",
    ]  # fmt: skip


@pytest.mark.parametrize("row", [None, 3, "text", [], [{}]])
def test_a_row_that_is_not_an_object_is_refused_and_the_others_are_read(row: Any) -> None:
    file = parsed(json.dumps({"keys": [row, plain_row()]}).encode())
    assert (file.refused, [r.path for r in file.rows]) == (1, ["keys.1"])
    assert "expected an object" in file.problems[0].message


def test_a_hashed_row_stands_under_64_hexadecimal_digits_once() -> None:
    name = hashlib.sha256(b"a").hexdigest()
    rows = {name: hashed_row(), name.upper(): hashed_row(), "nonsense": hashed_row(), "0" * 64: hashed_row(name="")}
    file = parsed(json.dumps({"keys": rows}).encode())
    assert [row.sha256.hex() for row in file.rows] == [name]
    said = [p.message.split(",")[0] for p in file.problems]
    assert said == [
        f"is the same key as keys.{name[:12]}…",
        "expected the SHA-256 of the key as the name",
        "found an empty text",
    ]


def test_a_duplicate_hash_in_a_file_is_reported() -> None:
    name, row = "ab" * 32, json.dumps(hashed_row())
    file = parsed(f'{{"keys": {{"{name}": {row}, "{name}": {row}}}}}'.encode())
    assert [p.message for p in file.problems] == ["stands in the file more than once"]


def test_numbers_and_times_of_json_are_read_exactly() -> None:
    row = plain_row(token_limit_per_5h=1e5, expiry_date=None, created_at="2026-01-01T00:00:00.123Z", usage_windows=None)
    (found,) = parsed(plain_file(row)).rows
    assert (found.token_limit, found.expires_us, found.created_us % 1_000_000) == (100_000, None, 123_000)


def test_unknown_fields_and_guessable_keys_are_noted() -> None:
    file = parsed(plain_file(plain_row(key="secret-1", plan="gold")))
    assert [(n.path, n.message.split(",")[0]) for n in file.notes] == [
        ("keys.0.key", "has only 8 characters: it can be guessed"),
        ("keys.0.plan", "is no field of this shape and is not carried over"),
    ]
    assert len(file.rows) == 1


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b'{"keys": [\n  {"a": 1,}\n]}', "is not JSON: line 2, column 11: trailing comma in object"),
        (b'{"keys": [', "is not JSON: line 1, column 11: it ends early"),
        (b"{'keys': 1}", "is not JSON: line 1, column 2"),
        (b'{"keys": []} {}', "is not JSON: line 1, column 15: trailing characters"),
        (b"[]", "is not a JSON object"),
        (b'{"users": {}}', 'has no "keys"'),
        (b'{"keys": 3}', '"keys" is neither a list of keys nor an object of hashes'),
        (b'{"k\xff": 1}', "is not UTF-8"),
        (b'{"keys": ' + b"[" * 100_000, "is"),
        ('{"keys": []}'.encode("utf-16"), "is not"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_a_key_file_is_refused_in_one_sentence(data: bytes, sentence: str) -> None:
    with pytest.raises(KeyFileError) as raised:
        parsed(data)
    assert raised.value.message.startswith(sentence)


def test_a_byte_order_mark_is_no_error() -> None:
    assert parsed(b"\xef\xbb\xbf" + plain_file(plain_row())).count == 1


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.dictionaries(st.sampled_from(sorted(plain_row())), json_values),
    st.dictionaries(st.text(max_size=9), json_values),
)
def test_no_content_of_a_row_raises_an_unexpected_error(known: dict[str, Any], unknown: dict[str, Any]) -> None:
    file = parsed(plain_file({**plain_row(), **unknown, **known}))
    assert file.count == 1
    assert (file.refused == 1) == bool(file.problems)


@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_a_file_of_any_content_is_read_or_refused_with_a_sentence(data: bytes) -> None:
    sentence = "read"
    try:
        parsed(data)
    except KeyFileError as error:
        sentence = error.message
    assert sentence
    assert "\n" not in sentence


@pytest.mark.parametrize("data", [PLAIN, HASHED])
def test_a_file_that_is_read_and_written_again_is_the_same_bytes(data: bytes) -> None:
    file = parsed(data)
    assert b"".join(render_file(file.shape, [render_row(file.shape, row) for row in file.rows])) == data


# --- Into a store -----------------------------------------------------------------------------------------------


async def put(
    room: Strongroom, data: bytes, *, tenant: str = "default", update: bool = False
) -> tuple[list[Planned], Checksums]:
    """Import a file as the command line does."""
    file = parse(data, us_from_utc(datetime.now(UTC)))
    assert not file.problems
    job = KeyImport(room.database, room.keys.hasher, file.shape, tenant, SYSTEM)
    planned = await job.plan(file.rows)
    await job.apply(planned, update=update)
    return planned, await job.checksums(planned, us_from_utc(datetime.now(UTC)), updated=update)


async def got(room: Strongroom, shape: Shape, tenant: str = "default") -> Exported:
    now_us = us_from_utc(datetime.now(UTC))
    return await export_keys(room.database, room.keys.hasher, shape, tenant, SYSTEM, now_us)


def as_file(shape: Shape, exported: Exported) -> bytes:
    return b"".join(render_file(shape, exported.rows))


async def journal_length(room: Strongroom) -> int:
    cursor, count = None, 0
    while (page := await room.store.changes(cursor)).records:
        cursor, count = page.cursor, count + len(page.records)
    return count


def standings(planned: list[Planned]) -> set[str]:
    return {p.standing.value for p in planned}


def live_tokens(row: dict[str, Any], now: datetime = NOW) -> int:
    windows = [(datetime.fromisoformat(w["window_start"]), w["tokens_used"]) for w in row["usage_windows"]]
    return sum(tokens for start, tokens in windows if start >= now - timedelta(hours=5))


async def test_imported_plain_keys_keep_their_secret_limits_windows_and_totals(room: Strongroom) -> None:
    with time_machine.travel(NOW, tick=False):
        _, sums = await put(room, PLAIN, tenant="acme")
        assert sums.equal
        assert sums.file_keys == sums.store_keys == 40
        seen = set()
        for row in json.loads(PLAIN)["keys"]:
            answer = await room.keys.verify(row["key"], cost={"tokens": 0})
            used = live_tokens(row)
            expired = datetime.fromisoformat(row["expiry_date"]) <= NOW
            code = "EXPIRED" if expired else "USAGE_EXCEEDED" if used > row["token_limit_per_5h"] else "VALID"
            assert (answer.code, answer.tenant) == (code, "acme")
            assert answer.metadata == ({"model": row["model"]} if "model" in row else {})
            stats = await room.keys.stats(answer.key_id or "")
            assert (stats.limits[0].used, stats.limits[0].limit) == (used, row["token_limit_per_5h"])
            assert stats.key.created_at == datetime.fromisoformat(row["created_at"])
            if code != "VALID":  # a use moves it
                assert stats.last_used_at == datetime.fromisoformat(row["last_used"])
            assert stats.totals["tokens"] == row["total_lifetime_tokens"]
            seen.add(code)
        assert seen == {"VALID", "EXPIRED", "USAGE_EXCEEDED"}


async def test_live_windows_end_when_they_would_have_ended(room: Strongroom) -> None:
    with time_machine.travel(NOW, tick=False) as clock:
        row = plain_row(token_limit_per_5h=300)
        await put(room, plain_file(row))
        assert (await room.keys.verify(row["key"], cost={"tokens": 101})).code == "USAGE_EXCEEDED"
        clock.move_to(NOW + timedelta(hours=4, minutes=2))
        assert (await room.keys.verify(row["key"], cost={"tokens": 101})).valid


async def test_imported_hashed_keys_keep_their_secret_and_their_hash_moves_under_the_pepper(
    room: Strongroom,
) -> None:
    with time_machine.travel(NOW, tick=False):
        _, sums = await put(room, HASHED)
        assert sums.equal
        for sha256, row in json.loads(HASHED)["keys"].items():
            answer = await room.keys.verify(SECRETS[sha256])
            expired = datetime.fromisoformat(row["expires_at"]) <= NOW
            assert (answer.code, answer.user_id) == ("EXPIRED" if expired else "VALID", row["user_id"])
            key = await room.keys.get(answer.key_id or "")
            assert key.usage_count == row["usage_count"], "lists show it without a use here"
            assert key.hash == room.keys.hasher.hash(SECRETS[sha256])
            stats = await room.keys.stats(key.id)
            uses = row["usage_count"] + answer.valid
            assert (stats.count, stats.totals.get("requests", 0)) == (uses, uses)


@pytest.mark.parametrize("data", [PLAIN, HASHED])
async def test_importing_the_same_file_again_changes_nothing(room: Strongroom, data: bytes) -> None:
    first, sums = await put(room, data)
    assert standings(first) == {"new"}
    length = await journal_length(room)
    again, sums_again = await put(room, data, update=True)
    assert standings(again) == {"unchanged"}
    assert await journal_length(room) == length
    assert sums_again == sums
    assert sums.equal


async def test_reimporting_used_keys_finds_them_and_keeps_their_usage(room: Strongroom, store: FaultyStore) -> None:
    with time_machine.travel(NOW, tick=False):
        await put(room, HASHED)
        await put(room, PLAIN)
        rows, text = json.loads(HASHED)["keys"].values(), next(iter(SECRETS.values()))
        used = [await room.keys.verify(text) for text in SECRETS.values()]
        plain = next(r for r in json.loads(PLAIN)["keys"] if live_tokens(r) == 45_294)
        assert (await room.keys.verify(plain["key"], cost={"tokens": 6})).limits[0].used == 45_300
        counts = [row["usage_count"] + answer.valid for row, answer in zip(rows, used, strict=True)]

        async def written() -> bool:  # keys without limits write their usage a moment later
            found = [(await stored_usage(store.store, answer.key_id or "")).count for answer in used]
            return found == counts

        await wait_until(written)
        length = await journal_length(room)
        for data, count in ((HASHED, sum(a.valid for a in used)), (PLAIN, 1)):
            planned, sums = await put(room, data, update=True)
            assert standings(planned) == {"unchanged"}
            assert sums.equal
            assert sums.used_since == count
        assert await journal_length(room) == length
        assert (await room.keys.verify(text)).key_id == used[0].key_id
        assert (await room.keys.verify(plain["key"], cost={"tokens": 0})).limits[0].used == 45_300


async def test_a_changed_row_is_reported_and_applied_only_on_request(room: Strongroom) -> None:
    with time_machine.travel(NOW, tick=False):
        row = plain_row()
        await put(room, plain_file(row))
        key = await room.keys.get(id_of(hashlib.sha256(row["key"].encode()).digest()))
        requests = Limit(resource="requests", limit=5, window=Rolling(seconds=60))
        await room.keys.update(key.id, limits=[*key.limits, requests], metadata={"note": "kept"})
        changed = plain_row(
            name="renamed", token_limit_per_5h=2_000, expiry_date=None, model="m", total_lifetime_tokens=5_100,
            usage_windows=[{"window_start": "2026-11-20T11:30:00Z", "tokens_used": 300}],
        )  # fmt: skip
        (planned,), sums = await put(room, plain_file(changed))
        assert planned.standing is Standing.CHANGED
        assert {d.field for d in planned.differences} == {
            "name", "token_limit_per_5h", "expiry_date", "model", "total_lifetime_tokens", "usage_windows",
        }  # fmt: skip
        assert sums.left_out == 1
        assert (await room.keys.get(key.id)).name == "worker"

        (planned,), sums = await put(room, plain_file(changed), update=True)
        assert sums.equal
        assert sums.file_keys == 1
        after = await room.keys.get(key.id)
        assert (after.name, after.expires_at, after.metadata) == ("renamed", None, {"note": "kept", "model": "m"})
        assert {limit.id: limit.limit for limit in after.limits} == {FIVE_HOURS: 2_000, requests.id: 5}
        stats = await room.keys.stats(key.id)
        assert (stats.totals["tokens"], stats.limits[0].used) == (5_100, 300)

        length = await journal_length(room)
        (planned,), _ = await put(room, plain_file(changed), update=True)
        assert planned.standing is Standing.UNCHANGED
        assert await journal_length(room) == length


async def test_an_import_update_never_reduces_usage_counted_here(room: Strongroom) -> None:
    with time_machine.travel(NOW, tick=False):
        row = plain_row()
        await put(room, plain_file(row))
        assert (await room.keys.verify(row["key"], cost={"tokens": 50})).valid
        (planned,), sums = await put(
            room, plain_file(plain_row(name="n", total_lifetime_tokens=9, usage_windows=[])), update=True
        )
        assert [d.field for d in planned.differences] == ["name"]
        assert sums.equal
        assert sums.used_since == 1
        stats = await room.keys.stats(planned.id)
        assert (stats.totals["tokens"], stats.limits[0].used) == (5_050, 250)


async def test_usage_between_plan_and_update_is_kept(room: Strongroom) -> None:
    with time_machine.travel(NOW, tick=False):
        row = plain_row()
        await put(room, plain_file(row))
        job = KeyImport(room.database, room.keys.hasher, "plain", "default", SYSTEM)
        planned = await job.plan(parsed(plain_file(plain_row(total_lifetime_tokens=9, usage_windows=[]))).rows)
        assert planned[0].standing is Standing.CHANGED
        assert (await room.keys.verify(row["key"], cost={"tokens": 50})).valid
        await job.apply(planned, update=True)
        stats = await room.keys.stats(planned[0].id)
        assert (stats.totals["tokens"], stats.limits[0].used) == (5_050, 250)


async def test_a_rotated_secret_is_not_restored_by_an_import(room: Strongroom) -> None:
    row = plain_row()
    ((planned,), _) = await put(room, plain_file(row))
    issued = await room.keys.rotate(planned.id)
    (again,), sums = await put(room, plain_file({**row, "name": "other"}), update=True)
    assert again.standing is Standing.ROTATED
    assert sums.left_out == 1
    assert (await room.keys.verify(row["key"])).code == "NOT_FOUND"
    assert (await room.keys.verify(issued.text)).key_id == planned.id
    assert (await room.keys.get(planned.id)).name == "worker"


async def test_an_import_does_not_enable_a_disabled_key(room: Strongroom) -> None:
    row = plain_row()
    ((planned,), _) = await put(room, plain_file(row))
    await room.keys.disable(planned.id)
    (again,), _ = await put(room, plain_file(row), update=True)
    assert again.standing is Standing.UNCHANGED
    assert (await room.keys.verify(row["key"])).code == "DISABLED"


async def test_an_import_leaves_keys_of_other_tenants_alone(room: Strongroom) -> None:
    await put(room, PLAIN, tenant="acme")
    length = await journal_length(room)
    planned, _ = await put(room, PLAIN, tenant="globex", update=True)
    assert standings(planned) == {"foreign"}
    assert await journal_length(room) == length


async def test_a_key_that_was_issued_here_is_not_added_a_second_time(room: Strongroom) -> None:
    issued = await room.keys.create(name="native")
    (sha256,) = [hashlib.sha256(issued.text.encode()).hexdigest()]
    exported = as_file("hashed", await got(room, "hashed"))
    assert list(json.loads(exported)["keys"]) == [sha256]
    (planned,), _ = await put(room, exported)
    assert (planned.standing, planned.id) == (Standing.UNCHANGED, issued.key.id)


async def test_management_keys_are_neither_imported_nor_exported(room: Strongroom) -> None:
    with pytest.raises(InvalidInput):
        KeyImport(room.database, room.keys.hasher, "plain", "*", SYSTEM)
    with pytest.raises(InvalidInput):
        await got(room, "plain", "*")


async def test_leftover_usage_of_a_removed_key_does_not_stop_an_import(room: Strongroom) -> None:
    row = plain_row()
    await put(room, plain_file(row))
    id = id_of(hashlib.sha256(row["key"].encode()).digest())
    await room.database.delete(SYSTEM, type(await room.keys.get(id)), id)  # and not its usage: as a crash leaves it
    (planned,), sums = await put(room, plain_file(row))
    assert planned.standing is Standing.NEW
    assert sums.equal


async def test_an_import_that_fails_half_way_is_completed_by_the_next(room: Strongroom, store: FaultyStore) -> None:
    rows = [plain_row(key=f"pk_{number:032x}", name=f"key {number}") for number in range(300)]
    begin = len(store.batches)
    store.fault = lambda number, batch: Fault("before", Conflict("no")) if len(store.batches) > begin + 1 else None
    with pytest.raises(Conflict):
        await put(room, plain_file(*rows))
    store.fault = lambda number, batch: None
    planned, sums = await put(room, plain_file(*rows))
    assert standings(planned) == {"new", "unchanged"}
    assert sums.equal
    assert sums.store_keys == 300
    assert await journal_length(room) == 300 + 1  # and the pepper


async def test_two_imports_at_once_write_each_key_once(room: Strongroom) -> None:
    rows = [plain_row(key=f"pk_{number:032x}", name=f"key {number}") for number in range(300)]
    results = await asyncio.gather(*(put(room, plain_file(*rows)) for _ in range(3)))
    assert all(sums.equal and sums.store_keys == 300 for _, sums in results)
    assert await journal_length(room) == 300 + 1


async def test_checksums_detect_a_stored_key_that_differs_from_the_file(room: Strongroom) -> None:
    with time_machine.travel(NOW, tick=False):
        planned, sums = await put(room, PLAIN)
    assert sums.equal
    job = KeyImport(room.database, room.keys.hasher, "plain", "default", SYSTEM)
    await room.keys.update(planned[3].id, name="changed behind its back")
    await room.keys.delete(planned[4].id, purge=True)
    sums = await job.checksums(planned, NOW_US, updated=False)
    assert not sums.equal
    assert set(sums.unequal) == {planned[3].row.path, planned[4].row.path}
    assert (sums.file_keys, sums.store_keys) == (40, 39)


# --- Out again --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [PLAIN, HASHED])
async def test_a_round_trip_through_another_store_exports_the_same_file(room: Strongroom, data: bytes) -> None:
    with time_machine.travel(NOW, tick=False):
        shape = parsed(data).shape
        await put(room, data)
        exported = as_file(shape, await got(room, shape))
        async with Strongroom.open("json://:memory:") as other:
            _, sums = await put(other, exported)
            assert sums.equal
            assert as_file(shape, await got(other, shape)) == exported
            for text in [row["key"] for row in json.loads(PLAIN)["keys"]] if shape == "plain" else SECRETS.values():
                one, two = (
                    await room.keys.verify(text, cost={"tokens": 1}),
                    await other.keys.verify(text, cost={"tokens": 1}),
                )
                assert (one.code, one.limits) == (two.code, two.limits)


async def test_an_export_equals_the_imported_file(room: Strongroom) -> None:
    with time_machine.travel(NOW, tick=False):
        await put(room, PLAIN)
        exported = {row["key"]: row for row in json.loads(as_file("plain", await got(room, "plain")))["keys"]}
        for row in json.loads(PLAIN)["keys"]:
            mine = exported[f"sha256:{hashlib.sha256(row['key'].encode()).hexdigest()}"]
            live = [w for w in row["usage_windows"] if live_tokens({"usage_windows": [w]})]
            assert mine == {**row, "key": mine["key"], "usage_windows": live}
        await put(room, HASHED, tenant="acme")
        assert json.loads(as_file("hashed", await got(room, "hashed", "acme"))) == {
            "keys": dict(sorted(json.loads(HASHED)["keys"].items(), key=lambda item: (item[1]["created_at"], item[0])))
        }


async def test_an_export_never_enables_a_disabled_key_and_reports_what_it_cannot_hold(
    room: Strongroom,
) -> None:
    await room.keys.create(name="a", permissions=["chat:write"], allowed_ips=["10.0.0.0/8"], user_id="u")
    off = await room.keys.create(name="b")
    await room.keys.disable(off.key.id)
    exported = await got(room, "plain")
    assert [json.loads(row)["name"] for row in exported.rows] == ["a"]
    assert sum(exported.left_out.values()) == 1
    assert set(exported.lost) == {"permissions", "addresses it may be used from", "a user"}


async def test_keys_sealed_under_an_older_pepper_are_exported_and_found(room: Strongroom) -> None:
    await put(room, PLAIN)
    await room.rotate_pepper()
    planned, sums = await put(room, PLAIN)
    assert standings(planned) == {"unchanged"}
    assert sums.equal
    assert len((await got(room, "plain")).rows) == 40


def test_ids_do_not_reveal_the_hash() -> None:
    sha256 = hashlib.sha256(b"key").digest()
    assert id_of(sha256) == id_of(sha256) != id_of(hashlib.sha256(b"other").digest())
    assert not any(sha256.hex()[start : start + 8] in id_of(sha256) for start in range(0, 56))


def test_a_row_renders_back_to_itself_whatever_its_name() -> None:
    row = KeyRow(
        "keys.0",
        b"\x01" * 32,
        None,
        'a "quoted" \\ name \u2028 李娜',
        "u",
        "m",
        5,
        1_000_001,
        None,
        None,
        0,
        3,
        ((0, 1),),
    )
    for shape in ("plain", "hashed"):
        (again,) = parsed(b"".join(render_file(shape, [render_row(shape, row)]))).rows
        assert (again.name, again.created_us, again.sha256) == (row.name, row.created_us, row.sha256)
