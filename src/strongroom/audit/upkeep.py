"""Builds the services of one store for retention, redaction and legal holds."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..clock import Clock
from ..database import Database
from ..entities import MAX_LIMIT
from ..jobs.sealing import Sealing
from ..journal.export import unsigned
from ..journal.signed_note import Checkpoint
from ..storage.port import JournalPartitions, Store, unwrapped
from .archive import Archive
from .legal_holds import LegalHolds
from .redaction import Redactions
from .retention import Policies, Retention


@dataclass(frozen=True, slots=True)
class Upkeep:
    """The services, and the retention job."""

    holds: LegalHolds
    policies: Policies
    redactions: Redactions
    job: Retention

    @classmethod
    def of(
        cls,
        database: Database,
        store: Store,
        clock: Clock,
        sealing: Sealing,
        days: int | None,
        archive: str | Path | None,
    ) -> Upkeep:
        """`days`: the setting for all tenants. `archive`: the folder."""
        holds, policies = LegalHolds(database), Policies(database, days)
        folder = Archive(Path(archive)) if archive is not None else None

        def sign(checkpoint: Checkpoint) -> str:
            signer = sealing.sealer.signer
            return unsigned(checkpoint) if signer is None else signer.sign(checkpoint, clock.now_us() // 1_000_000)

        job = Retention(database, store, clock, policies, holds, folder, sign, _dropping_empty(store, clock))
        return cls(holds, policies, Redactions(database, store, clock, policies, holds, folder), job)

    async def retention_statement(self) -> AsyncIterator[Mapping[str, Any]]:
        """How long the records of each tenant that has a tree are kept, and which are left, for the evidence pack."""
        async for tree in self.job.trees():
            kept = await self.policies.of(tree["tenant"])
            yield {**asdict(kept), "first_index": tree["first_index"], "size": tree["size"]}

    async def holds_statement(self) -> AsyncIterator[Mapping[str, Any]]:
        """The legal holds, lifted ones too, for the evidence pack."""
        cursor = None
        while True:
            page = await self.holds.list(limit=MAX_LIMIT, cursor=cursor)
            for hold in page.items:
                yield hold.model_dump(exclude={"version", "updated_at"})
            if (cursor := page.next_cursor) is None:
                return

    async def blocks_deletion(self, tenant: str) -> str | None:
        """The reason of a legal hold on a tenant's records; None if there is none."""
        hold = await self.holds.blocking(tenant)
        return hold.reason if hold is not None else None


def _dropping_empty(store: Store, clock: Clock) -> Callable[[], Awaitable[int]] | None:
    journal = unwrapped(store)
    if not isinstance(journal, JournalPartitions):
        return None
    parts = journal
    return lambda: parts.drop_journal_before(clock.now_us())


async def is_new(store: Store) -> bool:
    """Whether a store has no journal yet."""
    return not (await store.rows(None, limit=1)).rows
