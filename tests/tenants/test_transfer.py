"""A tenant as a file: exported whole, imported into an empty tenant of any store."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterable
from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated, Any

import pytest

from strongroom import Entity, Secret, Strongroom
from strongroom.context import Context
from strongroom.errors import Conflict, Denied, InvalidInput, NotFound
from strongroom.tenants import CloudAccount, Role, User
from tests.helpers.stores import rolling

SECRET = "a-secret-that-no-export-shows"


class Bill(Entity, collection="bills"):
    """Every kind of value that JSON lacks."""

    amount: Decimal
    at: datetime
    scan: bytes = b""
    lines: list[dict[str, Any]] = []
    token: Annotated[str | None, Secret()] = None


@pytest.fixture
def entities() -> list[type[Entity]]:
    return [Bill]


BILL = Bill(
    id="b/1",
    amount=Decimal("12.345678901234567890"),
    at=datetime(2026, 1, 1, 0, 0, 0, 1, UTC),
    scan=b"\x00\xff",
    lines=[{"$time": "x", "cost": Decimal("0.1"), "n": 2**60}],
    token=SECRET,
)


async def fill(room: Strongroom, tenant: str) -> str:
    """Give a tenant some of everything; the text of its key."""
    await room.tenants.create(tenant, name="Acme Inc.", plan="gold", metadata={"crm": 17})
    own = room.tenant(tenant)
    await own.create(BILL)
    await own.create(User(id="ann", email="ann@example.com", roles=["owner"]))
    await own.create(Role(id="owner", scopes=["admin"]))
    await own.create(CloudAccount(provider="aws", account_id="123456789012", credentials=SECRET))
    issued = await room.keys.create(name="k", tenant=tenant, user_id="ann", limits=[rolling("tokens", 100)])
    await room.quotas.put(kind="tenant", tenant=tenant, limits=[rolling("tokens", 1000)])
    assert (await room.keys.verify(issued.text, cost={"tokens": 5})).valid
    await room.webhooks.create(url="https://example.com/", tenant=tenant)
    return issued.text


async def lines_of(room: Strongroom, tenant: str, context: Context | None = None) -> list[bytes]:
    return [line async for line in await room.tenants.export(tenant, context=context)]


async def test_an_export_has_everything_and_no_secret_and_another_store_takes_it(url: str) -> None:
    async with (
        Strongroom.open(url, entities=[Bill]) as room,
        Strongroom.open("json://:memory:", entities=[Bill]) as other,
    ):
        text = await fill(room, "acme")
        await fill(room, "other")
        lines = await lines_of(room, "acme")
        whole = b"".join(lines)
        assert SECRET.encode() not in whole
        assert text.encode() not in whole
        assert b'"other"' not in whole
        said = [json.loads(line) for line in lines]
        assert [said[0]["type"], said[1]["type"], said[-1]["type"]] == ["tenant_export", "tenant", "end"]
        counts = said[-1]["counts"]
        journal = counts.pop("journal")
        assert counts == {
            "bills": 1, "users": 1, "roles": 1, "cloud_accounts": 1, "api_keys": 1, "quotas": 1, "webhooks": 1,
        }  # fmt: skip
        assert journal == len((await room.audit.list(tenant="acme", limit=1000)).items)
        hashes = {
            record["record"]["after"]["hash"]
            for record in said
            if record["type"] == "journal" and record["record"]["collection"] == "api_keys"
        }
        assert hashes == {"***"}

        told = await other.tenants.import_file(lambda: lines)
        assert told.written == {k: v for k, v in counts.items() if k != "webhooks"}
        assert told.left_out["webhooks: make them anew"] == 1
        bill = await other.tenant("acme").get(Bill, "b/1")
        assert (bill.amount, bill.at, bill.scan, bill.lines) == (BILL.amount, BILL.at, BILL.scan, BILL.lines)
        assert bill.token is None
        assert bill.created_at == (await room.tenant("acme").get(Bill, "b/1")).created_at
        tenant = await other.tenants.get("acme")
        assert (tenant.name, tenant.plan, tenant.metadata) == ("Acme Inc.", "gold", {"crm": 17})
        verified = await other.keys.verify(text, cost={"tokens": 5})
        assert verified.valid, "the key works there, with its usage"
        assert next(limit.used for limit in verified.limits) == 10
        with pytest.raises(Conflict, match="has data"):
            await other.tenants.import_file(lambda: lines)


async def test_a_deleted_tenant_comes_back_from_its_export(room: Strongroom) -> None:
    room.tenants.deletions.settle_s = 0
    text = await fill(room, "acme")
    lines = await lines_of(room, "acme")
    await room.tenants.delete("acme")
    assert not (await room.keys.verify(text)).valid
    await room.tenants.import_file(lambda: lines)
    assert (await room.keys.verify(text)).valid
    assert (await room.tenant("acme").get(User, "ann")).email == "ann@example.com"


async def test_a_suspended_tenant_stays_suspended_through_its_file(room: Strongroom) -> None:
    room.tenants.deletions.settle_s = 0
    text = await fill(room, "acme")
    await room.tenants.suspend("acme", "unpaid")
    lines = await lines_of(room, "acme")
    await room.tenants.delete("acme")
    await room.tenants.import_file(lambda: lines)
    assert (await room.tenants.get("acme")).reason == "unpaid"
    assert (await room.keys.verify(text)).code == "DISABLED", "though its first use would renew its hash"
    await room.tenants.resume("acme")
    assert (await room.keys.verify(text)).valid


async def test_a_tenants_own_administrator_exports_it_without_the_hashes_of_its_keys(room: Strongroom) -> None:
    await fill(room, "acme")
    await fill(room, "other")
    own = Context("acme", "key:1", {"tenant": "acme", "admin": True, "scope": "admin"})
    lines = await lines_of(room, "acme", own)
    keys = [record for line in lines if (record := json.loads(line)).get("collection") == "api_keys"]
    assert [record["record"]["name"] for record in keys if record["type"] == "record"] == ["k"]
    assert all("hash" not in record["record"] for record in keys)
    for context in (
        Context("other", "key:1", {"tenant": "acme", "admin": True, "scope": "admin"}),
        Context("acme", "key:1", {"tenant": "acme", "admin": True, "scope": "write"}),
        Context(None, "user:1", {}),
    ):
        with pytest.raises(Denied):
            await room.tenants.export("other", context=context)
    with pytest.raises(NotFound):
        await room.tenants.export("nobody")
    async with Strongroom.open("json://:memory:", entities=[Bill]) as there:
        told = await there.tenants.import_file(lambda: lines)
        assert sum(told.left_out.values()) > 1
        assert "api_keys" not in told.written


def changed(lines: list[bytes], number: int, **fields: Any) -> list[bytes]:
    """The lines with some fields of one of them set."""
    line = {**json.loads(lines[number]), **fields}
    return [*lines[:number], json.dumps(line).encode() + b"\n", *lines[number + 1 :]]


async def refusal(room: Strongroom, lines: Iterable[bytes]) -> dict[str, str]:
    given = list(lines)
    with pytest.raises(InvalidInput) as refused:
        await room.tenants.import_file(lambda: given)
    with pytest.raises(NotFound):
        await room.tenants.get("acme")  # nothing was written
    return {problem.path: problem.message for problem in refused.value.problems}


async def test_a_wrong_file_is_refused_whole_with_every_line_that_is_wrong(room: Strongroom) -> None:
    room.tenants.deletions.settle_s = 0
    await fill(room, "acme")
    lines = await lines_of(room, "acme")
    await room.tenants.delete("acme")
    at = next(n for n, line in enumerate(lines) if b'"collection":"users"' in line)
    assert await refusal(room, lines[:-1]) == {"file": "has no line of type end: it was cut"}
    assert "missing" in (await refusal(room, lines[:at] + lines[at + 1 :]))["file"]
    assert "was cut" in str(await refusal(room, [*lines[:-2], lines[-2][:20]]))
    assert list(await refusal(room, [])) == ["file"]
    assert list(await refusal(room, lines[1:])) == ["line 1"]
    assert list(await refusal(room, [*lines, lines[-1]])) == [f"line {len(lines) + 1}"]
    assert list(await refusal(room, changed(lines, 0, version=2))) == ["line 1: version"]
    found = await refusal(room, changed(lines, at, record={"id": "x", "email": "no", "status": "gone"}))
    assert set(found) == {f"line {at + 1}: record.email", f"line {at + 1}: record.status"}
    assert list(await refusal(room, changed(lines, at, collection="nothing"))) == [f"line {at + 1}: collection"]
    assert list(await refusal(room, changed(lines, at, part="nothing"))) == [f"line {at + 1}: part"]
    assert list(await refusal(room, [*lines[:at], b"[1]\n", *lines[at:]])) == [f"line {at + 1}"]
    key = next(n for n, line in enumerate(lines) if b'"collection":"api_keys"' in line and b'"part"' in line)
    record = json.loads(lines[key])["record"]
    found = await refusal(room, changed(lines, key, record={**record, "tenant": "other"}))
    assert list(found) == [f"line {key + 1}: record.tenant"]
    found = await refusal(room, changed(lines, key, record={**record, "hash": "x", "permissions": 5}))
    assert set(found) == {f"line {key + 1}: record.hash", f"line {key + 1}: record.permissions"}
    assert await room.tenants.import_file(lambda: lines)


async def test_an_export_of_many_documents_needs_constant_memory(room: Strongroom) -> None:
    if room.store.capabilities.name == "json":  # keeps all documents in memory anyway
        return
    own = room.tenant("acme")
    for _ in range(60):
        await own.create(Bill(amount=Decimal(1), at=datetime.now(UTC), scan=b"x" * 400_000))
    tracemalloc.start()
    size = 0
    async for line in await room.tenants.export("acme"):
        size += len(line)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size > 60_000_000, "documents and their records"
    assert peak < size / 2
