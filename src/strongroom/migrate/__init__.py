"""Moves everything from one store to another: planned, resumable, proved by checksums, live, and taken back.

It knows the stores by the port alone, so that any two of the backends will do. How far it is stands in the target, in
the same batches as the documents: after a kill at any moment the same call goes on. See docs/migrate.md.
"""

from .compare import Difference
from .plan import Plan, PlannedPart
from .prove import PartReport, Report
from .run import migrate, plan
from .state import Migration, MigrationPart, Options, Phase, Progress
from .undo import abort, roll_back

__all__ = [
    "Difference", "Migration", "MigrationPart", "Options", "PartReport", "Phase", "Plan", "PlannedPart", "Progress",
    "Report", "abort", "migrate", "plan", "roll_back",
]  # fmt: skip
