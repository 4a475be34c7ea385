# Generated from _async/leaks.py by `python src/strongroom/client/_unasync.py`: edit that file instead.
"""Leaked keys over HTTP: report them, and list the leaks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from .._wire import decode, encode, listed, once_of, query, without_none
from ..models import Leak, LeakLabel, LeakPolicy, Sighting
from .transport import Transport

DEFAULT_PAGE = 100
Labels = list[LeakLabel]


class Leaks:
    """Leaked keys."""

    def __init__(self, transport: Transport) -> None:
        self._http = transport

    def report(self, sightings: Iterable[Sighting]) -> Labels:
        """Report found secrets. The answers say in order which of them are keys. The tenant's policy is applied to each
        key; a repeated report changes nothing."""
        body = encode(listed(sightings))
        return decode(Labels, self._http.send("POST", "/v1/keys/leaked", body=body, repeatable=True))

    def list(
        self, *, tenant: str | None = None, key_id: str | None = None, page_size: int = DEFAULT_PAGE
    ) -> Iterator[Leak]:
        """Every matching leak, newest first, over all pages."""
        return self._http.items(Leak, "/v1/leaks", {}, query({"tenant": tenant, "key_id": key_id}), page_size)

    def policy(self, tenant: str) -> LeakPolicy:
        """The leak policy of a tenant; `*` stands for keys of no single tenant."""
        return decode(LeakPolicy, self._http.send("GET", "/v1/leaks/policy/{tenant}", {"tenant": tenant}))

    def set_policy(
        self, tenant: str, action: str, *, overlap_s: int | None = None, idempotency_key: str | None = None
    ) -> LeakPolicy:
        """Set the leak policy: `notify`, `disable`, or `rotate`, after which a leaked secret works for `overlap_s`
        seconds.

        Raises InvalidInput; Denied unless for an administrator.
        """
        answer = self._http.send(
            "PUT",
            "/v1/leaks/policy/{tenant}",
            {"tenant": tenant},
            body=encode(without_none({"action": action, "overlap_s": overlap_s})),
            once=once_of(idempotency_key),
        )
        return decode(LeakPolicy, answer)
