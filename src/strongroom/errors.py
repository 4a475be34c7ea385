"""Every error that Strongroom raises on purpose: one base class, about ten codes.

A class's docstring is its default message. `code` is the stable word that the HTTP layer, the command line and
the client share; the one map from code to HTTP status lives in `server/errors.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with the input: where (`limits.0.window.seconds`), and what was found and expected."""

    path: str
    message: str


class StrongroomError(Exception):
    """Something went wrong in Strongroom."""

    code: ClassVar[str] = "internal"

    def __init__(self, message: str | None = None, /, **details: Any) -> None:
        self.message = message or (type(self).__doc__ or "").strip().split("\n")[0]
        self.details = details
        super().__init__(self.message)

    @property
    def request_id(self) -> str | None:
        """The server's name for the request that failed, where a client was told it."""
        request_id: str | None = self.details.get("request_id")
        return request_id


class InvalidInput(StrongroomError):
    """The input is not valid."""

    code = "invalid_input"

    def __init__(self, problems: Iterable[Problem] | str, message: str | None = None) -> None:
        self.problems: tuple[Problem, ...] = (Problem("", problems),) if isinstance(problems, str) else tuple(problems)
        if message is None:
            message = "; ".join(f"{p.path}: {p.message}" if p.path else p.message for p in self.problems)
        super().__init__(message or None)


class Unauthenticated(StrongroomError):
    """A valid management key or token is needed: send it as `Authorization: Bearer …`."""

    code = "unauthenticated"


class Denied(StrongroomError):
    """The access rules do not allow this."""

    code = "denied"


class TenantSuspended(Denied):
    """The tenant is suspended: its keys and its writes are refused until it is resumed."""

    code = "tenant_suspended"


class NotFound(StrongroomError):
    """There is no such document."""

    code = "not_found"


class AlreadyExists(StrongroomError):
    """A document with this id, or with this value of a unique index, exists already."""

    code = "already_exists"


class Conflict(StrongroomError):
    """This does not fit what is stored now, which someone else may have changed: read it again."""

    code = "conflict"


class Gone(StrongroomError):
    """The place that the cursor stands at is not in the journal any more: read anew, and begin without a cursor."""

    code = "gone"


class BoundExceeded(StrongroomError):
    """Adding this amount would take the counter past its bound; nothing was added."""

    code = "bound_exceeded"


class TooLarge(StrongroomError):
    """The document, batch, page or request is larger than the stated limit."""

    code = "too_large"


class TooManyRequests(StrongroomError):
    """Too many requests at once: try again in a moment."""

    code = "too_many_requests"


class Unavailable(StrongroomError):
    """The store cannot be reached or cannot write at the moment.

    Nothing was changed by the call, unless `details["outcome"]` is `unknown`: then it may have been done."""

    code = "unavailable"


class WritesOff(Unavailable):
    """Writes are turned off, for all tenants or for this one; nothing was changed. Reads go on."""

    code = "writes_off"


class StorageFull(Unavailable):
    """The disk is full: writes are refused, reads go on."""

    code = "storage_full"


class StoreError(StrongroomError):
    """The store is damaged, is not Strongroom's, or has a schema that this version cannot use."""

    code = "store_error"


class SchemaError(StoreError):
    """The declared entities and the store's schema do not fit together."""

    code = "schema_error"


class ConfigError(StrongroomError):
    """The configuration contradicts itself or names something that does not exist."""

    code = "config_error"
