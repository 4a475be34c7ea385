"""Every answer that the tests see is held against the OpenAPI document: its status, headers, media type and body."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any
from urllib.parse import parse_qsl, quote, unquote

import httpx
import jsonschema_rs

from strongroom import Entity
from strongroom.server import openapi

JSON = dict[str, Any]
UNDESCRIBED = ("/openapi.json", "/docs")
"""What is served beside the API."""
TOLD = ("etag", "location", "retry-after", "www-authenticate", "x-request-id")
"""Headers that an answer has only if the document says so."""
NDJSON = "application/x-ndjson"
_BASE = "urn:strongroom:openapi"


class Contract:
    """One OpenAPI document. Its validators are compiled at their first use."""

    def __init__(self, document: JSON) -> None:
        self.document = document
        self._registry = jsonschema_rs.Registry([(_BASE, document)])
        self._validators: dict[str, Any] = {}
        self._operations = [
            (len(re.findall(r"\{", path)), re.compile(_pattern(path)), path, item)
            for path, item in document["paths"].items()
        ]
        self._operations.sort(key=lambda one: one[0])  # a path with fewer parameters is the better match

    def operation(self, method: str, path: str) -> tuple[str, JSON] | None:
        """Its template and what the document says of it."""
        for _, pattern, template, item in self._operations:
            if pattern.fullmatch(path) and (method in item or (method == "head" and "get" in item)):
                return template, item.get(method) or item["get"]
        return None

    def check(self, method: str, path: str, status: int, headers: Mapping[str, str], body: bytes | None) -> None:
        """Fail unless the answer is one that the document describes. `body`: None where it is a stream."""
        if path in UNDESCRIBED:
            return
        found = self.operation(method.lower(), path)
        where = f"{method} {path} → {status} {body[:2_000] if body is not None else '…'!r}"
        if found is None or status == 405:
            assert status >= 400, f"{where}: the document has no such operation"
            assert ("allow" in headers) == (status == 405), where
            if method != "HEAD":
                self._conforms("#/components/schemas/ProblemDetails", json.loads(body or b"null"), where)
            return
        template, operation = found
        pointer = f"#/paths/{_step(template)}/{method.lower()}/responses/{status}"
        answer = operation["responses"].get(str(status))
        assert answer is not None, f"{where}: the document has no such status, only {list(operation['responses'])}"
        if "$ref" in answer:
            pointer = answer["$ref"]
            answer = self.document["components"]["responses"][pointer.rpartition("/")[2]]
        self._check_headers(answer.get("headers", {}), headers, where)
        content = answer.get("content")
        if content is None:
            assert not body, f"{where}: the document has no body"
            return
        media_type = headers.get("content-type", "").partition(";")[0]
        assert media_type in content, f"{where}: found {media_type!r}, the document has {list(content)}"
        if body and method != "HEAD":
            value = json.loads(body) if media_type.endswith("json") and media_type != NDJSON else body.decode()
            self._conforms(f"{pointer}/content/{_step(media_type)}/schema", value, where)

    def check_request(self, method: str, path: str, query: str, body: bytes) -> None:
        """Fail unless a request that was taken is one that the document describes."""
        found = self.operation(method.lower(), path)
        if found is None:
            return
        template, operation = found
        where = f"{method} {path}?{query} {body[:2_000]!r}, which was taken"
        known = {parameter["name"]: parameter for parameter in operation.get("parameters", ())}
        for name, _ in parse_qsl(query, keep_blank_values=True):
            assert name in known or "__" in name, f"{where}: the document has no parameter {name!r}"
        content = operation.get("requestBody", {}).get("content", {})
        if body and content:
            pointer = f"#/paths/{_step(template)}/{method.lower()}/requestBody/content/application~1json/schema"
            self._conforms(pointer, json.loads(body), where)

    def check_event(self, path: str, event: str, data: str) -> None:
        """Fail unless an event of a stream is one that the document describes."""
        found = self.operation("get", path)
        assert found is not None, path
        events = found[1]["x-events"]
        assert event in events, f"{path}: the document has no event {event!r}"
        self._conforms(events[event]["$ref"], json.loads(data), f"{path} {event} {data[:2_000]}")

    def check_direct(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        """Fail unless an answer on a connection that carries verifications, of whose request no more is known, is a
        decision or an error."""
        if status == 200 and b'"valid"' in body and b"reservation_id" not in body:
            self.check("POST", "/v1/keys/verify", status, headers, body)
        elif headers.get("content-type") == "application/problem+json":
            self._conforms("#/components/schemas/ProblemDetails", json.loads(body), f"{status} {body[:2_000]!r}")

    def _check_headers(self, described: JSON, headers: Mapping[str, str], where: str) -> None:
        known = {name.lower(): header for name, header in described.items()}
        for name, header in known.items():
            value = headers.get(name)
            assert value is not None or not header.get("required"), f"{where}: the header {name} is missing"
            if value is not None:
                schema = header["schema"]
                found = int(value) if schema["type"] == "integer" else value
                problems = [error.message for error in jsonschema_rs.iter_errors(schema, found)]
                assert not problems, f"{where}: the header {name}: {problems}"
        for name in TOLD:
            assert name in known or name not in headers, f"{where}: the document has no header {name}"

    def _conforms(self, pointer: str, value: Any, where: str) -> None:
        validator = self._validators.get(pointer)
        if validator is None:
            validator = self._validators[pointer] = jsonschema_rs.Draft202012Validator(
                {"$ref": f"{_BASE}{quote(pointer, safe='#/~:')}"}, registry=self._registry, validate_formats=True
            )
        if not validator.is_valid(value):
            problems = "; ".join(f"{list(e.instance_path)}: {e.message[:300]}" for e in validator.iter_errors(value))
            raise AssertionError(f"{where} is not as the document says: {problems}")


def _pattern(path: str) -> str:
    parts = re.split(r"(\{[^}]+\})", path)
    return "".join("[^/]+" if part.startswith("{") else re.escape(part) for part in parts)


def _step(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")


# --- Where answers come from --------------------------------------------------------------------------------------

_CONTRACTS: dict[tuple[type[Entity], ...], Contract] = {}
_PROCESSES: dict[int, Contract] = {}
_OURS: set[int] = set()


def contract_of(api: Any, entities: Iterable[type[Entity]]) -> Contract:
    """The contract of an application with these entities, made once a process."""
    key = tuple(entities)
    if key not in _CONTRACTS:
        _CONTRACTS[key] = Contract(openapi.document(api))
    return _CONTRACTS[key]


@cache
def _contract_of_text(text: bytes) -> Contract:
    return Contract(json.loads(text))


def of_process(port: int) -> Contract:
    """The contract of a server process on this port, by the document that it serves itself."""
    if port not in _PROCESSES:
        answer = httpx.get(f"http://127.0.0.1:{port}/openapi.json", timeout=60)
        assert answer.status_code == 200, answer.text
        _PROCESSES[port] = _contract_of_text(answer.content)
    return _PROCESSES[port]


def watch_process(port: int) -> None:
    """A server process of ours listens on this port: what the clients of `checked_if_ours` get there is looked at."""
    _OURS.add(port)


def forget_process(port: int) -> None:
    _OURS.discard(port)
    _PROCESSES.pop(port, None)


def _body(response: httpx.Response) -> bytes | None:
    return None if response.headers.get("content-type", "").startswith("text/event-stream") else response.content


def _hold(contract: Contract, response: httpx.Response) -> None:
    request = response.request
    path = unquote(request.url.raw_path.partition(b"?")[0].decode().replace("%2F", "%252F").replace("%2f", "%252F"))
    contract.check(request.method, path, response.status_code, response.headers, _body(response))
    if response.status_code < 300:
        body = request.content if hasattr(request, "_content") else b""
        contract.check_request(request.method, path, request.url.query.decode(), body)


def checked(client: httpx.AsyncClient, contract: Contract) -> None:
    """Hold every answer that this client gets against the contract."""

    async def check(response: httpx.Response) -> None:
        if not response.headers.get("content-type", "").startswith("text/event-stream"):
            await response.aread()
        _hold(contract, response)

    client.event_hooks["response"] = [*client.event_hooks["response"], check]


def checked_if_ours(client: httpx.AsyncClient | httpx.Client, port: int | None) -> None:
    """Hold every answer of this client against the document of the server process it talks to, if that is ours."""
    if port not in _OURS:
        return
    if isinstance(client, httpx.AsyncClient):
        checked(client, of_process(port))
    else:
        client.event_hooks["response"] = [*client.event_hooks["response"], checked_by_port]


def checked_by_port(response: httpx.Response) -> None:
    """A hook of a synchronous client: holds each answer against the document of the process that gave it."""
    if not response.headers.get("content-type", "").startswith("text/event-stream"):
        response.read()
    _hold(of_process(response.request.url.port or 0), response)
