"""The audit trail: who changed what and when, read from the journal."""

from .proofs import ConsistencyProof, InclusionProof, Proofs
from .trail import Audit, AuditFilter, AuditRecord

__all__ = ["Audit", "AuditFilter", "AuditRecord", "ConsistencyProof", "InclusionProof", "Proofs"]
