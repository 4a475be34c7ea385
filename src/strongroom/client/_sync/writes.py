# Generated from _async/writes.py by `python src/strongroom/client/_unasync.py`: edit that file instead.
"""Writes off over HTTP: turn the writes of all tenants, or of one, off and on."""

from __future__ import annotations

from .._wire import decode, encode, once_of, query, without_none
from ..models import WritesStatus, WriteSwitch
from .transport import Transport

DEFAULT_PAGE = 100


class Writes:
    """Whether writes are on. Only an administrator of all tenants turns them off and on."""

    def __init__(self, transport: Transport) -> None:
        self._http = transport

    def off(
        self, reason: str, *, tenant: str | None = None, usage: bool = True, idempotency_key: str | None = None
    ) -> WriteSwitch:
        """Turn writes off, of all tenants or of one: everywhere within a second. `usage` false: verification, usage and
        reservations are refused too. Raises NotFound for an unknown tenant."""
        body = {"allowed": False, "tenant": tenant, "usage": usage, "reason": reason}
        answer = self._http.send("POST", "/v1/writes", body=encode(body), once=once_of(idempotency_key))
        return decode(WriteSwitch, answer)

    def on(
        self, *, tenant: str | None = None, reason: str | None = None, idempotency_key: str | None = None
    ) -> WriteSwitch:
        """Turn writes on again. Raises Conflict where a migration keeps them off."""
        body = without_none({"allowed": True, "tenant": tenant, "reason": reason})
        answer = self._http.send("POST", "/v1/writes", body=encode(body), once=once_of(idempotency_key))
        return decode(WriteSwitch, answer)

    def status(
        self, tenant: str | None = None, *, limit: int = DEFAULT_PAGE, cursor: str | None = None
    ) -> WritesStatus:
        """Whether writes are on, and one page of tenants (or the one tenant) whose own are off."""
        asked = query({"tenant": tenant, "limit": limit, "cursor": cursor})
        return decode(WritesStatus, self._http.send("GET", "/v1/writes", query=asked))
