"""Builds what keeps, redacts and drops the journal of one store, from its parts."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from ..clock import Clock
from ..database import Database
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
