"""Witnesses: others who keep the log's last checkpoint, and cosign a new one only if it continues the former one.

The protocol is C2SP tlog-witness. Submitting is a background job of one node: sealing never waits for a witness.
"""

from __future__ import annotations

import asyncio
import logging
import re
from base64 import b64encode
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from ..clock import Clock
from ..context import utc_from_us
from ..entities import Entity, Query
from ..errors import ConfigError, NotFound
from ..jobs import AcquiredLease
from ..journal.export import LoggedTree, logged_tree
from ..journal.merkle import consistency_ranges
from ..journal.signed_note import COSIGNATURE, ML_DSA_44, NoteError, Signature, SignedNote, VerifierKey
from ..storage.port import Batch, Put, Store

if TYPE_CHECKING:
    import httpx

EVERY_S = 5.0
TIMEOUT_S = 10.0
"""For one witness. They are asked at once, so this bounds a run of the job."""
MAX_WITNESSES = 20
MAX_FILE_BYTES = 1_000_000
MAX_ANSWER_BYTES = 64 * 1024
SIZE_TYPE = "text/x.tlog.size"
_SIZE = re.compile(rb"(0|[1-9][0-9]{0,18})\n?")
_log = logging.getLogger(__name__)


class JournalWitness(Entity, collection="journal_witnesses", scope="global", journalled=False):
    """What one witness has cosigned. `note` is the log's checkpoint of `size` with the witness's lines. `error`: why
    the last submission failed; empty if it did not."""

    url: str
    size: int = 0
    note: str = ""
    witnessed_at: datetime | None = None
    error: str = ""


WITNESSES = JournalWitness.__collection__.name


@dataclass(frozen=True, slots=True)
class Witness:
    """Where a witness is, and its public keys."""

    url: str
    keys: tuple[VerifierKey, ...]

    @property
    def id(self) -> str:
        return "w" + sha256(self.url.encode()).hexdigest()[:40]


class WitnessError(Exception):
    """A witness did not cosign. The text says why; `alarm`: the log contradicts what it has cosigned."""

    def __init__(self, message: str, *, alarm: bool = False) -> None:
        super().__init__(message)
        self.alarm = alarm


def parse(path: str) -> list[Witness]:
    """The witnesses of a file: lines of a URL prefix and a public key (`name+id+key`); several keys of one URL are on
    several lines; # begins a comment. Raises ConfigError with every problem."""
    try:
        content = Path(path).read_bytes()
        text = content[:MAX_FILE_BYTES].decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the witnesses {path} cannot be read: {error}") from None
    keys: dict[str, list[VerifierKey]] = {}
    problems = [] if len(content) <= MAX_FILE_BYTES else [f"found more than {MAX_FILE_BYTES} bytes"]
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            url, key = _parsed(line)
            keys.setdefault(url, []).append(key)
        except (NoteError, ValueError) as error:
            problems.append(f"line {number}: {error}")
    if len(keys) > MAX_WITNESSES or not (keys or problems):
        problems.append(f"found {len(keys)} witnesses, expected 1 to {MAX_WITNESSES}")
    if problems:
        raise ConfigError(f"the witnesses {path}: {'; '.join(problems)}")
    return [Witness(url, tuple(some)) for url, some in keys.items()]


def _parsed(line: str) -> tuple[str, VerifierKey]:
    url, _, text = line.strip().partition(" ")
    parts = urlsplit(url)
    if parts.scheme not in ("https", "http") or not parts.netloc or parts.query or parts.fragment:
        raise ValueError(f"found {url[:80]!r}, expected an https:// URL and a public key")
    if parts.scheme == "http" and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
        raise ValueError(f"found {url[:80]!r}, expected https:// (http:// is for this machine only)")
    key = VerifierKey.parse(text)
    if key.algorithm not in (COSIGNATURE, ML_DSA_44):
        raise ValueError(f"the key {key.name} makes no cosignatures: found algorithm {key.algorithm}, expected 4 or 6")
    return url.rstrip("/"), key


class Witnesses:
    """The witnesses of one log."""

    def __init__(self, store: Store, clock: Clock, witnesses: list[Witness]) -> None:
        self._store = store
        self._clock = clock
        self.witnesses = witnesses
        self.alarms: dict[str, str] = {}
        """By the witness's URL: how the log contradicts what the witness has cosigned."""
        self.counts = {"cosigned": 0, "failed": 0}

    async def run(self, lease: AcquiredLease) -> None:
        """The job: submit the latest checkpoint to every witness that has not cosigned it."""
        import httpx

        async with httpx.AsyncClient(timeout=TIMEOUT_S, follow_redirects=False) as client:
            await asyncio.gather(*(self._one(lease, client, witness) for witness in self.witnesses))

    async def _one(self, lease: AcquiredLease, client: httpx.AsyncClient, witness: Witness) -> None:
        import httpx

        stored = await self._store.get(WITNESSES, None, witness.id)
        fields = JournalWitness(url=witness.url) if stored is None else JournalWitness.__codec__.decode(stored)
        assert isinstance(fields, JournalWitness)  # noqa: S101 - the codec's type is Entity
        try:
            async with asyncio.timeout(TIMEOUT_S):
                found = await self._submit(client, witness, fields.size)
            if found is None:
                return
            size, note = found
            moment = utc_from_us(self._clock.now_us())
            new = {"size": size, "note": str(note), "witnessed_at": moment, "error": ""}
            self.counts["cosigned"] += 1
            self.alarms.pop(witness.url, None)
        except (WitnessError, TimeoutError, httpx.HTTPError) as error:
            message = str(error) or type(error).__name__
            self.counts["failed"] += 1
            if isinstance(error, WitnessError) and error.alarm:
                self.alarms[witness.url] = message
                _log.error("the witness %s: %s", witness.url, message)
            if message == fields.error:
                return
            _log.warning("the witness %s did not cosign the journal's checkpoint: %s", witness.url, message)
            new = {"error": message}
        document = JournalWitness.__codec__.encode(fields.model_copy(update=new))
        operation = Put(WITNESSES, witness.id, document)
        await self._store.commit(Batch(None, (lease.guard, operation), self._clock.now_us()))

    async def _submit(self, client: httpx.AsyncClient, witness: Witness, old: int) -> tuple[int, SignedNote] | None:
        """Ask for a cosignature of the latest checkpoint. None if the witness has cosigned it already, or nothing is
        sealed. Raises WitnessError."""
        try:
            tree = await logged_tree(self._store, None)
        except NotFound:
            return None
        note, size = SignedNote.parse(tree.log["checkpoint"]), tree.reader.size
        if not note.signatures:
            raise WitnessError("the checkpoints are not signed, so no witness can cosign them")
        if old > size:
            raise WitnessError(_older(old, size), alarm=True)
        if old == size:
            return None
        status, kind, answer = await _posted(client, witness.url, await _body(tree, note, old))
        if status == 409 and kind == SIZE_TYPE:  # it has cosigned another size than we know
            if not (known := _SIZE.fullmatch(answer)):
                raise WitnessError("answered 409 without the size that it has cosigned")
            old = int(known[1])
            if old > size:
                raise WitnessError(_older(old, size), alarm=True)
            status, _, answer = await _posted(client, witness.url, await _body(tree, note, old))
        if status == 409:
            raise WitnessError(f"has cosigned another history of {old} leaves: the journal was rewritten", alarm=True)
        if status == 422:
            raise WitnessError(f"this journal does not continue the {old} leaves that it has cosigned", alarm=True)
        if status != 200:
            reason = {404: "does not know this log", 403: "does not know the keys that signed"}.get(status, "")
            raise WitnessError(f"answered {status}" + (f": it {reason}" if reason else ""))
        return size, _cosigned(note, witness, answer)

    # --- What it is for ---------------------------------------------------------------------------------------

    async def states(self) -> list[JournalWitness]:
        """What each witness has cosigned."""
        return await states(self._store)


async def states(store: Store) -> list[JournalWitness]:
    """What each witness of a store's log has cosigned, the greatest size first."""
    found = [JournalWitness.__codec__.decode(one) for one in await store.find(WITNESSES, None, Query(limit=1_000))]
    return sorted((one for one in found if isinstance(one, JournalWitness)), key=lambda one: -one.size)


async def witnessed(store: Store) -> str:
    """The latest checkpoint that a witness has cosigned, with the lines of all that cosigned it. Raises NotFound."""
    found = [one for one in await states(store) if one.note]
    if not found:
        raise NotFound("no witness has cosigned a checkpoint of this log")
    notes = [SignedNote.parse(one.note) for one in found if one.size == found[0].size]
    lines = dict.fromkeys(signature for note in notes for signature in note.signatures)
    return str(SignedNote(notes[0].text, tuple(lines)))


async def _body(tree: LoggedTree, note: SignedNote, old: int) -> str:
    size = tree.reader.size
    proof = await tree.reader.hashes(consistency_ranges(old, size)) if 0 < old < size else []
    return f"old {old}\n" + "".join(f"{b64encode(one).decode()}\n" for one in proof) + f"\n{note}"


def _older(old: int, size: int) -> str:
    return f"has cosigned a log of {old} leaves, and this one has {size}: an older copy of the store was put back"


async def _posted(client: httpx.AsyncClient, url: str, body: str) -> tuple[int, str, bytes]:
    """The status, media type and body of an answer. Raises WitnessError for a long one."""
    headers = {"Content-Type": "text/plain; charset=utf-8"}
    async with client.stream("POST", f"{url}/add-checkpoint", content=body.encode(), headers=headers) as answer:
        content = b""
        async for part in answer.aiter_bytes():
            content += part
            if len(content) > MAX_ANSWER_BYTES:
                raise WitnessError(f"answered more than {MAX_ANSWER_BYTES} bytes")
        return answer.status_code, answer.headers.get("content-type", "").partition(";")[0].strip(), content


def _cosigned(note: SignedNote, witness: Witness, answer: bytes) -> SignedNote:
    """The note with the witness's valid cosignatures. Raises WitnessError if there is none, or one is not valid."""
    try:
        signatures = [Signature.parse(line) for line in answer.decode().splitlines()]
    except (NoteError, UnicodeDecodeError) as error:
        raise WitnessError(f"answered no signature lines: {error}") from None
    ids = {(key.name, key.id) for key in witness.keys}
    mine = tuple(one for one in signatures if (one.name, one.key_id) in ids)
    valid, invalid = SignedNote(note.text, mine).signers(witness.keys)
    if invalid or not valid:
        raise WitnessError("its cosignature is not valid" if invalid else "its known keys made no cosignature")
    return SignedNote(note.text, note.signatures + mine)


__all__ = ["EVERY_S", "JournalWitness", "Witness", "WitnessError", "Witnesses", "parse", "states", "witnessed"]
