"""Quotas: limits that the keys of a tenant or a user share."""

from .model import Quota, QuotaKind, is_quota, quota_id, quota_subject

__all__ = ["Quota", "QuotaKind", "is_quota", "quota_id", "quota_subject"]
