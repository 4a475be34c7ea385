"""Entities: `/v1/tenants/{tenant}/{collection}` for every collection that is kept by tenant; their streams of changes.

Each collection has routes of its own, so that OpenAPI has its schema. Secret fields are answered as `***`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from copy import copy
from decimal import Decimal
from typing import Any, TypeVar

import msgspec
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from ...entity import SYSTEM_FIELDS, Entity, FieldType, json_schema, problems_of
from ...errors import InvalidInput, NotFound, Problem
from ...fairness import in_slices
from ...journal import MASK
from ...query import MAX_PAGE_BYTES
from ..auth import Scope
from ..filters import parameters_of, query_of
from ..openapi import header, request_body
from ..services import Services
from ..watch import watch
from ..wire import (
    Preconditions,
    body_fields,
    caller_of,
    context_of,
    etag,
    idempotency_key,
    not_modified,
)

TAG = "entities"
SLASH = "\x00"
"""Stands for an encoded slash inside a path's segment, while the path is routed (`server.app`)."""
READ_ONLY = ("version", "created_at", "updated_at")
E = TypeVar("E", bound=BaseModel)
_encode = msgspec.json.Encoder().encode
_encode_exactly = msgspec.json.Encoder(decimal_format="number").encode


class Document(JSONResponse):
    """An answer with documents. Decimals are texts in it, so that no client rounds them; bytes are base64."""

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
        self.schemas = _Schemas(cls)

    def add_to(self, routes: APIRouter) -> None:
        path, one, name = f"/{self.name}", f"/{self.name}/{{id}}", self.name
        schemas = self.schemas

        def add(route: str, method: str, what: Callable[..., Awaitable[Response]], summary: str, **more: Any) -> None:
            status = more.pop("status", 200)
            answers = more.pop("answers", {})
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
                openapi_extra=more,
            )

        document = {"content": {"application/json": {"schema": schemas.document}}, "description": "The document"}
        matching = header("If-Match")
        add(
            path, "GET", self.list, f"List {name}",
            answers={200: {"content": {"application/json": {"schema": schemas.page}}, "description": "One page"}},
            parameters=list(parameters_of(self.collection)),
        )  # fmt: skip
        add(
            path, "POST", self.create, f"Add to {name}", status=201, answers={201: document},
            **request_body(schemas.new),
        )  # fmt: skip
        add(
            f"{path}:watch", "GET", self.watch, f"Watch {name}: server-sent events",
            answers={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}, "description": "Events"}},
        )  # fmt: skip
        add(one, "GET", self.get, f"One of {name}", answers={200: document, 304: {"description": "As before"}})
        add(
            one, "PUT", self.put, f"Replace one of {name}, or add it", answers={200: document, 201: document},
            parameters=[*matching, *header("If-None-Match")], **request_body(schemas.new),
        )  # fmt: skip
        add(
            one, "PATCH", self.patch, f"Change some fields of one of {name}", answers={200: document},
            parameters=matching, **request_body(schemas.changes),
        )  # fmt: skip
        add(one, "DELETE", self.delete, f"Remove one of {name}", status=204, parameters=matching)

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
        caller_of(request).needs(Scope.WRITE)
        entity = self.parse(self.cls, await self.fields(request))
        made = await self.database.create(
            context_of(request, _decoded(tenant)), entity, idempotency_key=idempotency_key(request)
        )
        return self.answer(made, 201)

    async def put(self, request: Request, tenant: str, id: str) -> Response:
        """201 if it was added, 200 if it was there."""
        caller_of(request).needs(Scope.WRITE)
        id = _decoded(id)
        context = context_of(request, _decoded(tenant))
        entity = self.parse(self.cls, await self.fields(request, id=id))
        with Preconditions(request) as preconditions:
            expected = await preconditions.expected(self.version_of(request, tenant, id))
            stored = await self.database.replace(
                context, entity, expected=expected, idempotency_key=idempotency_key(request)
            )
        return self.answer(stored, 201 if stored.created_at == stored.updated_at else 200)

    async def patch(self, request: Request, tenant: str, id: str) -> Response:
        """Fields that are not given stay."""
        caller_of(request).needs(Scope.WRITE)
        id = _decoded(id)
        context = context_of(request, _decoded(tenant))
        changes = self.parse(self.changes, await self.fields(request, patch=True))
        fields = {name: getattr(changes, name) for name in changes.model_fields_set}
        with Preconditions(request) as preconditions:
            expected = await preconditions.expected(self.version_of(request, tenant, id))
            stored = await self.database.update(
                context, self.cls, id, fields, expected=expected, idempotency_key=idempotency_key(request)
            )
        return self.answer(stored)

    async def delete(self, request: Request, tenant: str, id: str) -> Response:
        """Removes it; its history stays in the journal."""
        caller_of(request).needs(Scope.WRITE)
        id = _decoded(id)
        with Preconditions(request) as preconditions:
            expected = await preconditions.expected(self.version_of(request, tenant, id))
            await self.database.delete(
                context_of(request, _decoded(tenant)),
                self.cls,
                id,
                expected=expected,
                idempotency_key=idempotency_key(request),
            )
        return Response(status_code=204)

    # --- Documents and JSON -----------------------------------------------------------------------------------

    def version_of(self, request: Request, tenant: str, id: str) -> Callable[[], Awaitable[int | None]]:
        async def version() -> int | None:
            found = await self.database.get_or_none(context_of(request, _decoded(tenant)), self.cls, id)
            return found.version if found is not None else None

        return version

    async def fields(self, request: Request, *, id: str | None = None, patch: bool = False) -> dict[str, Any]:
        """The body's fields, exactly as sent. Raises InvalidInput for what no client may set."""
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
        if problems:
            known = {name: value for name, value in fields.items() if name not in SYSTEM_FIELDS}
            try:
                self.parse(self.changes if patch else self.cls, known)
            except InvalidInput as error:
                problems += error.problems
            raise InvalidInput(problems)
        for name in self.decimals & fields.keys():
            if type(fields[name]) in (int, Decimal):
                fields[name] = str(fields[name])  # as a number it would be read by way of a float
        return fields

    @staticmethod
    def parse(model: type[E], fields: dict[str, Any]) -> E:
        """Strictly, as JSON: a number is no text. Raises InvalidInput with every problem."""
        try:
            return model.model_validate_json(_encode_exactly(fields), strict=True)
        except ValidationError as error:
            raise InvalidInput(problems_of(error)) from None

    def shown(self, entity: Entity) -> dict[str, Any]:
        """A document as callers see it: secrets masked."""
        document = self.cls.__codec__.encode(entity)
        for name in self.collection.secrets:
            if document[name] is not None:
                document[name] = MASK
        return {**{name: getattr(entity, name) for name in SYSTEM_FIELDS}, **document}

    def answer(self, entity: Entity, status: int = 200) -> Response:
        return Document(self.shown(entity), status, headers={"etag": etag(entity.version)})


def _decoded(segment: str) -> str:
    return segment.replace(SLASH, "/")


def _changes_model(cls: type[Entity]) -> type[BaseModel]:
    """A model of some fields of an entity, none required: for PATCH."""
    fields: dict[str, Any] = {}
    for name in cls.__collection__.fields:
        info = copy(cls.model_fields[name])
        info.default, info.default_factory = None, None
        fields[name] = (info.annotation, info)
    config = ConfigDict(extra="forbid", hide_input_in_errors=True, ser_json_bytes="base64", val_json_bytes="base64")
    return create_model(f"{cls.__name__}Changes", __config__=config, **fields)


class _Schemas:
    """A collection's JSON Schemas. Nested models keep their names, with the collection's before them."""

    def __init__(self, cls: type[Entity]) -> None:
        name = cls.__collection__.name
        template = f"#/components/schemas/{name}.{{model}}"
        new = _named(cls.model_json_schema(ref_template=template), name, "new")
        new["properties"] = {k: v for k, v in new["properties"].items() if k not in READ_ONLY}
        document = _named(cls.model_json_schema(ref_template=template, mode="serialization"), name, "document")
        system = Entity.model_json_schema(mode="serialization")["properties"]
        moment = {"type": "string", "format": "date-time"}
        document["properties"] = {**system, **document["properties"], "created_at": moment, "updated_at": moment}
        document["required"] = list(document["properties"])
        for secret in cls.__collection__.secrets:
            document["properties"][secret] = {"enum": [MASK, None], "description": "Never answered in clear."}
        document["x-strongroom"] = json_schema(cls)["x-strongroom"]
        changes = _named(_changes_model(cls).model_json_schema(ref_template=template), name, "changes")
        for field in changes["properties"].values():
            field.pop("default", None)
        defs = {}
        for schema in (new, document, changes):
            for title, nested in schema.pop("$defs", {}).items():
                defs[f"{name}.{title}"] = nested
        kept = {f"{name}.new": new, f"{name}.document": document, f"{name}.changes": changes, **defs}
        self.new = {"$ref": f"#/components/schemas/{name}.new", "$defs": kept}
        self.document = {"$ref": f"#/components/schemas/{name}.document"}
        self.changes = {"$ref": f"#/components/schemas/{name}.changes"}
        self.page = {
            "type": "object",
            "properties": {
                "items": {"type": "array", "items": self.document},
                "next_cursor": {"type": ["string", "null"]},
            },
            "required": ["items", "next_cursor"],
        }


def _named(schema: dict[str, Any], collection: str, what: str) -> dict[str, Any]:
    schema["title"] = f"{collection}.{what}"
    return schema
