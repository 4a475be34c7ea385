"""The journal: one record for each change, committed with it; the audit trail and the change feed read it."""

from .denials import Denials, has_been_tenant, just_before
from .feed import FIRST_PAGE, POLL_S, ChangeFeed, next_limit
from .records import CHANGES, DENY, MASK, attempted_fields, change_record, document_after, is_redacted, masked
from .trees import TREE_ENTITIES

__all__ = [
    "CHANGES",
    "DENY",
    "FIRST_PAGE",
    "MASK",
    "POLL_S",
    "TREE_ENTITIES",
    "ChangeFeed",
    "Denials",
    "attempted_fields",
    "change_record",
    "document_after",
    "has_been_tenant",
    "is_redacted",
    "just_before",
    "masked",
    "next_limit",
]
