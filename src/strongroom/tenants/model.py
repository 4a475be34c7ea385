"""The entities of seed 003: tenants, and their users, cloud accounts, configurations, roles and service accounts.

Each field has its own check, so that a refused document lists every wrong field at once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from types import MappingProxyType
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationInfo,
    field_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from ..context import MAX_TENANT_BYTES, text_problem
from ..entities import Entity, Index, Indexed, Secret
from ..errors import SchemaError

MAX_NAME_CHARS = 200
MAX_TEXT_CHARS = 2_000
MAX_REASON_CHARS = 1_000
MAX_EMAIL_CHARS = 254
MAX_SUBJECT_CHARS = 255
MAX_ROLES = 50
MAX_SCOPES = 4
MAX_PERMISSIONS = 200
MAX_REGIONS = 100
MAX_METADATA_BYTES = 16_384
MAX_VALUE_BYTES = 262_144
MAX_CREDENTIALS_CHARS = 32_768
MAX_SCHEMA_VERSION = 1_000_000
MANAGEMENT = "strongroom:"
"""The prefix of the permissions of management keys. A role gives these by its scopes alone."""

TenantStatus = Literal["active", "suspended", "deleting"]
STATUSES: tuple[str, ...] = get_args(TenantStatus)
RoleScope = Literal["read", "write", "admin", "auditor"]
Provider = Literal["aws", "azure", "gcp", "oci"]

_LABEL = "[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")


# --- Kinds of fields ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Like:
    """A text that the whole pattern matches. `expected`: the same in words."""

    pattern: re.Pattern[str]
    expected: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {**handler(core), "pattern": f"^{self.pattern.pattern}$"}

    def check(self, value: str) -> str:
        """The value. Raises ValueError."""
        if not self.pattern.fullmatch(value):
            raise ValueError(f"found {value[:64]!r}, expected {self.expected}")
        return value


def _distinct(values: list[Any]) -> list[Any]:
    repeated = next((value for number, value in enumerate(values) if value in values[:number]), None)
    if repeated is not None:
        raise ValueError(f"found {str(repeated)[:64]!r} twice, expected each value once")
    return values


def _at_most(max_bytes: int) -> AfterValidator:
    def check(value: dict[str, Any]) -> dict[str, Any]:
        try:
            size = len(json.dumps(value, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass"))
        except (ValueError, RecursionError):
            raise ValueError("found values that are not JSON, expected a JSON object") from None
        if size > max_bytes:
            raise ValueError(f"found {size} bytes of JSON, expected at most {max_bytes}")
        return value

    return AfterValidator(check)


def _not_management(value: str) -> str:
    if value.startswith(MANAGEMENT):
        raise ValueError(f"found {value[:64]!r}, expected a permission of the application: scopes give Strongroom's")
    return value


Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARS)]
Text = Annotated[str, Field(max_length=MAX_TEXT_CHARS)]
Email = Annotated[
    str,
    Field(max_length=MAX_EMAIL_CHARS),
    _Like(
        re.compile(rf"[A-Za-z0-9.!#$%&'*+/=?^_`{{|}}~-]{{1,64}}@{_LABEL}(?:\.{_LABEL})+"),
        "an e-mail address such as ann@example.com",
    ),
    AfterValidator(str.lower),
]
"""In lower case: nearly every mail system takes Ann@ and ann@ for one mailbox, so they are one user."""
Metadata = Annotated[dict[str, Any], _at_most(MAX_METADATA_BYTES)]
_A_ROLE = _Like(re.compile(r"[A-Za-z][A-Za-z0-9_.:-]{0,63}"), "a letter, then at most 63 letters, digits and _ . : -")
_A_KEY = _Like(re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,199}"), "at most 200 letters, digits and _ . : -")
RoleName = Annotated[str, _A_ROLE]
Roles = Annotated[list[RoleName], Field(max_length=MAX_ROLES), AfterValidator(_distinct)]
Permission = Annotated[
    str,
    _Like(re.compile(r"[A-Za-z0-9_.:/*-]{1,128}"), "at most 128 letters, digits and _ . : / * -"),
    AfterValidator(_not_management),
]
Subject = Annotated[str, Field(min_length=1, max_length=MAX_SUBJECT_CHARS)]
Region = Annotated[str, _Like(re.compile(r"[a-z][a-z0-9-]{1,62}"), "a region such as eu-central-1")]
Uuid = Annotated[str, _Like(_UUID, "a UUID in lower case")]


# --- Tenants --------------------------------------------------------------------------------------------------


class Tenant(Entity, collection="tenants", scope="global", indexes=[Index("status"), Index("plan")]):
    """One tenant. The id is its name, as paths and keys have it; `name` is shown to people.

    `status`: a suspended tenant's keys verify as DISABLED, and its writes are refused; a `deleting` one's data is being
    removed. `reason` and `suspended_at` say why and since when. The collection is global: the platform's
    administrators list all tenants.
    """

    name: Name | None = None
    status: TenantStatus = "active"
    reason: Annotated[str, Field(max_length=MAX_REASON_CHARS)] | None = None
    suspended_at: datetime | None = None
    plan: Name | None = None
    contact_email: Email | None = None
    region: Region | None = None
    settings: Metadata = {}
    metadata: Metadata = {}

    @field_validator("id")
    @classmethod
    def _tenant_name(cls, value: str) -> str:
        if value and (problem := text_problem(value, MAX_TENANT_BYTES)):
            raise ValueError(problem)
        return value


# --- What a tenant has ----------------------------------------------------------------------------------------


class User(Entity, collection="users", indexes=[Index("status", "-created_at"), Index("-created_at")]):
    """A person of a tenant. `email` is unique in the tenant. `external_subject`: who it is at the identity provider,
    the `sub` of its tokens. `roles` name roles of the tenant."""

    email: Annotated[Email, Indexed(unique=True)]
    display_name: Name | None = None
    status: Literal["invited", "active", "suspended"] = "active"
    roles: Annotated[Roles, Indexed()] = []
    external_subject: Annotated[Subject | None, Indexed(unique=True)] = None
    metadata: Metadata = {}


class ServiceAccount(
    Entity, collection="service_accounts", indexes=[Index("status", "-created_at"), Index("-created_at")]
):
    """A program of a tenant that acts by itself. `external_subject` and `roles` are as those of users."""

    name: Annotated[Name, Indexed(unique=True)]
    description: Text | None = None
    status: Literal["active", "disabled"] = "active"
    roles: Annotated[Roles, Indexed()] = []
    external_subject: Annotated[Subject | None, Indexed(unique=True)] = None
    metadata: Metadata = {}


class Role(Entity, collection="roles"):
    """A set of rights in one tenant; the id is the role's name. `scopes`: what its holders may do with the tenant's
    keys and data over HTTP. `permissions`: names that the application's own rules ask for. A role gives nothing outside
    its tenant."""

    model_config = ConfigDict(validate_default=True)

    description: Text | None = None
    scopes: Annotated[list[RoleScope], Field(max_length=MAX_SCOPES), AfterValidator(_distinct)] = []
    permissions: Annotated[list[Permission], Field(max_length=MAX_PERMISSIONS), AfterValidator(_distinct)] = []

    @field_validator("id")
    @classmethod
    def _role_name(cls, value: str) -> str:
        return _identified(value, _A_ROLE)


class Configuration(Entity, collection="configurations", indexes=[Index("-updated_at")]):
    """One setting of a tenant; the id is its key, such as `billing.currency`. `schema_version` says which form the
    value has, so that its readers can tell old values from new ones."""

    model_config = ConfigDict(validate_default=True)

    value: Annotated[dict[str, Any], _at_most(MAX_VALUE_BYTES)]
    schema_version: Annotated[int, Field(ge=1, le=MAX_SCHEMA_VERSION)] = 1
    description: Text | None = None

    @field_validator("id")
    @classmethod
    def _key(cls, value: str) -> str:
        return _identified(value, _A_KEY)


RoleArn = Annotated[
    str,
    _Like(
        re.compile(r"arn:aws(?:-[a-z]+)*:iam::[0-9]{12}:role/[A-Za-z0-9_+=,.@/-]{1,576}"),
        "a role such as arn:aws:iam::123456789012:role/costs",
    ),
]
ExternalId = Annotated[
    str, _Like(re.compile(r"[A-Za-z0-9_+=,.@:/-]{2,1224}"), "2 to 1224 letters, digits and _ + = , . @ : / -")
]
GcpAccount = Annotated[
    str,
    _Like(
        re.compile(r"[a-z0-9][a-z0-9-]{0,62}@[a-z][a-z0-9.-]{0,99}\.gserviceaccount\.com"),
        "an address such as costs@my-project.iam.gserviceaccount.com",
    ),
]
ACCOUNT_IDS: Mapping[str, _Like] = MappingProxyType(
    {
        "aws": _Like(re.compile(r"[0-9]{12}"), "an AWS account: 12 digits"),
        "azure": _Like(_UUID, "an Azure subscription: a UUID in lower case"),
        "gcp": _Like(
            re.compile(r"(?:[a-z0-9.-]{1,63}:)?[a-z][a-z0-9-]{4,28}[a-z0-9]"),
            "a Google Cloud project's id: 6 to 30 lower-case letters, digits and -",
        ),
        "oci": _Like(
            re.compile(r"ocid1\.(?:tenancy|compartment)\.oc[0-9]{1,3}\.[a-z0-9-]{0,32}\.[a-z0-9]{1,128}"),
            "an OCI tenancy's or compartment's OCID: ocid1.tenancy.oc1..…",
        ),
    }
)
"""The form of an account's id at each provider."""
_ONLY_OF: Mapping[str, str] = MappingProxyType(
    {"role_arn": "aws", "external_id": "aws", "directory_id": "azure", "client_id": "azure", "service_account": "gcp"}
)
"""The provider that a field belongs to."""


def _schema_of(provider: str) -> dict[str, Any]:
    """What `CloudAccount` checks of one provider's accounts, as JSON Schema."""
    fields: dict[str, Any] = {name: {"type": "null"} for name, own in _ONLY_OF.items() if own != provider}
    fields["account_id"] = {"pattern": f"^{ACCOUNT_IDS[provider].pattern.pattern}$"}
    asked = {"properties": {"provider": {"const": provider}}, "required": ["provider"]}
    return {"if": asked, "then": {"properties": fields}}


class CloudAccount(
    Entity,
    collection="cloud_accounts",
    indexes=[
        Index("provider", "account_id", unique=True),
        Index("provider", "-created_at"),
        Index("status", "-created_at"),
        Index("-created_at"),
    ],
):
    """An account at a cloud provider whose costs a tenant watches. `account_id`: an AWS account, an Azure subscription,
    a Google Cloud project, or an OCI tenancy. `role_arn` and `external_id` are AWS's, `directory_id` and `client_id`
    Azure's, `service_account` Google Cloud's. `credentials` are secret: no answer and no journal record shows them."""

    model_config = ConfigDict(json_schema_extra={"allOf": [_schema_of(provider) for provider in ACCOUNT_IDS]})

    provider: Provider
    account_id: Annotated[str, Field(min_length=1, max_length=300)]
    name: Name | None = None
    status: Literal["pending", "active", "failing", "disabled"] = "pending"
    role_arn: RoleArn | None = None
    external_id: ExternalId | None = None
    directory_id: Uuid | None = None
    client_id: Uuid | None = None
    service_account: GcpAccount | None = None
    credentials: Annotated[str | None, Secret(), Field(max_length=MAX_CREDENTIALS_CHARS)] = None
    regions: Annotated[list[Region], Field(max_length=MAX_REGIONS), AfterValidator(_distinct)] = []
    metadata: Metadata = {}

    @field_validator("account_id")
    @classmethod
    def _of_the_provider(cls, value: str, info: ValidationInfo) -> str:
        known = ACCOUNT_IDS.get(info.data.get("provider", ""))
        return value if known is None else known.check(value)  # without a provider, that is the problem

    @field_validator(*_ONLY_OF)
    @classmethod
    def _only_of_its_provider(cls, value: str | None, info: ValidationInfo) -> str | None:
        provider, own = info.data.get("provider"), _ONLY_OF[info.field_name or ""]
        if value is not None and provider not in (None, own):
            raise ValueError(f"found a value, expected none: it belongs to {own}, and the provider is {provider}")
        return value


def _identified(value: str, like: _Like) -> str:
    """An id that its caller chooses."""
    if not value:
        raise ValueError(f"is required: {like.expected}")
    return like.check(value)


# --- What the application may not use -------------------------------------------------------------------------

ENTITIES: tuple[type[Entity], ...] = (Tenant, User, CloudAccount, Configuration, Role, ServiceAccount)
OPERATIONS = ("suspend", "resume", "export")
"""Paths below a tenant that are not collections."""
RESERVED_COLLECTIONS: Mapping[str, type[Entity] | None] = MappingProxyType(
    {**{cls.__collection__.name: cls for cls in ENTITIES}, **dict.fromkeys(OPERATIONS)}
)
"""The names that an application's own collection cannot have, and Strongroom's class of that name."""


def refuse_reserved(entities: Iterable[type[Entity]]) -> None:
    """Raise SchemaError, with a sentence for each, if an application's entity has a reserved collection's name."""
    wrong = [
        f"{cls.__module__}.{cls.__name__} declares the collection {name!r}, which is reserved for Strongroom's "
        f"{name.replace('_', ' ') if name not in OPERATIONS else f'path /v1/tenants/{{tenant}}/{name}'}: rename it"
        for cls in entities
        if (name := cls.__collection__.name if hasattr(cls, "__collection__") else "") in RESERVED_COLLECTIONS
        and cls is not RESERVED_COLLECTIONS[name]
    ]
    if wrong:
        raise SchemaError("; ".join(wrong))


__all__ = [
    "ACCOUNT_IDS",
    "ENTITIES",
    "MAX_METADATA_BYTES",
    "RESERVED_COLLECTIONS",
    "CloudAccount",
    "Configuration",
    "Provider",
    "Role",
    "RoleScope",
    "ServiceAccount",
    "Tenant",
    "TenantStatus",
    "User",
    "refuse_reserved",
]
