"""A token issuer on 127.0.0.1: it signs JWTs, and publishes its keys as a test says."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from joserfc.jwa import JWS_ALGORITHMS
from joserfc.jwk import ECKey, Key, OKPKey, RSAKey

from strongroom.tenants import TokenSettings

ISSUER = "https://issuer.example"
AUDIENCE = "strongroom"
JSON = dict[str, Any]
_MODELS = {model.name: model for model in JWS_ALGORITHMS}


@cache
def key_of(algorithm: str, kid: str = "k1") -> Key:
    """A private key that fits an algorithm. It is made once for all tests, since RSA keys take a tenth of a second."""
    if algorithm.startswith(("RS", "PS")):
        return RSAKey.generate_key(2048, {"kid": kid})
    if algorithm.startswith("ES"):
        curve = {"ES256": "P-256", "ES384": "P-384", "ES512": "P-521"}[algorithm]
        return ECKey.generate_key(curve, {"kid": kid})
    return OKPKey.generate_key("Ed25519", {"kid": kid})


def encoded(value: Any) -> str:
    """A value in base64url: bytes as they are, anything else as JSON."""
    content = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(content).decode().rstrip("=")


def signed(header: Any, content: Any, key: Key | bytes | None, algorithm: str = "RS256") -> str:
    """A compact JWS of whatever a test wants in it. `key` bytes: an HMAC secret; None: no signature."""
    text = f"{encoded(header)}.{encoded(content)}"
    if key is None:
        return f"{text}."
    if isinstance(key, bytes):
        return f"{text}.{encoded(hmac.digest(key, text.encode(), hashlib.sha256))}"
    return f"{text}.{encoded(_MODELS[algorithm].sign(text.encode(), key))}"


def public(key: Key, **more: Any) -> JSON:
    """The key as it is published."""
    return {**key.as_dict(private=False), **more}


def claims(now: float | None = None, **more: Any) -> JSON:
    """The claims of a usual token; a claim given as None is left out."""
    at = int(time.time() if now is None else now)
    usual = {"iss": ISSUER, "aud": AUDIENCE, "sub": "ann", "tenant": "acme", "iat": at, "exp": at + 600}
    return {name: value for name, value in {**usual, **more}.items() if value is not None}


@dataclass
class Issuer:
    """The published keys and the way they are published. `asked` counts the requests."""

    algorithm: str = "RS256"
    keys: list[JSON] = field(default_factory=list)
    raw: bytes | None = None
    """The body instead of the keys."""
    status: str = "200 OK"
    headers: str = ""
    silent: bool = False
    """Accept, and never answer."""
    asked: int = 0
    url: str = ""

    def __post_init__(self) -> None:
        self.keys = self.keys or [public(self.key)]

    @property
    def key(self) -> Key:
        return key_of(self.algorithm)

    def token(self, *, key: Key | None = None, header: Mapping[str, Any] | None = None, **more: Any) -> str:
        """A good token, with these claims."""
        used = key if key is not None else self.key
        head = {"alg": self.algorithm, "kid": used.kid, "typ": "JWT", **(header or {})}
        return signed(head, claims(**more), used, self.algorithm)

    def settings(self, **more: Any) -> TokenSettings:
        return TokenSettings(**{"issuer": ISSUER, "audiences": (AUDIENCE,), "jwks": self.url, **more})

    def environment(self, **more: str) -> dict[str, str]:
        """The settings of a server process that accepts this issuer's tokens."""
        return {
            "STRONGROOM_JWT_ISSUER": ISSUER,
            "STRONGROOM_JWT_AUDIENCE": AUDIENCE,
            "STRONGROOM_JWKS": self.url,
            **more,
        }

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            self.asked += 1
            if self.silent:
                await reader.read()  # until the other side gives up
            else:
                body = self.raw if self.raw is not None else json.dumps({"keys": self.keys}).encode()
                head = f"HTTP/1.1 {self.status}\r\n{self.headers}content-length: {len(body)}\r\n\r\n"
                writer.write(head.encode() + body)
                await writer.drain()
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


@asynccontextmanager
async def issuing(algorithm: str = "RS256") -> AsyncIterator[Issuer]:
    """An issuer that publishes its key at `url`."""
    issuer = Issuer(algorithm)
    server = await asyncio.start_server(issuer._serve, "127.0.0.1", 0)
    async with server:
        issuer.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/jwks.json"
        yield issuer


__all__ = ["AUDIENCE", "ISSUER", "Issuer", "claims", "encoded", "issuing", "key_of", "public", "signed"]
