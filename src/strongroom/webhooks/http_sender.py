"""Sends one webhook over HTTP: to a checked address, within a time, reading little of the answer.

No proxy, no redirect, no cookie, no connection kept: each attempt resolves the name, checks every address and connects
to one of those, while TLS and the Host header keep the name. So the name cannot lead elsewhere between the check and
the connection, and a certificate is checked against the name as ever.
"""

from __future__ import annotations

import asyncio
import email.utils
import importlib.util
import logging
import math
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import ConfigError, InvalidInput, Problem
from .ssrf_guard import Refused, Resolver, Target, addresses_of, parse_url, resolve

if TYPE_CHECKING:
    import httpx

CONNECT_TIMEOUT_S = 5.0
TOTAL_TIMEOUT_S = 10.0
MAX_ANSWER_BYTES = 65_536
MAX_TRIED_ADDRESSES = 4
MAX_ERROR_CHARS = 300
GONE = 410
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of an attempt: the status if there was one, and otherwise why there was none. `retry_after_s`: how long
    the receiver asked to be left alone."""

    status: int | None
    error: str | None = None
    retry_after_s: float | None = None

    @property
    def accepted(self) -> bool:
        return self.status is not None and 200 <= self.status < 300


class Sender:
    """Sends webhooks. Opened lazily, because httpx is; `close` after use.

    `resolver`: how names are resolved. `tls`: whom to trust (by default what httpx does, SSL_CERT_FILE included).
    """

    def __init__(
        self,
        *,
        resolver: Resolver = resolve,
        tls: ssl.SSLContext | None = None,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        total_timeout_s: float = TOTAL_TIMEOUT_S,
    ) -> None:
        self._resolver = resolver
        self._tls = tls
        self._connect_timeout_s = connect_timeout_s
        self._total_timeout_s = total_timeout_s
        self._transport: httpx.AsyncHTTPTransport | None = None
        self._opening = asyncio.Lock()

    @property
    def total_timeout_s(self) -> float:
        """The longest that an attempt takes."""
        return self._total_timeout_s

    async def check(self, url: str, *, allow_private: bool) -> None:
        """Whether a URL may be sent to, as far as can be told now: a name that cannot be resolved at the moment may,
        since each attempt looks again. Raises InvalidInput, which names the field `url`."""
        target = parse_url(url, allow_private=allow_private)
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                await addresses_of(target, allow_private=allow_private, resolver=self._resolver)
        except Refused as refused:
            raise InvalidInput([Problem("url", str(refused))]) from None
        except (OSError, UnicodeError) as error:  # TimeoutError is an OSError
            _log.info("the webhook's host %s cannot be resolved at the moment: %s", target.host, error)

    async def send(self, url: str, headers: Mapping[str, str], body: bytes, *, allow_private: bool) -> Answer:
        """One attempt; whatever the receiver and the network do is an answer. Raises ConfigError without httpx."""
        transport = await self._opened()
        try:
            async with asyncio.timeout(self._total_timeout_s):
                target = parse_url(url, allow_private=allow_private)
                found = await addresses_of(target, allow_private=allow_private, resolver=self._resolver)
                return await self._to_any(transport, target, found[:MAX_TRIED_ADDRESSES], headers, body)
        except TimeoutError:
            return Answer(None, f"no answer within {self._total_timeout_s:g} s")
        except (Refused, InvalidInput) as refused:
            return Answer(None, str(refused)[:MAX_ERROR_CHARS])
        except (OSError, UnicodeError) as error:
            return Answer(None, f"the host cannot be resolved: {error}"[:MAX_ERROR_CHARS])

    async def close(self) -> None:
        if self._transport is not None:
            await self._transport.aclose()
            self._transport = None

    async def _opened(self) -> httpx.AsyncHTTPTransport:
        async with self._opening:
            if self._transport is None:
                # To import it and to read the certificates takes a tenth of a second.
                self._transport = await asyncio.to_thread(_transport, self._tls)
            return self._transport

    async def _to_any(
        self,
        transport: httpx.AsyncHTTPTransport,
        target: Target,
        addresses: list[str],
        headers: Mapping[str, str],
        body: bytes,
    ) -> Answer:
        """Try the addresses in turn until one can be connected to."""
        import httpx

        answer = Answer(None, "no address")
        for address in addresses:
            try:
                return await self._to(transport, target, address, headers, body)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                answer = Answer(None, f"cannot connect: {_said(error)}")
            except httpx.HTTPError as error:
                return Answer(None, f"no whole answer: {_said(error)}")
            except httpx.InvalidURL as error:
                return Answer(None, f"is not a URL: {_said(error)}")
        return answer

    async def _to(
        self,
        transport: httpx.AsyncHTTPTransport,
        target: Target,
        address: str,
        headers: Mapping[str, str],
        body: bytes,
    ) -> Answer:
        import httpx

        url = httpx.URL(scheme=target.scheme, host=address, port=target.port, raw_path=target.path.encode())
        named = {"host": target.authority, "connection": "close", "accept": "*/*", "accept-encoding": "identity"}
        timeout = httpx.Timeout(self._total_timeout_s, connect=self._connect_timeout_s).as_dict()
        extensions = {"sni_hostname": target.host, "timeout": timeout}
        request = httpx.Request("POST", url, headers={**named, **headers}, content=body, extensions=extensions)
        response = await transport.handle_async_request(request)
        try:
            # What it says does not matter, and is neither kept nor shown; but a receiver may be confused by a
            # connection that is closed before it has said it.
            size = 0
            async for chunk in response.aiter_raw():
                size += len(chunk)
                if size >= MAX_ANSWER_BYTES:
                    break
            return Answer(response.status_code, None, _retry_after_s(response.headers.get("retry-after")))
        finally:
            await response.aclose()


def _transport(tls: ssl.SSLContext | None) -> httpx.AsyncHTTPTransport:
    """httpx without its client: no redirects, no cookies, no proxy of the environment, and no log of URLs, which may be
    secrets."""
    require_httpx()
    import httpx

    return httpx.AsyncHTTPTransport(
        verify=tls if tls is not None else httpx.create_ssl_context(),
        # A kept connection is found by its address, and would be one to another name there.
        limits=httpx.Limits(max_keepalive_connections=0),
        trust_env=False,
    )


def require_httpx() -> None:
    """Raises ConfigError, which says how to get it, if httpx is not installed. It is only looked for, not imported."""
    if importlib.util.find_spec("httpx") is None:
        raise ConfigError("webhooks are delivered with httpx: pip install 'strongroom[client]'")


def _said(error: Exception) -> str:
    return (str(error) or type(error).__name__)[:MAX_ERROR_CHARS]


def _retry_after_s(value: str | None) -> float | None:
    """The header Retry-After, in seconds from now, whichever of its two forms it has; None for what is neither."""
    if value is None:
        return None
    try:
        seconds = float(value) if value.isascii() else math.nan
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (TypeError, ValueError, OverflowError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None
