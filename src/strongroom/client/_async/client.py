"""The client of a server: its connections, and one attribute for each noun."""

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
from .tenants import AsyncTenants
from .transport import AsyncTransport
from .usage import AsyncUsage
from .webhooks import AsyncWebhooks
from .writes import AsyncWrites

TIMEOUT_S = 10.0
DEFAULT_RETRIES = Retries()


class AsyncClient:
    """A Strongroom server over HTTP. Use it as a context manager, one for the whole program.

    `key` is a management key; without it only `stats` of a key and the server's health are available. `timeout_s`
    bounds each try of a call; `retries` sets the number of tries. `http` is your own httpx client, for proxies,
    certificates or tests; you close it.

    Raises the server's errors, classes of `strongroom.errors`; NoAnswer (an Unavailable) without an answer.
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
        self.tenants = AsyncTenants(self._http)
        self.writes = AsyncWrites(self._http)

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
        """The statistics of `key`, or of the client's own key. Raises Unauthenticated."""
        return decode(OwnStats, await self._http.send("GET", "/stats", headers=bearer(key)))

    async def alive(self) -> bool:
        """Whether the server's process answers. Raises NoAnswer if it does not."""
        await self._http.send("GET", "/healthz")
        return True

    async def ready(self) -> Readiness:
        """Whether the server can answer requests, and the state of its dependencies."""
        return decode(Readiness, await self._http.send("GET", "/readyz", accept=(503,)))

    async def metrics(self) -> str:
        """The metrics of one of the server's processes, in Prometheus' text format."""
        return (await self._http.send("GET", "/metrics")).decode()

    async def openapi(self) -> dict[str, Any]:
        """The server's OpenAPI document."""
        return decode(dict[str, Any], await self._http.send("GET", "/openapi.json"))
