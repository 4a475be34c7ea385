"""Calls to Firestore: each with a deadline, and every error of Google's client as one of Strongroom's."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar
from urllib.parse import quote

import google.auth
import google.auth.exceptions
import grpc  # type: ignore[import-untyped]
from google.cloud.firestore_v1.services.firestore.transports import FirestoreGrpcAsyncIOTransport
from google.cloud.firestore_v1.types import firestore as _rpc

from ...errors import ConfigError, SchemaError, StoreError, StrongroomError, TooManyRequests, Unavailable
from .paths import Paths
from .values import DocumentPb

TIMEOUT_S = 10.0
"""How long one call may take."""
READ_ATTEMPTS = 3
EMULATOR_ATTEMPTS = 8
MAX_PAUSE_S = 0.5
_EMULATOR = "FIRESTORE_EMULATOR_HOST"
_OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # Reconnect soon after a server is back, not after gRPC's two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.keepalive_time_ms", 30_000),
)
_SERVICE = "/google.firestore.v1.Firestore/"
Code = grpc.StatusCode
PRECONDITION = frozenset({Code.ALREADY_EXISTS, Code.NOT_FOUND, Code.FAILED_PRECONDITION, Code.ABORTED})
"""The codes of a commit whose precondition failed, or that met another commit on the same document."""
UNCERTAIN = frozenset({Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED, Code.CANCELLED, Code.INTERNAL, Code.UNKNOWN})
"""The codes after which it is unknown whether a commit was applied."""
_AGAIN = UNCERTAIN | {Code.ABORTED, Code.RESOURCE_EXHAUSTED}
_T = TypeVar("_T")

CommitRequest: Any = _rpc.CommitRequest.pb()
CommitResponse: Any = _rpc.CommitResponse.pb()
RunQueryRequest: Any = _rpc.RunQueryRequest.pb()
AggregationRequest: Any = _rpc.RunAggregationQueryRequest.pb()
ListenRequest: Any = _rpc.ListenRequest.pb()
_GetRequest: Any = _rpc.GetDocumentRequest.pb()
_BatchGetRequest: Any = _rpc.BatchGetDocumentsRequest.pb()


class MissingIndex(SchemaError):
    """Firestore has no index for the query. The search names the index, and raises a SchemaError."""


class Rejected(Exception):
    """A failed commit's status, for the writer to interpret. It never leaves the store."""

    def __init__(self, code: Any, text: str) -> None:
        super().__init__(f"{code.name}: {text}")
        self.code = code
        self.text = text


def translated(code: Any, text: str, what: str) -> StrongroomError:
    """An RPC's status as one of Strongroom's errors. `what` names the call."""
    if code is Code.RESOURCE_EXHAUSTED:
        return TooManyRequests(f"{what}: Firestore's quota is used up for now: {text}", retry_after_s=1.0)
    if code in (Code.PERMISSION_DENIED, Code.UNAUTHENTICATED):
        return ConfigError(
            f"{what}: Firestore refused the credentials ({text}): grant the service account roles/datastore.user "
            "and set GOOGLE_APPLICATION_CREDENTIALS"
        )
    if code is Code.NOT_FOUND:
        return ConfigError(f"{what}: there is no such project or database: {text}")
    if code in _AGAIN:
        return Unavailable(f"{what}: Firestore does not answer: {code.name}: {text}", retry_after_s=1.0)
    if code is Code.FAILED_PRECONDITION:
        return MissingIndex(f"{what}: Firestore refused it: {text}")
    return StoreError(f"{what}: Firestore refused it: {code.name}: {text}")


class Wire:
    """One database's channel. `requests` counts the calls by method, `billed` the documents that Firestore charges for:
    each one read (a missing one too, and at least one a query), each write, each delete."""

    def __init__(self, paths: Paths, emulator: str | None, timeout_s: float = TIMEOUT_S) -> None:
        self.paths = paths
        self.emulator = emulator or os.environ.get(_EMULATOR) or None
        self.timeout_s = timeout_s
        self.requests: dict[str, int] = {}
        self.billed = {"reads": 0, "writes": 0, "deletes": 0}
        self._channel: Any = None
        self._calls: dict[str, Callable[..., Any]] = {}
        database = quote(paths.database, safe="")
        self._metadata: tuple[tuple[str, str], ...] = (
            ("google-cloud-resource-prefix", paths.root),
            ("x-goog-request-params", f"project_id={quote(paths.project)}&database_id={database}"),
        )

    async def open(self) -> None:
        """Connect lazily; the credentials are read now. ConfigError if there are none."""
        if self.emulator is not None:
            self._channel = grpc.aio.insecure_channel(self.emulator, options=_OPTIONS)
            self._metadata += (
                ("authorization", "Bearer owner"),
            )  # the emulator's token for a caller to whom rules do not apply
        else:
            try:
                credentials, _ = await asyncio.to_thread(
                    google.auth.default, scopes=FirestoreGrpcAsyncIOTransport.AUTH_SCOPES
                )
            except google.auth.exceptions.GoogleAuthError as error:
                raise ConfigError(f"firestore://{self.paths.project}: no credentials: {error}") from None
            self._channel = FirestoreGrpcAsyncIOTransport.create_channel(
                "firestore.googleapis.com:443", credentials=credentials, options=_OPTIONS
            )
        channel = self._channel
        self._calls = {
            "get": _unary(channel, "GetDocument", _GetRequest, DocumentPb),
            "batch_get": _streamed(channel, "BatchGetDocuments", _BatchGetRequest, _rpc.BatchGetDocumentsResponse.pb()),
            "commit": _unary(channel, "Commit", CommitRequest, CommitResponse),
            "query": _streamed(channel, "RunQuery", RunQueryRequest, _rpc.RunQueryResponse.pb()),
            "aggregate": _streamed(
                channel, "RunAggregationQuery", AggregationRequest, _rpc.RunAggregationQueryResponse.pb()
            ),
            "listen": channel.stream_stream(
                _SERVICE + "Listen",
                request_serializer=ListenRequest.SerializeToString,
                response_deserializer=_rpc.ListenResponse.pb().FromString,
            ),
        }

    async def close(self) -> None:
        channel, self._channel, self._calls = self._channel, None, {}
        if channel is not None:
            await channel.close()

    def _call(self, method: str, request: Any) -> Any:
        if self._channel is None:
            raise Unavailable(f"firestore://{self.paths.project}/{self.paths.database}: the store is not open")
        self.requests[method] = self.requests.get(method, 0) + 1
        return self._calls[method](request, timeout=self.timeout_s, metadata=self._metadata)

    # --- Reads: repeated a few times, which is safe ---

    async def get(self, name: str) -> Any | None:
        """A document by its name, or None."""

        async def once() -> Any | None:
            self.billed["reads"] += 1
            try:
                return await self._call("get", _GetRequest(name=name))
            except grpc.aio.AioRpcError as error:
                if error.code() is Code.NOT_FOUND:  # of the document: `open` has found the database
                    return None
                raise

        return await self._read("get", once)

    async def batch_get(self, names: Sequence[str], at: Any = None) -> tuple[dict[str, Any | None], Any]:
        """Documents by their names, None for a missing one, and the time of this state: `at`, or now."""
        request = _BatchGetRequest(database=self.paths.root, documents=list(dict.fromkeys(names)))
        if at is not None:
            request.read_time.CopyFrom(at)

        async def once() -> tuple[dict[str, Any | None], Any]:
            found: dict[str, Any | None] = {}
            moment = None
            async for answer in self._call("batch_get", request):
                if answer.HasField("read_time"):
                    moment = answer.read_time
                if answer.HasField("found"):
                    found[answer.found.name] = answer.found
                elif answer.missing:
                    found[answer.missing] = None
            self.billed["reads"] += len(found)
            return found, moment

        return await self._read("batch get", once)

    async def query(self, request: Any) -> tuple[list[Any], Any]:
        """A query's documents, and the time of this state."""

        async def once() -> tuple[list[Any], Any]:
            found = []
            moment = None
            async for answer in self._call("query", request):
                if answer.HasField("read_time"):
                    moment = answer.read_time
                if answer.HasField("document"):
                    found.append(answer.document)
            self.billed["reads"] += max(1, len(found))
            return found, moment

        if self.emulator is None or request.HasField("read_time"):
            return await self._read("query", once)
        found, moment = await self._read("query", once)
        request = RunQueryRequest.FromString(request.SerializeToString())
        request.read_time.CopyFrom(moment)
        for attempt in range(EMULATOR_ATTEMPTS):
            if await self._was_so(found, moment):
                return found, moment
            await pause(attempt)
            self.billed["reads"] -= max(1, len(found))  # the repetition is not billed by Firestore
            found, _ = await self._read("query", once)
        raise Unavailable("query: Firestore's emulator gives answers that do not belong together", retry_after_s=1.0)

    async def _was_so(self, found: list[Any], moment: Any) -> bool:
        """Whether a query's documents are the state at its time. The emulator's queries lag behind commits under way,
        even by a part of a commit. Its lookups by name do not, and Firestore's queries never do."""
        if len(found) < 2:
            return True
        there, _ = await self.batch_get([document.name for document in found], moment)
        self.billed["reads"] -= len(there)  # only the emulator is asked this
        return all(
            (then := there[document.name]) is not None and then.update_time == document.update_time
            for document in found
        )

    async def aggregate(self, request: Any) -> dict[str, Any]:
        """An aggregation's values by alias."""

        async def once() -> dict[str, Any]:
            values: dict[str, Any] = {}
            async for answer in self._call("aggregate", request):
                values.update(answer.result.aggregate_fields)
            self.billed["reads"] += 1  # at least: one for each 1,000 index entries that match
            return values

        return await self._read("aggregate", once)

    async def _read(self, what: str, once: Callable[[], Awaitable[_T]]) -> _T:
        for attempt in range(READ_ATTEMPTS):
            try:
                return await once()
            except grpc.aio.AioRpcError as error:
                last = attempt == READ_ATTEMPTS - 1 or error.code() is Code.DEADLINE_EXCEEDED
                if last or error.code() not in _AGAIN:
                    raise translated(error.code(), error.details() or "", what) from None
                await pause(attempt)
        raise Unavailable(f"{what}: Firestore does not answer")  # never: the last attempt returns or raises

    # --- Commit: sent once, because a second try must know the outcome of the first ---

    async def commit(self, writes: Sequence[Any]) -> Any:
        """One commit. Raises Rejected with its status."""
        try:
            answer = await self._call("commit", CommitRequest(database=self.paths.root, writes=writes))
        except grpc.aio.AioRpcError as error:
            raise Rejected(error.code(), error.details() or "") from None
        deletes = sum(bool(write.delete) for write in writes)
        self.billed["deletes"] += deletes
        self.billed["writes"] += len(writes) - deletes
        return answer

    async def listen(self, requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        """The answers of a listening stream, until it breaks (Unavailable) or the caller ends it."""
        if self._channel is None:
            raise Unavailable("the store is not open")
        self.requests["listen"] = self.requests.get("listen", 0) + 1
        call = self._calls["listen"](requests, metadata=self._metadata)
        try:
            async for answer in call:
                if answer is None:  # what gRPC gives for a message that it could not read
                    raise Unavailable("listen: an answer could not be read")
                yield answer
        except grpc.aio.AioRpcError as error:
            raise translated(error.code(), error.details() or "", "listen") from None
        finally:
            call.cancel()


def _unary(channel: Any, name: str, request: Any, response: Any) -> Any:
    return channel.unary_unary(
        _SERVICE + name, request_serializer=request.SerializeToString, response_deserializer=response.FromString
    )


def _streamed(channel: Any, name: str, request: Any, response: Any) -> Any:
    return channel.unary_stream(
        _SERVICE + name, request_serializer=request.SerializeToString, response_deserializer=response.FromString
    )


async def pause(attempt: int) -> None:
    """Wait before the next attempt: longer each time, with jitter."""
    await asyncio.sleep(min(MAX_PAUSE_S, 0.005 * 2**attempt) * random.uniform(0.5, 1.5))  # noqa: S311 - jitter
