"""Record files: invalid lines are reported; valid records arrive in any store, whole and once."""

from __future__ import annotations

import asyncio
import csv
import hashlib
import io
import json
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterable
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any
from unicodedata import normalize

import bcrypt
import pytest
from django.contrib.auth.hashers import PBKDF2PasswordHasher
from hypothesis import given, settings
from hypothesis import strategies as st
from rest_framework_api_key.crypto import KeyGenerator

from strongroom import (
    Anchored,
    ApiKey,
    Calendar,
    Limit,
    Rolling,
    Strongroom,
    Total,
)
from strongroom.context import system_context
from strongroom.entities.query import MAX_LIMIT, Query
from strongroom.errors import InvalidInput, Unavailable
from strongroom.keys.hasher import HINT_SLOTS
from strongroom.keys.import_source import MAX_RULES, KeySource
from strongroom.keys.token import generate
from strongroom.keys.transfer import record_import as recordtransfer
from strongroom.keys.transfer.import_plan import Standing
from strongroom.keys.transfer.key_file import Finding, KeyFileError
from strongroom.keys.transfer.key_file_rows import id_of
from strongroom.keys.transfer.record_export import ExportedRecords, export_records
from strongroom.keys.transfer.record_file import KeyRecord, Record, RecordReader
from strongroom.keys.transfer.record_import import PlannedRecord, RecordImport
from strongroom.keys.transfer.record_lines import MAX_LINE_BYTES, is_records
from strongroom.quotas.model import Quota, quota_id
from strongroom.rules import default_policy
from strongroom.testing.storage import Backend
from tests.conftest import backend_of
from tests.helpers.faulty_store import Fault, FaultyStore
from tests.helpers.stores import new_url, rolling, stored_usage
from tests.helpers.waiting import wait_until

SYSTEM = system_context()
TEXT = "abcdefgh.0123456789abcdefghijklmnopqrstuv"
SHA256 = hashlib.sha256(TEXT.encode()).hexdigest()
BCRYPT = bcrypt.hashpw(TEXT.encode(), b"$2b$04$abcdefghijklmnopqrstuu").decode()


def now_us() -> int:
    return time.time_ns() // 1_000


def lines_of(*rows: dict[str, Any]) -> list[bytes]:
    return [json.dumps({"hash": SHA256, "name": "worker", **row}).encode() for row in rows]


def read(lines: Iterable[bytes], *, secret: bool = False) -> tuple[list[Record], list[Finding]]:
    records, found = [], []
    for record, findings in RecordReader("default", now_us(), with_secret=secret).read(lines):
        records += [record] if record is not None else []
        found += findings
    return records, found


def csv_of(*rows: dict[str, str], delimiter: str = ",") -> list[bytes]:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode().splitlines(keepends=True)


# --- Reading ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"hash": None}, "line 1, hash: is missing (or key, the secret)"),
        ({"key": TEXT}, "line 1, hash: stands beside key, expected one of the two"),
        ({"hash": None, "key": ""}, "line 1, key: found an empty text, expected the key"),
        ({"hash": None, "key": 7}, "line 1, key: expected the key's secret"),
        ({"hash": "nonsense"}, "line 1, hash: found a text of 8 characters, expected SHA-256"),
        ({"hash": 12}, "line 1, hash: expected text"),
        ({"hash": BCRYPT}, "line 1, prefix: is missing: a hash with a salt cannot be looked up"),
        ({"hash": BCRYPT, "prefix": "a.b"}, "line 1, prefix: expected what stands before the first dot"),
        ({"hash": BCRYPT, "prefix": "a", "hint": "b"}, "line 1, hint: stands beside prefix"),
        ({"hash": BCRYPT, "hint": "x" * 65}, "line 1, hint: expected at most 64 printable characters"),
        ({"hash": "hmac-sha256:" + SHA256}, "line 1, hash: found an HMAC, for which the secret of the other system"),
        ({"name": None}, "line 1, name: is required"),
        ({"name": "n" * 201}, "line 1, name: found 201 characters, expected at most 200"),
        ({"id": "17"}, "line 1, id: found '17', expected key_…"),
        ({"type": "user"}, "line 1, type: found 'user', expected key or quota"),
        ({"tenant": "*"}, "line 1, tenant: keys for all tenants are management keys"),
        ({"tenant": ""}, "line 1, tenant: found an empty text"),
        ({"enabled": "yes"}, "line 1, enabled: found 'yes', expected true or false"),
        ({"revoked": 1}, "line 1, revoked: found 1, expected true or false"),
        ({"revoked": True, "enabled": True}, "line 1, revoked: stands beside enabled"),
        ({"expires_at": "2027-01-01T00:00:00"}, "line 1, expires_at: found a time without a zone"),
        ({"expires_at": "soon"}, "line 1, expires_at: found 'soon', expected a time with a zone"),
        ({"created_at": "1815-12-10T00:00:00Z"}, "line 1, created_at: found the year 1815, expected 1971 to 9998"),
        ({"created": "2027-01-01T00:00:00Z", "created_at": "2027-01-01T00:00:00Z"}, "line 1, created: stands beside"),
        ({"environment": "prod"}, "line 1, environment: found 'prod', expected live or test"),
        ({"permissions": ["a b"]}, "line 1, permissions: found 'a b', expected 1 to 128 letters"),
        ({"allowed_ips": ["10.0.0.0/33"]}, "line 1, allowed_ips: found '10.0.0.0/33', expected an address"),
        ({"limits": [{"resource": "tokens", "limit": -1, "window": {"kind": "total"}}]}, "line 1, limits.0.limit"),
        ({"limits": [{"resource": "tokens", "limit": 1, "window": {"kind": "fortnight"}}]}, "line 1, limits.0.window"),
        ({"usage_count": -1}, "line 1, usage_count: found -1, expected at least 0"),
        ({"previous_hash": SHA256}, "line 1, previous_hash: needs previous_until"),
        ({"previous_until": "2027-01-01T00:00:00Z"}, "line 1, previous_until: needs previous_hash"),
        ({"rotation_overlap_s": 3600}, "line 1, rotation_overlap_s: needs rotate_every_s"),
        ({"next_rotation_at": "2027-01-01T00:00:00Z"}, "line 1, next_rotation_at: needs rotate_every_s"),
        ({"usage": {"counters": {"tokens|total": ["x"]}}}, "line 1, usage.counters: 'tokens|total': expected whole"),
        ({"usage": {"counters": {"a": [[2, 1], [1, 1]]}}}, "expected the buckets in order"),
        ({"usage": {"counters": {"a": [[1], []]}}}, "expected two lists of one length"),
        ({"usage": {"totals": {"tokens": -1}}}, "line 1, usage.totals: found -1 of 'tokens'"),
        ({"usage": {"at": 10**17}}, "line 1, usage.at: lies more than a day ahead"),
        ({"usage": {"uses": 1}}, "line 1, usage.uses: is not a known field"),
        (
            {"limits": [rolling("tokens", 5).model_dump()], "usage": {"counters": {"tokens|rolling|3600": [7]}}},
            "line 1, usage.counters.tokens|rolling|3600: is no state of a rolling window",
        ),
        ({"type": "quota", "hash": None, "kind": "planet"}, "line 1, kind: found 'planet', expected tenant, user"),
        ({"type": "quota", "hash": None, "kind": "tenant"}, "line 1, name: found a name, expected none"),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)  # fmt: skip
def test_the_problem_of_a_line_is_reported(fields: dict[str, Any], problem: str) -> None:
    row = {name: value for name, value in {"hash": SHA256, "name": "worker", **fields}.items() if value is not None}
    records, findings = read([json.dumps(row).encode()])
    assert records == []
    assert any(f"{f.path}: {f.message}".find(problem) >= 0 for f in findings if f.refused), findings


def test_every_problem_of_a_line_is_reported_at_once_and_the_others_are_read() -> None:
    records, findings = read(lines_of({"hash": "x", "name": "", "enabled": 3}, {"expires_at": "soon"}, {"name": "ok"}))
    assert [record.path for record in records] == ["line 3"]
    assert [f.path for f in findings] == ["line 1, hash", "line 1, name", "line 1, enabled", "line 2, expires_at"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"nonsense", "is not JSON: "),
        (b"[]", "expected a JSON object"),
        (b"{}", "is missing"),
        (b'{"name": "k", "hash": "a\xff"}', "is not JSON"),
        (b'{"name": ' + b"[" * 50_000, "is not JSON"),
        (b'{"name": "' + b"x" * MAX_LINE_BYTES + b'"}', "expected at most"),
    ],
)
def test_a_line_that_is_not_an_object_is_refused_and_the_others_are_read(line: bytes, problem: str) -> None:
    records, findings = read([*lines_of({}), b"\n", line])
    assert len(records) == 1
    assert problem in findings[0].message
    assert findings[0].path.startswith("line 3")


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ([], "is empty"),
        ([b"\n", b" "], "is empty"),
        ([b"a,b\n", b"1,2\n"], "is neither JSON nor CSV with the columns name and hash"),
        ([b"name,hash,name\n"], "has two columns 'name'"),
        ([b"name,hash\n", b'"a,b\n'], "line 2: is not CSV"),
        ([b"name,hash\n", b"\xff,b\n"], "line 2: is not UTF-8"),
    ],
)
def test_a_file_that_is_not_a_record_file_is_refused_in_one_sentence(lines: list[bytes], sentence: str) -> None:
    with pytest.raises(KeyFileError) as raised:
        read(lines)
    assert raised.value.message.startswith(sentence)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"name": "k", "hash": "x"}\n', True),
        (b'\xef\xbb\xbf{"hash": "x"}\n{"hash": "y"}', True),
        (b'{"type": "quota"}', True),
        (b"name,hash\nk,x\n", True),
        (b"id;created;name;revoked;expiry_date;hashed_key;prefix\n", True),
        (b'{"model": "rest_framework_api_key.apikey", "pk": "x", "fields": {}}', True),
        (b'{"keys": []}', False),
        (b'{"users": []}', False),
        (b'{\n  "keys": [\n', False),
        (b"{'name': 1}", False),
        (b"[]", False),
        (b"", False),
        (b"a,b,c\n", True),  # what is no JSON can only be CSV, and is told there which columns are missing
    ],
)
def test_a_record_file_is_distinguished_from_the_other_formats(content: bytes, expected: bool) -> None:
    assert is_records(content) is expected


def test_duplicate_lines_and_too_many_keys_with_one_hint_are_reported() -> None:
    _, findings = read(lines_of({"name": "a"}, {"name": "b"}, {"hash": SHA256.upper(), "id": "key_x"}))
    assert [(f.path, f.message) for f in findings] == [
        ("line 2", "is the same key as line 1"),
        ("line 3", "is the same key as line 1"),
    ]
    salted = [{"hash": f"sha256${number}${SHA256}", "prefix": "abcdefgh"} for number in range(HINT_SLOTS + 1)]
    records, findings = read(lines_of(*salted))
    assert len(records) == HINT_SLOTS
    assert "found more than 4 keys that begin with 'abcdefgh'" in findings[0].message


def test_a_report_shows_neither_keys_nor_hashes() -> None:
    rows: list[dict[str, Any]] = [
        {"hash": BCRYPT},
        {"hash": None, "key": TEXT, "name": ""},
        {"hash": "hmac-sha256:" + SHA256},
        {"hash": "a" * 63},
    ]
    _, findings = read([json.dumps({"name": "worker", **row}).encode() for row in rows])
    assert len(findings) == 4
    said = repr(findings)
    for hidden in (BCRYPT[7:], TEXT, SHA256, "a" * 63):
        assert hidden not in said


def test_unsupported_fields_are_reported_as_notes() -> None:
    records, findings = read(lines_of({"plan": "gold", "password": "x"}))
    assert len(records) == 1
    assert [(f.path, f.refused) for f in findings] == [("line 1, password", False), ("line 1, plan", False)]


def test_csv_and_json_records_are_equivalent() -> None:
    limits = [rolling("cost", 5).model_dump(), {"resource": "tokens", "limit": 7, "window": {"kind": "total"}}]
    cells = {
        "hash": BCRYPT,
        "hint": "abcd",
        "name": " spaced ",
        "tenant": "acme",
        "enabled": "F",
        "permissions": "chat:read, chat:write",
        "groups": '["a", "b c"]',
        "metadata": '{"plan": "gold"}',
        "limits": json.dumps(limits),
        "created_at": "2026-01-01 00:00:00.5+00",
        "expires_at": "",
        "usage_count": "12",
        "rotate_every_s": "86400",
    }
    for delimiter in ",;\t":
        (record,), findings = read(csv_of(cells, delimiter=delimiter))
        assert findings == []
        assert isinstance(record, KeyRecord)
        assert record.fields == {
            "name": " spaced ",
            "enabled": False,
            "permissions": ["chat:read", "chat:write"],
            "groups": ["a", "b c"],
            "metadata": {"plan": "gold"},
            "limits": [Limit.model_validate(limit) for limit in limits],
            "created_at": datetime(2026, 1, 1, 0, 0, 0, 500_000, UTC),
            "rotate_every_s": 86_400,
        }
        assert (record.tenant, record.usage and record.usage.count) == ("acme", 12)
    _, findings = read(
        csv_of({"name": "k", "hash": SHA256, "limits": "[{", "usage_count": "many", "enabled": "perhaps"})
    )
    assert "limits: expected JSON" in findings[0].message


def test_a_row_with_too_few_cells_is_reported() -> None:
    _, findings = read([b"name,hash,tenant\n", b"k,x\n"])
    assert [(f.path, f.message) for f in findings] == [("line 2", "found 2 columns, expected 3")]


def test_money_keeps_every_digit() -> None:
    limit = b'{"resource": "cost", "limit": 123456789.123456789, "window": {"kind": "total"}}'
    (record,), _ = read([b'{"name": "k", "hash": "%s", "limits": [%s]}' % (SHA256.encode(), limit)])
    assert isinstance(record, KeyRecord)
    assert record.fields["limits"][0].limit == Decimal("123456789.123456789")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200)
@given(
    st.dictionaries(
        st.sampled_from(
            ["id", "key", "hash", "prefix", "hint", "previous_hash", "previous_until", "name", "tenant", "limits",
             "usage", "created", "revoked", "metadata", "groups", "type", "kind", "rotate_every_s", "fields", "model"]
        ),
        json_values,
    )
)  # fmt: skip
def test_no_content_of_a_line_raises_an_unexpected_error(row: dict[str, Any]) -> None:
    records, findings = read(lines_of(row))
    assert (len(records) == 0) == any(finding.refused for finding in findings)


@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_a_file_of_any_content_is_read_or_refused_with_a_sentence(data: bytes) -> None:
    sentence = "read"
    for lines in (io.BytesIO(data), io.BytesIO(b"name,hash\n" + data)):
        try:
            read(lines)
        except KeyFileError as error:
            sentence = error.message
        assert sentence
    assert is_records(data) in (True, False)


# --- Into a store -----------------------------------------------------------------------------------------------


async def put(
    room: Strongroom, lines: Iterable[bytes], *, update: bool = False, secret: bytes | None = None
) -> list[PlannedRecord]:
    """Import lines as the command line does."""
    records, findings = read(lines, secret=secret is not None)
    assert not [finding for finding in findings if finding.refused], findings
    job = RecordImport(room.database, room.keys.hasher, SYSTEM, hmac_secret=secret)
    planned = await job.plan(records)
    await job.apply(planned, update=update)
    return planned


async def got(room: Strongroom, tenant: str | None = None) -> tuple[list[bytes], ExportedRecords]:
    told = ExportedRecords()
    found = export_records(room.database, room.keys.hasher, tenant, SYSTEM, told, now_us())
    return [line async for line in found], told


async def journal_length(room: Strongroom) -> int:
    cursor, count = None, 0
    while (page := await room.store.changes(cursor)).records:
        cursor, count = page.cursor, count + len(page.records)
    return count


def standings(planned: list[PlannedRecord]) -> list[str]:
    return [p.standing.value for p in planned]


async def test_importing_the_same_file_again_changes_nothing(room: Strongroom) -> None:
    rows = lines_of(
        {"limits": [rolling("tokens", 9).model_dump()], "usage_count": 3, "last_used": "2026-01-01T00:00:00Z"},
        {"hash": BCRYPT, "prefix": "abcdefgh", "tenant": "acme", "rotate_every_s": 86_400},
        {"hash": "hmac-sha256:" + SHA256, "metadata": {"a": [1, {"b": None}]}},
        {"hash": "sha512:" + "ab" * 64, "previous_hash": "cd" * 32, "previous_until": "2099-01-01T00:00:00Z"},
        {"hash": None, "key": generate()},
        {"type": "quota", "hash": None, "kind": "group", "name": "g", "usage": {"count": 2}},
    )  # fmt: skip
    rows = [line.replace(b'"hash": null, ', b"") for line in rows]
    assert standings(await put(room, rows, secret=b"s")) == ["new"] * 6
    before = await journal_length(room)
    assert standings(await put(room, rows, secret=b"s")) == ["unchanged"] * 6
    assert standings(await put(room, rows, update=True, secret=b"s")) == ["unchanged"] * 6
    assert await journal_length(room) == before
    assert len((await room.database.find(SYSTEM, KeySource)).items) == 2


async def test_a_key_imported_in_another_format_is_the_same_key(room: Strongroom) -> None:
    (planned,) = await put(room, lines_of({}))
    assert planned.id == id_of(bytes.fromhex(SHA256))


async def test_differences_are_reported_and_changed_only_on_request(room: Strongroom) -> None:
    await put(room, lines_of({"user_id": "u1", "groups": ["a"], "usage_count": 1}))
    changed = lines_of({"user_id": "u2", "groups": ["a"], "usage_count": 5})
    (planned,) = await put(room, changed)
    assert {d.field: (d.file, d.store) for d in planned.differences} == {"user_id": ("u2", "u1"), "usage": (5, 1)}
    assert (await room.keys.get(planned.id)).user_id == "u1"
    await put(room, changed, update=True)
    assert (await room.keys.get(planned.id)).user_id == "u2"
    assert (await stored_usage(room.store, planned.id)).count == 5
    assert standings(await put(room, changed)) == ["unchanged"]


async def test_an_import_keeps_the_usage_of_a_key_used_here_since(room: Strongroom) -> None:
    limits = [rolling("requests", 9).model_dump()]
    await put(room, lines_of({"limits": limits, "usage_count": 3}))
    assert (await room.keys.verify(TEXT)).valid
    again = lines_of({"limits": limits, "usage_count": 100})
    (planned,) = await put(room, again, update=True)
    assert planned.standing is Standing.UNCHANGED
    assert (await stored_usage(room.store, planned.id)).count == 4


async def test_an_import_leaves_a_moved_or_rotated_key_alone(room: Strongroom) -> None:
    (planned,) = await put(room, lines_of({"tenant": "acme"}))
    (other,) = await put(room, lines_of({"tenant": "globex"}), update=True)
    assert (other.standing, other.problem) == (
        Standing.FOREIGN,
        ("", "is in the store already, for the tenant 'acme': a key belongs to one tenant"),
    )
    await room.keys.rotate(planned.id)
    (rotated,) = await put(room, lines_of({"tenant": "acme", "name": "other"}), update=True)
    assert rotated.standing is Standing.ROTATED
    assert (await room.keys.get(planned.id)).name == "worker"


async def test_more_keys_with_one_hint_than_a_store_takes_are_refused_over_several_files(room: Strongroom) -> None:
    def salted(numbers: Iterable[int]) -> list[bytes]:
        return lines_of(*({"hash": f"sha256${n}${SHA256}", "hint": "abcd"} for n in numbers))

    assert standings(await put(room, salted(range(3)))) == ["new"] * 3
    planned = await put(room, salted(range(3, 6)))
    assert standings(planned) == ["new", "foreign", "foreign"]
    assert planned[2].problem == ("hint", "found more than 4 keys that begin with 'abcd', expected 4 at most")
    assert len((await room.keys.list()).items) == 4


async def test_hints_of_too_many_lengths_are_refused(room: Strongroom) -> None:
    rows = [{"hash": f"sha256${n}${SHA256}", "hint": "x" * n} for n in range(1, MAX_RULES + 2)]
    with pytest.raises(InvalidInput, match="hint: found another form of hint"):
        await put(room, lines_of(*rows))


async def test_an_import_that_another_one_overtakes_or_that_fails_in_the_middle_is_completed(
    room: Strongroom, store: FaultyStore
) -> None:
    rows = lines_of(*({"hash": hashlib.sha256(b"%d" % n).hexdigest(), "name": f"k{n}"} for n in range(400)))
    records, _ = read(rows)
    job = RecordImport(room.database, room.keys.hasher, SYSTEM)
    planned = await job.plan(records)
    await put(room, rows[100:110])  # meanwhile
    seen = len(store.batches)
    store.fault = lambda number, batch: Fault("before", Unavailable("gone")) if number == seen + 4 else None
    with pytest.raises(Unavailable):
        await job.apply(planned, update=False)
    store.fault = lambda number, batch: None
    assert 0 < job.committed < 400
    await put(room, rows)
    found = (await room.database.find(SYSTEM, ApiKey, Query(limit=MAX_LIMIT))).items
    assert sorted(key.name for key in found) == sorted(f"k{n}" for n in range(400))


async def test_keys_as_large_as_they_may_be_are_committed_in_smaller_batches(room: Strongroom) -> None:
    large = {"metadata": {"text": "x" * 16_000}, "description": "é" * 2_000}
    rows = lines_of(*({"hash": hashlib.sha256(b"%d" % n).hexdigest(), **large} for n in range(120)))
    assert standings(await put(room, rows)) == ["new"] * 120
    assert standings(await put(room, rows)) == ["unchanged"] * 120


# --- Loading ----------------------------------------------------------------------------------------------------


def many(count: int) -> list[dict[str, Any]]:
    """Keys of two tenants, some with usage, salted hashes, limits and old secrets."""
    usage = {"count": 3, "totals": {"tokens": 12}, "last_used_at": "2026-02-01T00:00:00Z"}
    limits = [{"resource": "cost", "limit": 2.5, "window": {"kind": "total"}}]
    rows: list[dict[str, Any]] = []
    for number in range(count):
        row: dict[str, Any] = {"hash": hashlib.sha256(b"%d" % number).hexdigest(), "name": f"k{number:04d}"}
        row |= {"created_at": f"2026-01-01T00:{number // 60:02d}:{number % 60:02d}Z", "tenant": f"t{number % 2}"}
        rows.append(row)
        if number % 5 == 0:
            row |= {"limits": limits, "metadata": {"$plan": "gold", "n": [1, None]}, "usage": usage}
        if number % 7 == 0:
            salted = bcrypt.hashpw(b"hint%04d" % number, b"$2b$04$abcdefghijklmnopqrstuu").decode()
            row |= {"hash": salted, "hint": f"hint{number:04d}"}
        if number % 11 == 0:
            row |= {"description": 'of "them"', "expires_at": "2099-01-01T00:00:00Z", "groups": ["a"], "enabled": False}
    return rows


async def whole(room: Strongroom) -> tuple[list[Any], list[Any]]:
    """Keys with their usages, and journal records in order, without what differs each time."""
    keys = []
    for key in (await room.database.select(SYSTEM, ApiKey, Query(order_by=("name",), limit=MAX_LIMIT))).items:
        usage = await room.store.get("key_usage", None, key["id"])
        assert usage is not None
        assert usage["created_at"] == usage["updated_at"]
        own = {name: value for name, value in key.items() if name not in ("version", "updated_at")}
        keys.append((own, [usage[name] for name in ("count", "last_used_at", "active_at", "state")]))
    records, cursor = [], None
    while (page := await room.store.changes(cursor)).records:
        cursor = page.cursor
        for r in page.records:
            if r.collection == "api_keys":
                records.append((r.entity_id, r.tenant, r.actor, r.action, r.before, r.after))
                assert r.version is not None
    return keys, sorted(records, key=str)


async def test_bulk_loaded_records_equal_records_written_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = lines_of(*many(150))
    async with Strongroom.open(new_url("sqlite", tmp_path, "loaded")) as one:
        assert standings(await put(one, lines)) == ["new"] * 150
        assert standings(await put(one, lines)) == ["unchanged"] * 150
        async with Strongroom.open(new_url("sqlite", tmp_path, "written")) as two:
            monkeypatch.setattr(recordtransfer, "MIN_LOADED", 1_000)
            await put(two, lines)
            assert await whole(one) == await whole(two)
            assert len((await whole(one))[1]) == 150


async def test_records_written_by_a_concurrent_import_are_skipped_and_the_others_imported(
    tmp_path: Path,
) -> None:
    rows = many(150)
    async with Strongroom.open(new_url("sqlite", tmp_path)) as room:
        job = RecordImport(room.database, room.keys.hasher, SYSTEM)
        planned = await job.plan(read(lines_of(*rows))[0])
        await put(room, lines_of(*rows[7:9]))
        await job.apply(planned, update=False)
        assert job.committed == 148
        keys, records = await whole(room)
        assert [key["name"] for key, _ in keys] == [row["name"] for row in rows]
        assert len({record[0] for record in records}) == len(records) == 150


async def test_an_applications_own_rules_are_evaluated_for_every_record(tmp_path: Path) -> None:
    asked = set()

    def policy(request: Any) -> Any:
        if request.collection.name == "api_keys" and request.operation == "create":
            asked.add(request.id)
        return default_policy(request)

    async with Strongroom.open(new_url("sqlite", tmp_path), policy=policy) as room:
        await put(room, lines_of(*many(120)))
    assert len(asked) == 120


# --- From Django ------------------------------------------------------------------------------------------------

MODELS = """
import datetime, json, sys
import django
from django.conf import settings

settings.configure(
    INSTALLED_APPS=["rest_framework_api_key"], SECRET_KEY="x" * 50, USE_TZ=True,
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}},
    DEFAULT_AUTO_FIELD="django.db.models.AutoField",
)
django.setup()
from django.contrib.auth.hashers import make_password
from django.core.management import call_command
from rest_framework_api_key.models import APIKey

call_command("migrate", verbosity=0)
texts = {}
for name in ("worker", "revoked", "expired", "older"):
    key, texts[name] = APIKey.objects.create_key(name=name)
APIKey.objects.filter(name="revoked").update(revoked=True)
APIKey.objects.filter(name="expired").update(expiry_date=datetime.datetime(2020, 1, 1, tzinfo=datetime.timezone.utc))
APIKey.objects.filter(name="older").update(hashed_key=make_password(texts["older"], hasher="pbkdf2_sha256"))
assert all(APIKey.objects.is_valid(texts[name]) for name in ("worker",))
call_command("dumpdata", "rest_framework_api_key", format="jsonl", output=sys.argv[1])
print(json.dumps(texts))
"""


async def test_djangorestframework_api_keys_own_dump_is_imported_and_its_keys_work_on(
    room: Strongroom, tmp_path: Path
) -> None:
    dump = tmp_path / "keys.jsonl"
    ran = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(MODELS), str(dump)],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    texts = json.loads(ran.stdout)
    lines = dump.read_bytes().splitlines()
    assert is_records(lines[0])
    assert standings(await put(room, lines)) == ["new"] * 4
    await wait_until(lambda: room.keys.hasher.imported.rules)
    codes = {name: (await room.keys.verify(text)).code for name, text in texts.items()}
    assert codes == {"worker": "VALID", "revoked": "DISABLED", "expired": "EXPIRED", "older": "VALID"}
    assert standings(await put(room, lines)) == ["unchanged"] * 4


async def test_djangorestframework_api_keys_table_as_csv_is_imported(room: Strongroom) -> None:
    text, prefix, hashed = KeyGenerator().generate()
    old = PBKDF2PasswordHasher().encode("oldprefi.secret", "salt", 10)
    rows = csv_of(
        {"id": f"{prefix}.{hashed}", "created": "2024-02-03 04:05:06.789+00", "name": "new", "revoked": "f",
         "expiry_date": "", "hashed_key": hashed, "prefix": prefix},
        {"id": f"oldprefi.{old}", "created": "2019-02-03 04:05:06+00", "name": "before 1.4", "revoked": "t",
         "expiry_date": "", "hashed_key": "", "prefix": ""},
    )  # fmt: skip
    assert is_records(rows[0])
    assert standings(await put(room, rows)) == ["new", "new"]
    await wait_until(lambda: room.keys.hasher.imported.rules)
    assert (await room.keys.verify(text)).valid
    assert (await room.keys.verify("oldprefi.secret")).code == "DISABLED"


# --- From store to store ----------------------------------------------------------------------------------------

windows = st.one_of(
    st.builds(Rolling, seconds=st.integers(1, 10**6)),
    st.builds(Anchored, seconds=st.integers(1, 10**6)),
    st.builds(
        Calendar,
        unit=st.sampled_from(["minute", "hour", "day", "week", "month"]),
        timezone=st.sampled_from(["UTC", "Europe/Berlin", "Pacific/Apia"]),
    ),
    st.just(Total()),
)
limits = st.lists(
    st.builds(
        Limit,
        resource=st.sampled_from(["requests", "tokens", "cost"]),
        limit=st.integers(0, 10**6) | st.decimals(0, 10**6, places=0, allow_nan=False),
        window=windows,
    ),
    max_size=4,
    unique_by=lambda limit: limit.id,
)
names = (  # in NFC and without spaces around them, since others are refused
    st.text(st.characters(exclude_categories=["C"]), min_size=1, max_size=12)
    .map(lambda text: normalize("NFC", text).strip())
    .filter(bool)
)
moments = st.datetimes(datetime(2000, 1, 1), datetime(2090, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001
rows = st.fixed_dictionaries(
    {"name": names},
    optional={
        "user_id": names,
        "permissions": st.lists(st.sampled_from(["a", "b:*", "c"]), unique=True),
        "expires_at": moments,
        "metadata": st.dictionaries(
            names, st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(-1e9, 1e9) | names
        ),
        "allowed_ips": st.lists(st.sampled_from(["10.0.0.0/8", "::1", "192.0.2.7"]), unique=True),
        "limits": limits,
        "description": names,
        "owner": names,
        "groups": st.lists(names, max_size=3, unique=True),
        "allowed_models": st.lists(st.sampled_from(["gpt*", "claude", "*"]), unique=True),
        "allowed_routes": st.lists(st.sampled_from(["/v1/*", "/x"]), unique=True),
        "rotate_every_s": st.integers(3_600, 10**6),
        "environment": st.sampled_from(["live", "test"]),
    },
)  # fmt: skip


async def _filled(room: Strongroom, made: list[dict[str, Any]], uses: list[int]) -> list[tuple[str, str]]:
    """Keys of every kind: used, disabled, deleted, rotated with an overlap, imported. Gives their texts and ids."""
    texts = []
    for number, fields in enumerate(made):
        fields, ends = dict(fields), fields.get("expires_at")
        fields.pop("expires_at", None)  # a key is not born expired
        issued = await room.keys.create(tenant=f"tenant {number % 2}", **fields)
        if ends is not None:
            await room.keys.update(issued.key.id, expires_at=ends)
        texts.append((issued.text, issued.key.id))
        for use in uses:
            await room.keys.record(key_id=issued.key.id, cost={"requests": 1, "tokens": use, "cost": Decimal(use) / 8})
        if number % 4 == 1:
            await room.keys.disable(issued.key.id)
        elif number % 4 == 2:
            texts.append(((await room.keys.rotate(issued.key.id, overlap_s=3_600)).text, issued.key.id))
        elif number % 4 == 3:
            await room.keys.delete(issued.key.id)
    return texts


async def _all(room: Strongroom) -> dict[str, dict[str, Any]]:
    """All that is to be the same in another store: every field of keys and quotas, and every counter."""
    found: dict[str, dict[str, Any]] = {}
    different = {
        "version",
        "updated_at",
        "hash",
        "sealed",
        "previous_hash",
        "previous_sealed",
        "last_used",
        "usage_count",
    }
    for cls in (ApiKey, Quota):
        for entity in (await room.database.find(SYSTEM, cls, Query(limit=MAX_LIMIT))).items:
            usage = await stored_usage(room.store, entity.id)
            counted = (usage.count, usage.last_used_us, usage.totals, usage.at_us, usage.document()["state"])
            found[entity.id] = entity.model_dump(exclude=different) | {"usage": counted}
    return found


PAIRS = [("sqlite", "json-memory"), ("json-memory", "sqlite"), ("sqlite", "postgres"), ("postgres", "json-memory")]


@pytest.fixture(params=PAIRS, ids=" to ".join)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> list[Backend]:
    backends = []
    for number, kind in enumerate(request.param):
        folder = tmp_path / str(number)
        folder.mkdir()
        backends.append(backend_of(kind, folder, request))
    return backends


@settings(max_examples=6)
@given(made=st.lists(rows, min_size=1, max_size=5), uses=st.lists(st.integers(0, 10**5), max_size=3))
def test_every_key_is_transferred_whole_with_its_counters(
    pair: list[Backend], made: list[dict[str, Any]], uses: list[int]
) -> None:
    async def check() -> None:
        async with AsyncExitStack() as stack:
            opened = [await stack.enter_async_context(Strongroom.open(backend.new_url())) for backend in pair]
            here, there = opened
            texts = await _filled(here, made, uses)
            await put(here, lines_of({"hash": BCRYPT, "prefix": "abcdefgh", "usage_count": 3}, {"hash": "ef" * 32}))
            quota = Quota(id=quota_id("user", "tenant 0", "u/1"), tenant="tenant 0", kind="user", name="u/1",
                          limits=[Limit(resource="cost", limit=Decimal("1.5"), window=Total())])  # fmt: skip
            await here.database.create(SYSTEM, quota)
            written, told = await got(here)
            assert (told.keys, told.quotas) == (len(made) + 2, 1)
            assert standings(await put(there, written)) == ["new"] * len(written)
            assert await _all(there) == await _all(here)
            # Written again it is the same file, and read again it changes nothing.
            again, _ = await got(there)
            assert again == written
            assert standings(await put(there, written)) == ["unchanged"] * len(written)
            for text, id in texts:
                assert (await there.keys.verify(text)).code == (await here.keys.verify(text)).code
                known = await there.keys.identify(text)
                assert known is None or known.id == id

    asyncio.run(check())


async def test_a_hint_and_its_hash_are_transferred_to_the_next_store(tmp_path: Path) -> None:
    async with Strongroom.open(new_url("sqlite", tmp_path)) as here, Strongroom.open("json://:memory:") as there:
        (planned,) = await put(here, lines_of({"hash": BCRYPT, "prefix": "abcdefgh"}))
        await here.keys.rotate(planned.id, overlap_s=3_600)  # before its first use: the hash is the old secret's
        written, _ = await got(here)
        await put(there, written)
        await wait_until(lambda: there.keys.hasher.imported.rules)
        assert (await there.keys.verify(TEXT)).key_id == planned.id
        assert (await here.keys.verify(TEXT)).key_id == planned.id


async def test_an_export_reports_what_a_record_cannot_hold(room: Strongroom) -> None:
    issued = await room.keys.create(name="k")
    await room.keys.rotate(issued.key.id, overlap_s=60, hold=True)
    await put(room, lines_of({"hash": "hmac-sha256:" + SHA256}), secret=b"s")
    _, told = await got(room)
    assert sorted(told.lost.values()) == [1, 1]
    assert any("nobody has claimed" in what for what in told.lost)
    assert any("secret again" in what for what in told.lost)


async def test_management_keys_are_not_exported(room: Strongroom) -> None:
    await room.keys.create(name="admin", tenant="*", permissions=["strongroom:admin"])
    await room.keys.create(name="k", tenant="acme")
    written, told = await got(room)
    assert (len(written), told.keys) == (1, 1)
    written, _ = await got(room, "globex")
    assert written == []
    with pytest.raises(InvalidInput, match="management keys"):
        await got(room, "*")


async def test_imported_limits_continue_with_their_usage(room: Strongroom) -> None:
    limits = [
        Limit(resource="tokens", limit=100, window=Rolling(seconds=3600)),
        Limit(resource="tokens", limit=100, window=Anchored(seconds=3600)),
        Limit(resource="tokens", limit=100, window=Calendar(unit="month", timezone="Europe/Berlin")),
        Limit(resource="tokens", limit=100, window=Total()),
    ]
    issued = await room.keys.create(name="k", limits=limits)
    assert (await room.keys.verify(issued.text, cost={"tokens": 60})).valid
    async with Strongroom.open("json://:memory:") as there:
        await put(there, (await got(room))[0])
        denied = await there.keys.verify(issued.text, cost={"tokens": 41})
        assert (denied.code, [limit.used for limit in denied.limits]) == ("USAGE_EXCEEDED", [60] * 4)
        here = await room.keys.verify(issued.text, cost={"tokens": 41})
        assert [limit.resets_at for limit in here.limits] == [limit.resets_at for limit in denied.limits]
        assert (await there.keys.verify(issued.text, cost={"tokens": 40})).valid


async def test_reserved_and_leased_amounts_are_exported_as_used(tmp_path: Path) -> None:
    limits = [
        Limit(resource="tokens", limit=100, window=Rolling(seconds=3600)),
        Limit(resource="concurrency", limit=2, window=Total()),
    ]
    async with Strongroom.open(new_url("sqlite", tmp_path)) as here, Strongroom.open("json://:memory:") as there:
        issued = await here.keys.create(name="k", limits=limits)
        held = await here.keys.reserve(issued.text, cost={"tokens": 30})
        assert held.reservation_id
        assert (await here.keys.verify(issued.text, cost={"tokens": 5})).valid
        await put(there, (await got(here))[0])
        answer = await there.keys.verify(issued.text, cost={"tokens": 0})
        assert [(limit.resource, limit.used) for limit in answer.limits] == [("tokens", 35), ("concurrency", 0)]
        assert (await there.keys.verify(issued.text, cost={"tokens": 66})).code == "USAGE_EXCEEDED"
        assert (await there.keys.verify(issued.text, cost={"tokens": 65})).valid
