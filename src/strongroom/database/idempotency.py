"""Idempotency keys: a key of an actor identifies one request; a repeat changes nothing and returns the first answer.

The record of a call (`IdempotentCall`) commits with the call's changes, so that there is no moment in which one is
there without the other. It holds a fingerprint of the request, and the answer.

The fingerprint is an HMAC under the store's pepper of the canonical request (`canonical.py`), secrets included: a plain
digest of a secret could be guessed. The answer is encrypted under the pepper and the caller's idempotency key, which is
stored nowhere: it may hold the text of a new key.
"""

from __future__ import annotations

import hashlib
import hmac
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any, NamedTuple

import msgspec

from ..access import acting
from ..context import Context, text_problem
from ..entities import Document, Entity, Index, is_expired
from ..errors import Conflict, InvalidInput, Problem
from ..pepper import Pepper, Peppers
from ..storage.port import Create, Put, Store
from .canonical import canonical

IDEMPOTENCY_TTL = timedelta(days=1)
MAX_IDEMPOTENCY_KEY_BYTES = 255
MAX_MEMO_BYTES = 300_000
"""A longer answer (compressed) is not kept: the repeat changes nothing, and is answered from what is stored then."""
_FORMAT = "2"
_DECIMAL_CODE = 1


class IdempotentCall(
    Entity,
    collection="idempotent_calls",
    scope="global",
    indexes=[Index("expires_at")],
    ttl="expires_at",
    journalled=False,
):
    """The record of a call with an idempotency key, so that a repeat does nothing and returns the same answer.

    The id is a hash of scope, actor and key. `fingerprint` is `2:pepper id:HMAC`; what an earlier version wrote has
    no colon. `written` names the documents; `memo` is the encrypted answer.
    """

    fingerprint: str
    written: list[str] = []
    memo: bytes | None = None
    expires_at: datetime


class RequestKey(str):
    """An idempotency key of an HTTP request: `request` is that request as a whole, and `scope` separates its keys from
    other keys. They replace the request and scope of a library call."""

    request: object
    scope: str
    looked_up = False
    """Whether the key was found unused when the request began."""


@dataclass(frozen=True, slots=True)
class Idempotency:
    """An idempotency key (text of 1 to 255 bytes), the request, and a memo that a repeat gets back.

    `request` is anything that `canonical` takes, secrets in clear. Keys of different tenants are separate; `scope`
    replaces the tenant if a repeat would no longer know it.
    """

    key: str
    request: object
    memo: bytes | None = None
    scope: str | None = None

    @classmethod
    def of(
        cls, key: str | None, *request: object, memo: bytes | None = None, scope: str | None = None
    ) -> Idempotency | None:
        """For a library call that may have a key. A `RequestKey` brings its own request and scope."""
        if key is None:
            return None
        if isinstance(key, RequestKey):
            return cls(key, key.request, memo, key.scope)
        return cls(key, request, memo, scope)

    @classmethod
    def by(cls, context: Context | None, key: str | None, *request: object) -> Idempotency | None:
        """For a call of this caller, whatever tenant it is about: its idempotency keys are the caller's own."""
        return cls.of(key, *request, scope=acting(context).tenant or "")


class Replayed(Exception):
    """This very call was committed before. Carries the ids that it wrote, its memo, and the document of its answer
    (None if it had none, or a too long one). Never leaves the library."""

    def __init__(
        self, written: list[str], memo: bytes | None, answer: Document | None = None, version: int = 0
    ) -> None:
        super().__init__("done before")
        self.written = written
        self.memo = memo
        self.answer = answer
        self.version = version
        """That of the call's own record."""


class IdempotentOperation(NamedTuple):
    """A charge that may be made only once: the id of its record, the operation that makes it, and the fingerprints that
    stand for the same request (under each pepper)."""

    id: str
    operation: Create | Put
    alike: frozenset[str]


class Calls:
    """The idempotent calls of one store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        # `Strongroom.open` gives the store's own peppers. A Database that was made without has none to hide secrets by.
        self._peppers = Peppers([Pepper("unset", b"")])

    def use(self, peppers: Peppers) -> None:
        """Make fingerprints under these peppers, and know again what was made under any of them."""
        self._peppers = peppers

    async def before(self, context: Context, idempotency: Idempotency) -> Document | None:
        """The expired record of a call with this key, which may happen again; None if there is none.

        Raises Replayed if this very call was committed before, Conflict if the key was another request's.
        """
        stored = await self._stored(context, idempotency)
        if stored is None or is_expired(IdempotentCall.__collection__, stored, context.now):
            return stored
        self.compare(stored["fingerprint"], idempotency.request)
        memo = self._opened(context, idempotency.key, stored["memo"])
        raise Replayed(stored["written"], memo.get("memo"), memo.get("answer"), stored["version"])

    async def _stored(self, context: Context, idempotency: Idempotency) -> Document | None:
        name = IdempotentCall.__collection__.name
        stored = await self._store.get(name, None, self.id(context, idempotency))
        former = self.id(context, replace(idempotency, scope=None))
        if stored is None and former != self.id(context, idempotency):
            # An earlier version separated the keys of some calls by the tenant that they concerned.
            found = await self._store.get(name, None, former)
            if found is not None and not found["fingerprint"].startswith(_FORMAT + ":"):
                return None if is_expired(IdempotentCall.__collection__, found, context.now) else found
        return stored

    def operation(
        self,
        context: Context,
        idempotency: Idempotency,
        written: list[str],
        answer: Document | None,
        before: Document | None = None,
        kept_until: datetime | None = None,
    ) -> Create | Put:
        """The operation that lets this call happen once, committed with its changes. `before`: the result of
        `before`."""
        call = IdempotentCall(
            fingerprint=self.fingerprint(idempotency.request),
            written=written,
            memo=self._sealed(context, idempotency.key, {"memo": idempotency.memo, "answer": answer}),
            expires_at=max(kept_until or context.now, context.now + IDEMPOTENCY_TTL),
        )
        name, id = IdempotentCall.__collection__.name, self.id(context, idempotency)
        document = IdempotentCall.__codec__.encode(call)
        return Create(name, id, document) if before is None else Put(name, id, document, before["version"])

    @staticmethod
    def id(context: Context, idempotency: Idempotency) -> str:
        """The id of a call's record. Raises InvalidInput for an invalid key."""
        scope = idempotency.scope if idempotency.scope is not None else context.tenant or ""
        return call_id((scope, context.actor), idempotency.key)

    # --- Fingerprints -----------------------------------------------------------------------------------------

    def fingerprint(self, request: object) -> str:
        return self._fingerprints(request)[0]

    def alike(self, request: object) -> frozenset[str]:
        """The fingerprints of a request, one for each pepper."""
        return frozenset(self._fingerprints(request))

    def _fingerprints(self, request: object) -> list[str]:
        return [f"{_FORMAT}:{one}" for one in self._peppers.macs(canonical(request), "idempotent request")]

    def compare(self, stored: str, request: object) -> None:
        """Raise Conflict unless the stored fingerprint belongs to this request."""
        if any(hmac.compare_digest(stored, one) for one in self._fingerprints(request)):
            return
        version, _, rest = stored.partition(":")
        if version != _FORMAT or not rest:
            raise Conflict(
                "an earlier version of Strongroom used this idempotency key, and its record cannot be compared: check "
                "whether the change exists; if not, use a new key"
            )
        if rest.partition(":")[0] not in self._peppers.pepper_ids:
            raise Conflict(
                "the idempotency key was used under a pepper that is not configured: check whether the change exists; "
                "if not, use a new key"
            )
        raise Conflict("the idempotency key was used for a different request: take a new one")

    # --- Answers ----------------------------------------------------------------------------------------------

    def _sealed(self, context: Context, key: str, memo: Mapping[str, Any]) -> bytes | None:
        given = {name: value for name, value in memo.items() if value is not None}
        packed = zlib.compress(msgspec.msgpack.encode(_packed(given)), 1)
        if len(packed) > MAX_MEMO_BYTES:
            return self._sealed(context, key, {**memo, "answer": None}) if "answer" in given else None
        if not given:
            return None
        return self._peppers.conceal(packed, f"{context.actor}\x00{key}")

    def _opened(self, context: Context, key: str, memo: bytes | None) -> dict[str, Any]:
        if memo is None:
            return {}
        packed = self._peppers.reveal(memo, f"{context.actor}\x00{key}")
        if packed is None:
            raise Conflict("this was done before, but its answer is lost: its pepper is not configured any more")
        opened: dict[str, Any] = msgspec.msgpack.decode(zlib.decompress(packed), ext_hook=_unpacked)
        return opened


def call_id(scope: tuple[str, ...], key: str) -> str:
    """The id of a call's record. Raises InvalidInput for an invalid key."""
    if problem := text_problem(key, MAX_IDEMPOTENCY_KEY_BYTES):
        raise InvalidInput([Problem("idempotency_key", problem)])
    return hashlib.sha256("\x00".join((*scope, key)).encode()).hexdigest()


def _packed(value: Any) -> Any:
    """A document's value for MessagePack, which lacks Decimals."""
    if isinstance(value, Decimal):
        return msgspec.msgpack.Ext(_DECIMAL_CODE, str(value).encode())
    if isinstance(value, dict):
        return {name: _packed(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_packed(item) for item in value]
    return value


def _unpacked(code: int, data: memoryview) -> Any:
    if code != _DECIMAL_CODE:
        raise ValueError(f"found a value of the unknown kind {code} in an idempotent call's memo")
    return Decimal(bytes(data).decode())


__all__ = [
    "IDEMPOTENCY_TTL", "MAX_IDEMPOTENCY_KEY_BYTES", "Calls", "Idempotency", "IdempotentCall", "Replayed", "RequestKey",
    "call_id",
]  # fmt: skip
