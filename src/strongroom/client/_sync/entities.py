# Generated from _async/entities.py by `python src/strongroom/client/_unasync.py`: edit that file instead.
"""Entities over HTTP: one tenant's documents, as dicts or typed values, and their stream of changes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Generic, TypeVar, overload

import msgspec

from .._wire import (
    decode_document,
    decode_page,
    encode_document,
    fields_of,
    filters,
    if_match,
    once_of,
    query,
)
from ..models import Page
from .transport import Transport
from .watch import GIVE_UP_AFTER_S, Watch

T = TypeVar("T")
DEFAULT_PAGE = 100


class Tenant:
    """One tenant's data."""

    def __init__(self, transport: Transport, tenant: str) -> None:
        self._http = transport
        self.id = tenant

    @overload
    def collection(self, name: str) -> Collection[dict[str, Any]]: ...

    @overload
    def collection(self, name: str, type: type[T]) -> Collection[T]: ...

    def collection(self, name: str, type: Any = dict[str, Any]) -> Collection[Any]:
        """The documents of one collection, as dicts, or as values of `type`: a dataclass, a TypedDict, a msgspec Struct
        or a pydantic model."""
        return Collection(self._http, self.id, name, type)


class Collection(Generic[T]):
    """The documents of one collection of one tenant. Every write happens once, also after retries.

    The store sets `version`, `created_at` and `updated_at`; the client does not send them. `expected` is the required
    version of the document (0: it must not exist); else PreconditionFailed.
    """

    def __init__(self, transport: Transport, tenant: str, name: str, type: type[T]) -> None:
        self._http = transport
        self._type = type
        self._at = {"tenant": tenant, "collection": name}

    def create(self, document: T | Mapping[str, Any], *, idempotency_key: str | None = None) -> T:
        """Create a document, with a new id if it has no `id`. Raises AlreadyExists, InvalidInput with every problem."""
        body = encode_document(fields_of(document))
        answer = self._http.send(
            "POST", "/v1/tenants/{tenant}/{collection}", self._at, body=body, once=once_of(idempotency_key)
        )
        return decode_document(self._type, answer)

    def get(self, id: str) -> T:
        """One document. Raises NotFound."""
        answer = self._http.send("GET", "/v1/tenants/{tenant}/{collection}/{id}", {**self._at, "id": id})
        return decode_document(self._type, answer)

    def put(
        self,
        id: str,
        document: T | Mapping[str, Any],
        *,
        expected: int | None = None,
        idempotency_key: str | None = None,
    ) -> T:
        """Replace or create a document. Raises InvalidInput with every problem."""
        answer = self._http.send(
            "PUT",
            "/v1/tenants/{tenant}/{collection}/{id}",
            {**self._at, "id": id},
            body=encode_document(fields_of(document)),
            headers=if_match(expected),
            once=once_of(idempotency_key),
        )
        return decode_document(self._type, answer)

    def update(
        self,
        id: str,
        changes: Mapping[str, Any],
        *,
        expected: int | None = None,
        idempotency_key: str | None = None,
    ) -> T:
        """Change some fields of a document. Raises NotFound, InvalidInput with every problem."""
        answer = self._http.send(
            "PATCH",
            "/v1/tenants/{tenant}/{collection}/{id}",
            {**self._at, "id": id},
            body=encode_document(dict(changes)),
            headers=if_match(expected),
            once=once_of(idempotency_key),
        )
        return decode_document(self._type, answer)

    def delete(self, id: str, *, expected: int | None = None, idempotency_key: str | None = None) -> None:
        """Remove a document. Raises NotFound."""
        self._http.send(
            "DELETE",
            "/v1/tenants/{tenant}/{collection}/{id}",
            {**self._at, "id": id},
            headers=if_match(expected),
            once=once_of(idempotency_key),
        )

    def find(
        self,
        *,
        where: Mapping[str, Any] | None = None,
        order_by: str | Iterable[str] | None = None,
        page_size: int = DEFAULT_PAGE,
        **fields: object,
    ) -> Iterator[T]:
        """Every matching document, over all pages: `find(status="pending", priority__ge=3, order_by="-created_at")`.

        A field's name may end in `__ne`, `__lt`, `__le`, `__gt`, `__ge`, `__in`, `__not_in`, `__contains` or
        `__contains_any`; None means "is null". `where` is a filter such as `{"or": [{"field": "status", "op": "==",
        "value": "failed"}, …]}`.
        """
        asked = filters(fields, where, order_by)
        found = self._http.items(msgspec.Raw, "/v1/tenants/{tenant}/{collection}", self._at, asked, page_size)
        for document in found:
            yield decode_document(self._type, document)

    def page(
        self,
        *,
        where: Mapping[str, Any] | None = None,
        order_by: str | Iterable[str] | None = None,
        limit: int = DEFAULT_PAGE,
        cursor: str | None = None,
        **fields: object,
    ) -> Page[T]:
        """One page of `find`. `cursor`: the `next_cursor` of the last page."""
        asked = filters(fields, where, order_by) + query({"limit": limit, "cursor": cursor})
        answer = self._http.send("GET", "/v1/tenants/{tenant}/{collection}", self._at, query=asked)
        page = decode_page(msgspec.Raw, answer)
        return Page(items=[decode_document(self._type, one) for one in page.items], next_cursor=page.next_cursor)

    def watch(self, *, cursor: str | None = None, give_up_after_s: float = GIVE_UP_AFTER_S) -> Watch:
        """Every change from now on, or after the `cursor` of another watch, in order, each once.

        The watch reconnects after a lost connection and misses nothing. After `give_up_after_s` without success it
        raises the last error. A refusal of the server is raised at once (Unauthenticated, Denied, NotFound,
        InvalidInput).
        """
        return Watch(self._http, self._at, cursor, give_up_after_s)
