"""Signatures of webhooks after the Standard Webhooks specification (1.0): created here, verified by receivers. Pure.

A request has three headers. `webhook-id` identifies the event and is the same in every retry. `webhook-timestamp` is
the time of the attempt in seconds since the epoch. `webhook-signature` is `v1,` and the base64 of HMAC-SHA-256 over
`id.timestamp.body`; during a rotation it has one signature for each secret, separated by spaces.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import secrets
import time
from collections.abc import Mapping, Sequence

from ..errors import StrongroomError

SECRET_PREFIX = "whsec_"  # noqa: S105 - the public prefix of every secret
SECRET_BYTES = 32
MIN_SECRET_BYTES, MAX_SECRET_BYTES = 24, 64
TOLERANCE_S = 300
MAX_SIGNATURES = 32
"""Signatures of one header that are compared; further ones are ignored."""
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
    """The bytes of a secret. Raises ValueError, which does not contain the secret, if the text is not a secret."""
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
    """The three headers of one attempt, with a signature by each key; the current key comes first."""
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
    """For receivers: verify that a webhook was signed with the secret, and recently. Returns the webhook's id.

    `body`: the request's body as it arrived, not parsed. `secret`: the endpoint's secret, or several, of which one must
    match. `tolerance_s`: the maximum difference between `webhook-timestamp` and now; it rejects old requests that are
    replayed. A retry has the same id, so a receiver that must act once remembers ids. Raises InvalidSignature, and
    ValueError if `secret` is not a webhook secret.
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
    # Compare every pair, each in constant time, so that the time tells nothing of the secret.
    matches = [
        hmac.compare_digest(one.encode("utf-8", "replace"), other.encode()) for one in given for other in expected
    ]
    if not any(matches):
        raise InvalidSignature("no signature of this webhook was made with the secret over this body")
    return named[ID]


def _mac(key: bytes, content: bytes) -> str:
    return base64.b64encode(hmac.digest(key, content, "sha256")).decode()


__all__ = ["InvalidSignature", "new_secret", "secret_bytes", "secret_text", "sign", "verify_signature"]
