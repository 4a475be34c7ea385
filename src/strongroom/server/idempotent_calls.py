"""`Idempotency-Key` on writes: a retry changes nothing and gets the first answer; another request with it gets 409.

    run_once   for a call that is one transaction: the record of the call commits with it
    Answers    for a call of several repeatable steps: claimed first, its answer stored last

A retry repeats all steps of an interrupted call.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar
from weakref import WeakValueDictionary

import msgspec
from fastapi import Request, Response

from ..context import Context, text_problem
from ..database import (
    MAX_IDEMPOTENCY_KEY_BYTES,
    Database,
    Idempotency,
    Replayed,
    RequestKey,
)
from ..errors import (
    AlreadyExists,
    Conflict,
    InvalidInput,
    Problem,
    StrongroomError,
    Unavailable,
)
from ..storage.port import Delete, Put
from .wire import exactly, room_of

T = TypeVar("T")
_KEPT_HEADERS = ("content-type", "etag")
_log = logging.getLogger(__name__)


class _Answer(msgspec.Struct):
    status: int
    headers: dict[str, str]
    body: bytes


def idempotency_key(request: Request) -> str | None:
    """The Idempotency-Key header. Raises InvalidInput for a malformed key."""
    value = request.headers.get("idempotency-key")
    if value is not None and (problem := text_problem(value, MAX_IDEMPOTENCY_KEY_BYTES)):
        raise InvalidInput([Problem("Idempotency-Key", problem)])
    return value


async def request_key(request: Request, context: Context) -> RequestKey | None:
    """The Idempotency-Key with a digest of the request: method, path, query, preconditions, and the body by value. So a
    retry may order names and write numbers in another way. Raises InvalidInput."""
    value = idempotency_key(request)
    if value is None:
        return None
    key = RequestKey(value)
    headers = request.headers
    key.request = (
        request.method,
        request.scope["path"],
        sorted(request.query_params.multi_items()),
        [headers.get(name, "").replace(" ", "") for name in ("if-match", "if-none-match")],
        exactly(await request.body()),
    )
    key.scope = context.tenant or ""
    return key


async def run_once(
    request: Request,
    context: Context,
    work: Callable[[RequestKey | None], Awaitable[T]],
    again: Callable[[Replayed], Awaitable[T]],
) -> T:
    """The result of `work`, whose transaction gets the key; for a retry, the result of `again` on the stored record.

    The record is looked up first: a document that was changed or deleted since must not fail a retry.
    """
    key = await request_key(request, context)
    replayed = await room_of(request).database.repeated(context, Idempotency.of(key))
    if replayed is not None:
        return await again(replayed)
    if key is not None:
        key.looked_up = True
    return await work(key)


async def nothing(replayed: Replayed) -> None:
    """`again` for a call whose answer has no body."""


class Answers:
    """The answers of calls with several steps."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def answered(self, request: Request, context: Context, work: Callable[[], Awaitable[Response]]) -> Response:
        """The answer of `work`, or the stored answer to the same request."""
        call = Idempotency.of(await request_key(request, context))
        if call is None:
            return await work()
        id = self._database.calls.id(context, call)
        turn = self._turns.setdefault(id, asyncio.Lock())
        async with turn:  # a concurrent second call waits and gets the first answer
            claimed = await self._claim(context, call)
            if isinstance(claimed, Response):
                return claimed
            try:
                response = await work()
            except StrongroomError as error:
                if claimed and not isinstance(error, Unavailable):  # a failed call gives its key back
                    await self._try(Delete("idempotent_calls", id), context)
                raise
            headers = {name: response.headers[name] for name in _KEPT_HEADERS if name in response.headers}
            answer = msgspec.msgpack.encode(_Answer(response.status_code, headers, bytes(response.body)))
            kept = self._database.calls.operation(
                self._database.at_now(context), Idempotency(call.key, call.request, answer, call.scope), [], None
            )
            await self._try(Put(kept.collection, kept.id, kept.document), context)
            return response

    async def _claim(self, context: Context, call: Idempotency) -> Response | bool:
        """The stored answer to this request, or whether this call has claimed the key for the first time. Raises
        Conflict if another request used the key."""
        context = self._database.at_now(context)
        for _ in range(2):
            try:
                before = await self._database.calls.before(context, call)
            except Replayed as replayed:
                return _response(replayed.memo) if replayed.memo is not None else False
            try:
                claim = self._database.calls.operation(context, call, [], None, before)
                await self._database.commit_counters([claim], context.now_us)
            except (AlreadyExists, Conflict):
                continue  # another node claimed the key: check for which request
            return True
        raise Conflict("requests with this idempotency key come too quickly: try again")

    async def _try(self, operation: Put | Delete, context: Context) -> None:
        """Write the record, or log the failure. Without a record a retry only repeats the work, which finds it done."""
        try:
            await self._database.commit_counters([operation], self._database.at_now(context).now_us)
        except StrongroomError as error:
            _log.info("the answer of a call with an idempotency key could not be stored: %s", error)


def _response(memo: bytes) -> Response:
    answer = msgspec.msgpack.decode(memo, type=_Answer)
    return Response(answer.body, answer.status, headers=answer.headers)


__all__ = ["Answers", "idempotency_key", "nothing", "request_key", "run_once"]
