"""Tenants: who uses the platform, each with its users, roles, service accounts, cloud accounts and configurations.

`model` declares the entities, `service.Tenants` creates, lists, suspends and deletes tenants. A tenant needs no
document of its own: a name that has data is a tenant. `sign_in` turns a JWT into a caller with the rights that its
roles have in its tenant.
"""

from .deletion import DELETIONS_EVERY_S, DeletionStatement, TenantDeletion
from .directory import GRANTING, Rights
from .jwks import Jwks
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
from .sign_in import Session, SignIn, Source
from .state import StateReader, SuspendedTenants
from .tokens import DEFAULT_LEEWAY_S, MAX_LEEWAY_S, TokenSettings, is_token
from .writes import Writes, WritesChange, WritesOf, WritesStatus

__all__ = [
    "DEFAULT_LEEWAY_S",
    "DELETIONS_EVERY_S",
    "ENTITIES",
    "GRANTING",
    "MAX_LEEWAY_S",
    "RESERVED_COLLECTIONS",
    "CloudAccount",
    "Configuration",
    "DeletionStatement",
    "Imported",
    "Jwks",
    "NewTenant",
    "Owned",
    "Reason",
    "Removed",
    "Rights",
    "Role",
    "ServiceAccount",
    "Session",
    "SignIn",
    "Source",
    "StateReader",
    "SuspendedTenants",
    "Tenant",
    "TenantChanges",
    "TenantDeletion",
    "TenantFields",
    "TenantPart",
    "TenantStatus",
    "Tenants",
    "TokenSettings",
    "User",
    "Writes",
    "WritesChange",
    "WritesOf",
    "WritesStatus",
    "is_token",
    "refuse_reserved",
    "remove_owned",
    "tenants_of",
]
