"""Witnesses: what they cosign is checked and kept, and what they refuse is reported."""

from __future__ import annotations

import socket
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path

import pytest

from strongroom import Entity, Strongroom
from strongroom.audit import Witnesses
from strongroom.audit import witnesses as submitting
from strongroom.audit.witnesses import Witness as Known
from strongroom.audit.witnesses import parse
from strongroom.errors import ConfigError, NotFound
from strongroom.jobs import JobLeases
from strongroom.journal.signed_note import ED25519, SignedNote, VerifierKey
from strongroom.journal.signing_key import SigningKeys
from strongroom.storage.port import Batch, Delete
from tests.helpers.faulty_store import FaultyStore
from tests.helpers.server_app import serving
from tests.helpers.trees import check_trees
from tests.helpers.waiting import wait_until
from tests.helpers.witness import Witness, witnessing
from tests.journal.test_sealer import append


class Note(Entity, collection="witnessed_notes"):
    text: str = ""


@pytest.fixture
def entities() -> list[type[Entity]]:
    return [Note]


@pytest.fixture
def witness() -> Iterator[Witness]:
    with witnessing(Witness()) as served:
        yield served


async def sealed(room: Strongroom, store: FaultyStore, begin: int = 0, count: int = 7) -> None:
    await append(store, None, count, begin=begin)
    await room.sealer.seal_now()


@pytest.fixture
async def submitted(room: Strongroom, store: FaultyStore, witness: Witness, tmp_path: Path) -> Witnesses:
    """The witnesses of a log with records, which have not been asked yet."""
    keys = SigningKeys(tmp_path / "journal-key", make=True)
    room.sealer.sealer.signer = room.proofs.keys = keys
    await sealed(room, store)
    witness.trusted = keys.verifiers(await room.proofs.origin())
    return Witnesses(store, room.clock, [Known(witness.url, (witness.key,))])


async def submit(room: Strongroom, witnesses: Witnesses) -> None:
    lease = await JobLeases(room.database, room.clock).acquire("witnesses")
    assert lease is not None
    await witnesses.run(lease)
    await lease.release(done=True)


async def test_each_new_checkpoint_is_cosigned_with_a_proof_that_it_continues_the_former_one(
    room: Strongroom, store: FaultyStore, witness: Witness, submitted: Witnesses
) -> None:
    with pytest.raises(NotFound):
        await room.proofs.witnessed()
    sizes = [0]
    for begin in (7, 14, 300):
        await submit(room, submitted)
        sizes.append(witness.size)
        note = SignedNote.parse(await room.proofs.witnessed())
        assert note.text == SignedNote.parse(await room.proofs.checkpoint(None)).text
        assert note.signers([*witness.trusted, witness.key]) == ([*witness.trusted, witness.key], [])
        await submit(room, submitted)  # the same checkpoint is not sent again
        await sealed(room, store, begin, 300)
    assert witness.asked == sizes[:-1]
    await check_trees(store)


async def test_a_log_that_forgot_what_was_cosigned_asks_the_witness(
    room: Strongroom, witness: Witness, store: FaultyStore, submitted: Witnesses
) -> None:
    await submit(room, submitted)
    first = witness.size
    await sealed(room, store, 7, 9)
    other = Witnesses(store, room.clock, submitted.witnesses)
    (state,) = await other.states()
    await store.store.commit(Batch(None, (Delete("journal_witnesses", state.id),), 1))
    await submit(room, other)
    assert witness.asked == [0, 0, first]
    assert not other.alarms


async def test_an_older_copy_of_the_store_is_found_by_the_witness(
    room: Strongroom, store: FaultyStore, witness: Witness, submitted: Witnesses
) -> None:
    witness.size = 10_000  # it has cosigned more than this store has
    await submit(room, submitted)
    (alarm,) = submitted.alarms.values()
    assert "has cosigned a log of 10000 leaves" in alarm
    assert "an older copy of the store was put back" in alarm
    (state,) = await submitted.states()
    assert (state.size, state.error) == (0, alarm)


@pytest.mark.parametrize("size", [3, None], ids=["smaller", "same size"])
async def test_another_history_is_found_by_the_witness(
    room: Strongroom, witness: Witness, submitted: Witnesses, size: int | None
) -> None:
    """The witness has cosigned another tree of this log."""
    now = (await room.proofs.tree(None)).reader.size
    witness.size, witness.root = size or now, bytes(32)
    await submit(room, submitted)
    (alarm,) = submitted.alarms.values()
    assert "does not continue" in alarm if size else "another history" in alarm


BAD_ANSWERS = {
    "a signature that is not valid": (200, "text/plain", "— witness.example/w1 {id}\n"),
    "no signature line": (200, "text/plain", "hello\n"),
    "nothing": (200, "text/plain", ""),
    "a server error": (500, "text/plain", ""),
    "an endless answer": (200, "text/plain", "x" * 100_000),
    "a conflict without a size": (409, "text/x.tlog.size", "x"),
    "an unknown log": (404, "text/plain", ""),
    "unknown keys": (403, "text/plain", ""),
    "a redirection": (302, "text/plain", ""),
}


@pytest.mark.parametrize("name", BAD_ANSWERS)
async def test_a_witness_that_does_not_cosign_is_reported_and_stops_nothing(
    room: Strongroom, witness: Witness, submitted: Witnesses, name: str
) -> None:
    status, kind, text = BAD_ANSWERS[name]
    text = text.replace("{id}", b64encode(witness.key.id + bytes(72)).decode())
    witness.answer = status, kind, text.encode()
    await submit(room, submitted)
    (state,) = await submitted.states()
    assert (state.size, state.note, bool(state.error)) == (0, "", True)
    assert submitted.counts == {"cosigned": 0, "failed": 1}
    assert not submitted.alarms
    witness.answer = None
    await submit(room, submitted)
    (state,) = await submitted.states()
    assert (state.size, state.error) == (witness.size, "")


async def test_a_witness_that_never_answers_is_given_up(
    room: Strongroom, store: FaultyStore, submitted: Witnesses, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submitting, "TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # which accepts nothing
        port = silent.getsockname()[1]
        submitted.witnesses = [Known(f"http://127.0.0.1:{port}", submitted.witnesses[0].keys)]
        await submit(room, submitted)
    assert submitted.counts == {"cosigned": 0, "failed": 1}


def test_a_file_of_witnesses_names_every_problem(tmp_path: Path) -> None:
    key = Witness().key
    file = tmp_path / "witnesses"
    file.write_text(f"# ours\n\nhttps://one.example/w {key}\nhttps://two.example {key}\n")
    assert [(one.url, one.keys) for one in parse(str(file))] == [
        ("https://one.example/w", (key,)),
        ("https://two.example", (key,)),
    ]
    wrong = VerifierKey("n", ED25519, bytes(32))
    file.write_text(f"ftp://x {key}\nhttp://far.example {key}\nhttps://x nokey\nhttps://x {wrong}\n")
    with pytest.raises(ConfigError) as error:
        parse(str(file))
    for number in range(1, 5):
        assert f"line {number}: " in str(error.value)
    file.write_text("")
    with pytest.raises(ConfigError, match="found 0 witnesses, expected 1 to 20"):
        parse(str(file))
    with pytest.raises(ConfigError, match="cannot be read"):
        parse(str(tmp_path / "nothing"))


async def test_a_server_submits_its_checkpoints_by_itself(
    tmp_path: Path, witness: Witness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("strongroom.jobs.job_lease.FIRST_LOOK_S", 0.1)
    monkeypatch.setattr("strongroom.app.WITNESSES_EVERY_S", 0.2)
    file = tmp_path / "witnesses"
    file.write_text(f"{witness.url} {witness.key}\n")
    async with serving(f"sqlite:///{tmp_path}/store.db", witnesses=str(file)) as served:
        witness.trusted = await served.room.proofs.verifiers()

        async def cosigned() -> bool:
            return (await served.get("/v1/audit/checkpoint?witnessed=true")).status == 200

        await wait_until(cosigned)
        note = SignedNote.parse((await served.get("/v1/audit/checkpoint?witnessed=true")).answer.text)
        assert witness.key in note.signers([witness.key])[0]
        ready = (await served.get("/readyz")).json["dependencies"]["journal"]
        assert (ready["status"], ready["kind"]) == ("ok", "signed")
