"""The API key: its entity, and the fields that callers give."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from ipaddress import ip_network
from typing import Annotated, Any, ClassVar, Literal, TypedDict

import msgspec
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from ..access import DEFAULT_TENANT
from ..context import MAX_TENANT_BYTES, name_problem, text_problem
from ..entities import MAX_ID_BYTES, Entity, Index, Indexed, Secret, TenantName, described, no_number, not_given
from ..errors import NotFound, Problem
from ..limits import MAX_LIMITS, Limit, LimitLike, distinct
from .token import DEFAULT_PREFIX, MAX_PREFIX_CHARS, PREFIX_PATTERN

NAME = "api_keys"
MANAGEMENT = "strongroom:"
AUDITOR = MANAGEMENT + "auditor"
"""Reads and verifies the audit trail, and does nothing else."""
MANAGEMENT_PERMISSIONS = (*(MANAGEMENT + scope for scope in ("read", "write", "admin")), AUDITOR)
"""The permissions of management keys. Names with this prefix are reserved for Strongroom."""
MAX_PERMISSIONS = 100
MAX_ADDRESSES = 100
MAX_METADATA_BYTES = 16_384
_PERMISSION = re.compile(r"^[A-Za-z0-9_.:/*-]{1,128}$")
MAX_GROUPS = 16
MAX_GROUP_BYTES = 200
MAX_NAMES = 100
"""Names in `allowed_models`, and in `allowed_routes`."""
MAX_NAME_CHARS = 200
MAX_TOLD = 5
"""The most wrong values of one list that a message names."""
MAX_DESCRIPTION_CHARS = 2_000
MAX_OWNER_BYTES = 200
MAX_OVERLAP_S = 30 * 86_400
"""The longest time that a secret may work after it was rotated away."""
MIN_ROTATION_S = 3_600
MAX_ROTATION_S = 400 * 86_400
MIN_SCHEDULED_OVERLAP_S = 60
DEFAULT_SCHEDULED_OVERLAP_S = 7 * 86_400
"""The overlap of a scheduled rotation without one, at most half its period."""
RESTORABLE_FOR_S = 30 * 86_400
"""How long a deleted key can be restored. Then it is removed for good."""
TEST_PREFIX = f"{DEFAULT_PREFIX}_test"
"""The prefix of a test key's secret, instead of DEFAULT_PREFIX."""
HIDDEN = frozenset({"hash", "previous_hash", "sealed", "previous_sealed", "verifier", "due_at"})
"""Fields of a key that no caller sees."""
Environment = Literal["live", "test"]


_Permission = Annotated[str, described(128, pattern=_PERMISSION.pattern)]
_Group = Annotated[str, described(MAX_GROUP_BYTES)]
_ScopeName = Annotated[str, described(MAX_NAME_CHARS, pattern="^[^*\\u0000-\\u001f\\u007f]*\\*?$")]
_Network = Annotated[
    str,
    described(49, pattern="^[0-9A-Fa-f.:]+(/[0-9]{1,3})?$", description="An IPv4 or IPv6 address, or a range of them."),
]
_UserId = Annotated[str, described(MAX_ID_BYTES)]
_Owner = Annotated[str, described(MAX_OWNER_BYTES)]


class ApiKey(
    Entity,
    collection=NAME,
    scope="global",
    indexes=[
        # A list leaves the deleted keys out, or shows them alone: with `deleted_at` in its index, it is served whole.
        Index("tenant", "deleted_at", "-created_at"),
        Index("tenant", "user_id", "deleted_at", "-created_at"),
        Index("user_id", "deleted_at", "-created_at"),
        Index("user_id", "-created_at"),
        Index("deleted_at", "-created_at"),
        Index("tenant", "deleted_at", "name"),
        Index("deleted_at", "name"),
        Index("owner", "deleted_at", "-created_at"),
        Index("tenant", "environment", "deleted_at", "-created_at"),
        Index("environment", "deleted_at", "-created_at"),
        Index("due_at"),
    ],
    placed_by="hash",
):
    """One API key. It belongs to a tenant, but the collection is global: a verification knows no tenant before it has
    found the key. `hash`: finds the key by its secret. `sealed`: the secret's SHA-256, encrypted, for exports.
    `previous_hash` and `previous_sealed`: those of the secret that was rotated away.

    `last_used` and `usage_count`: copied from the key's usage about once a minute (a new version of the key, which the
    journal does not record). The statistics of a key are current.

    `groups`: the quotas that it shares with other keys of its tenant. `verifier`: the imported hash of a key whose hash
    cannot be looked up (bcrypt, Argon2, PBKDF2), until its first use; `hash` is then a hint to find it by.
    `deleted_at`: when the key was deleted; it can be restored. `unclaimed`: the secret of a rotation that waits to be
    claimed, encrypted under the pepper. `due_at`: when the key jobs must rotate the key, or remove it for good.
    """

    tenant: str
    name: str
    hash: Annotated[str, Indexed(unique=True)]
    previous_hash: Annotated[str | None, Indexed(unique=True)] = None
    previous_until: datetime | None = None
    sealed: Annotated[bytes | None, Secret()] = None
    previous_sealed: Annotated[bytes | None, Secret()] = None
    display: str
    user_id: str | None = None
    permissions: list[str] = []
    metadata: dict[str, Any] = {}
    allowed_ips: list[str] = []
    limits: list[Limit] = []
    enabled: bool = True
    expires_at: datetime | None = None
    last_used: datetime | None = None
    usage_count: int = 0
    description: str | None = None
    owner: str | None = None
    environment: Environment = "live"
    groups: list[str] = []
    allowed_models: list[str] = []
    allowed_routes: list[str] = []
    rotate_every_s: int | None = None
    rotation_overlap_s: int | None = None
    next_rotation_at: datetime | None = None
    unclaimed: Annotated[bytes | None, Secret()] = None
    leaked_at: datetime | None = None
    deleted_at: datetime | None = None
    due_at: datetime | None = None
    verifier: Annotated[str | None, Secret()] = None

    def is_expired(self, now: datetime) -> bool:
        return self.expires_at is not None and now >= self.expires_at

    @property
    def scheduled_overlap_s(self) -> int:
        """How long the old secret works after a scheduled rotation."""
        if self.rotation_overlap_s is not None:
            return self.rotation_overlap_s
        return min(DEFAULT_SCHEDULED_OVERLAP_S, (self.rotate_every_s or 0) // 2)

    def shown(self) -> dict[str, Any]:
        """The fields of a key that callers see. `unclaimed`: whether a secret waits to be claimed."""
        return {**self.model_dump(exclude=set(HIDDEN)), "unclaimed": self.unclaimed is not None}


def due_at(next_rotation_at: datetime | None, deleted_at: datetime | None) -> datetime | None:
    """When the key jobs must remove a deleted key, or rotate another key; None: never."""
    return next_rotation_at if deleted_at is None else deleted_at + timedelta(seconds=RESTORABLE_FOR_S)


def schedule_problem(rotate_every_s: int | None, overlap_s: int | None) -> Problem | None:
    """The problem of two rotation fields together; each is within its own bounds."""
    if overlap_s is None:
        return None
    if rotate_every_s is None:
        return Problem("rotation_overlap_s", "needs rotate_every_s: there is no scheduled rotation")
    if overlap_s >= rotate_every_s:
        return Problem(
            "rotation_overlap_s", f"found {overlap_s}, expected less than rotate_every_s, which is {rotate_every_s}"
        )
    return None


class KeyFields(BaseModel):
    """The fields that a caller may give, for a new key and for a change."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    name: str = Field(min_length=1, max_length=200)
    user_id: _UserId | None = None
    permissions: list[_Permission] = Field(default=[], max_length=MAX_PERMISSIONS)
    expires_at: datetime | None = None
    metadata: dict[str, Any] = {}
    allowed_ips: list[_Network] = Field(default=[], max_length=MAX_ADDRESSES)
    limits: list[Limit] = Field(default=[], max_length=MAX_LIMITS)
    description: str | None = Field(default=None, max_length=MAX_DESCRIPTION_CHARS)
    owner: _Owner | None = None
    groups: list[_Group] = Field(default=[], max_length=MAX_GROUPS)
    allowed_models: list[_ScopeName] = Field(default=[], max_length=MAX_NAMES)
    allowed_routes: list[_ScopeName] = Field(default=[], max_length=MAX_NAMES)
    rotate_every_s: int | None = Field(default=None, ge=MIN_ROTATION_S, le=MAX_ROTATION_S, strict=True)
    rotation_overlap_s: int | None = Field(default=None, ge=MIN_SCHEDULED_OVERLAP_S, le=MAX_OVERLAP_S, strict=True)

    @field_validator("name")
    @classmethod
    def _text(cls, value: str) -> str:
        if problem := text_problem(value, MAX_ID_BYTES):
            raise ValueError(problem)
        return value

    @field_validator("user_id")
    @classmethod
    def _user(cls, value: str | None) -> str | None:
        if value is not None and (problem := name_problem(value, MAX_ID_BYTES)):
            raise ValueError(problem)
        return value

    @field_validator("owner")
    @classmethod
    def _owner(cls, value: str | None) -> str | None:
        if value is not None and (problem := name_problem(value, MAX_OWNER_BYTES)):
            raise ValueError(problem)
        return value

    @field_validator("description")
    @classmethod
    def _description(cls, value: str | None) -> str | None:
        if value and (problem := text_problem(value, 4 * MAX_DESCRIPTION_CHARS)):
            raise ValueError(problem)
        return value

    @field_validator("groups")
    @classmethod
    def _groups(cls, value: list[str]) -> list[str]:
        return each_once(value, lambda name: name_problem(name, MAX_GROUP_BYTES))

    @field_validator("allowed_models", "allowed_routes")
    @classmethod
    def _names(cls, value: list[str]) -> list[str]:
        return each_once(value, _scope_problem)

    @field_validator("expires_at", mode="before")
    @classmethod
    def _no_number(cls, value: Any) -> Any:
        return no_number(value)

    @field_validator("expires_at")
    @classmethod
    def _zoned(cls, value: datetime | None) -> datetime | None:
        if value is not None and value.utcoffset() is None:
            raise ValueError("found a time without a zone, expected one with (for example 2027-01-01T00:00:00Z)")
        return value

    @field_validator("permissions")
    @classmethod
    def _permissions(cls, value: list[str]) -> list[str]:
        return each_once(value, _permission_problem)

    @field_validator("allowed_ips")
    @classmethod
    def _addresses(cls, value: list[str]) -> list[str]:
        each_once(value, _address_problem)
        return value

    @field_validator("metadata")
    @classmethod
    def _metadata(cls, value: dict[str, Any]) -> dict[str, Any]:
        try:
            size = len(msgspec.json.encode(value))
        except (TypeError, ValueError, RecursionError):
            raise ValueError("found a value that JSON does not have, expected JSON values") from None
        if size > MAX_METADATA_BYTES:
            raise ValueError(f"found {size} bytes of JSON, expected at most {MAX_METADATA_BYTES}")
        return value

    @field_validator("limits")
    @classmethod
    def _distinct(cls, value: list[Limit]) -> list[Limit]:
        return distinct(value)


def each_once(values: list[str], problem_of: Callable[[str], str | None]) -> list[str]:
    """The values without duplicates. Raises ValueError with the problems of the first MAX_TOLD wrong values."""
    problems = list(dict.fromkeys(problem for value in values if (problem := problem_of(value))))
    if problems:
        raise ValueError("; ".join(problems[:MAX_TOLD]) + ("; …" if len(problems) > MAX_TOLD else ""))
    return list(dict.fromkeys(values))


def _scope_problem(name: str) -> str | None:
    if not 1 <= len(name) <= MAX_NAME_CHARS or not name.isprintable() or "*" in name[:-1]:
        return f"found {name[:64]!r}, expected 1 to {MAX_NAME_CHARS} printable characters, * only as the last"
    return name_problem(name, 4 * MAX_NAME_CHARS)


def _permission_problem(name: str) -> str | None:
    if not _PERMISSION.fullmatch(name):
        return f"found {name[:64]!r}, expected 1 to 128 letters, digits and _ . : / * -"
    if name.startswith(MANAGEMENT) and name not in MANAGEMENT_PERMISSIONS:
        return (
            f"found {name[:64]!r}, expected {', '.join(MANAGEMENT_PERMISSIONS)}, or a permission of your own "
            f"that does not begin with {MANAGEMENT}"
        )
    return None


def _address_problem(text: str) -> str | None:
    length = text.partition("/")[2]
    try:
        # A mask in dots has two readings (0.0.0.0 is every address, or one): only a length is taken.
        if "/" in text and not (length.isascii() and length.isdigit()):
            raise ValueError
        ip_network(text, strict=False)
    except ValueError:
        return f"found {text[:64]!r}, expected an address or a range such as 10.0.0.0/8"
    return None


class KeyGiven(TypedDict, total=False):
    """The fields of a change as keywords. A time may be a text, as in JSON."""

    name: str
    user_id: str | None
    permissions: Sequence[str]
    expires_at: datetime | str | None
    metadata: Mapping[str, Any]
    allowed_ips: Sequence[str]
    limits: Sequence[LimitLike]
    description: str | None
    owner: str | None
    groups: Sequence[str]
    allowed_models: Sequence[str]
    allowed_routes: Sequence[str]
    rotate_every_s: int | None
    rotation_overlap_s: int | None


class NewKeyGiven(KeyGiven, total=False):
    """The fields of a new key as keywords."""

    tenant: str
    environment: Environment
    prefix: str


class NewKey(KeyFields):
    """A new key. `prefix` begins its secret; the default is `sr`, or `sr_test` in the environment `test`."""

    not_given: ClassVar[Mapping[str, str]] = not_given(
        elsewhere={"enabled": "is changed by its own calls, once the key is made: enable and disable"},
        of_the_store=set(ApiKey.model_fields) - KeyFields.model_fields.keys() - {"tenant", "environment"},
    )

    tenant: TenantName = DEFAULT_TENANT
    environment: Environment = "live"
    prefix: str = Field(default=DEFAULT_PREFIX, pattern=PREFIX_PATTERN, max_length=MAX_PREFIX_CHARS)

    @model_validator(mode="after")
    def _tenant(self) -> NewKey:
        if problem := name_problem(self.tenant, MAX_TENANT_BYTES):
            raise ValueError(f"tenant: {problem}")
        return self

    @field_validator("rotation_overlap_s")
    @classmethod
    def _shorter(cls, value: int | None, info: ValidationInfo) -> int | None:
        if "rotate_every_s" in info.data and (problem := schedule_problem(info.data["rotate_every_s"], value)):
            raise ValueError(problem.message)
        return value

    @property
    def text_prefix(self) -> str:
        return TEST_PREFIX if self.environment == "test" and self.prefix == DEFAULT_PREFIX else self.prefix


class KeyChanges(KeyFields):
    """Fields of a key to change; missing fields keep their values."""

    not_given: ClassVar[Mapping[str, str]] = not_given(
        unchangeable=("id", "tenant", "environment", "prefix", "created_at"),
        elsewhere={
            "enabled": "is changed by its own calls: enable and disable",
            "key": "is changed by its own call: rotate",
            **dict.fromkeys(("deleted_at",), "is changed by its own calls: delete and restore"),
        },
        of_the_store=(set(ApiKey.model_fields) | {"unclaimed"}) - KeyFields.model_fields.keys(),
    )

    name: str = Field(default="", min_length=1, max_length=200)


@dataclass(frozen=True, slots=True)
class IssuedKey:
    """A key with its secret, `text`. The store keeps only a hash of it. It is empty if the rotation keeps it for
    `claim`."""

    key: ApiKey
    text: str = field(repr=False)


def no_key(id: str) -> NotFound:
    return NotFound(f"there is no key {id!r}")
