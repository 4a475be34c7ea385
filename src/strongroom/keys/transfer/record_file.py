"""Files of records: one key or quota a line, with all its fields, as JSON Lines or CSV. Pure.

    {"hash": "pbkdf2_sha256$…", "prefix": "abcdefgh", "name": …, "tenant": …, "user_id": …, "limits": […], …}
    {"id": "key_…", "hash": "sha256:…", "name": …, "usage": {"count": …, "totals": …, "counters": …}, …}
    {"type": "quota", "kind": "user", "tenant": …, "name": …, "limits": […], "usage": …}

Such a file imports keys of other systems with their hashes (`foreign_hash.py`), and moves keys between stores without
loss. A CSV file has the same names in its first line, and lists and objects as JSON. The reader also takes the columns
of djangorestframework-api-key's table, from CSV and from Django's `dumpdata`.

A row is accepted unchanged, or refused with every reason: the reader does not guess.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...context import name_problem, us_from_utc
from ...entities import MAX_ID_BYTES, parse
from ...errors import InvalidInput
from ...limits import Limit, counter_for
from ...quotas import quota_id
from ..foreign_hash import ForeignHash, parsed_hash
from ..hasher import HINT_SLOTS, MAX_HINT_CHARS, HintRule
from ..model import schedule_problem
from ..token import masked
from .key_file import Finding
from .key_file_parse import key_problem
from .record_fields import KeyLine, QuotaLine, UsageLine, state_problem
from .record_lines import OF_DJANGO, rows_of

MAX_AHEAD_S = 86_400
"""How far usage may lie ahead of now, since clocks differ. Later usage is refused as a mistake."""

_KEY_ID = re.compile(r"key_[0-9A-Za-z_-]{1,96}")
_HASHES = ("id", "key", "hash", "prefix", "hint", "previous_hash")
_USED = frozenset({"last_used", "usage_count", "usage"})


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """A key of a file. `fields` are the fields of `ApiKey` that the line has; `path` is its place in the file.

    `secret`, if the file has it, or else `hash` identifies the key. A salted hash needs a `hint` for its lookup.
    """

    path: str
    id: str
    tenant: str
    fields: dict[str, Any]
    secret: str | None = field(repr=False)
    hash: ForeignHash
    hint: tuple[HintRule, str] | None
    previous: ForeignHash | None
    usage: UsageLine | None

    @property
    def name(self) -> str:
        return str(self.fields["name"])


@dataclass(frozen=True, slots=True)
class QuotaRecord:
    """A quota of a file."""

    path: str
    id: str
    tenant: str
    fields: dict[str, Any]
    usage: UsageLine | None

    @property
    def name(self) -> str:
        return f"quota of {self.fields['kind']} {self.fields['name']}".rstrip()


Record = KeyRecord | QuotaRecord


# --- Reading: the file ------------------------------------------------------------------------------------------


class RecordReader:
    """Reads a file of records line by line, each record with its findings. An instance reads a file once.

    `tenant` is for rows without a tenant. `with_secret`: the secret of the file's HMACs is known.
    """

    def __init__(self, tenant: str, now_us: int, *, with_secret: bool = False) -> None:
        self._tenant = tenant
        self._now_us = now_us
        self._with_secret = with_secret
        self._seen: dict[int, int] = {}
        self._hints: dict[str, int] = {}

    def read(self, lines: Iterable[bytes]) -> Iterator[tuple[Record | None, list[Finding]]]:
        """Yield the records of a file, None for a refused one. KeyFileError if the file has no records."""
        for number, row, problem in rows_of(lines):
            line = _Line(number, row)
            if problem is not None:
                line.wrong("", problem)
            record = line.record(self._tenant, self._now_us, self._with_secret) if problem is None else None
            if record is not None:
                self._compare(record, number, line)
            yield (None if line.is_refused else record), line.findings

    def _compare(self, record: Record, number: int, line: _Line) -> None:
        """The conflict of a record with earlier ones, or None."""
        names = [record.id]
        if isinstance(record, KeyRecord):
            names.append(record.hash.text)
            if record.hint is not None:
                rule, hint = record.hint
                count = self._hints[f"{rule.id}:{hint}"] = self._hints.get(f"{rule.id}:{hint}", 0) + 1
                if count > HINT_SLOTS:
                    line.wrong("hint" if rule.chars is not None else "prefix", too_many_hints(hint))
        for name in names:
            digest = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
            first = self._seen.setdefault(digest, number)
            if first != number:
                line.wrong("", f"is the same key as line {first}")
                return


def too_many_hints(hint: str) -> str:
    return f"found more than {HINT_SLOTS} keys that begin with {hint[:16]!r}, expected {HINT_SLOTS} at most"


# --- Reading: one line ------------------------------------------------------------------------------------------


class _Line:
    """One line being read. Problems are collected in `findings`, so that a user sees all of them at once."""

    def __init__(self, number: int, row: dict[str, Any]) -> None:
        self.path = f"line {number}"
        self.row = row
        self.shown = ""
        self.findings: list[Finding] = []

    def wrong(self, name: str, message: str) -> None:
        self._found(name, message, True)

    def note(self, name: str, message: str) -> None:
        self._found(name, message, False)

    def _found(self, name: str, message: str, refused: bool) -> None:
        label = self.row.get("name")
        path = f"{self.path}, {name}" if name else self.path
        self.findings.append(Finding(path, self.shown, label[:60] if isinstance(label, str) else "", message, refused))

    @property
    def is_refused(self) -> bool:
        return any(finding.refused for finding in self.findings)

    def record(self, tenant: str, now_us: int, with_secret: bool) -> Record | None:
        """The record of the line, or None if it has a problem."""
        kind = self.row.pop("type", "key")
        if kind == "quota":
            return self._quota(tenant, now_us)
        if kind != "key":
            self.wrong("type", f"found {kind!r:.40}, expected key or quota")
            return None
        self._from_django()
        return self._key(tenant, now_us, with_secret)

    # --- Keys -----------------------------------------------------------------------------------------------------

    def _from_django(self) -> None:
        """Rename the columns of djangorestframework-api-key. Drop its id: it was prefix.hash in old versions and has
        no meaning now."""
        row = self.row
        for theirs, ours in OF_DJANGO.items():
            if theirs in row:
                if row.get(ours) is not None:
                    self.wrong(theirs, f"stands beside {ours}, expected one of the two")
                row[ours] = row.pop(theirs)
        if "revoked" in row:
            revoked = row.pop("revoked")
            if not isinstance(revoked, bool):
                self.wrong("revoked", f"found {revoked!r:.40}, expected true or false")
            elif "enabled" in row:
                self.wrong("revoked", "stands beside enabled, expected one of the two")
            else:
                row["enabled"] = not revoked
        id = row.get("id")
        if isinstance(id, str) and "." in id and not _KEY_ID.fullmatch(id):
            before, _, rest = id.partition(".")
            del row["id"]
            if row.get("hash") is None and row.get("key") is None:
                row["hash"] = rest
                row.setdefault("prefix", before)

    def _key(self, tenant: str, now_us: int, with_secret: bool) -> KeyRecord | None:
        row = {name: value for name, value in self.row.items() if value is not None or name in _NULLABLE}
        for unknown in sorted(row.keys() - _KEY_FIELDS):
            self.note(unknown[:64], "is no field of a key and is not carried over")
            del row[unknown]
        given = {name: row.pop(name) for name in _HASHES if name in row}
        secret, hash = self._secret_and_hash(given, with_secret)
        hint = self._hint(given, hash)
        previous = self._previous(given, row, hash, with_secret)
        line: KeyLine | None = None
        try:
            line = parse(KeyLine, row)
        except InvalidInput as error:
            for problem in error.problems:
                self.wrong(problem.path, problem.message)
        if line is not None:
            self._schedule(line)
            self._counted(line.usage, line.limits, now_us)
            if line.expires_at is not None and us_from_utc(line.expires_at) <= now_us:
                self.note("expires_at", f"has passed ({line.expires_at.isoformat()}): the key is not valid")
        id = self._id(given, hash)
        if self.is_refused or line is None or hash is None or id is None:
            return None
        fields = {n: getattr(line, n) for n in line.model_fields_set if n not in _USED and n != "tenant"}
        usage = line.usage
        if usage is None and line.model_fields_set & _USED:
            totals = {"requests": line.usage_count} if line.usage_count else {}
            usage = UsageLine(count=line.usage_count, last_used_at=line.last_used, totals=totals)
        return KeyRecord(self.path, id, line.tenant or tenant, fields, secret, hash, hint, previous, usage)

    def _secret_and_hash(self, given: Mapping[str, Any], with_secret: bool) -> tuple[str | None, ForeignHash | None]:
        """The key's secret, if the file has it, and its hash."""
        secret = given.get("key")
        if (secret is None) == (given.get("hash") is None):
            both = secret is not None
            self.wrong(
                "hash", "stands beside key, expected one of the two" if both else "is missing (or key, the secret)"
            )
            return None, None
        if secret is None:
            return None, self._hash("hash", given, with_secret)
        if not isinstance(secret, str):
            self.wrong("key", "expected the key's secret")
        elif problem := key_problem(secret):
            self.wrong("key", problem)
        else:
            self.shown = masked(secret)
            return secret, ForeignHash("sha256", f"sha256:{hashlib.sha256(secret.encode()).hexdigest()}")
        return None, None

    def _hash(self, name: str, given: Mapping[str, Any], with_secret: bool) -> ForeignHash | None:
        value = given[name]
        if not isinstance(value, str):
            self.wrong(name, "expected text")
            return None
        try:
            hash = parsed_hash(value.strip())
        except ValueError as error:
            self.wrong(name, str(error))
            return None
        if name == "hash":
            self.shown = shown(hash)
        if hash.kind == "hmac-sha256" and not with_secret:
            self.wrong(name, "found an HMAC, for which the secret of the other system is needed: --hmac-secret-file")
        return hash

    def _hint(self, given: Mapping[str, Any], hash: ForeignHash | None) -> tuple[HintRule, str] | None:
        prefix, hint = given.get("prefix"), given.get("hint")
        if prefix is not None and hint is not None:
            self.wrong("hint", "stands beside prefix, expected one of the two")
            return None
        name, value = ("prefix", prefix) if prefix is not None else ("hint", hint)
        if value is None:
            if hash is not None and not hash.is_digest:
                self.wrong(
                    "prefix",
                    "is missing: a hash with a salt cannot be looked up. Expected what stands before the first dot of "
                    "the key as prefix, or how the key begins as hint",
                )
            return None
        if not isinstance(value, str) or not value.isprintable() or len(value) > MAX_HINT_CHARS:
            self.wrong(name, f"expected at most {MAX_HINT_CHARS} printable characters")
            return None
        if name == "prefix":
            value = value.removesuffix(".")
            if not value or "." in value:
                self.wrong(name, "expected what stands before the first dot of the key")
                return None
            return HintRule(), value
        return HintRule(len(value)), value

    def _previous(
        self, given: Mapping[str, Any], row: Mapping[str, Any], hash: ForeignHash | None, with_secret: bool
    ) -> ForeignHash | None:
        """The hash of the old secret, which still works until `previous_until`."""
        if given.get("previous_hash") is None:
            if row.get("previous_until") is not None:
                self.wrong("previous_until", "needs previous_hash")
            return None
        if row.get("previous_until") is None:
            self.wrong("previous_hash", "needs previous_until")
        previous = self._hash("previous_hash", given, with_secret)
        if previous is None or hash is None or previous.is_digest:
            return previous
        if not hash.is_digest:
            self.wrong("previous_hash", "found a salt as in hash, expected one of the two without")
        elif given.get("prefix") is None and given.get("hint") is None:
            self.wrong("prefix", "is missing: previous_hash has a salt and cannot be looked up")
        return previous

    def _id(self, given: Mapping[str, Any], hash: ForeignHash | None) -> str | None:
        id = given.get("id")
        if id is None:
            return imported_id(hash) if hash is not None else None
        if not isinstance(id, str) or not _KEY_ID.fullmatch(id):
            self.wrong("id", f"found {id!r:.40}, expected key_…: another system's id belongs into metadata")
            return None
        return id

    def _schedule(self, line: KeyLine) -> None:
        if problem := schedule_problem(line.rotate_every_s, line.rotation_overlap_s):
            self.wrong(problem.path, problem.message)
        if line.next_rotation_at is not None and line.rotate_every_s is None:
            self.wrong("next_rotation_at", "needs rotate_every_s: there is no scheduled rotation")

    # --- Quotas and usage -----------------------------------------------------------------------------------------

    def _quota(self, tenant: str, now_us: int) -> QuotaRecord | None:
        row = {name: value for name, value in self.row.items() if value is not None}
        for unknown in sorted(row.keys() - QuotaLine.model_fields.keys()):
            self.note(unknown[:64], "is no field of a quota and is not carried over")
            del row[unknown]
        try:
            line = parse(QuotaLine, row)
        except InvalidInput as error:
            for problem in error.problems:
                self.wrong(problem.path, problem.message)
            return None
        if line.kind == "tenant":
            if line.name:
                self.wrong("name", "found a name, expected none: it is the quota of the tenant itself")
        elif problem_of := name_problem(line.name, MAX_ID_BYTES // 2):
            self.wrong("name", problem_of)
        self._counted(line.usage, line.limits, now_us)
        if self.is_refused:
            return None
        whose = line.tenant or tenant
        fields: dict[str, Any] = {
            "kind": line.kind,
            "name": line.name,
            "limits": line.limits,
            "description": line.description,
        }
        if line.created_at is not None:
            fields["created_at"] = line.created_at
        return QuotaRecord(self.path, quota_id(line.kind, whose, line.name), whose, fields, line.usage)

    def _counted(self, usage: UsageLine | None, limits: Iterable[Limit], now_us: int) -> None:
        """Counters whose state fits their limits."""
        if usage is None:
            return
        latest_us = now_us + MAX_AHEAD_S * 1_000_000
        if usage.at > latest_us:
            self.wrong("usage.at", "lies more than a day ahead")
        for limit in limits:
            state = usage.counters.get(limit.id)
            if state is None:
                continue
            try:
                counter = counter_for(limit.window, state)
                fits = counter.used(latest_us) >= 0 and state_problem(counter.dump()) is None
            except (TypeError, ValueError, LookupError, OverflowError):
                fits = False
            if not fits:
                self.wrong(f"usage.counters.{limit.id}", f"is no state of a {limit.window.kind} window")


_NULLABLE = frozenset(name for name, known in KeyLine.model_fields.items() if known.default is None)
_KEY_FIELDS = frozenset(KeyLine.model_fields) | frozenset(_HASHES)


def imported_id(hash: ForeignHash) -> str:
    """The id of an imported key: the same in every run and store, and not a part of a hash that other files show."""
    known = bytes.fromhex(hash.text.removeprefix("sha256:")) if hash.kind == "sha256" else hash.text.encode()
    return "key_" + hashlib.sha256(b"strongroom imported key\x00" + known).hexdigest()[:31]


def shown(hash: ForeignHash) -> str:
    """The part of a hash that may be shown, for a key whose secret is unknown."""
    return f"{hash.text[:15]}…" if hash.kind in ("sha256", "sha512") else hash.kind
