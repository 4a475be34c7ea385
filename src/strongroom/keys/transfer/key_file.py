"""Key files: the two public shapes of a JSON file with API keys, read row by row and written back. Pure.

    plain    {"keys": [{"key", "name", "model", "token_limit_per_5h", "expiry_date", "created_at", "last_used",
              "total_lifetime_tokens", "usage_windows": [{"window_start", "tokens_used"}]}]}
    hashed   {"keys": {"<SHA-256 of the key, hex>": {"name", "user_id", "created_at", "expires_at", "last_used",
              "usage_count"}}}

Plain is the file of seed 004's proxy, hashed that of seed 000's service (haiven's API key storage guide). Where the
secret of a plain row is unknown, `key` is "sha256:<hex>".

A row is accepted unchanged, or refused with every reason. The reader does not guess and converts no text to a number.
It accepts an unusual value that has only one meaning, with a note.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ...context import (
    utc_from_us,
)
from ...errors import StrongroomError

MAX_FINDINGS = 10_000
"""Problems kept for one file, and notes kept; further ones are only counted."""
MAX_NAME_CHARS = 200
SHORT_KEY_CHARS = 20
WINDOW_S = 18_000
MAX_AHEAD_S = 366 * 86_400
"""A usage window that starts further ahead is refused as a mistake: its tokens would count until then."""

Shape = Literal["plain", "hashed"]


class KeyFileError(StrongroomError):
    """The key file cannot be read."""

    code = "key_file"


@dataclass(frozen=True, slots=True)
class KeyRow:
    """One key of a file, whichever its shape. Times are microseconds since the epoch; `path` is its place in the file.

    `secret` is the key's secret, if the file has it. `uses` counts requests (hashed), `tokens` is the lifetime total
    (plain), `windows` are (start, tokens) pairs in order of time.
    """

    path: str
    sha256: bytes
    secret: str | None
    name: str
    user_id: str | None
    model: str | None
    token_limit: int | None
    created_us: int
    expires_us: int | None
    last_used_us: int | None
    uses: int
    tokens: int
    windows: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Finding:
    """A problem of a row (`refused`), or a note about it. `key` is masked."""

    path: str
    key: str
    name: str
    message: str
    refused: bool


@dataclass(slots=True)
class KeyFile:
    """The content of a file: accepted rows, the number of refused rows, and the findings of all rows.

    `problems` are the reasons of refusals; `dropped` counts the problems and notes past MAX_FINDINGS of each.
    """

    shape: Shape
    rows: list[KeyRow] = field(default_factory=list)
    refused: int = 0
    problems: list[Finding] = field(default_factory=list)
    notes: list[Finding] = field(default_factory=list)
    dropped: int = 0

    @property
    def count(self) -> int:
        """The rows of the file, accepted or not."""
        return len(self.rows) + self.refused

    def keep(self, finding: Finding) -> None:
        kept = self.problems if finding.refused else self.notes
        if len(kept) < MAX_FINDINGS:
            kept.append(finding)
        else:
            self.dropped += 1


# --- Writing --------------------------------------------------------------------------------------------------


def render_row(shape: Shape, row: KeyRow) -> bytes:
    """One row in its shape, indented for the file, without the comma."""
    if shape == "plain":
        text = json.dumps(_plain(row), ensure_ascii=False, indent=2)
    else:
        text = f'"{row.sha256.hex()}": ' + json.dumps(_hashed(row), ensure_ascii=False, indent=2)
    return ("    " + text.replace("\n", "\n    ")).encode()


def render_file(shape: Shape, rows: Sequence[bytes]) -> Iterator[bytes]:
    """A whole file, from its rendered rows."""
    opening, closing = (b"[", b"]") if shape == "plain" else (b"{", b"}")
    yield b'{\n  "keys": ' + opening
    for index, row in enumerate(rows):
        yield (b",\n" if index else b"\n") + row
    yield (b"\n  " if rows else b"") + closing + b"\n}\n"


def _plain(row: KeyRow) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "key": row.secret if row.secret is not None else f"sha256:{row.sha256.hex()}",
        "name": row.name,
        "token_limit_per_5h": row.token_limit,
        "expiry_date": None if row.expires_us is None else zulu(row.expires_us),
        "created_at": zulu(row.created_us),
        "last_used": None if row.last_used_us is None else zulu(row.last_used_us),
        "total_lifetime_tokens": row.tokens,
        "usage_windows": [{"window_start": zulu(start), "tokens_used": tokens} for start, tokens in row.windows],
    }
    return fields | ({} if row.model is None else {"model": row.model})


def _hashed(row: KeyRow) -> dict[str, Any]:
    return {
        "name": row.name,
        "user_id": row.user_id,
        "created_at": utc_from_us(row.created_us).isoformat(),
        "expires_at": None if row.expires_us is None else utc_from_us(row.expires_us).isoformat(),
        "last_used": None if row.last_used_us is None else utc_from_us(row.last_used_us).isoformat(),
        "usage_count": row.uses,
    }


def zulu(us: int) -> str:
    """A time in the format of key files."""
    return utc_from_us(us).isoformat().replace("+00:00", "Z")
