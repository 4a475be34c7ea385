"""Tenants: who uses the platform, each with its users, roles, service accounts, cloud accounts and configurations.

`model` declares the entities, `service.Tenants` creates, lists, suspends and deletes tenants. A tenant needs no
document of its own: a name that has data is a tenant.
"""

from .deletion import DELETIONS_EVERY_S, DeletionStatement, TenantDeletion
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
from .parts import Imported, Owned, Removed, TenantPart, remove_owned, tenants_of
from .service import NewTenant, Reason, TenantChanges, TenantFields, Tenants

__all__ = [
    "DELETIONS_EVERY_S",
    "ENTITIES",
    "RESERVED_COLLECTIONS",
    "CloudAccount",
    "Configuration",
    "DeletionStatement",
    "Imported",
    "NewTenant",
    "Owned",
    "Reason",
    "Removed",
    "Role",
    "ServiceAccount",
    "Tenant",
    "TenantChanges",
    "TenantDeletion",
    "TenantFields",
    "TenantPart",
    "TenantStatus",
    "Tenants",
    "User",
    "refuse_reserved",
    "remove_owned",
    "tenants_of",
]
