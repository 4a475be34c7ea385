# Generated from _async/usage.py by `python src/strongroom/client/_unasync.py`: change that, not this.
"""Usage over HTTP: what has happened, recorded after the fact."""

from __future__ import annotations

from .._wire import decode, encode, once_of
from ..models import Cost, Recorded, Used
from .transport import Transport


class Usage:
    """Usage that has happened: counted whatever the state of the key, and past its limits."""

    def __init__(self, transport: Transport) -> None:
        self._http = transport

    def record(
        self, *, cost: Cost, key: str | None = None, key_id: str | None = None, idempotency_key: str | None = None
    ) -> Recorded:
        """Count `cost` on the key that is given by its text or its id: once for one idempotency key (within a day).

        Raises NotFound, InvalidInput.
        """
        used = Used(cost=cost, key=key, key_id=key_id)
        return decode(Recorded, self._http.send("POST", "/v1/usage", body=encode(used), once=once_of(idempotency_key)))
