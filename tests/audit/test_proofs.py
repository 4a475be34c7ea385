"""Checkpoints and proofs: what they show, and every bad question."""

from __future__ import annotations

import asyncio
import json
import os
import stat
from base64 import b64decode
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from strongroom import Entity, Strongroom
from strongroom.context import Context
from strongroom.errors import ConfigError, Denied, InvalidInput, NotFound
from strongroom.journal.merkle import root_from_inclusion, root_of, verify_consistency
from strongroom.journal.signed_note import ED25519, ML_DSA_44, Checkpoint, SignedNote, VerifierKey
from strongroom.journal.signing_key import SigningKeys
from strongroom.journal.trees import PLATFORM, tree_id
from tests.helpers.faulty_store import FaultyStore
from tests.helpers.server_app import Served, serving
from tests.helpers.stores import opened
from tests.helpers.trees import Trees, check_trees
from tests.journal.test_sealer import append


class Note(Entity, collection="proved_notes"):
    text: str = ""


@pytest.fixture
def entities() -> list[type[Entity]]:
    return [Note]


async def sealed(room: Strongroom, store: FaultyStore, count: int = 600) -> Trees:
    for begin in (0, count // 2):
        await append(store, "acme", count // 2, begin=begin)
        await append(store, None, 10, begin=begin)
        await room.sealer.seal_now()
    return await check_trees(store)


@pytest.mark.parametrize("tenant", ["acme", None])
async def test_each_leaf_is_proved_in_trees_of_several_sizes(
    room: Strongroom, store: FaultyStore, tenant: str | None
) -> None:
    leaves = (await sealed(room, store)).leaves[tree_id(tenant)]
    sizes = {1, 2, 3, 7, 255, 256, 257, 300, 511, 512, len(leaves)}
    for size in sorted(size for size in sizes if size <= len(leaves)):
        for index in {0, 1, size // 2, size - 1, min(size - 1, 256)}:
            if index >= size:
                continue
            found = await room.proofs.inclusion(tenant, index, size)
            assert (found.leaf, found.root) == (leaves[index], root_of(leaves[:size]))
            assert root_from_inclusion(index, size, found.leaf, found.proof) == found.root
            assert (found.checkpoint is not None) == (size == len(leaves))


@pytest.mark.parametrize("tenant", ["acme", None])
async def test_smaller_trees_are_proved_to_be_the_beginning_of_greater_ones(
    room: Strongroom, store: FaultyStore, tenant: str | None
) -> None:
    leaves = (await sealed(room, store)).leaves[tree_id(tenant)]
    for first in sorted({1, 3, len(leaves) // 2, min(256, len(leaves)), len(leaves) - 1, len(leaves)}):
        found = await room.proofs.consistency(tenant, first)
        assert (found.first_root, found.second_root) == (root_of(leaves[:first]), root_of(leaves))
        assert verify_consistency(first, len(leaves), found.first_root, found.second_root, found.proof)


async def test_a_records_index_is_found_by_its_sequence(room: Strongroom, store: FaultyStore) -> None:
    trees = await sealed(room, store)
    for tenant in ("acme", None):
        sequences = trees.sequences[tree_id(tenant)]
        wanted = {one: index for index, one in enumerate(sequences) if one}
        assert await room.proofs.indexes_of(tenant, wanted) == wanted
        assert await room.proofs.indexes_of(tenant, [10**15]) == {}


async def test_bad_questions_name_every_problem(room: Strongroom, store: FaultyStore) -> None:
    await sealed(room, store, 20)
    with pytest.raises(InvalidInput, match="index: found 20, expected one from 0 and below the size 20"):
        await room.proofs.inclusion("acme", 20)
    with pytest.raises(InvalidInput, match="size: found 21, expected 1 to 20") as error:
        await room.proofs.inclusion("acme", -1, 21)
    assert [problem.path for problem in error.value.problems] == ["size", "index"]
    with pytest.raises(InvalidInput, match="from: found 5, expected a size from 1 to 4"):
        await room.proofs.consistency("acme", 5, 4)
    with pytest.raises(NotFound, match="no record of tenant 'nobody' is sealed yet"):
        await room.proofs.checkpoint("nobody")
    with pytest.raises(Denied):
        await room.proofs.checkpoint("acme", context=Context("umbrella", claims={"tenant": "umbrella"}))
    with pytest.raises(Denied):
        await room.proofs.checkpoint(None, context=Context("umbrella", claims={"tenant": "umbrella"}))


# --- Keys ---------------------------------------------------------------------------------------------------------


async def test_an_embedded_store_makes_a_key_that_only_its_owner_reads(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/store.db"
    async with opened(url, entities=[Note]) as (room, _):
        await room.tenant("acme").create(Note(text="one"))
        await room.sealer.seal_now()
        file = tmp_path / "store.db.journal-key"
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        verifiers = await room.proofs.verifiers()
        assert [one.algorithm for one in verifiers] == [ED25519, ML_DSA_44]
        for tenant in ("acme", None):
            note = SignedNote.parse(await room.proofs.checkpoint(tenant))
            assert note.signers(verifiers) == (verifiers, [])
        origin = Checkpoint.parse(SignedNote.parse(await room.proofs.checkpoint("acme")).text).origin
        assert origin == f"{verifiers[0].name}/tenants/acme"
        statement = await room.proofs.sign_text("a statement\n")
        assert statement is not None
        assert SignedNote.parse(statement).signers(verifiers[:1]) == (verifiers[:1], [])
    async with opened(url, entities=[Note]) as (room, _):
        assert await room.proofs.verifiers() == verifiers, "the same key after a restart"


async def test_after_a_rotation_new_checkpoints_have_the_new_key_and_old_ones_still_verify(tmp_path: Path) -> None:
    async with opened(f"sqlite:///{tmp_path}/store.db", entities=[Note]) as (room, _):
        await room.tenant("acme").create(Note(text="one"))
        await room.sealer.seal_now()
        old, former = await room.proofs.checkpoint("acme"), await room.proofs.verifiers()
        assert room.proofs.keys is not None
        SigningKeys(room.proofs.keys.path).rotate()  # another process
        await room.tenant("acme").create(Note(text="two"))
        await room.sealer.seal_now()
        verifiers = await room.proofs.verifiers()
        assert verifiers[2:] == former
        for note, signers in ((old, former), (await room.proofs.checkpoint("acme"), verifiers[:2])):
            assert SignedNote.parse(note).signers(verifiers) == (signers, [])
        platform = SignedNote.parse(await room.proofs.checkpoint(None))
        assert platform.signers(verifiers) == (verifiers[:2], [])
        kept = json.loads(room.proofs.keys.path.read_text())["keys"]
        assert [one.get("public", False) for one in kept] == [False, True], "nobody can sign with the former key"


async def test_a_store_without_a_key_has_unsigned_checkpoints() -> None:
    async with opened("json://:memory:", entities=[Note]) as (room, _):
        await room.tenant("acme").create(Note(text="one"))
        await room.sealer.seal_now()
        note = SignedNote.parse(await room.proofs.checkpoint("acme"))
        assert (note.signatures, await room.proofs.verifiers()) == ((), [])
        assert await room.proofs.sign_text("a statement\n") is None


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "found no JSON, expected a file that `strongroom audit keys --make` made"),
        ("\udcff", "found no JSON"),
        ("{}", "found no strongroom_signing_keys of version 1"),
        ('{"strongroom_signing_keys": 1, "keys": []}', "expected 1 to 100 keys"),
        ('{"strongroom_signing_keys": 1, "keys": [{"ed25519": "x"}]}', "key 0: ed25519: expected 32 bytes in base64"),
        (None, "cannot be read: No such file or directory"),
    ],
)
async def test_a_bad_key_file_stops_the_start(tmp_path: Path, content: str | None, said: str) -> None:
    file = tmp_path / "key"
    if content is not None:
        file.write_text(content, errors="surrogateescape")
    with pytest.raises(ConfigError, match=said):
        async with Strongroom.open("json://:memory:", signing_key=str(file)):
            pass


async def test_many_processes_that_make_the_key_make_one(tmp_path: Path) -> None:
    file = str(tmp_path / "store.db")

    def make() -> list[VerifierKey]:
        return SigningKeys.of_store(file).verifiers("n")

    made = await asyncio.gather(*(asyncio.to_thread(make) for _ in range(8)))
    assert all(one == made[0] for one in made)
    assert os.listdir(tmp_path) == ["store.db.journal-key"]


# --- HTTP ---------------------------------------------------------------------------------------------------------


async def test_proofs_over_http(tmp_path: Path) -> None:
    async with serving(f"sqlite:///{tmp_path}/store.db") as served:
        await served.make_key(tenant="acme/b")
        await served.room.sealer.seal_now()
        trees = await check_trees(served.room.store)
        for path, tree in (("/v1/audit/acme%2Fb", tree_id("acme/b")), ("/v1/audit", PLATFORM)):
            leaves = trees.leaves[tree]
            note = await served.get(f"{path}/checkpoint")
            assert (note.status, note.answer.headers["content-type"]) == (200, "text/plain; charset=utf-8")
            checkpoint = Checkpoint.parse(SignedNote.parse(note.answer.text).text)
            assert (checkpoint.size, checkpoint.root) == (len(leaves), root_of(leaves))
            proof = (await served.get(f"{path}/proof?index=0")).json
            found = root_from_inclusion(0, proof["size"], b64decode(proof["leaf"]), [*map(b64decode, proof["proof"])])
            assert found == b64decode(proof["root"]) == checkpoint.root
            same = (await served.get(f"{path}/proof?from={len(leaves)}")).json
            assert (same["from_root"], same["to_root"], same["proof"]) == (proof["root"], proof["root"], [])
            for query, at in BAD.items():
                bad = await served.get(f"{path}/proof?{query}")
                assert (bad.status, [one["path"] for one in bad.json["errors"]]) == (422, at), query
        assert (await served.get("/v1/audit/nobody/checkpoint")).status == 404
        assert (await served.get("/v1/audit/nobody/proof?index=0")).status == 404


BAD = {
    "": ["index"],
    "index=9999": ["index"],
    "index=-1": ["index"],
    "index=x": ["index"],
    "index=0&size=9999": ["size"],
    "index=0&size=0": ["size"],
    "size=1": ["index"],
    "to=1": ["from"],
    "from=0": ["from"],
    "from=9999": ["from"],
    "from=1&to=9999": ["to"],
    "index=0&from=1": ["from"],
    "index=99999999999999999999": ["index"],
    "index=0&other=1": ["other"],
}


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with serving() as made:
        yield made


async def test_who_may_ask_for_proofs(served: Served) -> None:
    await served.make_key(tenant="acme")
    await served.room.sealer.seal_now()
    keys = {
        (tenant, permission): (await served.make_key(tenant=tenant, permissions=[f"strongroom:{permission}"]))["key"]
        for tenant in ("acme", "umbrella", "*")
        for permission in ("read", "admin", "auditor")
    }
    for (tenant, permission), key in keys.items():
        everything = tenant == "*" and permission != "read"
        for path, allowed in (("/acme", everything or tenant == "acme"), ("", everything)):
            for call in ("checkpoint", "proof?index=0"):
                answer = await served.get(f"/v1/audit{path}/{call}", key=key)
                assert answer.status == (200 if allowed else 403), (tenant, permission, path, call)
