"""The shapes of requests and answers, for OpenAPI. Answers are not validated against them at run time; the tests do
this."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    WithJsonSchema,
)
from pydantic.json_schema import JsonSchemaValue, SkipJsonSchema
from pydantic_core import CoreSchema

from ..entities import NO_NUMBER, RESOURCE_PATTERN
from ..keys import (
    MAX_RESOURCES,
)
from ..limits import MAX_AMOUNT, Window
from ..limits.windows import CONCURRENCY
from .errors import MAX_PROBLEMS, STATUS

Number = Annotated[float, Field(ge=0, description="A whole number; for the resource `cost` one with up to 9 decimals.")]


def _amounts(**more: Any) -> WithJsonSchema:
    return WithJsonSchema(
        {
            "type": "object",
            "description": "Amounts by resource: whole numbers; of `cost`, money, with up to 9 decimals.",
            "properties": {"cost": {"type": "number", "minimum": 0, "maximum": MAX_AMOUNT // 10**6}},
            "additionalProperties": {"type": "integer", "minimum": 0, "maximum": MAX_AMOUNT},
            "propertyNames": {"pattern": RESOURCE_PATTERN, "not": {"const": CONCURRENCY}},
            "maxProperties": MAX_RESOURCES,
            **more,
        }
    )


Cost = Annotated[dict[str, float], _amounts()]
UsedCost = Annotated[dict[str, float], _amounts(minProperties=1)]
HeldCost = Annotated[dict[str, float], _amounts(propertyNames={"pattern": RESOURCE_PATTERN})]
"""`concurrency` may be held, and is not used up."""
Totals = Annotated[
    dict[str, float],
    WithJsonSchema(
        {
            "type": "object",
            "description": "Amounts by resource: whole numbers; of `cost`, money, with up to 9 decimals.",
            "propertyNames": {"pattern": RESOURCE_PATTERN},
            "additionalProperties": {"type": "number", "minimum": 0},
        }
    ),
]


Address = Annotated[
    str,
    WithJsonSchema(
        {"type": "string", "anyOf": [{"type": "string", "format": "ipv4"}, {"type": "string", "format": "ipv6"}]}
    ),
]


class Like:
    """Describes a field as a model, which a route reads by itself."""

    def __init__(self, model: type[BaseModel]) -> None:
        self._model = model

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return handler(self._model.__pydantic_core_schema__)


Moment = Annotated[AwareDatetime, NO_NUMBER]
"""A time as callers give it: with a zone, and no number."""


class Closed(BaseModel):
    model_config = ConfigDict(extra="forbid")


# --- Errors ---------------------------------------------------------------------------------------------------


class ProblemItem(BaseModel):
    """One problem of the input: its path, the value and the expectation."""

    path: str
    message: str


def _only_unknown(schema: dict[str, Any]) -> None:
    schema.clear()
    schema["const"] = "unknown"


class NotCounted(BaseModel):
    """The records of a batch that were not counted, by their index, with the reason. With `unavailable` a record may
    have been counted."""

    code: str
    message: str
    items: list[int]


class ProblemDetails(BaseModel):
    """An error (RFC 9457). `errors`: all problems of the input. `outcome` is `unknown` if a write may have happened:
    read before you retry. `counted` and `failed`: the indexes of the counted and the other records of a usage batch."""

    type: str = Field(pattern="^/docs#error-[a-z_]+$")
    title: str = Field(min_length=1)
    status: int = Field(ge=400, le=599)
    detail: str = Field(min_length=1)
    code: str = Field(json_schema_extra={"enum": list(STATUS)})
    request_id: str = Field(pattern="^[A-Za-z0-9_.:-]{1,128}$")
    errors: list[ProblemItem] = Field([], min_length=1, max_length=MAX_PROBLEMS)
    outcome: Literal["unknown"] | SkipJsonSchema[None] = Field(None, json_schema_extra=_only_unknown)
    counted: list[int] = []
    failed: list[NotCounted] = []


# --- Limits --------------------------------------------------------------------------------------------------


class LimitStatusOut(BaseModel):
    """The state of one limit. `used` = `recorded` + `reserved` (held by open reservations) + `leased` (leased to other
    nodes). `resets_at`: when `recorded` next falls. `subject`: the owner of the limit: `key`, `tenant`, `user:…` or
    `group:…`. `exceeded`: this limit denied the call."""

    resource: str = Field(pattern=RESOURCE_PATTERN)
    limit: Number
    used: Number
    remaining: Number
    recorded: Number
    reserved: Number
    leased: Number
    subject: str = "key"
    models: list[str] = []
    routes: list[str] = []
    window: Window
    resets_at: datetime | None
    exceeded: bool = False


# --- Streams --------------------------------------------------------------------------------------------------


class ReadyEvent(BaseModel):
    """The first event of a stream: its cursor."""

    cursor: str = Field(min_length=1)


class ChangeEvent(BaseModel):
    """A change of a document. `before` and `after`: its fields, secrets masked; null if the document did not exist
    before, or does not exist after."""

    id: str = Field(min_length=1)
    action: Literal["create", "update", "delete"]
    version: int
    at: datetime
    actor: str
    request_id: str
    before: dict[str, Any] | None
    after: dict[str, Any] | None


class RemovedEvent(BaseModel):
    """A document that the rules no longer let the caller see."""

    id: str = Field(min_length=1)
    action: Literal["removed"]
    version: int
    at: datetime
    reason: Literal["access_lost"]


class ResetEvent(BaseModel):
    """Changes were missed: the stream continues at `cursor`, the journal's current end. Read the collection again."""

    cursor: str = Field(min_length=1)
    reason: str
