"""Reading of key files: every row is judged. A row is refused, with every reason, or accepted as it stands.

`parse` reads a whole file. `judged` reads one row.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from datetime import datetime
from typing import Any, TypeVar

import msgspec

from ...context import (
    name_problem,
    repeated_name,
    text_problem,
    us_from_utc,
)
from ...entities import MAX_ID_BYTES
from ...limits import MAX_AMOUNT, SATURATED
from ..token import MAX_KEY_CHARS, is_possible, masked
from .key_file import (
    MAX_AHEAD_S,
    MAX_NAME_CHARS,
    SHORT_KEY_CHARS,
    WINDOW_S,
    Finding,
    KeyFile,
    KeyFileError,
    KeyRow,
    Shape,
    zulu,
)

MAX_FILE_BYTES = 1 << 30
"""The largest file that is held in memory: about 2,500,000 keys, which take 3.5 GB."""
T = TypeVar("T")

_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_HASH_AS_KEY = re.compile(r"sha256:([0-9a-fA-F]{64})")
HASHES_NAMED = re.compile(rb'"([0-9a-fA-F]{64})"\s*:')
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?(Z|[+-]\d\d:\d\d)")
_BYTE = re.compile(r" \(byte (\d+)\)$")
_LAST_US = us_from_utc(datetime.fromisoformat("9999-12-30T00:00:00Z"))
_WINDOW_FIELDS = frozenset({"window_start", "tokens_used"})
_FIELDS: dict[Shape, frozenset[str]] = {
    "plain": frozenset(
        {
            "key", "name", "model", "token_limit_per_5h", "expiry_date", "created_at", "last_used",
            "total_lifetime_tokens", "usage_windows",
        }
    ),
    "hashed": frozenset({"name", "user_id", "created_at", "expires_at", "last_used", "usage_count"}),
}  # fmt: skip


# --- Reading: the file ----------------------------------------------------------------------------------------


def parse(data: bytes, now_us: int) -> KeyFile:
    """Read a file's bytes and judge every row. Raises KeyFileError if the file has neither shape."""
    data = data.removeprefix(b"\xef\xbb\xbf")
    if not data.strip():
        raise KeyFileError('is empty: expected {"keys": …}')
    document = _decoded(data, dict[str, msgspec.Raw], "is not a JSON object")
    if "keys" not in document:
        raise KeyFileError(
            f'has no "keys": expected {{"keys": [...]}} or {{"keys": {{...}}}}, found {_named(document)}'
        )
    keys = memoryview(document["keys"])
    opening = bytes(keys[:1])
    if opening == b"[":
        return _judge("plain", _decoded(keys, list[msgspec.Raw], '"keys" is not a list'), now_us)
    if opening == b"{":
        rows = _decoded(keys, dict[str, msgspec.Raw], '"keys" is not an object')
        return _judge("hashed", rows, now_us, _named_twice(data, len(rows)))
    raise KeyFileError('"keys" is neither a list of keys nor an object of hashes')


def _decoded(data: Any, type: type[T], otherwise: str) -> T:
    try:
        return msgspec.json.decode(data, type=type)
    except msgspec.ValidationError as error:
        raise KeyFileError(f"{otherwise}: {error}") from None
    except msgspec.DecodeError as error:
        raise KeyFileError(f"is not JSON: {_placed(str(error), data)}") from None
    except UnicodeDecodeError as error:
        raise KeyFileError(f"is not UTF-8: {error.reason}") from None
    except RecursionError:
        raise KeyFileError("is not a key file: it is nested too deeply") from None


def _placed(message: str, data: Any) -> str:
    """The decoder's message with line and column in place of a byte offset."""
    found = _BYTE.search(message)
    offset = int(found[1]) if found else len(data)
    before = bytes(data[:offset])
    line = before.count(b"\n") + 1
    column = len(before[before.rfind(b"\n") + 1 :].decode("utf-8", "replace")) + 1
    what = (
        _BYTE.sub("", message).removeprefix("JSON is malformed: ").replace("Input data was truncated", "it ends early")
    )
    return f"line {line}, column {column}: {what}"


def _named(document: dict[str, Any]) -> str:
    names = ", ".join(json.dumps(name[:40]) for name in list(document)[:5])
    return names + (", …" if len(document) > 5 else "") if names else "nothing"


def _named_twice(data: bytes, count: int) -> frozenset[str]:
    """Hashes that the file has more than once. JSON keeps only the last, so a key would be lost silently."""
    names = HASHES_NAMED.findall(data)
    if len(names) <= count:
        return frozenset()
    return frozenset(name.decode() for name, times in Counter(names).items() if times > 1)


def _judge(
    shape: Shape, raws: list[msgspec.Raw] | dict[str, msgspec.Raw], now_us: int, twice: frozenset[str] = frozenset()
) -> KeyFile:
    file = KeyFile(shape)
    seen: dict[bytes, str] = {}
    named = enumerate(raws) if isinstance(raws, list) else raws.items()
    for name, raw in named:
        row, findings = judged(shape, name, raw, now_us, seen, twice=name in twice)
        if row is not None:
            file.rows.append(row)
        else:
            file.refused += 1
        for finding in findings:
            file.keep(finding)
    return file


def judged(
    shape: Shape, name: int | str, raw: msgspec.Raw, now_us: int, seen: dict[bytes, str], *, twice: bool = False
) -> tuple[KeyRow | None, list[Finding]]:
    """One row from its JSON, or None if it is refused; and its findings. `name` is its index in the list, or its hash.
    `seen` maps the keys of earlier rows to their places; this row's key is added."""
    reader = _Row(shape, f"keys.{name if isinstance(name, int) else _short(name)}", raw)
    if isinstance(name, str):
        reader.take_hash(name)
        if twice:
            reader.wrong("", "stands in the file more than once")
    return reader.read(now_us, seen), reader.findings


def _short(name: str) -> str:
    return f"{name[:12]}…" if len(name) > 13 else name


# --- Reading: one row -----------------------------------------------------------------------------------------


class _Row:
    """One row being read. Problems are collected in `findings`, so that a user sees all of them at once."""

    def __init__(self, shape: Shape, path: str, raw: msgspec.Raw) -> None:
        self.shape = shape
        self.path = path
        self.findings: list[Finding] = []
        self.sha256: bytes | None = None
        self.secret: str | None = None
        self.shown = ""
        self.fields: dict[str, Any] = {}
        try:
            found = msgspec.json.decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            found = None
            self.wrong("", f"cannot be read: {error}")
        else:
            if not isinstance(found, dict):
                self.wrong("", f"found {_kind(found)}, expected an object")
            elif (twice := repeated_name(bytes(raw), found)) is not None:
                self.wrong(twice[:64], "found this name more than once, expected it once")
        self.is_object = isinstance(found, dict)
        if self.is_object:
            self.fields = found

    def wrong(self, name: str, message: str) -> None:
        self._found(name, message, True)

    def note(self, name: str, message: str) -> None:
        self._found(name, message, False)

    def _found(self, name: str, message: str, refused: bool) -> None:
        label = self.fields.get("name")
        path = f"{self.path}.{name}" if name else self.path
        self.findings.append(Finding(path, self.shown, label[:60] if isinstance(label, str) else "", message, refused))

    @property
    def is_refused(self) -> bool:
        return any(finding.refused for finding in self.findings)

    def read(self, now_us: int, seen: dict[bytes, str]) -> KeyRow | None:
        """The row, or None if it has a problem. `seen` has the keys of earlier rows."""
        if not self.is_object:
            return None
        plain = self.shape == "plain"
        if plain:
            self._take_key()
        if self.sha256 is not None and (first := seen.setdefault(self.sha256, self.path)) != self.path:
            self.wrong("key" if plain else "", f"is the same key as {first}")
        name = self._text("name", MAX_NAME_CHARS, required=True)
        created_us = self._time("created_at", required=True)
        expires_us = self._time("expiry_date" if plain else "expires_at", or_null=True, required=True)
        last_used_us = self._time("last_used", or_null=True)
        user_id = None if plain else self._text("user_id", MAX_ID_BYTES, identifies=True)
        uses = 0 if plain else self._whole("usage_count", SATURATED) or 0
        model = self._text("model", MAX_NAME_CHARS) if plain else None
        token_limit = self._whole("token_limit_per_5h", MAX_AMOUNT, required=True) if plain else None
        tokens = self._whole("total_lifetime_tokens", SATURATED) or 0 if plain else 0
        windows = self._windows(now_us) if plain else ()
        if created_us is not None and expires_us is not None and expires_us < created_us:
            self.note("expiry_date" if plain else "expires_at", "lies before created_at: the key was never valid")
        elif expires_us is not None and expires_us <= now_us:
            self.note(
                "expiry_date" if plain else "expires_at", f"has passed ({zulu(expires_us)}): the key is not valid"
            )
        for unknown in sorted(self.fields.keys() - _FIELDS[self.shape]):
            self.note(unknown[:64], "is no field of this shape and is not carried over")
        if self.is_refused or self.sha256 is None or name is None or created_us is None:
            return None
        return KeyRow(
            self.path, self.sha256, self.secret, name, user_id, model, token_limit, created_us, expires_us,
            last_used_us, uses, tokens, windows,
        )  # fmt: skip

    # --- The key ----------------------------------------------------------------------------------------------

    def take_hash(self, name: str) -> None:
        """The SHA-256 of a hashed row's key: the row's name."""
        self.shown = _short(name)
        if _SHA256.fullmatch(name):
            self.sha256 = bytes.fromhex(name)
        else:
            self.wrong("", "expected the SHA-256 of the key as the name, 64 hexadecimal digits")

    def _take_key(self) -> None:
        value = self.fields.get("key")
        if value is None:
            self.wrong("key", "is missing")
        elif not isinstance(value, str):
            self.wrong("key", f"found {_kind(value)}, expected the key's secret")
        elif digest := _HASH_AS_KEY.fullmatch(value):
            self.shown = f"sha256:{digest[1][:8]}…"
            self.sha256 = bytes.fromhex(digest[1])
        elif problem := key_problem(value):
            self.wrong("key", problem)
        else:
            self.shown = masked(value)
            self.secret = value
            self.sha256 = hashlib.sha256(value.encode()).digest()
            if len(value) < SHORT_KEY_CHARS:
                self.note("key", f"has only {len(value)} characters: it can be guessed, rotate it")

    # --- Fields -----------------------------------------------------------------------------------------------

    def _given(self, name: str, required: bool, or_null: bool = False) -> Any:
        """The value, or None if it is absent or null. Reports an absent or null value that is not allowed."""
        if required and name not in self.fields:
            self.wrong(name, "is missing" + (" (null: never)" if or_null else ""))
        return self.fields.get(name)

    def _text(self, name: str, most_chars: int, *, required: bool = False, identifies: bool = False) -> str | None:
        value = self._given(name, required)
        if value is None:
            if required and name in self.fields:
                self.wrong(name, "found null, expected text")
            return None
        if problem := (name_problem if identifies else text_problem)(value, MAX_ID_BYTES):
            self.wrong(name, problem)
            return None
        if len(value) > most_chars:
            self.wrong(name, f"found {len(value)} characters, expected at most {most_chars}")
        return str(value)

    def _whole(self, name: str, most: int, *, required: bool = False) -> int | None:
        value = self._given(name, required)
        if value is None:  # an absent count is 0; a limit of null means unlimited
            return None
        number, problem = _whole_number(value, most)
        if problem:
            self.wrong(name, problem)
        return number

    def _time(self, name: str, *, required: bool = False, or_null: bool = False) -> int | None:
        value = self._given(name, required, or_null)
        if value is None:
            if not or_null and name in self.fields:
                self.wrong(name, "found null, expected a time")
            return None
        us, problem = _moment(value)
        if problem:
            self.wrong(name, problem)
        elif us is not None and value[-6:-5] in ("+", "-") and value[-5:] != "00:00":
            self.note(name, f"has the offset {value[-6:]}: it is {zulu(us)} in UTC")
        return us

    def _windows(self, now_us: int) -> tuple[tuple[int, int], ...]:
        value = self.fields.get("usage_windows")
        if value is None:
            return ()
        if not isinstance(value, list):
            self.wrong("usage_windows", f"found {_kind(value)}, expected a list")
            return ()
        found = []
        for index, item in enumerate(value):
            path = f"usage_windows.{index}"
            if not isinstance(item, dict):
                self.wrong(path, f"found {_kind(item)}, expected an object")
                continue
            start_us, problem = _moment(item.get("window_start"))
            if problem:
                self.wrong(f"{path}.window_start", problem)
            elif start_us is not None and start_us > now_us:
                self._ahead(f"{path}.window_start", start_us, now_us)
            tokens, problem = _whole_number(item.get("tokens_used"), MAX_AMOUNT)
            if problem:
                self.wrong(f"{path}.tokens_used", problem)
            for unknown in sorted(item.keys() - _WINDOW_FIELDS):
                self.note(f"{path}.{unknown[:64]}", "is no field of this shape and is not carried over")
            if start_us is not None and tokens is not None:
                found.append((start_us, tokens))
        if sum(tokens for _, tokens in found) > SATURATED:
            self.wrong("usage_windows", f"found more than {SATURATED} tokens in all")
        return tuple(sorted(found))

    def _ahead(self, name: str, start_us: int, now_us: int) -> None:
        if start_us - now_us > MAX_AHEAD_S * 1_000_000:
            self.wrong(name, f"found {zulu(start_us)}, which is more than a year ahead")
        else:
            self.note(name, f"lies ahead: these tokens count until {zulu(start_us + WINDOW_S * 1_000_000)}")


def key_problem(text: str) -> str | None:
    if not text:
        return "found an empty text, expected the key"
    if len(text) > MAX_KEY_CHARS:
        return f"found {len(text)} characters, expected at most {MAX_KEY_CHARS}"
    if not text.isprintable() or text_problem(text, MAX_KEY_CHARS * 4):
        return "has characters that cannot be part of a key"
    if not is_possible(text):
        return "has the form of a Strongroom key but a wrong checksum: it is mistyped or cut"
    return None


def _whole_number(value: object, most: int) -> tuple[int | None, str | None]:
    """A whole JSON number (1e5 is one), or None and the problem."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        shown = f" {json.dumps(value[:40])}" if isinstance(value, str) else ""
        return None, f"found {_kind(value)}{shown}, expected a number"
    if not 0 <= value <= most:
        return None, f"found {value}, expected 0 to {most}"
    if isinstance(value, float) and (not value.is_integer() or value > 2**53):
        return None, f"found {value}, expected a whole number"
    return int(value), None


def _moment(value: object) -> tuple[int | None, str | None]:
    """A time as microseconds since the epoch, or None and the problem."""
    expected = "expected a time such as 2027-01-01T00:00:00Z"
    if not isinstance(value, str):
        return None, f"found {_kind(value)}, {expected}"
    if not _TIME.fullmatch(value):
        return None, f"found {json.dumps(value[:40], ensure_ascii=False)}, {expected}"
    try:
        us = us_from_utc(datetime.fromisoformat(value))
    except ValueError as error:
        return None, f"found {value!r}: {error}"
    if not 0 <= us <= _LAST_US:
        return None, f"found {value!r}, expected a time of the years 1970 to 9999"
    return us, None


def _kind(value: object) -> str:
    match value:
        case None:
            return "nothing"
        case bool():
            return "true or false"
        case int() | float():
            return "a number"
        case str():
            return "the text"
        case list():
            return "a list"
        case _:
            return "an object"
