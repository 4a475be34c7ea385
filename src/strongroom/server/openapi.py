"""`/openapi.json`: the complete OpenAPI document, with the bare verify route and every schema."""

from __future__ import annotations

import asyncio
from copy import deepcopy
from functools import cache
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from .docs import page
from .errors import MEDIA_TYPE, STATUS
from .schemas import REF, Components, given
from .shapes import (
    ChangeEvent,
    ProblemDetails,
    ReadyEvent,
    RemovedEvent,
    ResetEvent,
)
from .shapes_usage import VerifyOneIn, VerifyOut
from .verify import PATH as VERIFY
from .wire import Json

HTML = "text/html; charset=utf-8"
DESCRIPTION = """API keys with exact usage limits, and tenant-isolated state.

Send a management key as `Authorization: Bearer …`: one with the permission `strongroom:read`, `strongroom:write` or
`strongroom:admin` (each includes those before it), or `strongroom:auditor` (the audit trail and nothing else). The key
is bound to its tenant, or has the tenant `*` for all of them.
Every error is `application/problem+json` (RFC 9457)."""
WRITES = ("post", "put", "patch", "delete")
_ONE_ETAG = r'(W/)?"[\x21\x23-\x7e\x80-\xff]*"'
_REQUEST_HEADERS: dict[str, tuple[dict[str, Any], str]] = {
    "Idempotency-Key": (
        {"type": "string", "minLength": 1, "maxLength": 255},
        "A retry with the same key (within a day) changes nothing and gets the same answer.",
    ),
    "If-Match": (
        {"type": "string", "pattern": rf"^(\*|{_ONE_ETAG}(\s*,\s*{_ONE_ETAG}){{0,19}})$"},
        'The required version of the document, quoted (`"17"`), or `*`: it must exist. Else 412.',
    ),
    "If-None-Match": ({"type": "string", "const": "*"}, "`*`: the document must not exist yet. Else 412."),
    "Last-Event-ID": (
        {"type": "string"},
        "The `id` of the last received event: the stream continues after it. Browsers send it automatically.",
    ),
    "X-Request-Id": (
        {"type": "string"},
        "The id of this request in the journal and the answer: 1 to 128 letters, digits and "
        "`_ . : -`. Default: a generated one.",
    ),
}
_UNCHANGED = {
    "name": "If-None-Match",
    "in": "header",
    "required": False,
    "schema": {"type": "string"},
    "description": "Quoted versions, or `*`: if the document has one of them the answer is 304, without a body.",
}
_ANSWER_HEADERS: dict[str, dict[str, Any]] = {
    "ETag": {
        "description": "The document's version, quoted, for If-Match and If-None-Match.",
        "schema": {"type": "string", "pattern": '^"[1-9][0-9]*"$'},
    },
    "Location": {
        "description": "The path of the new resource.",
        "schema": {"type": "string", "format": "uri-reference", "pattern": "^/v1/"},
    },
    "Retry-After": {"description": "Seconds to wait.", "schema": {"type": "integer", "minimum": 1}},
    "WWW-Authenticate": {"description": "`Bearer`.", "schema": {"type": "string", "pattern": "^Bearer "}},
    "X-Request-Id": {
        "description": "The name of this request, as in the journal.",
        "schema": {"type": "string", "pattern": "^[A-Za-z0-9_.:-]{1,128}$"},
    },
}
_OF_EVERY_REQUEST = (
    "malformed_request",
    "too_large",
    "too_many_requests",
    "headers_too_large",
    "internal",
    "unavailable",
)
"""Errors of any request, on any path."""
_OF_THE_API = (
    "unauthenticated",
    "denied",
    "tenant_suspended",
    "invalid_input",
    "store_error",
    "schema_error",
    "config_error",
    "storage_full",
)
_OF_WRITES = ("conflict", "writes_off")
RETRY_LATER = (429, 503, 507)


def version() -> str:
    from .. import __version__

    return __version__


def body(model: type[BaseModel], *, required: bool = True) -> dict[str, Any]:
    """The description of the body of a route that reads its body itself (`openapi_extra`)."""
    return request_body(deepcopy(_schema(model)), required=required)


@cache
def _schema(model: type[BaseModel]) -> dict[str, Any]:
    return model.model_json_schema(ref_template=REF)


def request_body(schema: dict[str, Any], *, required: bool = True) -> dict[str, Any]:
    return {"requestBody": {"required": required, "content": {"application/json": {"schema": schema}}}}


def header(*names: str) -> list[dict[str, Any]]:
    """Request headers as OpenAPI parameters."""
    return [
        {"name": name, "in": "header", "required": False, "schema": schema, "description": description}
        for name, (schema, description) in ((name, _REQUEST_HEADERS[name]) for name in names)
    ]


def takes(*names: str) -> dict[str, Any]:
    """The request headers that a route reads (`openapi_extra`)."""
    return {"parameters": header(*names)}


def tells(*names: str, status: int = 200) -> dict[str, Any]:
    """The headers of a route's answer with this status (`openapi_extra`)."""
    return {"responses": {str(status): {"headers": answer_headers(*names)}}}


def may_be_unchanged(*, always: bool = True) -> dict[str, Any]:
    """A route whose answer is one document, or 304 for a caller that has it (`openapi_extra`). `always`: every answer
    has an ETag."""
    unchanged = {"description": "Unchanged.", "headers": answer_headers("ETag")}
    headers = answer_headers("ETag") if always else {"ETag": {**_ANSWER_HEADERS["ETag"], "required": False}}
    return {
        "parameters": [_UNCHANGED],
        "responses": {"200": {"headers": headers}, "304": unchanged},
    }


def may_fail(*codes: str) -> dict[str, Any]:
    """The errors of a route, beside the errors of all routes of its kind (`openapi_extra`)."""
    return {"x-errors": list(codes)}


def about(*parts: dict[str, Any]) -> dict[str, Any]:
    """Several descriptions as one."""
    whole: dict[str, Any] = {}
    for part in parts:
        _merge(whole, part)
    return whole


def _merge(whole: dict[str, Any], part: dict[str, Any]) -> None:
    for name, value in part.items():
        if isinstance(value, dict):
            _merge(whole.setdefault(name, {}), value)
        elif isinstance(value, list):
            whole[name] = [*whole.get(name, ()), *value]
        else:
            whole[name] = value


def answer_headers(*names: str) -> dict[str, Any]:
    return {name: {**_ANSWER_HEADERS[name], "required": True} for name in names}


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
    """Build the document once, on a thread: it takes a few hundred milliseconds, which would block other requests."""
    if api.openapi_schema is None:
        making: asyncio.Task[Any] | None = getattr(api.state, "making_openapi", None)
        if making is None:
            making = api.state.making_openapi = asyncio.ensure_future(asyncio.to_thread(document, api))
        await asyncio.shield(making)


def document(api: FastAPI) -> dict[str, Any]:
    """The OpenAPI document of all routes, built once."""
    if api.openapi_schema is None:
        api.openapi_schema = _build(api)
    return api.openapi_schema


def methods(api: FastAPI, path: str) -> list[str]:
    """The methods of a path, for Allow. The framework knows only the methods of the first matching route."""
    paths = document(api)["paths"]
    found = {method.upper() for template, item in paths.items() if _matches(template, path) for method in item}
    found = found or {"GET"}
    return sorted(found | {"HEAD"} if "GET" in found and not path.endswith(":watch") else found)


def _matches(template: str, path: str) -> bool:
    parts, given = template.split("/"), path.split("/")
    return len(parts) == len(given) and all(
        one.startswith("{") or one == other for one, other in zip(parts, given, strict=True)
    )


def _build(api: FastAPI) -> dict[str, Any]:
    spec = get_openapi(title=api.title, version=api.version, description=DESCRIPTION, routes=api.routes)
    spec["paths"]["/v1/keys/verify"] = {"post": _verify()}
    schemas = spec.setdefault("components", {}).setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's error shape, which this server never sends
        schemas.pop(name, None)
    components = Components(schemas)
    models = (ProblemDetails, VerifyOut, ReadyEvent, ChangeEvent, RemovedEvent, ResetEvent)
    answers = [(model, "serialization") for model in models]
    _, own = models_json_schema(answers, ref_template=REF)  # type: ignore[arg-type]
    components.answer(own)
    errors: dict[str, Any] = {}
    for path, item in spec["paths"].items():
        for method, operation in item.items():
            _complete(path, method, operation, components, errors)
    spec["components"] = {
        "schemas": dict(sorted(schemas.items())),
        "responses": dict(sorted(errors.items())),
        "securitySchemes": _SECURITY,
    }
    spec["paths"] = dict(sorted(spec["paths"].items()))
    return spec


_SECURITY = {
    "bearer": {
        "type": "http",
        "scheme": "bearer",
        "description": "A management key, or a JWT.",
    },
    "key": {"type": "http", "scheme": "bearer", "description": "The API key itself."},
    "signature": {
        "type": "apiKey",
        "in": "header",
        "name": "Github-Public-Key-Signature",
        "description": "The signature of the body, by the key in `Github-Public-Key-Identifier`.",
    },
}
_SECURED: dict[str, list[dict[str, list[str]]]] = {
    "/stats": [{"key": []}],
    "/readyz": [{}, {"bearer": []}],
    "/v1/keys/leaked": [{"bearer": []}, {"signature": []}],
}
"""Paths with another authentication than a management key."""


def _complete(
    path: str, method: str, operation: dict[str, Any], components: Components, errors: dict[str, Any]
) -> None:
    """Add to every operation its authentication, errors, headers and named schemas."""
    answers = operation["responses"]
    answers.pop("422", None)
    is_api = path.startswith("/v1")
    if is_api or path in _SECURED:
        operation["security"] = _SECURED.get(path, [{"bearer": []}])
    parameters = [given(parameter) for parameter in operation.get("parameters", ())]
    if is_api:
        wanted = ["X-Request-Id"] + (["Idempotency-Key"] if method in WRITES else [])
        parameters += header(*wanted)
    for parameter in parameters:
        if parameter["in"] == "path" and parameter["schema"].get("type") == "string":
            parameter["schema"].setdefault("minLength", 1)
    if parameters:
        operation["parameters"] = parameters
    for media in operation.get("requestBody", {}).get("content", {}).values():
        media["schema"] = components.request(media["schema"])
    for answer in answers.values():
        if path != VERIFY:  # the verify route has none, to stay fast
            answer["headers"] = {**answer_headers("X-Request-Id"), **answer.get("headers", {})}
        for media in answer.get("content", {}).values():
            media["schema"] = components.answer(media["schema"])
    for status, codes in _failures(path, method, operation, {parameter["name"] for parameter in parameters}).items():
        name = "-or-".join(codes)
        errors.setdefault(name, _failure(status, codes))
        if str(status) in answers:  # `/readyz`, whose 503 may be of either kind
            answers[str(status)]["content"].update(errors[name]["content"])
        else:
            answers[str(status)] = {"$ref": f"#/components/responses/{name}"}


def _failures(path: str, method: str, operation: dict[str, Any], named: set[str]) -> dict[int, list[str]]:
    """The errors of an operation: by status, its codes."""
    codes = {*_OF_EVERY_REQUEST, *operation.pop("x-errors", ())}
    if path.startswith("/v1"):
        codes |= {*_OF_THE_API, *(_OF_WRITES if method in WRITES else ())}
    elif path == "/stats":
        codes |= {*_OF_THE_API} - {"denied", "invalid_input"}
    if "{id}" in path or "{name}" in path or "{kind}" in path:
        codes.add("not_found")
    if "If-Match" in named:
        codes.add("precondition_failed")
    found: dict[int, list[str]] = {}
    for code, status in STATUS.items():
        if code in codes:
            found.setdefault(status, []).append(code)
    return found


def _failure(status: int, codes: list[str]) -> dict[str, Any]:
    members: dict[str, Any] = {"status": {"const": status}, "code": {"enum": codes}}
    schema = {
        "allOf": [{"$ref": REF.format(model="ProblemDetails")}],
        "properties": members,
        **({"required": ["errors"]} if status == 422 else {}),
    }
    headers = ["X-Request-Id"]
    headers += ["WWW-Authenticate"] if status == 401 else []
    headers += ["Retry-After"] if status in RETRY_LATER else []
    return {
        "description": " or ".join(f"`{code}`" for code in codes),
        "headers": answer_headers(*headers),
        "content": {MEDIA_TYPE: {"schema": schema}},
    }


def _verify() -> dict[str, Any]:
    return {
        "tags": ["keys"],
        "summary": "Verify a key",
        "description": "Decides whether a key may be used now, for this cost. If so, all its limits are debited "
        "durably before the answer; if not, none is. An authorised caller always gets 200.",
        "operationId": "verify_key",
        **body(VerifyOneIn),
        "responses": {
            "200": {
                "description": "The decision",
                "content": {"application/json": {"schema": {"$ref": REF.format(model="VerifyOut")}}},
            }
        },
    }
