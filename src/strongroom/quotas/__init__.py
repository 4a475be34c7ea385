"""Quotas: limits that the keys of a tenant, of a user, or of a named group share.

`service.Quotas` puts, changes and shows them. `cache.QuotaCache` gives the verifier the quotas of a key.
"""

from .model import Quota, QuotaKind, is_quota, quota_id, quota_subject

__all__ = ["Quota", "QuotaKind", "is_quota", "quota_id", "quota_subject"]
