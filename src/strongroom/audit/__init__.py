"""The audit trail: who changed what and when, read from the journal, and exported with or without proofs."""

from .formats import FORMATS, Format, changes_of, view
from .proofs import ConsistencyProof, InclusionProof, Proofs
from .record import AuditRecord
from .trail import Audit, AuditFilter

__all__ = [
    "FORMATS",
    "Audit",
    "AuditFilter",
    "AuditRecord",
    "ConsistencyProof",
    "Format",
    "InclusionProof",
    "Proofs",
    "changes_of",
    "view",
]
