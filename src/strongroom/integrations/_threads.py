"""Shared by the WSGI integrations: verifies and reserves from threads, over a room on an event loop of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any, Self

from ..app import OpenOptions, Strongroom
from ..blocking import BlockingStrongroom
from ..client_address import client_address
from ..errors import ConfigError
from ..keys import Charged, Reservation
from ..limits import Amount
from ._core import (
    Cost,
    Presented,
    checked_header,
    credential,
    leased,
    networks,
    verified,
)
from ._hold import TTL_S, Hold, reserving, returned


class BlockingHold:
    """A Hold for threads (`with`, `open()`, `close()`) and for another loop (`async with`, `aopen()`, `aclose()`)."""

    def __init__(
        self,
        room: BlockingStrongroom,
        presented: Presented,
        *,
        ttl_s: int = TTL_S,
        opened: list[BlockingHold] | None = None,
    ) -> None:
        self._room = room
        self._presented = presented
        self._ttl_s = ttl_s
        self._opened = opened
        self._hold: Hold | None = None

    async def _reserve(self, room: Strongroom) -> Hold:
        return await Hold(room, self._presented, ttl_s=self._ttl_s)

    def _began(self, hold: Hold) -> Self:
        self._hold = hold
        if self._opened is not None:
            self._opened.append(self)
        return self

    @property
    def _held(self) -> Hold:
        if self._hold is None:
            raise RuntimeError("nothing is reserved yet: use `with reserve(…)` or `reserve(…).open()`")
        return self._hold

    @property
    def verification(self) -> Reservation:
        """The answer to the reservation."""
        return self._held.verification

    @property
    def used(self) -> Mapping[str, Amount]:
        """The amounts used so far, by resource."""
        return self._held.used

    def use(self, **amounts: float | Decimal) -> None:
        """Add usage; usage beyond the reserved amount is charged too. Raises InvalidInput."""
        self._held.use(**amounts)

    def open(self) -> Self:
        """Reserve. Raises KeyRefused if the limits do not allow it."""
        return self._began(self._room.call(self._reserve))

    async def aopen(self) -> Self:
        """`open` for an event loop."""
        return self._began(await self._room.acall(self._reserve))

    def extend(self, **more: float | Decimal) -> Reservation:
        """Reserve more. Raises KeyRefused if the limits do not allow it; the hold then does not change."""
        hold = self._held
        return self._room.call(lambda _: hold.extend(**more))

    async def aextend(self, **more: float | Decimal) -> Reservation:
        """`extend` for an event loop."""
        hold = self._held
        return await self._room.acall(lambda _: hold.extend(**more))

    def close(self) -> None:
        """Charge the used amount and release the rest. A second call does nothing."""
        hold = self._hold
        if hold is not None:
            self._room.call(lambda _: hold.close())

    async def aclose(self) -> None:
        """`close` for an event loop. It completes even if the caller is cancelled meanwhile."""
        hold = self._hold
        if hold is not None:
            await self._room.acall(lambda _: hold.close())

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return await self.aopen()

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


class Desk:
    """Verifies the keys of WSGI requests. The first request opens the room."""

    def __init__(
        self,
        *,
        url: str | None,
        room: BlockingStrongroom | None,
        header: str,
        trusted_proxies: Iterable[str],
        options: OpenOptions,
    ) -> None:
        if (room is None) == (url is None):
            raise ConfigError("found both a room and a url, or neither: expected one of them")
        if options and url is None:
            raise ConfigError(f"found {', '.join(sorted(options))}, which need a url to be opened with")
        self.room = room if room is not None else BlockingStrongroom(url or "", **leased(options))
        self.header = checked_header(header)
        self.variable = "HTTP_" + self.header.upper().replace("-", "_")
        self._trusted = networks("trusted_proxies", trusted_proxies)

    def presented(self, environ: Mapping[str, Any], route: str, **asked: Any) -> Presented:
        """The key of a request, from its WSGI environment. Raises KeyRefused (401) if there is none."""
        value = environ.get(self.variable)
        secret = credential(self.header, [value.encode("latin-1", "replace")] if value is not None else [])
        forwarded: str | None = environ.get("HTTP_X_FORWARDED_FOR") if self._trusted else None
        hops = [forwarded.encode("latin-1", "replace")] if forwarded is not None else []
        ip = client_address(environ.get("REMOTE_ADDR") or None, hops, self._trusted)
        return Presented.of(secret, self.header, route=route, ip=ip, **asked)

    def verify(self, presented: Presented) -> Charged:
        """Raises KeyRefused."""
        return self.room.call(lambda room: verified(room, presented))

    async def averify(self, presented: Presented) -> Charged:
        """`verify` for an event loop."""
        return await self.room.acall(lambda room: verified(room, presented))

    def give_back(self, charges: list[Charged]) -> None:
        """Refund the charges of a request that is refused after its verification."""
        if charges:
            self.room.call(lambda room: returned(room, charges))

    def hold(
        self,
        presented: Presented,
        cost: Cost,
        ttl_s: int,
        permission: str | None,
        model: str | None,
        opened: list[BlockingHold],
    ) -> BlockingHold:
        """A reservation for the key of a verified request."""
        presented = reserving(presented, cost, permission, model, first=not opened)
        return BlockingHold(self.room, presented, ttl_s=ttl_s, opened=opened)
