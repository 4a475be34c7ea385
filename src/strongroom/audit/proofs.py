"""Proofs that the journal's records are in their trees: checkpoints, inclusion and consistency (RFC 6962, C2SP).

A tree is covered by the log up to the last finished round of sealing. A proof is about a size up to there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from ..access import bound_to
from ..clock import Clock
from ..context import Context, new_salt, next_id
from ..database import Database
from ..errors import ConfigError, Denied, InvalidInput, NotFound, Problem
from ..journal.export import LoggedTree, logged_tree, round_proof, unsigned
from ..journal.export_format import RoundProof
from ..journal.log import made_log
from ..journal.merkle import consistency_ranges, inclusion_ranges, root_from_inclusion
from ..journal.signed_note import Checkpoint, SignedNote, VerifierKey
from ..journal.signing_key import SigningKeys
from ..storage.port import Append, Batch, Record, Store
from .witnesses import witnessed

NAME = "journal"
KEPT_NOTES = 1_000
"""Signed checkpoints of tenants that stay in memory: signing one takes more than a millisecond."""


@dataclass(frozen=True, slots=True)
class InclusionProof:
    """The leaf with this index is in the tree of this size. `proof`: the hashes beside the path from the leaf to the
    root, the lowest first. `checkpoint`: the signed note, if it is of this size."""

    index: int
    size: int
    leaf: bytes
    proof: list[bytes]
    root: bytes
    checkpoint: str | None


@dataclass(frozen=True, slots=True)
class ConsistencyProof:
    """The tree of size `first` is the beginning of the tree of size `second`. `checkpoint`: the signed note, if it is
    of the second size."""

    first: int
    second: int
    proof: list[bytes]
    first_root: bytes
    second_root: bytes
    checkpoint: str | None


class Proofs:
    """The trees of one store. `tenant` None is the platform's tree. Without `context` the caller is the application
    itself; a caller that is bound to a tenant asks for that tenant's tree only, else Denied. NotFound if no record of
    the tenant is sealed yet; Gone for what retention has dropped."""

    def __init__(self, store: Store, database: Database, clock: Clock, keys: SigningKeys | None) -> None:
        self._store = store
        self._database = database
        self._clock = clock
        self.keys = keys
        self._notes: OrderedDict[tuple[str, int, int], str] = OrderedDict()

    # --- What a caller asks for -------------------------------------------------------------------------------

    async def checkpoint(self, tenant: str | None, *, context: Context | None = None) -> str:
        """The latest checkpoint, a C2SP signed note (unsigned, if there is no signing key)."""
        return await self.note(await self._tree(tenant, context))

    async def witnessed(self, *, context: Context | None = None) -> str:
        """The platform's latest checkpoint that a witness has cosigned, with the cosignatures. Raises NotFound."""
        await self._tree(None, context)
        return await witnessed(self._store)

    async def inclusion(
        self, tenant: str | None, index: int, size: int | None = None, *, context: Context | None = None
    ) -> InclusionProof:
        """Raises InvalidInput for an index that is not below the size, or a size that the log does not cover."""
        tree = await self._tree(tenant, context)
        latest = tree.reader.size
        problems = _size_problems("size", size, latest)
        size = latest if size is None else size
        if index < 0 or (not problems and index >= size):
            problems.append(Problem("index", f"found {index}, expected one from 0 and below the size {size}"))
        if problems:
            raise InvalidInput(problems)
        leaf = await tree.reader.subtree(0, index)
        proof = await tree.reader.hashes(inclusion_ranges(index, size))
        root = root_from_inclusion(index, size, leaf, proof)
        return InclusionProof(index, size, leaf, proof, root, await self._note_of(tree, size))

    async def consistency(
        self, tenant: str | None, first: int, second: int | None = None, *, context: Context | None = None
    ) -> ConsistencyProof:
        """Raises InvalidInput unless 1 <= first <= second, and for a size that the log does not cover."""
        tree = await self._tree(tenant, context)
        latest = tree.reader.size
        problems = _size_problems("to", second, latest)
        second = latest if second is None else second
        if first < 1 or (not problems and first > second):
            problems.append(Problem("from", f"found {first}, expected a size from 1 to {second}"))
        if problems:
            raise InvalidInput(problems)
        proof = await tree.reader.hashes(consistency_ranges(first, second)) if first < second else []
        roots = await tree.reader.root(first), await tree.reader.root(second)
        return ConsistencyProof(first, second, proof, *roots, await self._note_of(tree, second))

    # --- What other packages ask for --------------------------------------------------------------------------

    async def tree(self, tenant: str | None) -> LoggedTree:
        """The tree as far as the log covers it. Raises NotFound."""
        return await logged_tree(self._store, tenant)

    async def note(self, tree: LoggedTree) -> str:
        """The signed checkpoint of a tree as far as the log covers it."""
        if tree.tenant is None or self.keys is None:
            return await tree.checkpoint(unsigned)
        known = tree.reader.id, tree.reader.size, id(self.keys.current)
        note = self._notes.get(known)
        if note is None:
            name, time_s, keys = tree.log["origin"], self._clock.now_us() // 1_000_000, self.keys
            note = await tree.checkpoint(lambda checkpoint: keys.sign(checkpoint, time_s, name))
            self._notes[known] = note
            if len(self._notes) > KEPT_NOTES:
                self._notes.popitem(last=False)
        return note

    async def round(self, tree: LoggedTree) -> RoundProof | None:
        """What ties a tenant's tree to the platform's checkpoint."""
        return await round_proof(self._store, tree)

    async def indexes_of(self, tenant: str | None, sequences: Iterable[int]) -> dict[int, int]:
        """The indexes of the records with these sequences, of those that are sealed."""
        return await (await self.tree(tenant)).reader.indexes_of(sequences)

    async def size_and_root(self, tenant: str | None) -> tuple[int, str] | None:
        """The size of a tree and its root in hex; None if no record is sealed."""
        try:
            tree = await self.tree(tenant)
        except NotFound:
            return None
        return tree.reader.size, (await tree.reader.root(tree.reader.size)).hex()

    async def sign_text(self, text: str) -> str | None:
        """A text, which ends with a newline, as a note that the log's key signed; None without a key."""
        if self.keys is None:
            return None
        return str(self.keys.current.sign_text(await self.origin(), text))

    async def sign_checkpoint(self, checkpoint: Checkpoint) -> str:
        """The note of a checkpoint, of the log or of a tenant, which the log's key signed (unsigned without a key)."""
        if self.keys is None:
            return str(SignedNote(checkpoint.text))
        return self.keys.sign(checkpoint, self._clock.now_us() // 1_000_000, await self.origin())

    async def verifiers(self) -> list[VerifierKey]:
        """The public keys, the current ones first."""
        return [] if self.keys is None else self.keys.verifiers(await self.origin())

    async def rotate(self, context: Context) -> list[VerifierKey]:
        """Sign with a new key from now on, and journal that. The former key's public key stays, for old checkpoints.
        The public keys, the new ones first. Raises ConfigError without a key's file."""
        if self.keys is None:
            raise ConfigError("there is no signing key: STRONGROOM_JOURNAL_SIGNING_KEY names its file")
        self.keys.rotate()
        found = await self.verifiers()
        context = self._database.at_now(context)
        record = Record(
            next_id(), None, context.now_us, context.actor, context.request_id or next_id(), "rotate", NAME,
            found[0].id.hex(), after={"public_keys": [str(key) for key in found[:2]]}, salt=new_salt(),
        )  # fmt: skip
        await self._store.commit(Batch(None, (Append(record),), context.now_us))
        return found

    async def origin(self) -> str:
        """The log's origin, which is the name of its keys."""
        log = await made_log(self._store, self._clock.now_us())
        origin: str = log["origin"]
        return origin

    # --- Parts ------------------------------------------------------------------------------------------------

    async def _tree(self, tenant: str | None, context: Context | None) -> LoggedTree:
        own = bound_to(context)
        if own is not None and context is not None and tenant != own:
            reason = f"the caller belongs to tenant {own!r}"
            by = Context(tenant, context.actor, context.claims, context.request_id)
            await self._database.denials.note(self._database.at_now(by), "get", NAME, "", reason)
            raise Denied(f"get {NAME}: {reason}", reason=reason)
        return await self.tree(tenant)

    async def _note_of(self, tree: LoggedTree, size: int) -> str | None:
        return await self.note(tree) if size == tree.reader.size else None


def _size_problems(name: str, size: int | None, latest: int) -> list[Problem]:
    if size is None or 1 <= size <= latest:
        return []
    return [Problem(name, f"found {size}, expected 1 to {latest}, which the log covers now")]


__all__ = ["ConsistencyProof", "InclusionProof", "Proofs"]
