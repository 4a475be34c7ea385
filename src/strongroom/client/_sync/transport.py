# Generated from _async/transport.py by `python src/strongroom/client/_unasync.py`: edit that file instead.
"""One call to the server: sent, retried where this is safe, and answered with a value or the server's error."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar
from urllib.parse import urlencode

import httpx

from .._sio import new_http, sleep
from .._wire import (
    Query,
    Retries,
    base_url,
    bearer,
    checked_timeout_s,
    decode_page,
    no_answer,
    path,
)
from ..errors import UnexpectedAnswer, error_of

T = TypeVar("T")
EVENTS = "text/event-stream"
CONNECT_TIMEOUT_S = 5.0
CONNECTIONS = 100
KEPT_CONNECTIONS = 20
KEEP_ALIVE_S = 20.0
"""Shorter than the server's 30 s: else a call could be sent on a connection that the server is closing."""
_NONE: Mapping[str, str] = {}


class Transport:
    """The connections to one server, and its management key."""

    def __init__(
        self,
        url: str,
        key: str | None,
        *,
        timeout_s: float,
        retries: Retries,
        http: httpx.Client | None,
        user_agent: str,
    ) -> None:
        self.url = base_url(url)
        self.timeout_s = checked_timeout_s(timeout_s)
        self.retries = retries
        self._headers = {**bearer(key), "Accept": "application/json", "User-Agent": user_agent}
        self._owned = http is None
        self._timeout = httpx.Timeout(timeout_s, connect=min(timeout_s, CONNECT_TIMEOUT_S))
        limits = httpx.Limits(
            max_connections=CONNECTIONS, max_keepalive_connections=KEPT_CONNECTIONS, keepalive_expiry=KEEP_ALIVE_S
        )
        self._http = http if http is not None else new_http(self._timeout, limits)

    def close(self) -> None:
        """Close the connections, except those of the caller's own httpx client."""
        if self._owned:
            self._http.close()

    def send(
        self,
        method: str,
        template: str,
        segments: Mapping[str, str] = _NONE,
        *,
        query: Query | None = None,
        body: bytes | None = None,
        headers: Mapping[str, str] = _NONE,
        once: str | None = None,
        repeatable: bool = False,
        accept: tuple[int, ...] = (),
    ) -> bytes:
        """The answer's body.

        `once` is the Idempotency-Key of every try. `repeatable`: repeating the call has no further effect. `accept`:
        error statuses that count as answers.

        Raises the server's error; NoAnswer without an answer.
        """
        sent = {**self._headers, **headers}
        repeatable = repeatable or once is not None or method == "GET"
        if once is not None:
            sent["Idempotency-Key"] = once
        if body is not None:
            sent["Content-Type"] = "application/json"
        url = self.url + path(template, segments) + (f"?{urlencode(query)}" if query else "")
        started = time.monotonic()
        tried = 0
        while True:
            cause: Exception | None = None
            try:
                response = self._http.request(method, url, content=body, headers=sent, timeout=self._timeout)
            except httpx.RequestError as error:
                failure = no_answer(error, method, template, self.timeout_s)
                cause = error
            else:
                if response.status_code < 300 or response.status_code in accept:
                    return response.content
                failure = error_of(response.status_code, response.headers, response.content)
            elapsed_s = time.monotonic() - started
            wait_s = self.retries.wait_s(failure, repeatable=repeatable, tried=tried, elapsed_s=elapsed_s)
            if wait_s is None:
                raise failure from cause
            sleep(wait_s)
            tried += 1

    def items(
        self, type_: type[T], template: str, segments: Mapping[str, str], query: Query, page_size: int
    ) -> Iterator[T]:
        """Every item of a list, over all pages; each page is fetched when it is needed."""
        cursor: str | None = None
        while True:
            asked = [*query, ("limit", str(page_size))]
            if cursor is not None:
                asked.append(("cursor", cursor))
            page = decode_page(type_, self.send("GET", template, segments, query=asked))
            yield from page.items
            cursor = page.next_cursor
            if cursor is None:
                return

    @contextmanager
    def stream(
        self,
        template: str,
        segments: Mapping[str, str],
        headers: Mapping[str, str],
        silence_s: float,
        expected: str = EVENTS,
    ) -> Iterator[Iterator[bytes]]:
        """An open stream of this content type: its bytes as they arrive. Tried once.

        Raises the server's error; NoAnswer if the connection is lost, or silent for longer than `silence_s`.
        """
        sent = {**self._headers, **headers, "Accept": expected}
        timeout = httpx.Timeout(self.timeout_s, connect=self._timeout.connect, read=silence_s)
        url = self.url + path(template, segments)
        try:
            with self._http.stream("GET", url, headers=sent, timeout=timeout) as response:
                if response.status_code >= 300:
                    raise error_of(response.status_code, response.headers, response.read())
                kind = response.headers.get("content-type", "no content type")
                if not kind.startswith(expected):
                    raise UnexpectedAnswer(f"GET {template}: found {kind}, expected {expected}")
                yield response.iter_bytes()
        except httpx.RequestError as error:
            raise no_answer(error, "GET", template, silence_s) from error
