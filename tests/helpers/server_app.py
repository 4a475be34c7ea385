"""The HTTP application in the test's process: over a new store, with callers, replies and streams."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Annotated, Any, cast

import httpx
from pydantic import BaseModel

from strongroom import Entity, Secret, Strongroom
from strongroom.client_address import Network
from strongroom.server import adminkey
from strongroom.server.app import DEFAULT_BOUNDS, Application, Bounds, build
from strongroom.state.model import ENTITIES
from tests.helpers.openapi_contract import (
    Contract,
    checked,
    contract_of,
)
from tests.helpers.waiting import PATIENCE_S

ADMIN = "an-administrator's-key-of-enough-characters"
TOKENS = {"resource": "tokens", "limit": 1000, "window": {"kind": "rolling", "seconds": 18000}}
JSON = dict[str, Any]


class Address(BaseModel):
    street: str
    number: int


class Account(Entity, collection="accounts", ttl="until"):
    """An entity with every kind of field that needs care in JSON."""

    owner: str
    token: Annotated[str | None, Secret()] = None
    balance: Decimal = Decimal(0)
    photo: bytes = b""
    seats: int = 1
    rate: float = 1.0
    tags: list[str] = []
    address: Address | None = None
    limit: int = 0  # called like a parameter of lists
    until: datetime | None = None


@dataclass(frozen=True)
class Served:
    """An application, and who calls it."""

    room: Strongroom
    app: Application
    client: httpx.AsyncClient
    contract: Contract
    """What each answer to `client` is held against."""

    def transport(self, peer: str | None) -> httpx.ASGITransport:
        """For a client that calls from an address (None: from a Unix socket)."""
        return httpx.ASGITransport(cast(Any, self.app), client=(peer, 1) if peer is not None else cast(Any, None))

    async def call(self, method: str, path: str, body: Any = None, *, key: str | None = ADMIN, **headers: str) -> Reply:
        """One request; `body` is bytes as they are, or a value sent as JSON. Header names are written with `_`."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        if key is not None:
            named["Authorization"] = f"Bearer {key}"
        content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        answer = await self.client.request(method, path, content=content, headers=named)
        return Reply(answer)

    async def get(self, path: str, **more: Any) -> Reply:
        return await self.call("GET", path, **more)

    async def post(self, path: str, body: Any = None, **more: Any) -> Reply:
        return await self.call("POST", path, body, **more)

    async def make_key(self, **fields: Any) -> JSON:
        """A new key with its text under `key`."""
        made = await self.post("/v1/keys", {"name": "a key", **fields})
        assert made.status == 201, made
        return dict(made.json)

    async def manager(self, scope: str, tenant: str = "*") -> str:
        """The text of a new management key."""
        made: str = (await self.make_key(tenant=tenant, permissions=[f"strongroom:{scope}"]))["key"]
        return made

    async def verify(self, text: str, *, key: str | None = ADMIN, **more: Any) -> Reply:
        return await self.post("/v1/keys/verify", {"key": text, **more}, key=key)


class Reply:
    """An answer. Every error is checked to have the one shape."""

    def __init__(self, answer: httpx.Response) -> None:
        self.answer = answer
        self.status = answer.status_code
        self.headers = answer.headers
        if self.status >= 400 and answer.request.url.path not in ("/readyz",):
            check_problem(answer)

    @property
    def json(self) -> Any:
        return json.loads(self.answer.content, parse_float=Decimal)

    @property
    def code(self) -> str:
        return str(self.json["code"])

    @property
    def paths(self) -> list[str]:
        """Where the input is wrong."""
        return sorted(item["path"] for item in self.json["errors"])

    def __repr__(self) -> str:
        return f"{self.status} {self.answer.text[:2_000]}"


def check_problem(answer: httpx.Response) -> None:
    """An error is RFC 9457's document with our own members, whatever part of the server it comes from."""
    assert answer.headers["content-type"] == "application/problem+json", (answer.status_code, answer.text)
    body = answer.json()
    assert set(body) - {"errors", "outcome", "counted", "failed"} == {
        "type",
        "title",
        "status",
        "detail",
        "code",
        "request_id",
    }, body
    assert body["status"] == answer.status_code
    assert body["type"] == f"/docs#error-{body['code']}"
    assert all(isinstance(body[name], str) and body[name] for name in ("title", "detail", "code", "request_id")), body
    assert answer.headers["x-request-id"] == body["request_id"]
    for item in body.get("errors", []):
        assert set(item) == {"path", "message"}, item
    assert ("errors" in body) == (answer.status_code == 422)
    assert ("retry-after" in answer.headers) == (answer.status_code in (429, 503, 507))
    assert ("www-authenticate" in answer.headers) == (answer.status_code == 401)


@asynccontextmanager
async def serving(
    url: str = "json://:memory:",
    *,
    bounds: Bounds = DEFAULT_BOUNDS,
    entities: Sequence[type[Entity]] = (Account,),
    proxies: Sequence[Network] = (),
    **options: Any,
) -> AsyncIterator[Served]:
    """The application in this process, with the administrator's key ADMIN. `options` as of Strongroom.open."""
    async with Strongroom.open(url, entities=(*ENTITIES, *entities), **options) as room:
        await adminkey.ensure(room, ADMIN)
        app = build(room, bounds, proxies=proxies)
        transport = httpx.ASGITransport(cast(Any, app))
        async with httpx.AsyncClient(transport=transport, base_url="http://strongroom") as client:
            contract = contract_of(app.api, room.database.registry.entities)
            checked(client, contract)
            yield Served(room, app, client, contract)


# --- Streams --------------------------------------------------------------------------------------------------


class Stream:
    """One `:watch` in this process, event by event (httpx's ASGI transport would wait for the end of it)."""

    def __init__(self, app: Application, path: str, key: str = ADMIN, **headers: str) -> None:
        self._app = app
        self._contract = contract_of(app.api, app.services.room.database.registry.entities)
        path, _, query = path.partition("?")
        named = {"authorization": f"Bearer {key}", **{n.replace("_", "-").lower(): v for n, v in headers.items()}}
        self._scope = {
            "type": "http",
            "method": "GET",
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "root_path": "",
            "scheme": "http",
            "server": ("strongroom", 80),
            "client": ("127.0.0.1", 1),
            "http_version": "1.1",
            "headers": [(n.encode(), v.encode()) for n, v in named.items()],
        }
        self._sent: asyncio.Queue[Any] = asyncio.Queue()
        self._gone = asyncio.Event()
        self.status = 0
        self.body = b""

    async def __aenter__(self) -> Stream:
        self._task = asyncio.create_task(self._app(self._scope, self._receive, self._sent.put))
        start = await asyncio.wait_for(self._sent.get(), PATIENCE_S)
        self.status = start["status"]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._gone.set()
        await asyncio.wait_for(self._task, PATIENCE_S)

    async def _receive(self) -> dict[str, Any]:
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def event(self) -> dict[str, str] | None:
        """The next event's fields (comments left out), None once the stream has ended."""
        while b"\n\n" not in self.body:
            message = await asyncio.wait_for(self._sent.get(), PATIENCE_S)
            self.body += message.get("body", b"")
            if not message.get("more_body"):
                return None
        text, _, self.body = self.body.partition(b"\n\n")
        lines = [line.partition(": ") for line in text.decode().split("\n")]
        fields = {name: value for name, _, value in lines if name}
        if "event" in fields:
            self._contract.check_event(str(self._scope["path"]), fields["event"], fields["data"])
        return fields
