"""Signatures of webhooks, as the Standard Webhooks specification (1.0) has them: made, and verified by receivers. Pure.

Three headers go with a body: `webhook-id` (one for an event, the same in every repeat), `webhook-timestamp` (seconds
since the epoch, when this attempt was made) and `webhook-signature`: one or more of `v1,` and the base64 of
HMAC-SHA-256 over `id.timestamp.body`, with a space between them while a secret is being rotated.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import secrets
import time
from collections.abc import Mapping, Sequence

from ..errors import StrongroomError

SECRET_PREFIX = "whsec_"  # noqa: S105 - what secrets begin with
SECRET_BYTES = 32
MIN_SECRET_BYTES, MAX_SECRET_BYTES = 24, 64
TOLERANCE_S = 300
MAX_SIGNATURES = 32
"""Of the signatures in one header, so many are looked at."""
ID, TIMESTAMP, SIGNATURE = "webhook-id", "webhook-timestamp", "webhook-signature"
_VERSION = "v1,"


class InvalidSignature(StrongroomError):
    """The webhook is not signed with this secret, is too old, or was altered."""

    code = "invalid_signature"


def new_secret() -> str:
    """A new secret: `whsec_` and the base64 of 32 random bytes."""
    return secret_text(secrets.token_bytes(SECRET_BYTES))


def secret_text(key: bytes) -> str:
    return SECRET_PREFIX + base64.b64encode(key).decode()


def secret_bytes(text: str) -> bytes:
    """The key in a secret's text. ValueError, which does not show it, if it is none."""
    try:
        key = base64.b64decode(text.removeprefix(SECRET_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if not text.startswith(SECRET_PREFIX) or not MIN_SECRET_BYTES <= len(key) <= MAX_SECRET_BYTES:
        raise ValueError(
            f"expected {SECRET_PREFIX} and the base64 of {MIN_SECRET_BYTES} to {MAX_SECRET_BYTES} random bytes"
        )
    return key


def sign(keys: Sequence[bytes], id: str, timestamp: int, body: bytes) -> dict[str, str]:
    """The three headers of one attempt; a signature for each key, the current one's first."""
    content = f"{id}.{timestamp}.".encode() + body
    signatures = " ".join(_VERSION + _mac(key, content) for key in keys)
    return {ID: id, TIMESTAMP: str(timestamp), SIGNATURE: signatures}


def verify_signature(
    secret: str | Sequence[str],
    headers: Mapping[str, str],
    body: bytes | str,
    *,
    tolerance_s: int = TOLERANCE_S,
    now_s: float | None = None,
) -> str:
    """For receivers: whether a webhook was sent by who has the secret, and lately. Returns its id.

    `body` is the request's body as it arrived, not parsed. `secret`: the endpoint's, or several of which any will do.
    `tolerance_s`: how far the time in the headers may be from now, which keeps an old request from being repeated; a
    repeat within it has the same id, so a receiver that must act once remembers ids. Raises InvalidSignature;
    ValueError if the secret itself is none.
    """
    texts = [secret] if isinstance(secret, str) else list(secret)
    keys = [secret_bytes(text) for text in texts]
    named = {name.lower(): value for name, value in headers.items()}
    missing = [name for name in (ID, TIMESTAMP, SIGNATURE) if not named.get(name)]
    if missing:
        raise InvalidSignature(f"the header {missing[0]} is missing")
    timestamp = named[TIMESTAMP]
    if not (timestamp.isascii() and timestamp.isdigit() and len(timestamp) <= 12):
        raise InvalidSignature(f"found the {TIMESTAMP} {timestamp[:32]!r}, expected seconds since the epoch")
    age_s = (time.time() if now_s is None else now_s) - int(timestamp)
    if abs(age_s) > tolerance_s:
        when = "old" if age_s > 0 else "in the future"
        raise InvalidSignature(f"the {TIMESTAMP} is {abs(round(age_s))} s {when}, expected at most {tolerance_s} s")
    raw = body.encode() if isinstance(body, str) else body
    content = f"{named[ID]}.{timestamp}.".encode("utf-8", "surrogatepass") + raw
    given = [text.removeprefix(_VERSION) for text in named[SIGNATURE].split()[:MAX_SIGNATURES] if text[:3] == _VERSION]
    expected = [_mac(key, content) for key in keys]
    # Every pair is compared, each in constant time.
    matches = [
        hmac.compare_digest(one.encode("utf-8", "replace"), other.encode()) for one in given for other in expected
    ]
    if not any(matches):
        raise InvalidSignature("no signature of this webhook was made with the secret over this body")
    return named[ID]


def _mac(key: bytes, content: bytes) -> str:
    return base64.b64encode(hmac.digest(key, content, "sha256")).decode()


__all__ = ["InvalidSignature", "new_secret", "secret_bytes", "secret_text", "sign", "verify_signature"]
