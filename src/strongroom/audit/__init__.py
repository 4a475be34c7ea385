"""The audit trail: who changed what and when, read from the journal, with its proofs, exports and evidence."""

from .evidence import Evidence
from .formats import FORMATS, Format, changes_of, view
from .proofs import ConsistencyProof, InclusionProof, Proofs
from .record import AuditRecord
from .trail import Audit, AuditFilter
from .witnesses import JournalWitness, Witnesses

__all__ = [
    "FORMATS",
    "Audit",
    "AuditFilter",
    "AuditRecord",
    "ConsistencyProof",
    "Evidence",
    "Format",
    "InclusionProof",
    "JournalWitness",
    "Proofs",
    "Witnesses",
    "changes_of",
    "view",
]
