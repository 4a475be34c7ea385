# Generated from _async/reservations.py by `python src/strongroom/client/_unasync.py`: edit that file instead.
"""Reservations over HTTP: hold an amount before the usage is known, then settle the usage."""

from __future__ import annotations

from decimal import Decimal
from types import TracebackType
from typing import Self

from ...errors import (
    Conflict,
    NotFound,
    StrongroomError,
    TooManyRequests,
    Unavailable,
)
from .._amounts import Amounts, added, less
from .._sio import Ticker, uninterrupted
from .._wire import decode, encode, once_of, without_none
from ..errors import Refused
from ..models import Cost, Recorded, Reservation, Used
from .transport import Transport

DEFAULT_TTL_S = 60
TICKS_PER_TTL = 3
"""Extensions of a hold within its time: two may fail before the hold ends."""


class Reservations:
    """Reservations on a key's limits. `hold` is a context manager; the other methods are the single steps."""

    def __init__(self, transport: Transport) -> None:
        self._http = transport

    def reserve(
        self,
        key: str,
        *,
        cost: Cost | None = None,
        ttl_s: int = DEFAULT_TTL_S,
        permission: str | None = None,
        ip: str | None = None,
        model: str | None = None,
        route: str | None = None,
        idempotency_key: str | None = None,
    ) -> Reservation:
        """Verify the key and hold `cost` (default: one request), and one of its `concurrency`, for `ttl_s` seconds.

        A valid answer has a `reservation_id`. The held amount is given back when that time is over.
        """
        fields = {
            "key": key,
            "cost": cost,
            "ttl_s": ttl_s,
            "permission": permission,
            "ip": ip,
            "model": model,
            "route": route,
        }
        answer = self._http.send(
            "POST", "/v1/reservations", body=encode(without_none(fields)), once=once_of(idempotency_key)
        )
        return decode(Reservation, answer)

    def settle(self, reservation_id: str, cost: Cost) -> Reservation:
        """End a reservation: `cost` is the total usage, charged in full even if it exceeds the held amount. A retry
        gets the same answer.

        Raises NotFound (unknown, or another tenant's); Conflict (it has expired, or was settled with other amounts).
        """
        answer = self._http.send(
            "POST",
            "/v1/reservations/{id}/settle",
            {"id": reservation_id},
            body=encode({"cost": cost}),
            repeatable=True,
        )
        return decode(Reservation, answer)

    def extend(
        self,
        reservation_id: str,
        *,
        ttl_s: int = DEFAULT_TTL_S,
        cost: Cost | None = None,
        used: Cost | None = None,
    ) -> Reservation:
        """Hold for `ttl_s` seconds from now, `cost` in total (default: unchanged). `used` is the total usage so far; it
        is charged now, even if the caller dies.

        If the answer is not valid, the limits do not allow it, and the reservation does not change. Raises NotFound,
        Conflict.
        """
        answer = self._http.send(
            "POST",
            "/v1/reservations/{id}/extend",
            {"id": reservation_id},
            body=encode(without_none({"ttl_s": ttl_s, "cost": cost, "used": used})),
            repeatable=True,
        )
        return decode(Reservation, answer)

    def release(self, reservation_id: str) -> Reservation:
        """End a reservation and charge only the reported usage. A retry gets the same answer.

        Raises NotFound, Conflict (it was settled).
        """
        answer = self._http.send("POST", "/v1/reservations/{id}/release", {"id": reservation_id}, repeatable=True)
        return decode(Reservation, answer)

    def hold(
        self,
        key: str,
        *,
        cost: Cost | None = None,
        ttl_s: int = DEFAULT_TTL_S,
        permission: str | None = None,
        ip: str | None = None,
        model: str | None = None,
        route: str | None = None,
    ) -> Hold:
        """A reservation as a context manager. Raises Refused at the start if the key may not be used.

        Report usage with `hold.use(tokens=12)`. The end of the block settles it, also after an error. Held requests
        (default one) count as used from the beginning. An open hold extends itself and reports its usage so far.
        """
        return Hold(self, self._http, key, cost, ttl_s, permission, ip, model, route)


class Hold:
    """An open reservation and its usage so far, settled when its block ends."""

    def __init__(
        self,
        reservations: Reservations,
        transport: Transport,
        key: str,
        cost: Cost | None,
        ttl_s: int,
        permission: str | None,
        ip: str | None,
        model: str | None,
        route: str | None,
    ) -> None:
        self._reservations = reservations
        self._http = transport
        self._key = key
        self._cost: Cost = {"requests": 1} if cost is None else cost
        self._ttl_s = ttl_s
        self._asked = {"permission": permission, "ip": ip, "model": model, "route": route}
        self._ticker = Ticker(ttl_s / TICKS_PER_TTL, self._tick)
        self._reported: Amounts = {}
        self._reservation: Reservation | None = None
        self.used: Amounts = added({}, {name: self._cost[name] for name in self._cost if name == "requests"})
        """The amounts used so far, by resource."""
        self.trouble: StrongroomError | None = None
        """The error of the last extension; None if it succeeded."""

    @property
    def reservation(self) -> Reservation:
        """The server's answer to the reservation."""
        if self._reservation is None:
            raise RuntimeError("the hold is not open: use it in a with statement")
        return self._reservation

    @property
    def id(self) -> str:
        """The reservation's id."""
        return self.reservation.reservation_id or ""

    def use(self, amounts: Cost | None = None, /, **more: float | Decimal) -> None:
        """Add usage: `use(tokens=12)`, or `use({"my.resource": 1})`. It is sent later."""
        self.used = added(added(self.used, amounts or {}), more)

    def extend(self, cost: Cost | None = None) -> Reservation:
        """Hold `cost` in total (default: unchanged), and report the usage so far. If the answer is not valid, the
        limits do not allow it, and the hold does not change. Raises NotFound and Conflict if it has ended."""
        used = self.used
        answer = self._reservations.extend(self.id, ttl_s=self._ttl_s, cost=cost, used=used)
        if answer.valid:
            self._reported = used
        return answer

    def __enter__(self) -> Self:
        answer = self._reservations.reserve(self._key, cost=self._cost, ttl_s=self._ttl_s, **self._asked)
        if not answer.valid:
            raise Refused(answer)
        self._reservation = answer
        self._ticker.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        uninterrupted(self._end)

    def _end(self) -> None:
        self._ticker.stop()
        try:
            self._reservations.settle(self.id, self.used)
        except (NotFound, Conflict):
            self._record_rest()

    def _record_rest(self) -> None:
        """Record the unreported usage of an expired hold: only the reported usage was charged."""
        rest = less(self.used, self._reported)
        if rest:
            key_id, model, route = self.reservation.key_id, self._asked["model"], self._asked["route"]
            used = Used(cost=rest, key_id=key_id, model=model, route=route)
            once = once_of(f"hold-{self.id}")
            decode(Recorded, self._http.send("POST", "/v1/usage", body=encode(used), once=once))

    def _tick(self) -> bool:
        """Extend the hold; returns whether the ticker continues."""
        try:
            answer = self.extend()
        except (Unavailable, TooManyRequests) as error:
            self.trouble = error
            return True
        except StrongroomError as error:
            self.trouble = error
            return False
        self.trouble = None if answer.valid else Refused(answer)
        return True
