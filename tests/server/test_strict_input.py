"""Input that earlier versions accepted silently is refused with a reason, or reported."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from strongroom import Strongroom
from strongroom.errors import InvalidInput
from strongroom.keys.transfer.key_file_chunks import survey
from strongroom.keys.transfer.key_file_parse import parse
from strongroom.keys.transfer.record_file import RecordReader
from tests.cli.test_cli import Run, created, run
from tests.helpers.server_app import Served, serving

__all__ = ["run"]  # the fixture
PAST, NOW_US = "2020-01-01T00:00:00Z", 1_700_000_000_000_000


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with serving() as one:
        yield one


# --- Keys and quotas --------------------------------------------------------------------------------------------


async def test_a_key_cannot_be_created_expired_but_can_be_ended_later(served: Served) -> None:
    refused = await served.post("/v1/keys", {"name": "late", "expires_at": PAST})
    assert (refused.status, refused.paths) == (422, ["expires_at"])
    assert "found 2020-01-01T00:00:00Z, expected a time after" in refused.json["errors"][0]["message"]
    key = await served.make_key()
    ended = await served.call("PATCH", f"/v1/keys/{key['id']}", {"expires_at": PAST})
    assert (ended.status, (await served.verify(key["key"])).json["code"]) == (200, "EXPIRED")


async def test_a_retried_create_after_the_expiry_of_its_key_answers_as_before(tmp_path: Path) -> None:
    soon = datetime.now(UTC) + timedelta(seconds=0.2)
    async with Strongroom.open("json://:memory:") as room:
        made = await room.keys.create(name="soon", expires_at=soon, idempotency_key="once")
        now = soon + timedelta(seconds=1)
        room.keys.editor._now = lambda: now  # type: ignore[method-assign]
        assert (await room.keys.create(name="soon", expires_at=soon, idempotency_key="once")).text == made.text
        with pytest.raises(InvalidInput, match="expires_at"):
            await room.keys.create(name="soon", expires_at=soon)


def test_a_file_with_expired_keys_is_imported_with_a_note_of_each(run: Run, tmp_path: Path) -> None:
    row = {"name": "w", "token_limit_per_5h": None, "expiry_date": PAST, "created_at": "2019-01-01T00:00:00Z"}
    file = tmp_path / "keys.json"
    file.write_text(json.dumps({"keys": [{"key": "a-key-of-enough-characters", **row}]}))
    ran = run("import", str(file), "--json")
    assert (ran.status, ran.json["new"]) == (0, 1)
    (note,) = ran.json["notes"]
    assert (note["path"], "has passed" in note["message"]) == ("keys.0.expiry_date", True)
    hashed = {"name": "w", "created_at": "2019-01-01T00:00:00Z", "expires_at": PAST}
    file.write_text(json.dumps({"keys": {"ab" * 32: hashed}}))
    assert ["has passed" in note.message for note in survey(file, NOW_US).file.notes] == [True]
    line = json.dumps({"hash": "sha256:" + "ab" * 32, "name": "w", "expires_at": PAST}).encode()
    ((record, findings),) = RecordReader("acme", NOW_US).read([line])
    assert record is not None
    assert [(finding.refused, "has passed" in finding.message) for finding in findings] == [(False, True)]


def test_a_quota_put_without_limits_is_refused(run: Run) -> None:
    assert run("quotas", "set", "--tenant", "acme", "--limit", "tokens=5/1h").status == 0
    ran = run("quotas", "set", "--tenant", "acme", "--description", "forgotten")
    assert (ran.status, "quotas delete" in ran.err) == (2, True)
    assert len(run("quotas", "show", "--tenant", "acme", "--json").json["limits"]) == 1


async def test_a_quota_of_the_tenant_of_management_keys_is_refused(served: Served) -> None:
    limits = {"limits": [{"resource": "tokens", "limit": 1, "window": {"kind": "total"}}]}
    for path in ("/v1/quotas/tenant/*", "/v1/quotas/user/*/u1"):
        refused = await served.call("PUT", path, limits)
        assert (refused.status, refused.paths) == (422, ["tenant"])
    line = json.dumps({"type": "quota", "kind": "tenant", "tenant": "*", **limits}).encode()
    ((record, _),) = RecordReader("acme", NOW_US).read([line])
    assert record is None


@pytest.mark.parametrize("permission", ["strongroom:adm", "strongroom:", "strongroom:*", "strongroom:Admin"])
async def test_an_unknown_strongroom_permission_is_refused(served: Served, permission: str) -> None:
    refused = await served.post("/v1/keys", {"name": "mistyped", "permissions": [permission]})
    assert (refused.status, refused.paths) == (422, ["permissions"])
    assert "expected strongroom:read, strongroom:write, strongroom:admin" in refused.json["errors"][0]["message"]


# --- Names that stand twice -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/keys", b'{"name": "a", "name": "b"}'),
        ("/v1/keys", b'{"name": "a", "metadata": {"x": 1, "x": 2}}'),
        ("/v1/keys/verify", b'{"key": "one", "key": "two"}'),
        ("/v1/keys/verify", b'{"key": "one", "k\\u0065y": "two", "cost": {"tokens": 1, "tokens": 2}}'),
        ("/v1/keys/verify:batch", b'{"items": [{"key": "a", "key": "b"}]}'),
        ("/v1/usage:batch", b'{"items": [{"key_id": "a", "key_id": "b", "cost": {"tokens": 1}}]}'),
        ("/v1/tenants/acme/policies", b'{"policy_type": "a", "policy_name": "b", "policy_name": "c"}'),
        ("/v1/tenants/acme/policies", b'{"policy_type": "a", "policy_name": "b", "rules": {"a": [{"b": 1, "b": 1}]}}'),
    ],
)  # fmt: skip
async def test_a_json_body_with_a_duplicate_name_is_refused(served: Served, path: str, body: bytes) -> None:
    refused = await served.post(path, body)
    assert refused.status == 422, refused
    assert "more than once in one object" in refused.json["errors"][0]["message"]


async def test_duplicate_names_inside_strings_are_accepted(served: Served) -> None:
    odd = {"name": '"name": 1, "name": 2', "metadata": {"a\\": {'b"': '\\": "x" :', "c": ":"}}}
    made = await served.post("/v1/keys", odd)
    assert made.status == 201, made
    assert made.json["metadata"] == odd["metadata"]
    assert (await served.verify('"key":')).json["code"] == "NOT_FOUND"


def twice(rows: int, row: str) -> bytes:
    """A plain key file whose last row is this one."""
    usual = '{"key": "key-%d-of-enough-characters", "name": "n", "token_limit_per_5h": 1, "expiry_date": null, '
    usual += '"created_at": "2019-01-01T00:00:00Z"%s}'
    lines = [usual % (number, "") for number in range(rows)] + [usual % (rows, row)]
    return ('{"keys": [' + ", ".join(lines) + "]}").encode()


@pytest.mark.parametrize(
    "row", [', "name": "m"', ', "model": "a", "model": "b"', ', "usage_windows": [{"tokens_used": 1, "tokens_used": 2, '
            '"window_start": "2019-01-01T00:00:00Z"}]', ', "n\\u0061me": "m"']
)  # fmt: skip
def test_a_row_with_a_duplicate_name_is_refused(row: str, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    file.write_bytes(twice(3, row))
    for found in (survey(file, NOW_US).file, parse(file.read_bytes(), NOW_US)):
        assert (found.refused, ["more than once" in problem.message for problem in found.problems]) == (1, [True])
    line = b'{"hash": "sha256:%b", "name": "a", "name": "b"}' % (b"ab" * 32)
    ((record, findings),) = RecordReader("acme", NOW_US).read([line])
    assert record is None
    assert "more than once" in findings[0].message


# --- Stores that are not there ----------------------------------------------------------------------------------

READS: list[tuple[str, ...]] = [
    ("keys", "list"), ("keys", "show", "key_1"), ("keys", "verify", "a text"), ("keys", "stats", "key_1"),
    ("keys", "disable", "key_1"), ("quotas", "list"), ("webhooks", "list"), ("leaks", "list"),
    ("leaks", "policy", "acme"), ("export", "out.json"), ("schema", "advise"),
]  # fmt: skip


@pytest.mark.parametrize("scheme", ["sqlite", "json"])
@pytest.mark.parametrize("arguments", READS, ids=" ".join)
def test_a_read_does_not_create_a_missing_store(
    run: Run, tmp_path: Path, scheme: str, arguments: tuple[str, ...]
) -> None:
    before = sorted(tmp_path.iterdir())
    ran = run(*arguments, "--store", f"{scheme}:///{tmp_path}/typo/store.db")
    assert (ran.status, ran.out) == (2, "")
    assert ran.err.startswith("strongroom: --store: found '")
    assert "there is no file" in ran.err
    assert sorted(tmp_path.iterdir()) == before


def test_the_setting_that_names_a_missing_store_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STRONGROOM_STORE")
    monkeypatch.setenv("DATABASE_PATH", "typo.db")
    assert run("keys", "list").err.startswith("strongroom: DATABASE_PATH: found ")
    monkeypatch.delenv("DATABASE_PATH")
    assert run("keys", "list").err.startswith("strongroom: STRONGROOM_STORE (the default): found ")


def test_a_write_that_creates_a_store_says_so(run: Run, tmp_path: Path) -> None:
    ran = run("keys", "create", "--name", "first", "--store", f"sqlite:///{tmp_path}/new/store.db")
    assert ran.status == 0
    assert f"making a new store: {tmp_path}/new/store.db\n" in ran.err
    assert "making" not in run("keys", "list", "--store", f"sqlite:///{tmp_path}/new/store.db").err


@pytest.mark.parametrize("scheme", ["sqlite", "json"])
def test_a_plan_writes_nothing(run: Run, tmp_path: Path, scheme: str) -> None:
    created(run)
    (tmp_path / "keys.json").write_text('{"keys": []}')
    before: list[Any] = sorted(tmp_path.iterdir())
    target = f"{scheme}:///{tmp_path}/new/store.db"
    plan = run("schema", "plan", "--store", target)
    assert (plan.status, "create collection api_keys" in plan.out) == (0, True)
    source = f"sqlite:///{tmp_path}/store.db"
    plan = run("migrate", "--from", source, "--to", target, "--plan", "--json")
    assert (plan.status, plan.json["documents"] >= 1, plan.json["problems"]) == (0, True, [])
    assert run("import", str(tmp_path / "keys.json"), "--dry-run", "--store", target).status == 0
    assert sorted(tmp_path.iterdir()) == before
