# Generated from _async/keys.py by `python src/strongroom/client/_unasync.py`: edit that file instead.
"""API keys over HTTP: create, show, list, change, rotate, delete, verify."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any, Literal, TypedDict, Unpack

from .._wire import (
    UNSET,
    Unset,
    decode,
    decode_page,
    encode,
    given,
    if_match,
    issued,
    listed,
    once_of,
    query,
    without_none,
)
from ..models import (
    ApiKey,
    Ask,
    BulkStep,
    Cost,
    IssuedKey,
    KeyStats,
    Limit,
    Model,
    Page,
    Verification,
)
from .transport import Transport

Environment = Literal["live", "test"]
LimitIn = Limit | Mapping[str, Any]
DEFAULT_PAGE = 100
Verifications = list[Verification]
Asks = Iterable[Ask | Mapping[str, Any]]


class KeyFilters(TypedDict, total=False):
    """A filter of keys: a key must match all given conditions."""

    tenant: str | None
    user_id: str | None
    owner: str | None
    environment: Environment | None
    name_prefix: str | None
    created_after: datetime | None
    created_before: datetime | None
    deleted: bool | None
    name_contains: str | None
    state: Literal["active", "disabled", "expired"] | None
    group: str | None
    permission: str | None
    expires_after: datetime | None
    expires_before: datetime | None
    used_after: datetime | None
    used_before: datetime | None


class Answers(Model, frozen=True):
    """The answers to a batch, in order."""

    items: list[Verification]


class Keys:
    """API keys. Every write happens once, also after retries."""

    def __init__(self, transport: Transport) -> None:
        self._http = transport

    def create(
        self,
        name: str,
        *,
        tenant: str | None = None,
        user_id: str | None = None,
        description: str | None = None,
        owner: str | None = None,
        environment: Environment | None = None,
        permissions: Iterable[str] = (),
        expires_at: datetime | None = None,
        metadata: Mapping[str, Any] | None = None,
        allowed_ips: Iterable[str] = (),
        allowed_models: Iterable[str] = (),
        allowed_routes: Iterable[str] = (),
        groups: Iterable[str] = (),
        limits: Iterable[LimitIn] = (),
        rotate_every_s: int | None = None,
        rotation_overlap_s: int | None = None,
        prefix: str | None = None,
        idempotency_key: str | None = None,
    ) -> IssuedKey:
        """Create a key. The answer has its secret, once. Raises InvalidInput with every problem."""
        fields = without_none(
            {
                "name": name,
                "tenant": tenant,
                "user_id": user_id,
                "description": description,
                "owner": owner,
                "environment": environment,
                "permissions": listed(permissions) or None,
                "expires_at": expires_at,
                "metadata": metadata,
                "allowed_ips": listed(allowed_ips) or None,
                "allowed_models": listed(allowed_models) or None,
                "allowed_routes": listed(allowed_routes) or None,
                "groups": listed(groups) or None,
                "limits": listed(limits) or None,
                "rotate_every_s": rotate_every_s,
                "rotation_overlap_s": rotation_overlap_s,
                "prefix": prefix,
            }
        )
        return issued(self._http.send("POST", "/v1/keys", body=encode(fields), once=once_of(idempotency_key)))

    def get(self, id: str, *, deleted: bool | None = None) -> ApiKey:
        """One key; with `deleted` also a deleted key that can be restored. Raises NotFound."""
        asked = query({"deleted": deleted})
        return decode(ApiKey, self._http.send("GET", "/v1/keys/{id}", {"id": id}, query=asked))

    def list(self, *, page_size: int = DEFAULT_PAGE, **filters: Unpack[KeyFilters]) -> Iterator[ApiKey]:
        """Every key that matches all of `filters`, newest first (with `name_prefix` by name), over all pages.

        `deleted`: only deleted keys that can be restored. `name_contains`: a part of the name, in any case.
        `used_before`: includes keys that were never used.
        """
        return self._http.items(ApiKey, "/v1/keys", {}, query(filters), page_size)

    def page(
        self, *, limit: int = DEFAULT_PAGE, cursor: str | None = None, **filters: Unpack[KeyFilters]
    ) -> Page[ApiKey]:
        """One page of `list`."""
        asked = query({**filters, "limit": limit, "cursor": cursor})
        return decode_page(ApiKey, self._http.send("GET", "/v1/keys", query=asked))

    def update(
        self,
        id: str,
        *,
        name: str | Unset = UNSET,
        user_id: str | Unset | None = UNSET,
        description: str | Unset | None = UNSET,
        owner: str | Unset | None = UNSET,
        permissions: Iterable[str] | Unset = UNSET,
        expires_at: datetime | Unset | None = UNSET,
        metadata: Mapping[str, Any] | Unset = UNSET,
        allowed_ips: Iterable[str] | Unset = UNSET,
        allowed_models: Iterable[str] | Unset = UNSET,
        allowed_routes: Iterable[str] | Unset = UNSET,
        groups: Iterable[str] | Unset = UNSET,
        limits: Iterable[LimitIn] | Unset = UNSET,
        rotate_every_s: int | Unset | None = UNSET,
        rotation_overlap_s: int | Unset | None = UNSET,
        expected: int | None = None,
        idempotency_key: str | None = None,
    ) -> ApiKey:
        """Change the given fields. `expected`: the required version of the key, else PreconditionFailed.

        Raises NotFound, InvalidInput with every problem.
        """
        fields = given(
            {
                "name": name,
                "user_id": user_id,
                "description": description,
                "owner": owner,
                "permissions": listed(permissions),
                "expires_at": expires_at,
                "metadata": metadata,
                "allowed_ips": listed(allowed_ips),
                "allowed_models": listed(allowed_models),
                "allowed_routes": listed(allowed_routes),
                "groups": listed(groups),
                "limits": listed(limits),
                "rotate_every_s": rotate_every_s,
                "rotation_overlap_s": rotation_overlap_s,
            }
        )
        answer = self._http.send(
            "PATCH",
            "/v1/keys/{id}",
            {"id": id},
            body=encode(fields),
            headers=if_match(expected),
            once=once_of(idempotency_key),
        )
        return decode(ApiKey, answer)

    def delete(
        self, id: str, *, purge: bool | None = None, expected: int | None = None, idempotency_key: str | None = None
    ) -> None:
        """Delete a key: its secrets stop working. `restore` reverses this within 30 days. `purge` removes the key and
        its usage for good. Raises NotFound."""
        self._http.send(
            "DELETE",
            "/v1/keys/{id}",
            {"id": id},
            query=query({"purge": purge}),
            headers=if_match(expected),
            once=once_of(idempotency_key),
        )

    def restore(self, id: str) -> ApiKey:
        """Restore a deleted key. Raises NotFound."""
        return decode(ApiKey, self._http.send("POST", "/v1/keys/{id}/restore", {"id": id}, once=once_of(None)))

    def disable(self, id: str) -> ApiKey:
        """Disable the key. Raises NotFound."""
        return decode(ApiKey, self._http.send("POST", "/v1/keys/{id}/disable", {"id": id}, once=once_of(None)))

    def enable(self, id: str) -> ApiKey:
        """Enable the key. Raises NotFound."""
        return decode(ApiKey, self._http.send("POST", "/v1/keys/{id}/enable", {"id": id}, once=once_of(None)))

    def rotate(
        self,
        id: str,
        *,
        overlap_s: int = 0,
        hold: bool | None = None,
        expected: int | None = None,
        idempotency_key: str | None = None,
    ) -> IssuedKey:
        """Give the key a new secret; its id, limits and usage stay. The old secret works for `overlap_s` seconds more.
        With `hold` the answer has no secret: it waits to be claimed.

        Raises NotFound, InvalidInput.
        """
        answer = self._http.send(
            "POST",
            "/v1/keys/{id}/rotate",
            {"id": id},
            body=encode(without_none({"overlap_s": overlap_s, "hold": hold})),
            headers=if_match(expected),
            once=once_of(idempotency_key),
        )
        return issued(answer)

    def claim(self, id: str, *, idempotency_key: str | None = None) -> IssuedKey:
        """The secret of a scheduled rotation, or of one with `hold`, once. Raises NotFound; Conflict if no secret
        waits."""
        once = once_of(idempotency_key)
        return issued(self._http.send("POST", "/v1/keys/{id}/claim", {"id": id}, once=once))

    def stats(self, id: str) -> KeyStats:
        """The usage of each limit, lifetime totals, and the last use. Raises NotFound."""
        return decode(KeyStats, self._http.send("GET", "/v1/keys/{id}/stats", {"id": id}))

    def verify(
        self,
        key: str,
        *,
        cost: Cost | None = None,
        permission: str | None = None,
        ip: str | None = None,
        model: str | None = None,
        route: str | None = None,
        idempotency_key: str | None = None,
        peek: bool = False,
    ) -> Verification:
        """Verify a key. If it is valid, `cost` (default: one request) is debited from all its limits. `peek`: a dry
        run, with the same answer and without a debit.

        Without an `idempotency_key`, which costs the server a write, a call without an answer is not retried: it raises
        NoAnswer, and may have debited. A call that cannot have reached the server is always retried.
        """
        asked = Ask(key=key, cost=cost, permission=permission, ip=ip, model=model, route=route)
        if peek:
            fields = {name: getattr(asked, name) for name in Ask.__struct_fields__}
            body = encode(without_none({**fields, "peek": True}))
            return decode(Verification, self._http.send("POST", "/v1/keys/verify", body=body, repeatable=True))
        once = None if idempotency_key is None else once_of(idempotency_key)
        return decode(Verification, self._http.send("POST", "/v1/keys/verify", body=encode(asked), once=once))

    def verify_batch(self, asks: Asks, *, idempotency_key: str | None = None) -> Verifications:
        """Up to 1,000 verifications, decided and answered in order.

        `idempotency_key` works as in `verify`.
        """
        once = None if idempotency_key is None else once_of(idempotency_key)
        body = encode({"items": listed(asks)})
        answer = self._http.send("POST", "/v1/keys/verify:batch", body=body, once=once)
        return decode(Answers, answer).items

    def bulk(
        self,
        action: str,
        *,
        where: Mapping[str, Any] | None = None,
        ids: Iterable[str] | None = None,
        changes: Mapping[str, Any] | None = None,
        dry_run: bool = False,
        page_size: int = DEFAULT_PAGE,
    ) -> Iterator[BulkStep]:
        """Change the keys of `ids`, or those that match `where` (the filters of `list`), some with each step of the
        iteration.

        `action` is disable, enable, delete, purge, restore, or update with `changes`. Each key is changed entirely or
        not at all. After an interruption call it again: changed keys count as unchanged.
        """
        fields = without_none(
            {
                "action": action,
                "filter": where,
                "ids": None if ids is None else listed(ids),
                "changes": changes,
                "dry_run": dry_run,
                "limit": page_size,
            }
        )
        cursor: str | None = None
        while True:
            body = encode(without_none({**fields, "cursor": cursor}))
            step = decode(BulkStep, self._http.send("POST", "/v1/keys:bulk", body=body, repeatable=True))
            yield step
            cursor = step.next_cursor
            if cursor is None:
                return

    def rotate_pepper(self) -> None:
        """Make a new pepper for new hashes; all keys keep working. Not retried without an answer. Raises Conflict if
        the server's configuration sets the peppers; Denied unless for an administrator of all tenants."""
        self._http.send("POST", "/v1/keys:rotate-pepper")
