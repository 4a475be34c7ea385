"""The storage conformance suite: what every backend must honour, one class a topic. Every backend runs all of it.

A module of tests that imports these classes, and one fixture, run it on a backend:

    import pytest
    from strongroom.testing.storage import Backend, SUITE

    globals().update({suite.__name__: suite for suite in SUITE})

    @pytest.fixture
    def backend() -> Backend:
        return Backend(new_url=a_new_and_empty_store, opener="my_package:open_store")

It needs pytest, pytest-asyncio (with `asyncio_mode = "auto"`) and hypothesis; ask for
`pytest.register_assert_rewrite("strongroom.testing")` before the import to see what was compared. In what backends may
differ they say in their `capabilities`; the tests ask, and none is skipped.
"""

from __future__ import annotations

from .backend import Backend
from .batches import TestAtomicBatches, TestGroupCommit, TestLimits
from .counters import TestCounters
from .isolation import TestIsolation
from .journal import TestJournal
from .journal_rows import TestJournalRows, TestJournalUpkeep
from .model import TestModel
from .preconditions import TestPreconditions, TestVersions
from .processes import TestProcesses
from .queries import TestQueries
from .reopening import TestReopening
from .roundtrips import TestRoundTrips
from .schema import TestSchema

SUITE: tuple[type, ...] = (
    TestRoundTrips,
    TestQueries,
    TestPreconditions,
    TestVersions,
    TestAtomicBatches,
    TestLimits,
    TestGroupCommit,
    TestCounters,
    TestIsolation,
    TestJournal,
    TestJournalRows,
    TestJournalUpkeep,
    TestSchema,
    TestReopening,
    TestProcesses,
    TestModel,
)

__all__ = ["SUITE", "Backend"]
