# Generated from _async/usage.py by `python src/strongroom/client/_unasync.py`: edit that file instead.
"""Usage over HTTP, recorded after it happened."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from .._wire import decode, encode, listed, once_of
from ..models import Cost, Recorded, RecordedBatch, Used
from .transport import Transport


class Usage:
    """Usage that has happened: counted in any state of the key, and over its limits."""

    def __init__(self, transport: Transport) -> None:
        self._http = transport

    def record(
        self,
        *,
        cost: Cost,
        key: str | None = None,
        key_id: str | None = None,
        model: str | None = None,
        route: str | None = None,
        idempotency_key: str | None = None,
        at: datetime | None = None,
    ) -> Recorded:
        """Count `cost` on a key, given by its secret or its id, once for an idempotency key (within a day). `at`: the
        time of the usage (default: now); it counts in the windows that still include this time.

        Raises NotFound, and InvalidInput, also if no window includes `at` any more.
        """
        used = Used(cost=cost, key=key, key_id=key_id, model=model, route=route, at=at)
        answer = self._http.send("POST", "/v1/usage", body=encode(used), once=once_of(idempotency_key))
        return decode(Recorded, answer)

    def record_many(
        self, items: Iterable[Used | Mapping[str, Any]], *, idempotency_key: str | None = None
    ) -> RecordedBatch:
        """Count up to 10,000 items in one call: all of them, or none if one is invalid. `idempotency_key` is that of
        the batch.

        Raises InvalidInput with every problem of every item, including unknown keys. If single items still cannot be
        counted, the error's `details` have `counted` and `failed`.
        """
        body = encode({"items": listed(items)})
        answer = self._http.send("POST", "/v1/usage:batch", body=body, once=once_of(idempotency_key))
        return decode(RecordedBatch, answer)
