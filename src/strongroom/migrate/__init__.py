"""Moves everything from one store to another: planned, resumable, verified by checksums, live, and reversible.

It uses the storage port only, so it works between any two backends. The target stores the progress in the same batches
as the documents: after a kill at any moment the same call resumes. See docs/migrate.md.
"""

from .compare import Difference
from .plan import Plan, PlannedPart
from .prove import PartReport, Report
from .run import migrate, plan
from .state import Migration, MigrationPart, Options, Phase, Progress
from .trees import TreeDifference, TreesReport
from .undo import abort, roll_back

__all__ = [
    "Difference", "Migration", "MigrationPart", "Options", "PartReport", "Phase", "Plan", "PlannedPart", "Progress",
    "Report", "TreeDifference", "TreesReport", "abort", "migrate", "plan", "roll_back",
]  # fmt: skip
