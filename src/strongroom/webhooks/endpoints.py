"""Webhook endpoints: created, listed, updated and deleted; their secrets rotated."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import TypeVar, Unpack

from ..access import ALL_TENANTS, acting, bound_to, may_see, reader, writer
from ..clock import Clock
from ..context import Context, new_id, utc_from_us
from ..database import Database, Idempotency, Replayed, Transaction
from ..entities import MAX_PAGE_BYTES, Page, Query, Where, parse
from ..errors import Denied, InvalidInput, NotFound, Problem
from ..journal import ChangeFeed
from ..pepper import Peppers
from .http_sender import HttpSender
from .model import (
    IssuedWebhook,
    NewWebhook,
    NewWebhookGiven,
    Webhook,
    WebhookChanges,
    WebhookGiven,
)
from .secrets import WebhookSecrets
from .signatures import new_secret, secret_bytes, secret_text
from .subscriptions import Subscriptions

MAX_PER_TENANT = 50
MAX_WEBHOOKS = 100_000
"""Endpoints in one store. Every process keeps the subscriptions of all of them in memory."""
MAX_OVERLAP_S = 7 * 86_400
DEFAULT_OVERLAP_S = 86_400
T = TypeVar("T")


class Webhooks:
    """The endpoints of one store. `peppers` gives the current peppers; `sender` checks the address of a URL."""

    def __init__(
        self, database: Database, peppers: Callable[[], Peppers], clock: Clock, feed: ChangeFeed, sender: HttpSender
    ) -> None:
        self._database = database
        self._clock = clock
        self._sender = sender
        self.secrets = WebhookSecrets(peppers, clock)
        self.subscriptions = Subscriptions(database, feed)

    async def create(
        self,
        new: NewWebhook | None = None,
        /,
        *,
        context: Context | None = None,
        idempotency_key: str | None = None,
        **fields: Unpack[NewWebhookGiven],
    ) -> IssuedWebhook:
        """Create an endpoint: `create(url="https://…", tenant="acme", events=["limit.threshold"])`.

        A retry with the same idempotency key returns the same endpoint and secret (within a day). Raises InvalidInput
        (also for a URL that resolves to a private address), Denied.
        """
        new = new if new is not None else parse(NewWebhook, fields)
        own = bound_to(context)
        if own is not None and context is not None and new.tenant != own:
            await self._database.rules.refuse_other_tenant(context, new.tenant, "create", Webhook.__collection__)
        if new.allow_private or new.tenant == ALL_TENANTS:
            _require_administrator(context, "allow_private" if new.allow_private else "tenant")
        idempotency = _idempotency(context, idempotency_key, "create webhook", new)

        async def create() -> IssuedWebhook:
            await self._sender.check(new.url, allow_private=new.allow_private)
            secret = new.secret if new.secret is not None else new_secret()
            id = new_id("whk_")
            encrypted = self.secrets.encrypt(id, secret_bytes(secret))
            webhook = Webhook(id=id, secret=encrypted, **new.model_dump(exclude={"secret"}))

            async def body(tx: Transaction) -> Webhook:
                await self._check_room(tx, new.tenant)
                return await tx.create(webhook)

            made = await self._database.transaction(writer(context, new.tenant), body, idempotency=idempotency)
            return IssuedWebhook(made, secret)

        async def again(replayed: Replayed) -> IssuedWebhook:
            return await self.issued_before(replayed, context=context)

        return await self._idempotent(context, idempotency, create, again)

    async def _check_room(self, tx: Transaction, tenant: str) -> None:
        """Raise InvalidInput if the tenant, or the store, has as many endpoints as are allowed."""
        found = (await tx.find(Webhook, Query(Where("tenant", "==", tenant), limit=MAX_PER_TENANT))).items
        for count, most in ((len(found), MAX_PER_TENANT), (len(self.subscriptions), MAX_WEBHOOKS)):
            if count >= most:
                raise InvalidInput([Problem("tenant", f"found {most} endpoints, the most that a tenant may have")])

    async def get(self, id: str, *, context: Context | None = None) -> Webhook:
        """An endpoint by its id. Raises NotFound, also for an endpoint of another tenant."""
        found = await self._database.get_or_none(reader(context), Webhook, id)
        if found is None or not may_see(context, found.tenant):
            raise NotFound(f"there is no webhook {id!r}")
        return found

    async def list(
        self,
        *,
        tenant: str | None = None,
        limit: int = 100,
        cursor: str | None = None,
        context: Context | None = None,
    ) -> Page[Webhook]:
        """One page of endpoints, newest first. A caller that is bound to a tenant gets that tenant's only."""
        own = bound_to(context)
        if own is not None and tenant is not None and own != tenant:
            return Page([], None)
        of = own if own is not None else tenant
        where = Where("tenant", "==", of) if of is not None else None
        query = Query(where, ("-created_at",), limit)
        return await self._database.find(reader(context), Webhook, query, cursor, max_bytes=MAX_PAGE_BYTES)

    async def update(
        self,
        id: str,
        changes: WebhookChanges | None = None,
        /,
        *,
        context: Context | None = None,
        expected: int | None = None,
        idempotency_key: str | None = None,
        **fields: Unpack[WebhookGiven],
    ) -> Webhook:
        """Set some fields. To enable an endpoint clears `failing_since` and `disabled_reason`."""
        changes = changes if changes is not None else parse(WebhookChanges, fields)
        values = {name: getattr(changes, name) for name in changes.model_fields_set}
        idempotency = _idempotency(context, idempotency_key, "update webhook", id, changes, expected)

        async def update() -> Webhook:
            webhook = await self.get(id, context=context)
            if {"url", "allow_private"} & values.keys():
                allow_private = values.get("allow_private", webhook.allow_private)
                if allow_private:  # a caller that may not allow private addresses may not choose one either
                    _require_administrator(context, "allow_private")
                await self._sender.check(values.get("url", webhook.url), allow_private=allow_private)
            enabled = {"failing_since": None, "disabled_reason": None} if values.get("enabled") else {}

            async def body(tx: Transaction) -> Webhook:
                return await tx.update(Webhook, id, values | enabled, expected=expected)

            return await self._database.transaction(writer(context, webhook.tenant), body, idempotency=idempotency)

        async def again(replayed: Replayed) -> Webhook:
            return await self.answered_before(replayed, context=context)

        return await self._idempotent(context, idempotency, update, again)

    async def delete(
        self,
        id: str,
        *,
        context: Context | None = None,
        expected: int | None = None,
        idempotency_key: str | None = None,
    ) -> None:
        """Remove an endpoint. Its pending deliveries are not sent any more."""
        idempotency = _idempotency(context, idempotency_key, "delete webhook", id, expected)

        async def delete() -> None:
            webhook = await self.get(id, context=context)

            async def body(tx: Transaction) -> None:
                await tx.delete(Webhook, id, expected=expected)

            await self._database.transaction(writer(context, webhook.tenant), body, idempotency=idempotency)

        async def again(replayed: Replayed) -> None:
            return None

        await self._idempotent(context, idempotency, delete, again)

    async def rotate_secret(
        self,
        id: str,
        *,
        overlap_s: int = DEFAULT_OVERLAP_S,
        context: Context | None = None,
        expected: int | None = None,
        idempotency_key: str | None = None,
    ) -> IssuedWebhook:
        """Give an endpoint a new secret. The previous secret signs beside it for `overlap_s` seconds. A secret that is
        still in the overlap of an earlier rotation stops to sign."""
        if type(overlap_s) is not int or not 0 <= overlap_s <= MAX_OVERLAP_S:
            raise InvalidInput([Problem("overlap_s", f"found {overlap_s!r}, expected 0 to {MAX_OVERLAP_S} seconds")])
        idempotency = _idempotency(context, idempotency_key, "rotate webhook", id, overlap_s, expected)

        async def rotate() -> IssuedWebhook:
            webhook = await self.get(id, context=context)
            secret = new_secret()

            async def body(tx: Transaction) -> Webhook:
                now = await tx.get(Webhook, id)
                until = utc_from_us(self._clock.now_us()) + timedelta(seconds=overlap_s)
                fields = {
                    "secret": self.secrets.encrypt(id, secret_bytes(secret)),
                    "previous_secret": now.secret if overlap_s else None,
                    "previous_until": until if overlap_s else None,
                }
                return await tx.update(Webhook, id, fields, expected=expected)

            made = await self._database.transaction(writer(context, webhook.tenant), body, idempotency=idempotency)
            return IssuedWebhook(made, secret)

        async def again(replayed: Replayed) -> IssuedWebhook:
            return await self.issued_before(replayed, context=context)

        return await self._idempotent(context, idempotency, rotate, again)

    # --- Idempotent retries -----------------------------------------------------------------------------------

    async def _idempotent(
        self,
        context: Context | None,
        idempotency: Idempotency | None,
        work: Callable[[], Awaitable[T]],
        again: Callable[[Replayed], Awaitable[T]],
    ) -> T:
        """Do the work, or answer with `again` if this call was committed before."""
        replayed = await self._database.repeated(acting(context), idempotency)
        if replayed is None:
            try:
                return await work()
            except Replayed as committed:  # the same call was committed while this one worked
                replayed = committed
        return await again(replayed)

    async def answered_before(self, replayed: Replayed, *, context: Context | None = None) -> Webhook:
        """The endpoint that the first call answered with."""
        return await self._database.answer_of(reader(context), Webhook, replayed)

    async def issued_before(self, replayed: Replayed, *, context: Context | None = None) -> IssuedWebhook:
        """The endpoint and the secret that the first call answered with."""
        webhook = await self.answered_before(replayed, context=context)
        return IssuedWebhook(webhook, secret_text(self.secrets.current(webhook)))


def _idempotency(context: Context | None, key: str | None, *request: object) -> Idempotency | None:
    """Idempotency keys belong to the caller, whichever tenant the endpoint belongs to."""
    return Idempotency.of(key, *request, scope=acting(context).tenant or "")


def _require_administrator(context: Context | None, field: str) -> None:
    """Raise Denied unless the caller is an administrator who is bound to no tenant."""
    if context is None:
        return
    is_administrator = context.is_admin and context.claims.get("scope", "admin") == "admin"
    if not is_administrator or bound_to(context) is not None:
        raise Denied(f"only an administrator of all tenants may set {field} like this")


__all__ = ["IssuedWebhook", "NewWebhook", "Webhook", "WebhookChanges", "Webhooks"]
