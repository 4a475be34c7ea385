"""`/openapi.json`, complete: the bare verify route too, and every schema that the code has."""

from __future__ import annotations

import asyncio
from functools import cache
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from .docs import page
from .errors import MEDIA_TYPE
from .shapes import ProblemDetails, VerifyIn, VerifyOut
from .wire import Json

REF = "#/components/schemas/{model}"
HTML = "text/html; charset=utf-8"
DESCRIPTION = """API keys with exact usage limits, and tenant-isolated state.

Send a management key as `Authorization: Bearer …`: one with the permission `strongroom:read`, `strongroom:write` or
`strongroom:admin` (each includes those before it), bound to its tenant, or with the tenant `*` for all of them.
Every error is `application/problem+json` (RFC 9457)."""
_PROBLEM = {
    "description": "An error",
    "content": {MEDIA_TYPE: {"schema": {"$ref": REF.format(model="ProblemDetails")}}},
}
_HEADERS = {
    "Idempotency-Key": "The same call again with the same key (within a day) does nothing more and answers the same.",
    "If-Match": 'The version that the document must have, quoted (`"17"`), or `*`: it must exist. Else 412.',
    "If-None-Match": "`*`: the document must not exist yet. Else 412.",
    "X-Request-Id": "A name for this request, in the journal and in the answer; without it one is made.",
}


def version() -> str:
    from .. import __version__

    return __version__


def body(model: type[BaseModel], *, required: bool = True) -> dict[str, Any]:
    """For a route that reads its body itself: the body's description (`openapi_extra`)."""
    schema = model.model_json_schema(ref_template=REF)
    return request_body(schema, required=required)


def request_body(schema: dict[str, Any], *, required: bool = True) -> dict[str, Any]:
    return {"requestBody": {"required": required, "content": {"application/json": {"schema": schema}}}}


def header(*names: str) -> list[dict[str, Any]]:
    """Request headers as OpenAPI parameters."""
    return [
        {"name": name, "in": "header", "required": False, "schema": {"type": "string"}, "description": _HEADERS[name]}
        for name in names
    ]


def serve(api: FastAPI) -> None:
    """Add `/openapi.json` and `/docs`."""

    @cache
    def html() -> bytes:
        return page(document(api)).encode()

    @cache
    def text() -> bytes:
        return bytes(Json(document(api)).body)

    @api.get("/openapi.json", include_in_schema=False)
    async def openapi_json(request: Request) -> Response:
        await made(api)
        return Response(await asyncio.to_thread(text), media_type="application/json")

    @api.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> Response:
        await made(api)
        return Response(await asyncio.to_thread(html), media_type=HTML)


async def made(api: FastAPI) -> None:
    """Make the document on a thread, once: it takes a few hundred milliseconds, for which nobody else should wait."""
    if api.openapi_schema is None:
        making: asyncio.Task[Any] | None = getattr(api.state, "making_openapi", None)
        if making is None:
            making = api.state.making_openapi = asyncio.ensure_future(asyncio.to_thread(document, api))
        await asyncio.shield(making)


def document(api: FastAPI) -> dict[str, Any]:
    """The OpenAPI document of all that is served, made once."""
    if api.openapi_schema is None:
        api.openapi_schema = _build(api)
    return api.openapi_schema


def methods(api: FastAPI, path: str) -> list[str]:
    """The methods that a path takes, for Allow (the framework knows only those of the first route that it meets)."""
    paths = document(api)["paths"]
    found = {method.upper() for template, item in paths.items() if _matches(template, path) for method in item}
    return sorted(found or {"GET"})


def _matches(template: str, path: str) -> bool:
    parts, given = template.split("/"), path.split("/")
    return len(parts) == len(given) and all(
        one.startswith("{") or one == other for one, other in zip(parts, given, strict=True)
    )


def _build(api: FastAPI) -> dict[str, Any]:
    spec = get_openapi(title=api.title, version=api.version, description=DESCRIPTION, routes=api.routes)
    spec["paths"]["/v1/keys/verify"] = {"post": _verify()}
    components = spec.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    _, own = models_json_schema(
        [(ProblemDetails, "serialization"), (VerifyIn, "validation"), (VerifyOut, "serialization")], ref_template=REF
    )
    schemas.update(own["$defs"])
    _hoist(spec, schemas)
    for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's own error shape, which is never sent
        schemas.pop(name, None)
    for schema in schemas.values():
        if "limit" in schema.get("properties", {}) and "resource" in schema["properties"]:
            schema["properties"]["limit"] = {"type": "number", "title": "Limit", "minimum": 0, "maximum": 10**15}
    components["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer", "description": "A management key."}}
    for path, item in spec["paths"].items():
        for method, operation in item.items():
            _complete(path, method, operation)
    spec["paths"] = dict(sorted(spec["paths"].items()))
    return spec


def _complete(path: str, method: str, operation: dict[str, Any]) -> None:
    """What holds for every operation: authentication, errors, headers."""
    operation["responses"].pop("422", None)
    operation["responses"]["default"] = _PROBLEM
    if path.startswith("/v1") or path == "/stats":
        operation["security"] = [{"bearer": []}]
    if path.startswith("/v1"):
        parameters = operation.setdefault("parameters", [])
        named = {parameter["name"] for parameter in parameters}
        wanted = ["X-Request-Id"] + (["Idempotency-Key"] if method in ("post", "put", "patch", "delete") else [])
        parameters += header(*(name for name in wanted if name not in named))


def _verify() -> dict[str, Any]:
    return {
        "tags": ["keys"],
        "summary": "Verify a key",
        "description": "Whether a key may be used now, for this cost. If so, all its limits are debited, durably, "
        "before the answer; if not, none is. An authorised caller is always answered 200.",
        "operationId": "verify_key",
        **request_body({"$ref": REF.format(model="VerifyIn")}),
        "responses": {
            "200": {
                "description": "The decision",
                "content": {"application/json": {"schema": {"$ref": REF.format(model="VerifyOut")}}},
            }
        },
    }


def _hoist(value: Any, schemas: dict[str, Any]) -> None:
    """Move the `$defs` that schemas brought with them to the components."""
    if isinstance(value, dict):
        for name, schema in value.pop("$defs", {}).items():
            if name not in schemas:
                schemas[name] = schema
                _hoist(schema, schemas)
        for item in list(value.values()):
            _hoist(item, schemas)
    elif isinstance(value, list):
        for item in value:
            _hoist(item, schemas)
