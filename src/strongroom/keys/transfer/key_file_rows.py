"""Converts rows of key files to a store's documents, and documents to rows. Pure.

`key_file` has the rows; `key_file_import` and `key_file_export` read and write stores.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from typing import Any

import msgspec

from ...context import Context, new_salt, next_id, us_from_utc, utc_from_us
from ...entities import Document
from ...errors import StoreError
from ...journal import change_record
from ...limits import Limit, Rolling, RollingCounter, UsageState
from ...limits.usage_state import NAME as USAGE
from ...storage.port import Alike
from ..hasher import Hasher, imported_sha256, sha256_of_imported
from ..model import NAME, ApiKey
from ..token import masked
from .key_file import WINDOW_S, KeyRow, Shape

_WINDOW = Rolling(seconds=WINDOW_S)
FIVE_HOURS = Limit(resource="tokens", limit=0, window=_WINDOW).id
"""The counter of the plain shape's one limit: tokens in the last five hours."""
UNCHANGEABLE = frozenset({"created_at"})
VARYING = (
    "name", "hash", "sealed", "display", "user_id", "metadata", "limits", "expires_at", "last_used", "usage_count",
)  # fmt: skip
"""Fields in which the keys of one import differ."""
USAGE_VARYING = ("count", "last_used_at", "state")
USAGE_SAID = frozenset({"last_used", "total_lifetime_tokens", "usage_windows", "usage_count"})

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.decode


def id_of(sha256: bytes) -> str:
    """The id of an imported key: the same in every run and store, and not a part of the hash that other files show."""
    return "key_" + hashlib.sha256(b"strongroom imported key\x00" + sha256).hexdigest()[:31]


# --- From rows to documents -----------------------------------------------------------------------------------


class Maker:
    """Makes the documents of new keys, for one tenant, under one pepper."""

    def __init__(self, hasher: Hasher, shape: Shape, tenant: str) -> None:
        self._hasher = hasher
        self._shape = shape
        self._tenant = tenant
        pattern = ApiKey(tenant=tenant, name="pattern", hash="pattern", display="pattern")
        self._pattern = ApiKey.__codec__.encode(pattern)

    def key_of(self, row: KeyRow) -> Document:
        """A row as a key's document. Without its secret, the key is hashed under the pepper at its first use."""
        values = self.values_of(row, self._hasher.seal)
        return {**self._pattern, **dict(zip(VARYING, values, strict=True)), "limits": limits_of(row.token_limit)}

    def values_of(self, row: KeyRow, seal: Callable[[bytes], bytes]) -> tuple[Any, ...]:
        """The VARYING fields of a row's key."""
        hasher, sha256, secret = self._hasher, row.sha256, row.secret
        return (
            row.name,
            imported_sha256(sha256.hex()) if secret is None else hasher.hash_of(sha256),
            None if secret is None else seal(sha256),
            f"sha256:{sha256.hex()[:8]}…" if secret is None else masked(secret),
            row.user_id,
            _NO_METADATA if row.model is None else _metadata(row.model),
            _NO_LIMITS if row.token_limit is None else _encoded_limits(row.token_limit),
            utc(row.expires_us),
            utc(row.last_used_us),
            row.uses,
        )

    def usage_of(self, row: KeyRow, now_us: int) -> Document:
        """A row's usage, as a document."""
        return usage_document(self._shape, row, UsageState(), now_us)

    def alike(self, rows: Sequence[KeyRow], context: Context) -> tuple[Alike, Alike]:
        """The bulk form of new keys with their journal records, and of their usages."""
        values, seal, now_us = self.values_of, self._hasher.sealer(), context.now_us
        pattern = {**self._pattern, "sealed": b"pattern"}
        record = change_record(context, "create", ApiKey.__collection__, "", None, pattern)
        keys, usages = [], []
        for row in rows:
            id = id_of(row.sha256)
            keys.append((id, utc_from_us(row.created_us), *values(row, seal)))
            usages.append((id, None, *new_usage(self._shape, row, now_us)))
        return (
            Alike(NAME, pattern, VARYING, keys, record, [next_id() for _ in keys], [new_salt() for _ in keys]),
            Alike(USAGE, UsageState().document(), USAGE_VARYING, usages),
        )


_NO_METADATA: Document = {}
_NO_LIMITS: list[Document] = []


@functools.lru_cache(maxsize=1_000)
def _metadata(model: str) -> Document:
    return {"model": model}


@functools.lru_cache(maxsize=1_000)
def _encoded_limits(token_limit: int) -> list[Document]:
    limits = [Limit(resource="tokens", limit=token_limit, window=_WINDOW)]
    pattern = ApiKey(tenant="t", name="n", hash="h", display="d", limits=limits)
    encoded: list[Document] = ApiKey.__codec__.encode(pattern)["limits"]
    return encoded


def limits_of(token_limit: int | None) -> list[Document]:
    """The limits of a key with this limit of the plain shape (None: unlimited), as they are stored."""
    return [] if token_limit is None else list(_encoded_limits(token_limit))


def usage_document(shape: Shape, row: KeyRow, state: UsageState, now_us: int) -> Document:
    """A row's usage: the live part of its windows, its totals, the number and time of its uses. Fields of the
    usage state that the shape lacks stay unchanged."""
    state.last_used_us = row.last_used_us
    if shape == "hashed":
        state.count = row.uses
        _set(state.totals, "requests", row.uses)
        return state.document()
    _set(state.totals, "tokens", row.tokens)
    state.unknown.pop(FIVE_HOURS, None)
    if live := _live(row, now_us):
        counter = RollingCounter(_WINDOW)
        for start_us, tokens in live:
            counter.add_at(start_us, tokens)
        state.counters[FIVE_HOURS] = counter
    return state.document()


def new_usage(shape: Shape, row: KeyRow, now_us: int) -> tuple[int, datetime | None, str]:
    """The USAGE_VARYING fields of the `usage_document` of a row and a new usage state."""
    amount, resource = (row.uses, "requests") if shape == "hashed" else (row.tokens, "tokens")
    counters = {}
    if row.windows and shape == "plain":
        counter = RollingCounter(_WINDOW)
        for start_us, tokens in row.windows:
            counter.add_at(start_us, tokens)
        if counter.buckets(now_us):
            counters[FIVE_HOURS] = counter.dump()
    dumped = {"totals": {resource: amount} if amount else {}, "counters": counters, "at": 0}
    return (row.uses if shape == "hashed" else 0), utc(row.last_used_us), _encode(dumped).decode()


def _set(totals: dict[str, int], resource: str, units: int) -> None:
    totals.pop(resource, None)
    if units:
        totals[resource] = units


# --- From documents to rows -----------------------------------------------------------------------------------


def row_of(key: Document, usage: Document | None, hasher: Hasher, now_us: int) -> KeyRow:
    """A stored key as a row, without its secret, which is not stored. StoreError if its SHA-256 cannot be decrypted."""
    sha256 = sha256_of_imported(key["hash"])
    if sha256 is None:
        if key["sealed"] is None:
            raise StoreError(f"the key {key['id']} has no sealed hash")
        sha256 = hasher.unseal(key["sealed"])
    state = UsageState(usage)
    model = key["metadata"].get("model")
    dumped = state.unknown.get(FIVE_HOURS)
    return KeyRow(
        path=key["id"],
        sha256=sha256,
        secret=None,
        name=key["name"],
        user_id=key["user_id"],
        model=model if isinstance(model, str) and model else None,
        token_limit=_token_limit(key["limits"]),
        created_us=us_from_utc(key["created_at"]),
        expires_us=_us(key["expires_at"]),
        last_used_us=state.last_used_us,
        uses=state.count,
        tokens=state.totals.get("tokens", 0),
        windows=tuple(RollingCounter(_WINDOW, dumped).buckets(now_us)) if dumped else (),
    )


def _token_limit(limits: list[Document]) -> int | None:
    for limit in limits:
        if limit["resource"] == "tokens" and (found := _five_hours(_encode(limit))) is not None:
            return found
    return None


@functools.lru_cache(maxsize=1_000)
def _five_hours(encoded: bytes) -> int | None:
    limit = Limit.model_validate_json(encoded)
    return int(limit.limit) if limit.id == FIVE_HOURS else None


def is_five_hours(limit: Document) -> bool:
    """Whether a stored limit is the plain shape's limit: tokens in five hours."""
    return limit["resource"] == "tokens" and _five_hours(_encode(limit)) is not None


def is_as_imported(usage: Document | None) -> bool:
    """Whether a usage document is unchanged since the import."""
    return usage is not None and usage["active_at"] is None and usage["created_at"] == usage["updated_at"]


def lost(shape: Shape, key: Document) -> Iterator[str]:
    """The parts of a key that the shape has no field for."""
    if key["permissions"]:
        yield "permissions"
    if key["allowed_ips"]:
        yield "addresses it may be used from"
    if key["previous_hash"] is not None:
        yield "an old secret that still works"
    if shape == "plain":
        if key["user_id"] is not None:
            yield "a user"
        if not all(map(is_five_hours, key["limits"])):
            yield "limits other than tokens in 5 hours"
        if key["metadata"].keys() - {"model"}:
            yield "metadata other than the model"
    else:
        if key["limits"]:
            yield "limits"
        if key["metadata"]:
            yield "metadata"


# --- What a shape says of a key -------------------------------------------------------------------------------


def said(shape: Shape, row: KeyRow, now_us: int) -> dict[str, Any]:
    """All fields that a shape has of a key, as values to compare; of its windows, the live buckets."""
    found: dict[str, Any] = {"name": row.name, "created_at": utc(row.created_us), "last_used": utc(row.last_used_us)}
    if shape == "plain":
        return found | {
            "expiry_date": utc(row.expires_us),
            "model": row.model,
            "token_limit_per_5h": row.token_limit,
            "total_lifetime_tokens": row.tokens,
            "usage_windows": _live(row, now_us),
        }
    return found | {"expires_at": utc(row.expires_us), "user_id": row.user_id, "usage_count": row.uses}


def canonical(shape: Shape, row: KeyRow, now_us: int, *, with_usage: bool) -> bytes:
    """The bytes of one key that a checksum hashes."""
    usage: list[Any] = []
    if shape == "plain":
        own = [row.expires_us, row.model, row.token_limit]
        if with_usage:
            usage = [row.last_used_us, row.tokens, _live(row, now_us)]
    else:
        own = [row.expires_us, row.user_id]
        if with_usage:
            usage = [row.last_used_us, row.uses]
    return _encode([row.sha256.hex(), row.name, row.created_us, own, usage])


def _live(row: KeyRow, now_us: int) -> list[tuple[int, int]]:
    """The row's live windows, as buckets of a minute."""
    if not row.windows:
        return []
    counter = RollingCounter(_WINDOW)
    for start_us, tokens in row.windows:
        counter.add_at(start_us, tokens)
    return [bucket for bucket in counter.buckets(now_us) if bucket[1]]


def utc(us: int | None) -> datetime | None:
    return None if us is None else utc_from_us(us)


def _us(moment: datetime | None) -> int | None:
    return None if moment is None else us_from_utc(moment)
