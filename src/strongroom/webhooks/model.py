"""The webhook endpoint as an entity, and the fields that callers set at creation and in an update."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Annotated, ClassVar, TypedDict

from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationInfo, WithJsonSchema, field_validator

from ..access import DEFAULT_TENANT
from ..context import MAX_TENANT_BYTES, name_problem
from ..entities import Entity, Index, Secret, TenantName, not_given
from ..events import EVENT_TYPES, LIMIT_THRESHOLD, Event
from ..limits import DEFAULT_THRESHOLDS, MAX_THRESHOLD, MAX_THRESHOLDS
from ..limits import thresholds as alerts
from .signatures import MAX_SECRET_BYTES, MIN_SECRET_BYTES, SECRET_PREFIX, secret_bytes
from .ssrf_guard import MAX_URL_CHARS, url_problem

NAME = "webhooks"
ALL_EVENTS = "*"
MAX_DESCRIPTION_CHARS = 1_000


class Webhook(Entity, collection=NAME, scope="global", indexes=[Index("tenant", "-created_at"), Index("-created_at")]):
    """An endpoint. It receives its tenant's events; with the tenant `*` it receives the events of every tenant.

    `secret` is encrypted under the pepper; `previous_secret` signs beside it until `previous_until`. At the
    `thresholds` (percent of a limit) `limit.threshold` is sent, for limits whose window is at least `min_window_s`
    long. `failing_since` is set while every attempt fails; that change is not journalled. `disabled_reason` says why
    Strongroom disabled the endpoint.
    """

    tenant: str
    url: str
    events: list[str] = [ALL_EVENTS]
    thresholds: list[int] = list(DEFAULT_THRESHOLDS)
    min_window_s: int = 0
    description: str | None = None
    enabled: bool = True
    allow_private: bool = False
    secret: Annotated[bytes, Secret()]
    previous_secret: Annotated[bytes | None, Secret()] = None
    previous_until: datetime | None = None
    failing_since: datetime | None = None
    disabled_reason: str | None = None

    def wants(self, event: Event) -> bool:
        """Whether the endpoint subscribes to this event of its tenant."""
        if event.only is not None:
            return event.only == self.id
        if event.type not in self.events and ALL_EVENTS not in self.events:
            return False
        if event.type != LIMIT_THRESHOLD:
            return True
        data = json.loads(event.body)["data"]
        return data["threshold"] in self.thresholds and self.min_window_s <= alerts.length_s(data["window"])


_SECRET = {
    "type": "string",
    "pattern": f"^{SECRET_PREFIX}[A-Za-z0-9+/]+={{0,2}}$",
    "description": f"The base64 of {MIN_SECRET_BYTES} to {MAX_SECRET_BYTES} random bytes after `{SECRET_PREFIX}`.",
}


class WebhookFields(BaseModel):
    """The fields of an endpoint that a caller can set, at creation and in an update."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    allow_private: StrictBool = False
    url: Annotated[
        str,
        WithJsonSchema(
            {
                "type": "string",
                "format": "uri",
                "pattern": "^https?://[!#-;=?-\\[\\]_a-z~]+$",
                "maxLength": MAX_URL_CHARS,
            }
        ),
    ]
    events: list[Annotated[str, WithJsonSchema({"enum": [ALL_EVENTS, *EVENT_TYPES]})]] = Field(
        default=[ALL_EVENTS], min_length=1, max_length=len(EVENT_TYPES) + 1
    )
    thresholds: list[Annotated[int, Field(strict=True, ge=1, le=MAX_THRESHOLD)]] = Field(
        default=list(DEFAULT_THRESHOLDS), max_length=MAX_THRESHOLDS
    )
    min_window_s: int = Field(default=0, strict=True, ge=0, le=366 * 86_400)
    description: str | None = Field(default=None, max_length=MAX_DESCRIPTION_CHARS)
    enabled: StrictBool = True

    @field_validator("url")
    @classmethod
    def _well_formed(cls, value: str, info: ValidationInfo) -> str:
        """Check what needs no name resolution, so that one answer lists every problem of the request."""
        if problem := url_problem(value, allow_private=cls._may_be_private(info)):
            raise ValueError(problem)
        return value

    @staticmethod
    def _may_be_private(info: ValidationInfo) -> bool:
        """Whether a private address is allowed. An invalid `allow_private` counts as yes: it is reported itself."""
        return bool(info.data.get("allow_private", True))

    @field_validator("events")
    @classmethod
    def _known(cls, value: list[str]) -> list[str]:
        wrong = [name for name in value if name != ALL_EVENTS and name not in EVENT_TYPES]
        if wrong:
            raise ValueError(f"found {wrong[0][:64]!r}, expected {ALL_EVENTS} or some of {', '.join(EVENT_TYPES)}")
        return list(dict.fromkeys(value))

    @field_validator("thresholds")
    @classmethod
    def _ascending(cls, value: list[int]) -> list[int]:
        return sorted(set(value))


class NewWebhook(WebhookFields):
    """A new endpoint. `secret`: the caller's own; without it Strongroom generates one."""

    tenant: TenantName = DEFAULT_TENANT
    secret: Annotated[str, WithJsonSchema(_SECRET)] | None = Field(default=None, repr=False)

    @field_validator("tenant")
    @classmethod
    def _tenant(cls, value: str) -> str:
        if problem := name_problem(value, MAX_TENANT_BYTES):
            raise ValueError(problem)
        return value

    @field_validator("secret")
    @classmethod
    def _secret(cls, value: str | None) -> str | None:
        if value is not None:
            secret_bytes(value)
        return value


class WebhookChanges(WebhookFields):
    """An update of some fields of an endpoint. Other fields keep their value."""

    not_given: ClassVar[Mapping[str, str]] = not_given(
        unchangeable=("id", "tenant"),
        elsewhere={"secret": "is changed by its own call: rotate the secret"},
        of_the_store=Webhook.model_fields.keys() - WebhookFields.model_fields.keys(),
    )

    url: str = ""

    @staticmethod
    def _may_be_private(info: ValidationInfo) -> bool:
        return True  # the stored endpoint may allow it: `Webhooks.update` checks again


class WebhookGiven(TypedDict, total=False):
    """The fields of an update as keyword arguments."""

    allow_private: bool
    url: str
    events: Sequence[str]
    thresholds: Sequence[int]
    min_window_s: int
    description: str | None
    enabled: bool


class NewWebhookGiven(WebhookGiven, total=False):
    """The fields of a new endpoint as keyword arguments."""

    tenant: str
    secret: str | None


@dataclass(frozen=True, slots=True)
class IssuedWebhook:
    """An endpoint with its secret. Only creation and rotation return the secret."""

    webhook: Webhook
    secret: str = field(repr=False)
