"""The audit trail: who changed what and when, read from the journal, with its proofs, exports and evidence; how long it
is kept, what is redacted, and what a legal hold keeps as it is."""

from .archive import Archive
from .evidence import Evidence
from .formats import FORMATS, Format, changes_of, view
from .legal_holds import LegalHolds
from .model import LegalHold, RetentionPolicy
from .proofs import ConsistencyProof, InclusionProof, Proofs
from .record import AuditRecord
from .redaction import Redaction, Redactions, Subject
from .retention import JOB, RETENTION_EVERY_S, Kept, Policies, Retention
from .trail import Audit, AuditFilter
from .witnesses import JournalWitness, Witnesses

__all__ = [
    "FORMATS",
    "JOB",
    "RETENTION_EVERY_S",
    "Archive",
    "Audit",
    "AuditFilter",
    "AuditRecord",
    "ConsistencyProof",
    "Evidence",
    "Format",
    "InclusionProof",
    "JournalWitness",
    "Kept",
    "LegalHold",
    "LegalHolds",
    "Policies",
    "Proofs",
    "Redaction",
    "Redactions",
    "Retention",
    "RetentionPolicy",
    "Subject",
    "Witnesses",
    "changes_of",
    "view",
]
