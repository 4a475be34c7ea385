"""Entities: `/v1/tenants/{tenant}/{collection}` for every tenant collection, and their streams of changes.

Each collection has its own routes, so that OpenAPI has its schema. Secret fields are answered as `***`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from copy import copy, deepcopy
from decimal import Decimal
from functools import lru_cache
from types import MappingProxyType
from typing import Any, TypeVar
from urllib.parse import quote

import msgspec
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from ...context import Context
from ...cooperative import in_slices
from ...database import Replayed, RequestKey
from ...entities import (
    INT64_MAX,
    INT64_MIN,
    MAX_PAGE_BYTES,
    SYSTEM_FIELDS,
    Entity,
    FieldType,
    json_schema,
    numbers_for_times,
    problems_of,
)
from ...errors import InvalidInput, NotFound, Problem
from ...journal import MASK
from ...tenants import GRANTING
from ..auth import Scope
from ..filters import parameters_of, query_of
from ..idempotent_calls import nothing, run_once
from ..openapi import (
    about,
    may_be_unchanged,
    may_fail,
    request_body,
    takes,
    tells,
)
from ..services import Services
from ..watch import watch
from ..wire import (
    Preconditions,
    body_fields,
    caller_of,
    context_of,
    etag,
    not_modified,
)

TAG = "entities"
SLASH = "\x00"
"""Replaces an encoded slash inside a path's segment during routing (`server.app`)."""
READ_ONLY = ("version", "created_at", "updated_at")
_CHANGE = {"$ref": "#/components/schemas/ChangeEvent"}
EVENTS = {
    "ready": {"$ref": "#/components/schemas/ReadyEvent"},
    "create": _CHANGE,
    "update": _CHANGE,
    "delete": _CHANGE,
    "removed": {"$ref": "#/components/schemas/RemovedEvent"},
    "reset": {"$ref": "#/components/schemas/ResetEvent"},
}
"""The data of each event of a stream, as `x-events`: OpenAPI 3.1 has no keyword for it."""
NO_ANSWERS: Any = MappingProxyType({})
CURSOR = {
    "name": "cursor",
    "in": "query",
    "schema": {"type": "string"},
    "description": "As the header Last-Event-ID, for where no header can be set.",
}
E = TypeVar("E", bound=BaseModel)
_encode = msgspec.json.Encoder().encode
_encode_exactly = msgspec.json.Encoder(decimal_format="number").encode


class Document(JSONResponse):
    """An answer with documents. Decimals are texts, so that no client rounds them; bytes are base64."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return _encode(content)


def router(services: Services) -> APIRouter:
    routes = APIRouter(prefix="/v1/tenants/{tenant}")
    registry = services.room.database.registry
    served = {name: cls for name, cls in registry.by_name.items() if cls.__collection__.tenant_scoped}
    for cls in served.values():
        _Collection(services, cls).add_to(routes)

    @routes.api_route("/{collection}", methods=["GET", "POST"], include_in_schema=False)
    @routes.api_route("/{collection}/{id}", methods=["GET", "PUT", "PATCH", "DELETE"], include_in_schema=False)
    async def unknown_collection(collection: str) -> Response:
        raise NotFound(f"there is no collection {collection[:64]!r}; there are {', '.join(sorted(served))}")

    return routes


class _Collection:
    """One collection's routes."""

    def __init__(self, services: Services, cls: type[Entity]) -> None:
        self.services = services
        self.database = services.room.database
        self.cls = cls
        self.collection = cls.__collection__
        self.name = cls.__collection__.name
        self.decimals = {f.name for f in cls.__collection__.fields.values() if f.type is FieldType.DECIMAL}
        self.changes = _changes_model(cls)
        # Else a writer could give itself a wider role, and be an administrator of its tenant.
        self.to_write = Scope.ADMIN if self.name in GRANTING else Scope.WRITE
        self.schemas = deepcopy(_schemas_of(cls))  # OpenAPI's builder removes parts of it

    def add_to(self, routes: APIRouter) -> None:
        path, one, name = f"/{self.name}", f"/{self.name}/{{id}}", self.name
        schemas = self.schemas

        def add(
            route: str,
            method: str,
            what: Callable[..., Awaitable[Response]],
            summary: str,
            *extra: dict[str, Any],
            status: int = 200,
            answers: dict[int | str, dict[str, Any]] = NO_ANSWERS,
        ) -> None:
            operation = what.__name__
            routes.add_api_route(
                route,
                what,
                methods=[method],
                status_code=status,
                response_class=Response if status == 204 else Document,
                responses=answers,
                summary=summary,
                tags=[name],
                name=f"{operation}_{name}",
                operation_id=f"{operation}_{name}",
                openapi_extra=about(*extra),
            )

        document = {"content": {"application/json": {"schema": schemas.document}}, "description": "The document"}
        page = {"content": {"application/json": {"schema": schemas.page}}, "description": "One page"}
        events = {"content": {"text/event-stream": {"schema": {"type": "string"}}}, "description": "Events"}
        matching, unique = takes("If-Match"), may_fail("already_exists")
        add(
            path, "GET", self.list, f"List {name}", {"parameters": list(parameters_of(self.collection))},
            answers={200: page},
        )  # fmt: skip
        add(
            path, "POST", self.create, f"Add to {name}", request_body(schemas.new), unique,
            tells("ETag", "Location", status=201), status=201, answers={201: document},
        )  # fmt: skip
        add(
            f"{path}:watch", "GET", self.watch, f"Watch {name}: server-sent events", takes("Last-Event-ID"),
            may_fail("gone"), {"parameters": [CURSOR], "x-events": EVENTS}, answers={200: events},
        )  # fmt: skip
        add(one, "GET", self.get, f"One of {name}", may_be_unchanged(), answers={200: document})
        add(
            one, "PUT", self.put, f"Replace one of {name}, or add it", request_body(schemas.new), matching, unique,
            takes("If-None-Match"), tells("ETag"), tells("ETag", status=201), answers={200: document, 201: document},
        )  # fmt: skip
        add(
            one, "PATCH", self.patch, f"Change some fields of one of {name}", request_body(schemas.changes), matching,
            unique, tells("ETag"), answers={200: document},
        )  # fmt: skip
        add(one, "DELETE", self.delete, f"Remove one of {name}", matching, status=204)

    # --- Reading ----------------------------------------------------------------------------------------------

    async def list(self, request: Request, tenant: str) -> Response:
        """One page of the documents that match. Filters are `field=value` and `field__op=value`."""
        caller_of(request).needs(Scope.READ)
        query, cursor = query_of(self.collection, request.query_params.multi_items())
        context = context_of(request, _decoded(tenant))
        page = await self.database.find(context, self.cls, query, cursor, max_bytes=MAX_PAGE_BYTES)
        return Document({"items": await in_slices(self.shown, page.items), "next_cursor": page.next_cursor})

    async def get(self, request: Request, tenant: str, id: str) -> Response:
        """The ETag is the version, for If-Match and If-None-Match."""
        caller_of(request).needs(Scope.READ)
        found = await self.database.get(context_of(request, _decoded(tenant)), self.cls, _decoded(id))
        if not_modified(request, found.version):
            return Response(status_code=304, headers={"etag": etag(found.version)})
        return self.answer(found)

    async def watch(self, request: Request, tenant: str) -> Response:
        """Every change from now on, or from the event that `Last-Event-ID` (or `cursor`) names. The first event,
        `ready`, has the cursor one stands at. Events are `create`, `update` and `delete`; each is delivered at least
        once, in order, if the rules let the caller see the document now."""
        caller_of(request).needs(Scope.READ)
        return await watch(self.services, self.cls, request, context_of(request, _decoded(tenant)))

    # --- Writing ----------------------------------------------------------------------------------------------

    async def create(self, request: Request, tenant: str) -> Response:
        """Without an `id` it gets a new one."""
        caller_of(request).needs(self.to_write)
        context = context_of(request, _decoded(tenant))

        async def work(key: RequestKey | None) -> Entity:
            entity = self.parse(self.cls, await self.fields(request))
            return await self.database.create(context, entity, idempotency_key=key)

        made = await run_once(request, context, work, self.again(context))
        answer = self.answer(made, 201)
        answer.headers["location"] = path_of(tenant, self.name, made.id)
        return answer

    async def put(self, request: Request, tenant: str, id: str) -> Response:
        """201 if it was added, 200 if it was there."""
        caller_of(request).needs(self.to_write)
        id = _decoded(id)
        context = context_of(request, _decoded(tenant))

        async def work(key: RequestKey | None) -> Entity:
            entity = self.parse(self.cls, await self.fields(request, id=id))
            with Preconditions(request) as preconditions:
                expected = await preconditions.expected(self.version_of(request, tenant, id))
                return await self.database.replace(
                    context, entity, expected=expected, exists=preconditions.any, idempotency_key=key
                )

        stored = await run_once(request, context, work, self.again(context))
        return self.answer(stored, 201 if stored.created_at == stored.updated_at else 200)

    async def patch(self, request: Request, tenant: str, id: str) -> Response:
        """Missing fields keep their values."""
        caller_of(request).needs(self.to_write)
        id = _decoded(id)
        context = context_of(request, _decoded(tenant))

        async def work(key: RequestKey | None) -> Entity:
            changes = self.parse(self.changes, await self.fields(request, patch=True))
            fields = {name: getattr(changes, name) for name in changes.model_fields_set}
            with Preconditions(request) as preconditions:
                expected = await preconditions.expected(self.version_of(request, tenant, id))
                return await self.database.update(context, self.cls, id, fields, expected=expected, idempotency_key=key)

        return self.answer(await run_once(request, context, work, self.again(context)))

    async def delete(self, request: Request, tenant: str, id: str) -> Response:
        """Removes it; its history stays in the journal."""
        caller_of(request).needs(self.to_write)
        id = _decoded(id)
        context = context_of(request, _decoded(tenant))

        async def work(key: RequestKey | None) -> None:
            with Preconditions(request) as preconditions:
                expected = await preconditions.expected(self.version_of(request, tenant, id))
                await self.database.delete(context, self.cls, id, expected=expected, idempotency_key=key)

        await run_once(request, context, work, nothing)
        return Response(status_code=204)

    def again(self, context: Context) -> Callable[[Replayed], Awaitable[Entity]]:
        async def again(replayed: Replayed) -> Entity:
            return await self.database.answer_of(context, self.cls, replayed)

        return again

    # --- Documents and JSON -----------------------------------------------------------------------------------

    def version_of(self, request: Request, tenant: str, id: str) -> Callable[[], Awaitable[int | None]]:
        async def version() -> int | None:
            found = await self.database.get_or_none(context_of(request, _decoded(tenant)), self.cls, id)
            return found.version if found is not None else None

        return version

    async def fields(self, request: Request, *, id: str | None = None, patch: bool = False) -> dict[str, Any]:
        """The fields of the body, exactly as sent. Raises InvalidInput for fields that a client may not set."""
        fields = await body_fields(request, exact=None)
        problems = [Problem(name, "is set by the store: leave it out") for name in READ_ONLY if name in fields]
        if patch and "id" in fields:
            problems.append(Problem("id", "cannot be changed: leave it out"))
        elif id is not None and fields.setdefault("id", id) != id:
            problems.append(Problem("id", "differs from the id in the path"))
        problems += [
            Problem(name, f"found {MASK!r}, which stands for the secret: send the secret, or PATCH without it")
            for name in sorted(self.collection.secrets)
            if fields.get(name) == MASK
        ]
        problems += numbers_for_times(self.collection, fields)
        if problems:
            known = {name: value for name, value in fields.items() if name not in SYSTEM_FIELDS}
            try:
                self.parse(self.changes if patch else self.cls, known)
            except InvalidInput as error:
                named = {problem.path for problem in problems}
                problems += [problem for problem in error.problems if problem.path not in named]
            raise InvalidInput(problems)
        for name in self.decimals & fields.keys():
            if type(fields[name]) in (int, Decimal):
                fields[name] = str(fields[name])  # a number would be parsed as a float
        return fields

    def parse(self, model: type[E], fields: dict[str, Any]) -> E:
        """Parse fields strictly, as JSON: a number is not accepted as text. Raises InvalidInput with every problem."""
        try:
            return model.model_validate_json(_encode_exactly(fields), strict=True)
        except ValidationError as error:
            raise InvalidInput(problems_of(error, secrets=self.collection.secrets)) from None

    def shown(self, entity: Entity) -> dict[str, Any]:
        """A document in the form of an answer: secrets masked."""
        document = self.cls.__codec__.encode(entity)
        for name in self.collection.secrets:
            if document[name] is not None:
                document[name] = MASK
        return {**{name: getattr(entity, name) for name in SYSTEM_FIELDS}, **document}

    def answer(self, entity: Entity, status: int = 200) -> Response:
        return Document(self.shown(entity), status, headers={"etag": etag(entity.version)})


def _decoded(segment: str) -> str:
    return segment.replace(SLASH, "/")


def path_of(tenant: str, collection: str, id: str) -> str:
    """A document's path."""
    segments = (quote(_decoded(segment), safe="") for segment in (tenant, collection, id))
    return "/v1/tenants/" + "/".join(segments)


@lru_cache(maxsize=256)
def _changes_model(cls: type[Entity]) -> type[BaseModel]:
    """A model of some fields of an entity, all optional: for PATCH."""
    fields: dict[str, Any] = {}
    for name in cls.__collection__.fields:
        info = copy(cls.model_fields[name])
        info.default, info.default_factory = None, None
        fields[name] = (info.annotation, info)
    config = ConfigDict(extra="forbid", hide_input_in_errors=True, ser_json_bytes="base64", val_json_bytes="base64")
    return create_model(f"{cls.__name__}Changes", __config__=config, **fields)


class _Schemas:
    """A collection's JSON Schemas. Names of nested models get the collection's name as a prefix."""

    def __init__(self, cls: type[Entity]) -> None:
        name = cls.__collection__.name
        template = f"#/components/schemas/{name}.{{model}}"
        new = _named(cls.model_json_schema(ref_template=template), name, "new")
        new["properties"] = {k: v for k, v in new["properties"].items() if k not in READ_ONLY}
        document = _named(cls.model_json_schema(ref_template=template, mode="serialization"), name, "document")
        changes = _named(_changes_model(cls).model_json_schema(ref_template=template), name, "changes")
        for field in changes["properties"].values():
            field.pop("default", None)
        system = {
            "id": {"type": "string", "minLength": 1},
            "version": {"type": "integer", "minimum": 1},
            "created_at": {"type": "string", "format": "date-time"},
            "updated_at": {"type": "string", "format": "date-time"},
        }
        document["properties"] = {**system, **{k: v for k, v in document["properties"].items() if k not in system}}
        document["required"] = list(document["properties"])
        for secret in cls.__collection__.secrets:
            document["properties"][secret] = {"enum": [MASK, None], "description": "Never answered in clear."}
        for schema in (new, changes, document):
            for spec in cls.__collection__.fields.values():
                if spec.name not in cls.__collection__.secrets or schema is not document:
                    _exactly(schema["properties"][spec.name], spec.type)
        document["x-strongroom"] = json_schema(cls)["x-strongroom"]
        self.new = new
        self.changes = changes
        kept = {f"{name}.document": document, **document.pop("$defs", {})}
        self.document = {"$ref": f"#/components/schemas/{name}.document", "$defs": kept}
        self.page = {
            "type": "object",
            "properties": {
                "items": {"type": "array", "items": {"$ref": f"#/components/schemas/{name}.document"}},
                "next_cursor": {"type": ["string", "null"]},
            },
            "required": ["items", "next_cursor"],
            "additionalProperties": False,
            "$defs": kept,
        }


_schemas_of = lru_cache(maxsize=256)(_Schemas)


_STORED: dict[tuple[FieldType, str], dict[str, Any]] = {
    (FieldType.INT, "integer"): {"minimum": INT64_MIN, "maximum": INT64_MAX},
    (FieldType.TEXT, "string"): {"pattern": "^[^\\u0000]*$"},
    (FieldType.BYTES, "string"): {
        "contentEncoding": "base64",
        "pattern": "|".join(
            f"^([{letters}]{{4}})*([{letters}][AQgw]==|[{letters}]{{2}}[AEIMQUYcgkosw048]=)?$"
            for letters in ("A-Za-z0-9+/", "A-Za-z0-9_-")
        ),
    },
    (FieldType.DECIMAL, "string"): {"pattern": "^[+-]?([0-9]+(\\.[0-9]*)?|\\.[0-9]+)([eE][+-]?[0-9]+)?$"},
}
"""The store's range of a type, if JSON Schema allows more."""


def _exactly(schema: dict[str, Any], kind: FieldType) -> None:
    """Add the store's constraints to a field, unless its class has stricter ones."""
    for option in [schema, *schema.get("anyOf", ())]:
        for name, bound in _STORED.get((kind, option.get("type", "")), {}).items():
            option.setdefault(name, bound)
        if kind is FieldType.BYTES:
            option.pop("format", None)


def _named(schema: dict[str, Any], collection: str, what: str) -> dict[str, Any]:
    """The schema under its own name; its parts get names with the collection's prefix."""
    schema["title"] = f"{collection}.{what}"
    if "$defs" in schema:
        schema["$defs"] = {f"{collection}.{name}": one for name, one in schema["$defs"].items()}
    return schema
