# Generated from _async/client.py by `python src/strongroom/client/_unasync.py`: edit that file instead.
"""The client of a server: its connections, and one attribute for each noun."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import httpx

from ... import __version__
from .._wire import Retries, bearer, decode
from ..models import OwnStats, Readiness
from .audit import Audit
from .entities import Tenant
from .keys import Keys
from .leaks import Leaks
from .quotas import Quotas
from .reservations import Reservations
from .tenants import Tenants
from .transport import Transport
from .usage import Usage
from .webhooks import Webhooks
from .writes import Writes

TIMEOUT_S = 10.0
DEFAULT_RETRIES = Retries()


class Client:
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
        http: httpx.Client | None = None,
    ) -> None:
        self._http = Transport(
            url,
            key,
            timeout_s=timeout_s,
            retries=retries,
            http=http,
            user_agent=f"strongroom-python/{__version__}",
        )
        self.keys = Keys(self._http)
        self.usage = Usage(self._http)
        self.quotas = Quotas(self._http)
        self.reservations = Reservations(self._http)
        self.webhooks = Webhooks(self._http)
        self.leaks = Leaks(self._http)
        self.audit = Audit(self._http)
        self.tenants = Tenants(self._http)
        self.writes = Writes(self._http)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._http.url!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def tenant(self, id: str) -> Tenant:
        """One tenant's data: `client.tenant("acme").collection("notes")`."""
        return Tenant(self._http, id)

    def stats(self, key: str | None = None) -> OwnStats:
        """The statistics of `key`, or of the client's own key. Raises Unauthenticated."""
        return decode(OwnStats, self._http.send("GET", "/stats", headers=bearer(key)))

    def alive(self) -> bool:
        """Whether the server's process answers. Raises NoAnswer if it does not."""
        self._http.send("GET", "/healthz")
        return True

    def ready(self) -> Readiness:
        """Whether the server can answer requests, and the state of its dependencies."""
        return decode(Readiness, self._http.send("GET", "/readyz", accept=(503,)))

    def metrics(self) -> str:
        """The metrics of one of the server's processes, in Prometheus' text format."""
        return (self._http.send("GET", "/metrics")).decode()

    def openapi(self) -> dict[str, Any]:
        """The server's OpenAPI document."""
        return decode(dict[str, Any], self._http.send("GET", "/openapi.json"))
