"""Sign-in by JWT: from a bearer token to who calls, for which tenant, and what its roles allow there.

A token gives an identity, a tenant and names of roles. What a role allows is stored with the tenant. So nothing that an
issuer writes into a token gives more than the tenant's own roles give, and nothing at all outside the tenant.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import msgspec

from ..clock import Clock
from ..database import Database
from ..errors import StrongroomError, Unavailable
from ..journal import ChangeFeed
from ..storage.port import Record
from .directory import Directory, Rights
from .jwks import Jwks, JwksState
from .tokens import Tokens, TokenSettings, refused


class Source(Protocol):
    """What a session was read from."""

    stale: bool
    """Whether it has changed since."""


class Session(msgspec.Struct, frozen=True):
    """A caller with a token, and its rights in `tenant`. `claims` are the token's: rules may ask for them, and
    Strongroom itself asks none of them. `expires_us`: when the token stops working."""

    subject: str
    tenant: str
    rights: Rights
    claims: Mapping[str, Any]
    expires_us: int
    source: Source


def _never(tenant: str | None) -> None:
    """No tenant is suspended."""


class SignIn:
    """The sign-in of one store. `start` before use, and `close` after. `expect_active`: raises
    TenantSuspended for a tenant whose callers are refused."""

    def __init__(
        self,
        settings: TokenSettings,
        database: Database,
        clock: Clock,
        feed: ChangeFeed | None = None,
        expect_active: Callable[[str | None], None] = _never,
    ) -> None:
        self._jwks = Jwks(settings.jwks)
        self._tokens = Tokens(settings, self._jwks, clock)
        self.directory = Directory(database, feed)
        self._expect_active = expect_active
        self.results = {"accepted": 0, "refused": 0, "unavailable": 0}
        """How many tokens were verified with which result, since the start."""

    def start(self) -> None:
        """Read the issuer's keys, now and again and again. Raises ConfigError for a file that cannot be used."""
        self._jwks.start()

    async def close(self) -> None:
        await self._jwks.close()

    def state(self) -> JwksState:
        """How the issuer's keys are, for operators."""
        return self._jwks.state()

    def seen(self, record: Record) -> None:
        """A journal record of any process: forget what it makes outdated."""
        self.directory.seen(record)

    def tenant_changed(self, tenant: str) -> None:
        """A tenant was suspended or resumed: its callers are asked again."""
        self.directory.forget(tenant)

    def forget_all(self) -> None:
        """Records were missed: everything that was read before may be outdated."""
        self.directory.forget_all()

    async def session(self, text: str) -> Session:
        """The caller of a token. Raises Unauthenticated, which says why the token or its user is refused;
        TenantSuspended; Unavailable if the issuer's keys or the store cannot be read."""
        try:
            session = await self._session(text)
        except Unavailable:
            self.results["unavailable"] += 1
            raise
        except StrongroomError:
            self.results["refused"] += 1
            raise
        self.results["accepted"] += 1
        return session

    async def _session(self, text: str) -> Session:
        token = await self._tokens.verify(text)
        access = await self.directory.access(token.tenant, token.subject, token.roles)
        if access.refusal is not None:
            raise refused(access.refusal)
        self._expect_active(token.tenant)
        return Session(token.subject, token.tenant, access.rights, token.claims, token.expires_us, access.source)


__all__ = ["Session", "SignIn"]
