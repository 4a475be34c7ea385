"""The evidence pack: complete, checked without the store, and each change of it is found."""

from __future__ import annotations

import io
import json
import zipfile
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from strongroom import Strongroom
from strongroom.context import system_context
from strongroom.errors import InvalidInput
from strongroom.journal.findings import Report
from strongroom.journal.signed_note import Checkpoint, SignedNote, VerifierKey
from strongroom.journal.signing_key import SigningKeys
from strongroom.journal.trees import tree_id
from strongroom.journal.verify_evidence import verify_evidence
from strongroom.tenants import Role, User
from tests.journal.test_exports import NOW_US, append

EVE = system_context(actor="cli:eve")


@pytest.fixture
async def filled(room: Strongroom, store: Any, tmp_path: Any) -> Strongroom:
    keys = SigningKeys(tmp_path / "keys.json", make=True)
    room.proofs.keys = room.sealer.sealer.signer = keys
    await append(store, "acme", 300)
    await append(store, "beta", 20)
    await room.keys.create(name="reader", tenant="acme", permissions=["chat:write"])
    await room.keys.create(name="auditor", tenant="acme", permissions=["strongroom:auditor"])
    await room.database.create(system_context("acme"), Role(id="support", scopes=["read"]))
    await room.database.create(system_context("acme"), User(id="u1", email="ada@example.com", roles=["support"]))
    await room.sealer.seal_now()
    return room


async def pack(room: Strongroom, since: datetime | None = None, until: datetime | None = None) -> bytes:
    file = io.BytesIO()
    await room.evidence.write(file, since, until, context=EVE)
    return file.getvalue()


def verified(content: bytes, keys: list[VerifierKey], saved: Checkpoint | None = None) -> Report:
    return verify_evidence(io.BytesIO(content), "pack", keys=keys, saved=saved)


def parts(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as found:
        return {name: found.read(name) for name in found.namelist()}


def packed(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        for name, content in members.items():
            made.writestr(name, content)
    return file.getvalue()


async def test_a_pack_has_everything_and_verifies_without_the_store(filled: Strongroom) -> None:
    content, keys = await pack(filled), await filled.proofs.verifiers()
    report = verified(content, keys)
    assert (report.findings, report.notes) == ([], [])
    assert {tree.tenant: tree.end for tree in report.trees if tree.tenant != "acme"}["beta"] == 20
    members = parts(content)
    review = [json.loads(line) for line in members["access/keys.jsonl"].splitlines()]
    assert sorted((one["name"], one["permissions"], one["management"], one["status"]) for one in review) == [
        ("auditor", [], ["strongroom:auditor"], "active"), ("reader", ["chat:write"], [], "active"),
    ]  # fmt: skip
    assert not [one for one in review if {"hash", "sealed"} & set(one)]
    (user,) = [json.loads(line) for line in members["access/users.jsonl"].splitlines()]
    assert (user["tenant"], user["roles"]) == ("acme", ["support"])
    manifest = json.loads(members["manifest.json"])
    assert (manifest["made_by"], manifest["since"]) == ("cli:eve", None)
    assert members["keys.txt"].decode().splitlines() == [str(key) for key in keys]


async def test_a_pack_of_a_time_range_has_its_records_alone(filled: Strongroom) -> None:
    begin = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=NOW_US + 100)
    content = await pack(filled, begin, begin + timedelta(microseconds=50))
    report = verified(content, await filled.proofs.verifiers())
    assert report.findings == []
    assert {tree.tenant: (tree.first, tree.end) for tree in report.trees}["acme"] == (100, 150)
    assert "beta" not in {tree.tenant for tree in report.trees}


async def test_a_saved_checkpoint_is_compared_with_its_tree(filled: Strongroom) -> None:
    content, keys = await pack(filled), await filled.proofs.verifiers()
    good = Checkpoint.parse(SignedNote.parse(await filled.proofs.checkpoint("acme")).text)
    assert verified(content, keys, good).findings == []
    for saved, kind in (
        (Checkpoint(good.origin, good.size, bytes(32)), "forked"),
        (Checkpoint(good.origin, good.size + 1, bytes(32)), "old_copy"),
    ):
        assert [one.kind for one in verified(content, keys, saved).findings] == [kind]
    absent = Checkpoint(f"{good.origin.partition('/tenants/')[0]}/tenants/nobody", 1, bytes(32))
    assert "was not compared" in verified(content, keys, absent).notes[-1]
    with pytest.raises(InvalidInput, match="expected one of"):
        verified(content, keys, Checkpoint("other.example", 1, bytes(32)))


async def test_each_change_of_a_pack_is_found(filled: Strongroom) -> None:
    content, keys = await pack(filled), await filled.proofs.verifiers()
    members, acme = parts(content), f"records/{tree_id('acme')}.jsonl"
    for name in members:
        if name not in ("manifest.json", "manifest.note"):
            changed = {**members, name: members[name] + b"\n"}
            assert "altered" in [one.kind for one in verified(packed(changed), keys).findings], name
            without = {other: members[other] for other in members if other != name}
            assert [one.kind for one in verified(packed(without), keys).findings] == ["damaged"], name
    more = {**members, "access/more.jsonl": b""}
    assert [one.kind for one in verified(packed(more), keys).findings] == ["damaged"]
    altered = {**members, acme: members[acme].replace(b'\\"b7\\"', b'\\"b8\\"')}
    found = verified(packed(altered), keys).findings
    assert (found[0].tenant, found[0].kind, found[0].index) == ("acme", "altered", 7)
    manifest = {**members, "manifest.json": members["manifest.json"].replace(b"cli:eve", b"cli:bob")}
    assert [one.kind for one in verified(packed(manifest), keys).findings] == ["altered"]
    assert "signature" in [one.kind for one in verified(content, other_keys(filled)).findings]
    for spoiled in (
        content[:-200],
        content[:100],
        b"PK\x03\x04",
        b"",
        packed({"a": b"b"}),
        packed({"manifest.json": b"["}),
    ):
        with pytest.raises(InvalidInput, match="evidence pack"):
            verified(spoiled, keys)
    middle = bytearray(content)
    middle[len(content) // 3] ^= 0xFF
    with_findings = _findings_or_refusal(bytes(middle), keys)
    assert with_findings


def _findings_or_refusal(content: bytes, keys: list[VerifierKey]) -> list[Any]:
    try:
        return list(verified(content, keys).findings)
    except InvalidInput as error:
        return list(error.problems)


def other_keys(room: Strongroom) -> list[VerifierKey]:
    assert room.proofs.keys is not None
    made = SigningKeys(room.proofs.keys.path.with_name("other.json"), make=True)
    return made.verifiers("strongroom.invalid/0000")
