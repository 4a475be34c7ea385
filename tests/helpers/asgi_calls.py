"""ASGI applications called in this process, and checks of their refusals, for the tests of the integrations."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import httpx

from strongroom.integrations.asgi import ASGIApp, Message, Receive, Scope, Send
from tests.helpers.waiting import PATIENCE_S

JSON = dict[str, Any]
_ITEM = re.compile(r'^"((?:[^"\\]|\\.)*)"((?:;[a-z]+=(?:\d+|"[^"]*"))+)$')
REQUESTS = {"resource": "requests", "limit": 2, "window": {"kind": "rolling", "seconds": 3600}}


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with the key that it was let in with."""
    answer = scope.get("strongroom.key")
    body = json.dumps({"key_id": answer.key_id if answer is not None else None}).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": body})


def client(app: Any, address: str = "192.0.2.7", **options: Any) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, client=(address, 4_000), **options)
    return httpx.AsyncClient(transport=transport, base_url="http://api.test")


def bearer(text: str) -> dict[str, str]:
    return {"authorization": f"Bearer {text}"}


def check_refusal(answer: Any, status: int, code: str) -> JSON:
    """A refusal is a problem document with its headers, whatever framework it comes through. Gives the document."""
    headers: Mapping[str, str] = answer.headers
    assert answer.status_code == status, (answer.status_code, answer.content)
    assert headers["content-type"] == "application/problem+json"
    assert headers["cache-control"] == "no-store"
    document: JSON = json.loads(answer.content)
    assert document["status"] == status
    assert document["code"] == code
    assert document["type"]
    assert document["title"]
    assert document["detail"]
    assert ("WWW-Authenticate" in headers) == (status == 401)
    if status == 503:
        assert int(headers["Retry-After"]) >= 1
    if status == 429:
        assert document["violated-policies"]
        policies, states = fields(headers["RateLimit-Policy"]), fields(headers["RateLimit"])
        assert set(document["violated-policies"]) <= set(policies) | {"cost"}
        assert set(policies) == set(states)
    return document


def fields(header: str) -> dict[str, dict[str, int | str]]:
    """A RateLimit header by its items (a List of Strings with parameters, RFC 9651)."""
    found: dict[str, dict[str, int | str]] = {}
    for item in header.split(", "):
        match = _ITEM.match(item)
        assert match, item
        parameters = (pair.split("=") for pair in match[2][1:].split(";"))
        found[match[1]] = {name: int(value) if value.isdigit() else value.strip('"') for name, value in parameters}
    return found


@asynccontextmanager
async def lifespan(app: ASGIApp) -> AsyncIterator[JSON]:
    """Start an application as a server does, and stop it. Gives the state that requests begin with."""
    state: JSON = {}
    sent: asyncio.Queue[Message] = asyncio.Queue()
    received: asyncio.Queue[Message] = asyncio.Queue()
    scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": state}
    task = asyncio.ensure_future(app(scope, received.get, sent.put))
    await received.put({"type": "lifespan.startup"})
    started = await asyncio.wait_for(sent.get(), PATIENCE_S)
    if started["type"] != "lifespan.startup.complete":
        await asyncio.wait_for(asyncio.wait([task]), PATIENCE_S)
        raise RuntimeError(started["message"])
    yield state
    await received.put({"type": "lifespan.shutdown"})
    stopped = await asyncio.wait_for(sent.get(), PATIENCE_S)
    assert stopped["type"] == "lifespan.shutdown.complete", stopped
    await asyncio.wait_for(task, PATIENCE_S)


def websocket(path: str = "/live", headers: Mapping[str, str] | None = None, **more: Any) -> Scope:
    return {
        "type": "websocket",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "scheme": "ws",
        "client": ("192.0.2.7", 4_000),
        "headers": [(name.encode(), value.encode()) for name, value in (headers or {}).items()],
        **more,
    }


async def speak(app: ASGIApp, scope: Scope) -> list[Message]:
    """Open a WebSocket and close it; what the application sent."""
    sent: list[Message] = []
    incoming: list[Message] = [{"type": "websocket.disconnect", "code": 1000}, {"type": "websocket.connect"}]

    async def receive() -> Message:
        return incoming.pop()

    async def send(message: Message) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return sent
