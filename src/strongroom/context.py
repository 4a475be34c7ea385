"""The context of a call: the actor, the tenant, the request and the time. It is immutable and passed to every call."""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
import secrets
import time
import unicodedata
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from types import MappingProxyType
from typing import Any, Protocol

import msgspec
from msgspec.structs import force_setattr

from .errors import InvalidInput, Problem

MAX_TENANT_BYTES = 128
MAX_ACTOR_BYTES = 512
MAX_REMEMBERED = 4_096
TOKEN = "token"  # noqa: S105 - the name of a claim
"""The claim that holds the claims of the caller's JWT, all of them and nothing else. The other claims are
Strongroom's own, and none of them is ever taken from a token."""
_NO_CLAIMS: Mapping[str, Any] = MappingProxyType({})
_SYSTEM_CLAIMS: Mapping[str, Any] = MappingProxyType({"admin": True})
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_KINDS: tuple[tuple[Any, str], ...] = (
    (bool, "a boolean"),  # before the numbers, of which it is one to Python
    ((int, float, Decimal), "a number"),
    (str, "text"),
    ((list, tuple), "a list"),
    (Mapping, "an object"),
)


@functools.lru_cache(maxsize=MAX_REMEMBERED)  # the same moments come again: commit times, ends of windows
def utc_from_us(microseconds: int) -> datetime:
    """The aware UTC time of this many microseconds since the Unix epoch, exactly."""
    return _EPOCH + timedelta(microseconds=microseconds)


def us_from_utc(moment: datetime) -> int:
    """Microseconds since the Unix epoch, exactly (a float timestamp would round)."""
    delta = moment - _EPOCH
    return (delta.days * 86_400 + delta.seconds) * 1_000_000 + delta.microseconds


class _RandomIds:
    """Ids that nobody can guess: the time, so that new rows land at the end of an index, and 80 random bits.

    The random bits are read from the system for RANDOM_AT_ONCE ids at a time: a system call for each id would cost as
    much as the rest of a small document's validation.
    """

    def __init__(self) -> None:
        self.start()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self.start)  # a child that kept the bits would repeat its parent's ids

    def start(self) -> None:
        self._unused: list[str] = []

    def __call__(self, prefix: str = "") -> str:
        try:
            random = self._unused.pop()  # one step of the interpreter: no two threads get the same bits
        except IndexError:
            text = secrets.token_hex(RANDOM_BYTES * RANDOM_AT_ONCE)
            size = 2 * RANDOM_BYTES
            random, *unused = (text[begin : begin + size] for begin in range(0, len(text), size))
            self._unused.extend(unused)
        return f"{prefix}{time.time_ns() // 1_000_000:011x}{random}"


RANDOM_BYTES = 10
RANDOM_AT_ONCE = 100
new_id = _RandomIds()
"""An id that nobody can guess."""
SALT_BYTES = 16


class _Salts:
    """Random salts of SALT_BYTES. They are read from the system for many at a time, as `_RandomIds` does."""

    def __init__(self) -> None:
        self.start()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self.start)  # a child that kept the bits would repeat its parent's salts

    def start(self) -> None:
        self._unused: list[bytes] = []

    def __call__(self) -> bytes:
        try:
            return self._unused.pop()  # one step of the interpreter: no two threads get the same bits
        except IndexError:
            random = secrets.token_bytes(SALT_BYTES * RANDOM_AT_ONCE)
            salt, *unused = (random[at : at + SALT_BYTES] for at in range(0, len(random), SALT_BYTES))
            self._unused.extend(unused)
            return salt


new_salt = _Salts()
"""A salt for a journal record, by which its values are committed to in its leaf."""


class _Sequence:
    """Ids that never repeat and may be guessed: the time, 64 random bits of this process, a counter."""

    def __init__(self) -> None:
        self.start()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self.start)  # a child that kept them would repeat its parent's ids

    def start(self) -> None:
        self._process = secrets.token_hex(8)
        self._next = itertools.count().__next__

    def __call__(self) -> str:
        return f"{time.time_ns() // 1_000_000:011x}{self._process}{self._next():x}"


next_id = _Sequence()
"""An id for a request or a journal record: unique, cheaper than `new_id`, and not secret."""


def check_tenant(tenant: str, path: str = "tenant") -> None:
    """Raise InvalidInput unless `tenant` is a text of 1 to MAX_TENANT_BYTES UTF-8 bytes without U+0000."""
    problem = text_problem(tenant, MAX_TENANT_BYTES)
    if problem:
        raise InvalidInput([Problem(path, problem)])


_NAME = re.compile(rb'(?<!\\)"\s*:')
"""The end of a name in a JSON text: a quote, without a backslash before it, and a colon."""


def repeated_name(text: bytes, value: Any) -> str | None:
    """A name that occurs more than once in one object of a JSON text, or None. `value` is the decoded text.

    Some JSON readers take the first value and others the last, so one system would check another value than the next
    system uses.
    """
    if len(_NAME.findall(text)) == _count_names(value):  # a tenth of the time of reading it again
        return None

    def of(pairs: list[tuple[str, Any]]) -> None:
        seen = set()
        for name, _ in pairs:
            if name in seen:
                raise _Repeated(name)
            seen.add(name)

    try:
        json.loads(text, object_pairs_hook=of, parse_int=len, parse_float=len)
    except _Repeated as found:
        return found.name
    except (ValueError, RecursionError):  # the caller's own decoding reports it
        pass
    return None


class _Repeated(Exception):
    def __init__(self, name: str) -> None:
        self.name = name


def _count_names(value: Any) -> int:
    if isinstance(value, dict):
        return len(value) + sum(_count_names(item) for item in value.values() if isinstance(item, dict | list))
    return sum(_count_names(item) for item in value if isinstance(item, dict | list)) if isinstance(value, list) else 0


def kind_of(value: object) -> str:
    """The kind of a value in JSON's words, for messages: `a number`; Python's name for kinds that JSON lacks."""
    if value is None:
        return "null"
    for types, name in _KINDS:
        if isinstance(value, types):
            return name
    return type(value).__name__


def text_problem(value: object, max_bytes: int) -> str | None:
    """Why `value` cannot be an identifier on every engine, or None if it can."""
    if not isinstance(value, str):
        return f"found {kind_of(value)}, expected text"
    if not value:
        return "found an empty text, expected at least one character"
    if "\x00" in value:
        return "found U+0000, which no engine can index"
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        return "found a lone surrogate, expected valid Unicode"
    if size > max_bytes:
        return f"found {size} bytes, expected at most {max_bytes}"
    return None


def name_problem(value: object, max_bytes: int) -> str | None:
    """Why `value` cannot be the name of a tenant, user, owner, group or quota, or None if it can.

    As `text_problem`. In addition a name is in NFC, Unicode's composed form, without spaces around it, so that two
    names that look equal are equal.

    New names are checked, not names that are looked up: a name that was stored earlier is still found.
    """
    problem = text_problem(value, max_bytes)
    if problem is not None or not isinstance(value, str):
        return problem
    if value != value.strip():
        return f"found {value[:64]!r}, expected no spaces at its beginning or end"
    if not value.isascii() and not unicodedata.is_normalized("NFC", value):
        composed = unicodedata.normalize("NFC", value)
        return f"found {value[:64]!a}, expected it in Unicode's form NFC: {composed[:64]!a}"
    return None


def check_tenant_name(tenant: str, path: str = "tenant") -> None:
    """Raise InvalidInput unless `tenant` can be the name of a tenant for which something new is stored."""
    if tenant not in _GOOD_TENANT_NAMES:  # each creation asks
        if problem := name_problem(tenant, MAX_TENANT_BYTES):
            raise InvalidInput([Problem(path, problem)])
        if len(_GOOD_TENANT_NAMES) >= MAX_REMEMBERED:
            _GOOD_TENANT_NAMES.clear()
        _GOOD_TENANT_NAMES.add(tenant)


_GOOD_TENANT_NAMES: set[str] = set()


class MachineTime(int):
    """A time of this machine's clock, in microseconds. Code that knows the store's clock replaces it by that
    clock's."""


class _HasNow(Protocol):
    def now_us(self) -> int: ...


@functools.lru_cache(maxsize=MAX_REMEMBERED)  # the same callers come again, and each call makes two or three contexts
def _check_caller(tenant: str | None, actor: str) -> None:
    if tenant is not None:
        check_tenant(tenant)
    if problem := text_problem(actor, MAX_ACTOR_BYTES):
        raise InvalidInput([Problem("actor", problem)])


class Context(msgspec.Struct, frozen=True):
    """One caller's call.

    `tenant` is the tenant whose data the call sees, or None for the platform itself (no tenant's data).
    `actor` names who acts, for the journal (`key:…`, `user:…`, `system`). `claims` are what the rules may ask
    (`{"admin": True}`). `now` is read once, when the call begins, so that every line of it agrees: from
    the store's clock, unless `now_us` says when it is.
    """

    tenant: str | None
    actor: str = "system"
    claims: Mapping[str, Any] = _NO_CLAIMS
    request_id: str = ""
    now_us: int = msgspec.field(default_factory=lambda: MachineTime(time.time_ns() // 1_000))

    def __post_init__(self) -> None:
        try:
            _check_caller(self.tenant, self.actor)
        except TypeError:  # not even hashable, so no text
            _check_caller.__wrapped__(self.tenant, self.actor)

    @property
    def now(self) -> datetime:
        """The moment of the call, aware UTC, microseconds."""
        return utc_from_us(self.now_us)

    @property
    def is_admin(self) -> bool:
        return self.claims.get("admin") is True

    def by(self, clock: _HasNow) -> Context:
        """The same call at the clock's time, unless the caller chose a time."""
        if type(self.now_us) is not MachineTime:
            return self
        then: Context = self.__copy__()  # type: ignore[attr-defined]  # of every Struct; it does not validate again
        force_setattr(then, "now_us", clock.now_us())
        return then

    def at_now(self) -> Context:
        """The same caller at the present time, with the same request id: for a retry or a long-lived handle."""
        later: Context = self.__copy__()  # type: ignore[attr-defined]  # of every Struct; it does not validate again
        force_setattr(later, "now_us", MachineTime(time.time_ns() // 1_000))
        return later


def system_context(tenant: str | None = None, *, actor: str = "system") -> Context:
    """The context of Strongroom's own work: an administrator of `tenant`."""
    return Context(tenant, actor, _SYSTEM_CLAIMS)
