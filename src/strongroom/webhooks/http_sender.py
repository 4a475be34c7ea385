"""Sends one webhook over HTTP: to a checked address, within a timeout, with a bound on the response that is read.

The sender uses no proxy, follows no redirect, and keeps no cookie and no connection. Each attempt resolves the name,
checks every address and connects to a checked address; TLS and the Host header still name the host. So the name cannot
resolve to another address between check and connection (DNS rebinding), and the certificate is verified as usual.
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
MAX_RESPONSE_BYTES = 65_536
MAX_TRIED_ADDRESSES = 4
MAX_ERROR_CHARS = 300
GONE = 410
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SendResult:
    """The result of one attempt: the HTTP status, or the `error` that prevented one. `retry_after_s`: the seconds of
    the receiver's Retry-After header."""

    status: int | None
    error: str | None = None
    retry_after_s: float | None = None

    @property
    def accepted(self) -> bool:
        return self.status is not None and 200 <= self.status < 300


class HttpSender:
    """Sends webhooks. It opens at the first use, because httpx is an optional dependency; `close` it after use.

    `resolver` resolves host names. `tls` names the trusted authorities (default: httpx's own, and SSL_CERT_FILE).
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
        """The maximum duration of one attempt."""
        return self._total_timeout_s

    async def check(self, url: str, *, allow_private: bool) -> None:
        """Check that webhooks may be sent to a URL. A name that does not resolve now passes, because every attempt
        checks again. Raises InvalidInput, which names the field `url`."""
        target = parse_url(url, allow_private=allow_private)
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                await addresses_of(target, allow_private=allow_private, resolver=self._resolver)
        except Refused as refused:
            raise InvalidInput([Problem("url", str(refused))]) from None
        except (OSError, UnicodeError) as error:  # TimeoutError is an OSError
            _log.info("the webhook's host %s cannot be resolved at the moment: %s", target.host, error)

    async def send(self, url: str, headers: Mapping[str, str], body: bytes, *, allow_private: bool) -> SendResult:
        """Send once. Failures of the receiver and the network become a result. Raises ConfigError without httpx."""
        transport = await self._opened()
        try:
            async with asyncio.timeout(self._total_timeout_s):
                target = parse_url(url, allow_private=allow_private)
                found = await addresses_of(target, allow_private=allow_private, resolver=self._resolver)
                return await self._to_any(transport, target, found[:MAX_TRIED_ADDRESSES], headers, body)
        except TimeoutError:
            return SendResult(None, f"no answer within {self._total_timeout_s:g} s")
        except (Refused, InvalidInput) as refused:
            return SendResult(None, str(refused)[:MAX_ERROR_CHARS])
        except (OSError, UnicodeError) as error:
            return SendResult(None, f"the host cannot be resolved: {error}"[:MAX_ERROR_CHARS])

    async def close(self) -> None:
        if self._transport is not None:
            await self._transport.aclose()
            self._transport = None

    async def _opened(self) -> httpx.AsyncHTTPTransport:
        async with self._opening:
            if self._transport is None:
                # The import and the certificates take a tenth of a second: off the loop.
                self._transport = await asyncio.to_thread(_transport, self._tls)
            return self._transport

    async def _to_any(
        self,
        transport: httpx.AsyncHTTPTransport,
        target: Target,
        addresses: list[str],
        headers: Mapping[str, str],
        body: bytes,
    ) -> SendResult:
        """Try the addresses in turn until a connection succeeds."""
        import httpx

        result = SendResult(None, "no address")
        for address in addresses:
            try:
                return await self._to(transport, target, address, headers, body)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                result = SendResult(None, f"cannot connect: {_message(error)}")
            except httpx.HTTPError as error:
                return SendResult(None, f"no whole answer: {_message(error)}")
            except httpx.InvalidURL as error:
                return SendResult(None, f"is not a URL: {_message(error)}")
        return result

    async def _to(
        self,
        transport: httpx.AsyncHTTPTransport,
        target: Target,
        address: str,
        headers: Mapping[str, str],
        body: bytes,
    ) -> SendResult:
        import httpx

        url = httpx.URL(scheme=target.scheme, host=address, port=target.port, raw_path=target.path.encode())
        named = {"host": target.authority, "connection": "close", "accept": "*/*", "accept-encoding": "identity"}
        timeout = httpx.Timeout(self._total_timeout_s, connect=self._connect_timeout_s).as_dict()
        extensions = {"sni_hostname": target.host, "timeout": timeout}
        request = httpx.Request("POST", url, headers={**named, **headers}, content=body, extensions=extensions)
        response = await transport.handle_async_request(request)
        try:
            # The body is neither stored nor shown. It is read because some receivers fail when the connection closes
            # before they have sent it.
            size = 0
            async for chunk in response.aiter_raw():
                size += len(chunk)
                if size >= MAX_RESPONSE_BYTES:
                    break
            return SendResult(response.status_code, None, _retry_after_s(response.headers.get("retry-after")))
        finally:
            await response.aclose()


def _transport(tls: ssl.SSLContext | None) -> httpx.AsyncHTTPTransport:
    """httpx's transport without its client: no redirects, no cookies, no proxy from the environment, no log of URLs
    (a URL may contain a secret)."""
    require_httpx()
    import httpx

    return httpx.AsyncHTTPTransport(
        verify=tls if tls is not None else httpx.create_ssl_context(),
        # httpx finds a kept connection by its address, so it could serve another host name.
        limits=httpx.Limits(max_keepalive_connections=0),
        trust_env=False,
    )


def require_httpx() -> None:
    """Raise ConfigError, with the command that installs httpx, if it is missing. Does not import it."""
    if importlib.util.find_spec("httpx") is None:
        raise ConfigError("webhooks are delivered with httpx: pip install 'strongroom[client]'")


def _message(error: Exception) -> str:
    return (str(error) or type(error).__name__)[:MAX_ERROR_CHARS]


def _retry_after_s(value: str | None) -> float | None:
    """The Retry-After header in seconds from now, from either of its two forms (RFC 9110); None if it has neither."""
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
