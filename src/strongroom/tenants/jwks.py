"""The public keys of the token issuer: read from its JWKS (RFC 7517), kept in memory, read again in the background.

What such caches got wrong elsewhere, and what this one does:

- A failed read changes nothing: the old keys serve for MAX_STALE_S.
- Many requests with an unknown key id share one read. Reads have a bound on size and time, and COOL_DOWN_S between
  them, so that invented key ids cannot make this server flood the issuer. An unknown id is remembered for a moment.
- A key that cannot be used, or is of an unknown kind, is left out. It does not spoil the others.
- Several keys may have one id: each that fits the algorithm is tried.
- A key that the issuer no longer publishes verifies nothing after the next read.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import msgspec

from ..errors import ConfigError, Unavailable
from ..published import fetch, is_file, read_file, reason, shown
from ..retry_log import RetryLog

if TYPE_CHECKING:
    from joserfc.jwa import JWSAlgModel
    from joserfc.jwk import Key

MAX_BYTES = 262_144
MAX_KEYS = 64
MAX_KID_CHARS = 255
MAX_TRIED = 8
"""Keys that are tried for one token, because they have one id, or because the token names none."""
TIMEOUT_S = 5.0
REFRESH_S = 600.0
"""The keys are read again after this long: so soon a withdrawn key stops verifying."""
MAX_STALE_S = 86_400.0
"""While the issuer cannot be reached, the old keys serve for this long."""
COOL_DOWN_S = 10.0
"""The shortest time between two reads that unknown key ids cause."""
FIRST_RETRY_S = 1.0
"""The pause after the first failed read; each further pause is twice as long, up to REFRESH_S."""
UNKNOWN_FOR_S = 30.0
"""An unknown key id causes no second read for this long. Once a read has found it, it is known at once."""
MAX_UNKNOWN = 1_000
MAX_WAITING = 100
"""Requests that may wait for one read; further ones are answered at once."""
MIN_RSA_BITS, MAX_RSA_BITS = 2_048, 8_192
"""A shorter key can be broken; a longer one takes milliseconds for each signature."""
ALGORITHMS: Mapping[tuple[str, str | None], tuple[str, ...]] = {
    ("RSA", None): ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"),
    ("EC", "P-256"): ("ES256",),
    ("EC", "P-384"): ("ES384",),
    ("EC", "P-521"): ("ES512",),
    ("OKP", "Ed25519"): ("EdDSA", "Ed25519"),
}
"""The algorithms that a key of a kind may verify. The key's kind decides, never the token alone: so no token can use a
public key as an HMAC secret. There is no HMAC at all, since its secret would let this server make tokens."""
ALLOWED = frozenset(name for names in ALGORITHMS.values() for name in names)
_log = logging.getLogger(__name__)


class _Set(msgspec.Struct):
    keys: list[Any]


class SigningKey:
    """One public key of the issuer."""

    __slots__ = ("_algorithms", "_key", "kid")

    def __init__(self, key: Key, algorithms: Mapping[str, JWSAlgModel], kid: str | None) -> None:
        self._key = key
        self._algorithms = algorithms
        self.kid = kid

    def fits(self, algorithm: str) -> bool:
        """Whether this key may verify signatures of an algorithm."""
        return algorithm in self._algorithms

    def verifies(self, algorithm: str, signed: bytes, signature: bytes) -> bool:
        """Whether this key has made the signature. Only for an algorithm that fits."""
        return self._algorithms[algorithm].verify(signed, signature, self._key)


@dataclass(frozen=True, slots=True)
class JwksState:
    """What an operator should see. `age_s`: since the last successful read; None if there was none. `error`: why the
    last read failed; None if it did not."""

    place: str
    keys: int
    age_s: float | None
    error: str | None


class Jwks:
    """The keys of one issuer, at a URL or in a file. `start` before use, and `close` after."""

    def __init__(self, place: str, *, now: Callable[[], float] = time.monotonic) -> None:
        self._place = place
        self._now = now
        self._keys: dict[str | None, tuple[SigningKey, ...]] = {}
        self._published: dict[bytes, SigningKey] = {}
        """Each key by its JSON, so that a key that is published again stays the same object."""
        self._unknown: dict[str | None, float] = {}
        self._read_at: float | None = None
        self._tried_at: float | None = None
        self._error: str | None = None
        self._reading: asyncio.Task[None] | None = None
        self._waiting = 0
        self._task: asyncio.Task[None] | None = None
        self._told = RetryLog(_log, f"the keys of the token issuer at {shown(place)} cannot be read")

    def start(self) -> None:
        """Read the keys now, and from then on again and again. Raises ConfigError for a file that cannot be used."""
        if is_file(self._place):
            try:
                self._use(read_file(self._place, max_bytes=MAX_BYTES))
            except (OSError, ValueError) as error:
                raise ConfigError(f"STRONGROOM_JWKS: {self._place}: {reason(error)}") from None
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        tasks = [task for task in (self._task, self._reading) if task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def find(self, kid: str | None) -> Sequence[SigningKey]:
        """The keys with an id, or the first keys of all for a token that names none. Empty if there is no such key.

        Raises Unavailable if that cannot be told, because the keys cannot be read.
        """
        found = self._keys.get(kid)
        if found and not self._too_old():
            return found
        until = self._unknown.get(kid)
        if until is not None and self._now() < until and not self._too_old():
            return ()
        was_read = await self._read_again()
        found = self._keys.get(kid)
        if found and not self._too_old():
            return found
        if self._error is not None or self._too_old():
            raise self._unavailable()
        if was_read:
            self._remember_unknown(kid)
        return ()

    async def read(self) -> None:
        """Read the keys now, or join the read under way; `state` says how it went. A caller that is cancelled does not
        end the read for the others."""
        if self._reading is None:
            self._reading = asyncio.get_running_loop().create_task(self._read())
        await asyncio.shield(self._reading)

    def state(self) -> JwksState:
        age_s = None if self._read_at is None else self._now() - self._read_at
        return JwksState(shown(self._place), len(self._published), age_s, self._error)

    def _unavailable(self) -> Unavailable:
        return Unavailable(f"the keys of the token issuer cannot be read: {self._error or 'not read yet'}")

    def _too_old(self) -> bool:
        return self._read_at is None or self._now() - self._read_at > MAX_STALE_S

    def _remember_unknown(self, kid: str | None) -> None:
        if len(self._unknown) >= MAX_UNKNOWN:
            for oldest in list(self._unknown)[: MAX_UNKNOWN // 10]:
                del self._unknown[oldest]
        self._unknown[kid] = self._now() + UNKNOWN_FOR_S

    # --- Reading ----------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        pause_s = FIRST_RETRY_S
        while True:
            await self.read()
            if self._error is None:
                pause_s = FIRST_RETRY_S
                await asyncio.sleep(REFRESH_S * random.uniform(0.9, 1))  # noqa: S311 - jitter, not a secret
            else:
                await asyncio.sleep(pause_s * random.uniform(0.5, 1))  # noqa: S311 - jitter, not a secret
                pause_s = min(2 * pause_s, REFRESH_S)

    async def _read_again(self) -> bool:
        """Wait for a read, unless one was made a short while ago; whether there was a read. Raises Unavailable if too
        many wait already."""
        resting = self._tried_at is not None and self._now() - self._tried_at < COOL_DOWN_S
        if resting and self._reading is None:
            return False
        if self._waiting >= MAX_WAITING:
            raise Unavailable("the keys of the token issuer are being read, and many requests wait for them")
        self._waiting += 1
        try:
            await self.read()
        finally:
            self._waiting -= 1
        return True

    async def _read(self) -> None:
        """Read the keys. A failure is logged, and the old keys stay."""
        self._tried_at = self._now()
        try:
            self._use(await self._content())
        except (OSError, ValueError, ImportError) as error:
            self._error = str(error) if isinstance(error, ImportError) else reason(error)
            self._told.failed(self._error)
        except Exception as error:  # whatever a key does to its parser: the other keys, and later reads, must go on
            self._error = f"unexpected {type(error).__name__}"
            _log.exception("the keys of the token issuer cannot be read, because of an unexpected error")
        else:
            self._error = None
            self._told.succeeded()
        finally:
            self._tried_at = self._now()
            self._reading = None

    async def _content(self) -> bytes:
        if is_file(self._place):
            return await asyncio.to_thread(read_file, self._place, max_bytes=MAX_BYTES)
        return await fetch(self._place, max_bytes=MAX_BYTES, timeout_s=TIMEOUT_S)

    def _use(self, content: bytes) -> None:
        """Use the keys of a JWKS instead of the former ones. Raises ValueError if it has none that can be used."""
        published: dict[bytes, SigningKey] = {}
        for fields in _fields_of(content):
            name = msgspec.json.encode(fields, order="deterministic")
            key = self._published.get(name)
            try:
                published[name] = key if key is not None else _imported(fields)
            except ValueError as error:
                kid = fields.get("kid")
                _log.warning("the issuer's key %.64r is left out: %s", kid, error)
        if not published:
            raise ValueError("it has no key that verifies tokens")
        by_kid: dict[str | None, list[SigningKey]] = {}
        for key in published.values():
            by_kid.setdefault(None, []).append(key)
            if key.kid is not None:
                by_kid.setdefault(key.kid, []).append(key)
        self._keys = {kid: tuple(keys) for kid, keys in by_kid.items()}
        self._published = published
        self._read_at = self._tried_at = self._now()


def _fields_of(content: bytes) -> list[dict[str, Any]]:
    try:
        found = msgspec.json.decode(content, type=_Set).keys
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise ValueError(f'expected a JWKS, {{"keys": […]}}: {error}') from None
    if len(found) > MAX_KEYS:
        raise ValueError(f"it has {len(found)} keys, expected at most {MAX_KEYS}")
    return [fields for fields in found if isinstance(fields, dict)]


@cache
def _models() -> Mapping[str, JWSAlgModel]:
    from joserfc.jwa import JWS_ALGORITHMS

    return {model.name: model for model in JWS_ALGORITHMS if model.name in ALLOWED}


def _imported(fields: Mapping[str, Any]) -> SigningKey:
    """A key from its JWK. Raises ValueError, which says why it cannot verify tokens."""
    kind, curve, kid, only = (fields.get(name) for name in ("kty", "crv", "kid", "alg"))
    if not all(value is None or isinstance(value, str) for value in (kind, curve, kid, only)):
        raise ValueError("kty, crv, kid and alg must be texts")
    names = ALGORITHMS.get((str(kind), curve if kind in ("EC", "OKP") else None))
    if names is None:
        raise ValueError(f"its kind is {kind!r}{f' on {curve!r}' if curve else ''}, expected RSA, EC or Ed25519")
    if kid is not None and not 0 < len(kid) <= MAX_KID_CHARS:
        raise ValueError(f"its id has {len(kid)} characters, expected 1 to {MAX_KID_CHARS}")
    operations = fields.get("key_ops", ["verify"])
    if fields.get("use", "sig") != "sig" or not isinstance(operations, list) or "verify" not in operations:
        raise ValueError("it is not for signatures")
    if "d" in fields:
        raise ValueError("it is published with its private part, so anyone can sign with it")
    if only is not None:
        names = names if kind == "OKP" and only in names else tuple(name for name in names if name == only)
        if not names:
            raise ValueError(f"it is for {only[:64]!r}, which is not an algorithm for its kind")
    return SigningKey(_parsed(fields), {name: _models()[name] for name in names}, kid)


def _parsed(fields: Mapping[str, Any]) -> Key:
    from joserfc.errors import JoseError
    from joserfc.jwk import JWKRegistry

    if fields["kty"] == "RSA" and not MIN_RSA_BITS <= (bits := _bits(fields.get("n"))) <= MAX_RSA_BITS:
        raise ValueError(f"it has {bits} bits, expected {MIN_RSA_BITS} to {MAX_RSA_BITS}")
    needed = {name: fields[name] for name in ("kty", "crv", "n", "e", "x", "y") if name in fields}
    try:
        return JWKRegistry.import_key(needed)
    except (JoseError, ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"it cannot be read: {error}") from None


def _bits(number: object) -> int:
    """The length of a number that a JWK has in base64url."""
    if not isinstance(number, str):
        return 0
    return int.from_bytes(base64.urlsafe_b64decode(number + "=" * (-len(number) % 4))).bit_length()


__all__ = ["ALLOWED", "Jwks", "JwksState", "SigningKey"]
