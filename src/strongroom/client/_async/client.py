"""The client of a server: its connections, and what it has, noun by noun."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import httpx

from ... import __version__
from .._wire import Retries, bearer, decode
from ..models import OwnStats, Readiness
from .audit import AsyncAudit
from .entities import AsyncTenant
from .keys import AsyncKeys
from .leaks import AsyncLeaks
from .quotas import AsyncQuotas
from .reservations import AsyncReservations
from .transport import AsyncTransport
from .usage import AsyncUsage
from .webhooks import AsyncWebhooks

TIMEOUT_S = 10.0
DEFAULT_RETRIES = Retries()


class AsyncClient:
    """A Strongroom server over HTTP. Use it as a context manager, one for the whole program.

    `key` is a management key; without one only `stats` of a key and the server's health can be asked for. `timeout_s`
    bounds each try of a call, `retries` says how many there are. `http` is a client of httpx to be used instead of
    one of its own, for proxies, certificates or tests; it stays the caller's to close.

    Raises the errors of `strongroom.errors` that the server raised; NoAnswer (an Unavailable) if it did not answer.
    """

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        timeout_s: float = TIMEOUT_S,
        retries: Retries = DEFAULT_RETRIES,
        http: httpx.AsyncClient | None = None,
    ) -> None:
        self._http = AsyncTransport(
            url,
            key,
            timeout_s=timeout_s,
            retries=retries,
            http=http,
            user_agent=f"strongroom-python/{__version__}",
        )
        self.keys = AsyncKeys(self._http)
        self.usage = AsyncUsage(self._http)
        self.quotas = AsyncQuotas(self._http)
        self.reservations = AsyncReservations(self._http)
        self.webhooks = AsyncWebhooks(self._http)
        self.leaks = AsyncLeaks(self._http)
        self.audit = AsyncAudit(self._http)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._http.url!r})"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    def tenant(self, id: str) -> AsyncTenant:
        """One tenant's data: `client.tenant("acme").collection("notes")`."""
        return AsyncTenant(self._http, id)

    async def stats(self, key: str | None = None) -> OwnStats:
        """The statistics of the key that asks: `key`, or else the client's own. Raises Unauthenticated."""
        return decode(OwnStats, await self._http.send("GET", "/stats", headers=bearer(key)))

    async def alive(self) -> bool:
        """Whether the server's process answers; NoAnswer is raised where it does not."""
        await self._http.send("GET", "/healthz")
        return True

    async def ready(self) -> Readiness:
        """Whether the server would answer requests, and what it stands on."""
        return decode(Readiness, await self._http.send("GET", "/readyz", accept=(503,)))

    async def metrics(self) -> str:
        """The metrics of one of the server's processes, in Prometheus' text format."""
        return (await self._http.send("GET", "/metrics")).decode()

    async def openapi(self) -> dict[str, Any]:
        """The server's description of its own interface."""
        return decode(dict[str, Any], await self._http.send("GET", "/openapi.json"))
