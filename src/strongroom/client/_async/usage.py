"""Usage over HTTP: what has happened, recorded after the fact."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from .._wire import decode, encode, listed, once_of
from ..models import Cost, Recorded, RecordedBatch, Used
from .transport import AsyncTransport


class AsyncUsage:
    """Usage that has happened: counted whatever the state of the key, and past its limits."""

    def __init__(self, transport: AsyncTransport) -> None:
        self._http = transport

    async def record(
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
        """Count `cost` on the key that is given by its text or its id: once for one idempotency key (within a day).
        `at`: when it was used (default: now); it counts in the windows that still count that moment.

        Raises NotFound, and InvalidInput, also where no limit counts `at` any more.
        """
        used = Used(cost=cost, key=key, key_id=key_id, model=model, route=route, at=at)
        answer = await self._http.send("POST", "/v1/usage", body=encode(used), once=once_of(idempotency_key))
        return decode(Recorded, answer)

    async def record_many(
        self, items: Iterable[Used | Mapping[str, Any]], *, idempotency_key: str | None = None
    ) -> RecordedBatch:
        """Count at most 10,000 items in one call, which is much faster than one by one: all of them, or none if
        anything is wrong with one. `idempotency_key` is that of the batch.

        Raises InvalidInput with every problem of every item, unknown keys included. Where single items cannot be
        counted all the same, the error's `details` say which were (`counted`) and which were not (`failed`).
        """
        body = encode({"items": listed(items)})
        answer = await self._http.send("POST", "/v1/usage:batch", body=body, once=once_of(idempotency_key))
        return decode(RecordedBatch, answer)
