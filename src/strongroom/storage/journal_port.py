"""The journal's part of the storage port: its records, how they are read, and how old or redacted ones go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from msgspec import Struct

from ..entities import Document
from ..errors import Gone

MAX_CHANGES_PAGE = 1_000


class Record(Struct, frozen=True):
    """One line of the journal. `sequence` and `version` are the store's; the rest is the caller's.

    No two records have one sequence, and of one tenant's records (or of those of none) a later one has a greater one.

    `before` and `after` hold the changed fields (all of them for create and delete), secrets masked.
    `tenant` is whom the change concerns; None is the platform itself. `at_us` is microseconds since the epoch.
    `salt` is `context.new_salt()`, empty for a record that is older than sealing, and longer
    for one that was redacted (`journal.leaf`). `claims` are those of the
    caller's token, if it came with one. `rules` is the version of the access rules that decided; None: the default
    rules.
    """

    id: str
    tenant: str | None
    at_us: int
    actor: str
    request_id: str
    action: str
    collection: str
    entity_id: str
    before: Document | None = None
    after: Document | None = None
    version: int | None = None
    sequence: int = 0
    salt: bytes = b""
    claims: Document | None = None
    rules: str | None = None


class ChangesPage(Struct, frozen=True):
    """Journal records in commit order, and the opaque cursor after the last of them.

    `size` is about how many bytes their `before` and `after` have, from a store that knows it without counting.
    """

    records: tuple[Record, ...]
    cursor: str
    size: int | None = None


JournalRow = tuple[
    int,
    str,
    str | None,
    int,
    str,
    str,
    str,
    str,
    str,
    int | None,
    str | None,
    str | None,
    bytes,
    str | None,
    str | None,
]
"""A record as a store keeps it, in the order of JOURNAL_ROW: `before`, `after` and `claims` are the tagged JSON text
(`storage.tagged_json`) that was written with the record, or None. A plain tuple, because sealing and verification read
millions."""
JOURNAL_ROW = (
    "sequence", "id", "tenant", "at_us", "actor", "request_id", "action", "collection", "entity_id", "version",
    "before", "after", "salt", "claims", "rules",
)  # fmt: skip


class RowsPage(Struct, frozen=True):
    """Journal rows in commit order, and the opaque cursor after the last record that was examined."""

    rows: Sequence[JournalRow]
    cursor: str


class JournalFilter(Struct, frozen=True):
    """Which rows are read: every given field must match. `tenant` None is any tenant, and the platform.

    `platform` means the records of no tenant alone. `since_us` is inclusive, `until_us` exclusive. `after_sequence`
    and `through_sequence` bound the sequence, and are given together with one tenant or with `platform` only, because
    sequences of several tenants need not be in the order of the cursors.
    """

    tenant: str | None = None
    platform: bool = False
    actor: str | None = None
    action: str | None = None
    collection: str | None = None
    entity_id: str | None = None
    request_id: str | None = None
    since_us: int | None = None
    until_us: int | None = None
    after_sequence: int | None = None
    through_sequence: int | None = None

    def matches(self, row: JournalRow) -> bool:
        """Whether a row matches, as every store decides it."""
        sequence, _, tenant, at_us, actor, request_id, action, collection, entity_id = row[:9]
        return (
            (self.tenant is None or tenant == self.tenant)
            and (not self.platform or tenant is None)
            and (self.actor is None or actor == self.actor)
            and (self.action is None or action == self.action)
            and (self.collection is None or collection == self.collection)
            and (self.entity_id is None or entity_id == self.entity_id)
            and (self.request_id is None or request_id == self.request_id)
            and (self.since_us is None or at_us >= self.since_us)
            and (self.until_us is None or at_us < self.until_us)
            and (self.after_sequence is None or sequence > self.after_sequence)
            and (self.through_sequence is None or sequence <= self.through_sequence)
        )


WHOLE_JOURNAL = JournalFilter()


class JournalStore(Protocol):
    """What a store does with its journal. Records are added by `Append` in a batch."""

    async def changes(
        self, after: str | None, *, tenant: str | None = None, limit: int = MAX_CHANGES_PAGE
    ) -> ChangesPage:
        """Journal records after a cursor (None: from the beginning), of one tenant or (None) of all.

        The records of one tenant (and those of none) come in commit order, and no record ever becomes visible behind a
        cursor that was given out. The cursor `"end"` gives an empty page whose cursor is the present end.
        InvalidInput for a text that is not a cursor. Gone for a cursor past the journal's end (an older copy of the
        store was put back), or from before records that were dropped (with a tenant: before dropped records of this
        tenant): records may have been missed, so the reader must read its state anew and begin at `"end"`.
        """
        ...

    async def rows(
        self, after: str | None = None, where: JournalFilter = WHOLE_JOURNAL, limit: int = MAX_CHANGES_PAGE
    ) -> RowsPage:
        """Rows after a cursor (as of `changes`; None: from the oldest row that is left) that match, at most `limit`.

        Each field of the filter, alone or with a tenant, is found by an index. A page may have fewer than `limit` rows,
        or none, and yet not be the last: the last page is one whose cursor equals the cursor that was given.
        Dropped records raise no error here. InvalidInput for a text that is not a cursor, Gone for one past the end.
        """
        ...

    async def rewrite(self, rows: Sequence[JournalRow]) -> int:
        """Redact: replace `actor`, `entity_id`, `before`, `after`, `salt` and `claims` of the rows with these
        sequences and ids, all of them or (after an error) none; the other fields stay. The number of rows found."""
        ...

    async def drop(self, tenant: str | None, through_sequence: int) -> int:
        """Remove the rows of a tenant (None: of the platform) up to and with a sequence, durably, for good.

        The number of removed rows. A large part may be removed in several transactions, oldest first, so that others
        are not kept waiting; a call that was interrupted is repeated.
        """
        ...

    def on_change(self, callback: Callable[[], None]) -> None:
        """Call `callback`, on the event loop, when another process may have appended to the journal, if the engine
        reports it (PostgreSQL, Firestore). Some calls are lost, so a reader of the journal polls as well."""
        ...


def past_the_end() -> Gone:
    """The error of `changes` for a cursor past the journal's end. Callers of the server read it, so it does not name
    the store."""
    return Gone("the cursor lies past the journal's end: an older copy of the store was put back")
