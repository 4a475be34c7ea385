"""Tenants: who uses the platform, each with its users, roles, service accounts, cloud accounts and configurations.

`model` declares the entities. A tenant needs no document of its own: a name that has data is a tenant.
"""

from .model import (
    ENTITIES,
    RESERVED_COLLECTIONS,
    CloudAccount,
    Configuration,
    Role,
    ServiceAccount,
    Tenant,
    TenantStatus,
    User,
    refuse_reserved,
)

__all__ = [
    "ENTITIES",
    "RESERVED_COLLECTIONS",
    "CloudAccount",
    "Configuration",
    "Role",
    "ServiceAccount",
    "Tenant",
    "TenantStatus",
    "User",
    "refuse_reserved",
]
