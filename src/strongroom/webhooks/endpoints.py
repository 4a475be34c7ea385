"""Webhook endpoints: where a tenant wants to be told of events, of which ones, and the secret that signs them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Annotated, Any, ClassVar, TypedDict, Unpack

from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationInfo, WithJsonSchema, field_validator

from ..access import ALL_TENANTS, DEFAULT_TENANT, bound_to, may_see
from ..clock import Clock
from ..context import (
    MAX_TENANT_BYTES,
    Context,
    name_problem,
    new_id,
    system_context,
    utc_from_us,
)
from ..database import Database, Idempotency, Replayed, Transaction
from ..entities import (
    MAX_LIMIT,
    MAX_PAGE_BYTES,
    Entity,
    Index,
    Page,
    Query,
    Secret,
    TenantName,
    Where,
    not_given,
    parse,
)
from ..errors import Denied, InvalidInput, NotFound, Problem, StoreError
from ..events import EVENT_TYPES, LIMIT_THRESHOLD, Event
from ..journal import ChangeFeed
from ..limits import DEFAULT_THRESHOLDS, MAX_THRESHOLD, MAX_THRESHOLDS, Crossing, Limit
from ..limits import thresholds as alerts
from ..pepper import Peppers
from ..storage.port import Put, Record
from .http_sender import Sender
from .signatures import (
    MAX_SECRET_BYTES,
    MIN_SECRET_BYTES,
    SECRET_PREFIX,
    new_secret,
    secret_bytes,
    secret_text,
)
from .ssrf_guard import MAX_URL_CHARS, url_problem

NAME = "webhooks"
ALL_EVENTS = "*"
MAX_PER_TENANT = 50
MAX_WEBHOOKS = 100_000
"""Endpoints in one store: each process knows what all of them want to be told of (about 1 KB each)."""
MAX_DESCRIPTION_CHARS = 1_000
MAX_OVERLAP_S = 7 * 86_400
DEFAULT_OVERLAP_S = 86_400


class Webhook(Entity, collection=NAME, scope="global", indexes=[Index("tenant", "-created_at"), Index("-created_at")]):
    """An endpoint. It hears of what happens to its tenant, or with the tenant `*` to every tenant.

    `secret` is encrypted under the pepper; `previous_secret` signs beside it until `previous_until`. `thresholds` are
    the shares (percent) of limits at which `limit.threshold` is sent, for limits whose window is at least
    `min_window_s` long. `failing_since` is set while every attempt fails (in the background: no change that the journal
    tells of); `disabled_reason` says why it was disabled by itself.
    """

    tenant: str
    url: str
    events: list[str] = [ALL_EVENTS]
    thresholds: list[int] = list(DEFAULT_THRESHOLDS)
    min_window_s: int = 0
    description: str | None = None
    enabled: bool = True
    allow_private: bool = False
    secret: Annotated[bytes, Secret()]
    previous_secret: Annotated[bytes | None, Secret()] = None
    previous_until: datetime | None = None
    failing_since: datetime | None = None
    disabled_reason: str | None = None

    def wants(self, event: Event) -> bool:
        """Whether it hears of an event of its tenant."""
        if event.only is not None:
            return event.only == self.id
        if event.type not in self.events and ALL_EVENTS not in self.events:
            return False
        if event.type != LIMIT_THRESHOLD:
            return True
        data = json.loads(event.body)["data"]
        return data["threshold"] in self.thresholds and self.min_window_s <= alerts.length_s(data["window"])


_SECRET = {
    "type": "string",
    "pattern": f"^{SECRET_PREFIX}[A-Za-z0-9+/]+={{0,2}}$",
    "description": f"The base64 of {MIN_SECRET_BYTES} to {MAX_SECRET_BYTES} random bytes after `{SECRET_PREFIX}`.",
}


class WebhookFields(BaseModel):
    """What a caller may say of an endpoint, when it is made and later."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    allow_private: StrictBool = False
    url: Annotated[
        str,
        WithJsonSchema(
            {
                "type": "string",
                "format": "uri",
                "pattern": "^https?://[!#-;=?-\\[\\]_a-z~]+$",
                "maxLength": MAX_URL_CHARS,
            }
        ),
    ]
    events: list[Annotated[str, WithJsonSchema({"enum": [ALL_EVENTS, *EVENT_TYPES]})]] = Field(
        default=[ALL_EVENTS], min_length=1, max_length=len(EVENT_TYPES) + 1
    )
    thresholds: list[Annotated[int, Field(strict=True, ge=1, le=MAX_THRESHOLD)]] = Field(
        default=list(DEFAULT_THRESHOLDS), max_length=MAX_THRESHOLDS
    )
    min_window_s: int = Field(default=0, strict=True, ge=0, le=366 * 86_400)
    description: str | None = Field(default=None, max_length=MAX_DESCRIPTION_CHARS)
    enabled: StrictBool = True

    @field_validator("url")
    @classmethod
    def _well_formed(cls, value: str, info: ValidationInfo) -> str:
        """As far as can be told without resolving its name, so that it is told with everything else that is wrong."""
        if problem := url_problem(value, allow_private=cls._may_be_private(info)):
            raise ValueError(problem)
        return value

    @staticmethod
    def _may_be_private(info: ValidationInfo) -> bool:
        """Without an answer, the doubt is in favour of the URL: `allow_private` is itself what is wrong."""
        return bool(info.data.get("allow_private", True))

    @field_validator("events")
    @classmethod
    def _known(cls, value: list[str]) -> list[str]:
        wrong = [name for name in value if name != ALL_EVENTS and name not in EVENT_TYPES]
        if wrong:
            raise ValueError(f"found {wrong[0][:64]!r}, expected {ALL_EVENTS} or some of {', '.join(EVENT_TYPES)}")
        return list(dict.fromkeys(value))

    @field_validator("thresholds")
    @classmethod
    def _ascending(cls, value: list[int]) -> list[int]:
        return sorted(set(value))


class NewWebhook(WebhookFields):
    """An endpoint to be made. `secret`: one of the caller's own; without it one is made."""

    tenant: TenantName = DEFAULT_TENANT
    secret: Annotated[str, WithJsonSchema(_SECRET)] | None = Field(default=None, repr=False)

    @field_validator("tenant")
    @classmethod
    def _tenant(cls, value: str) -> str:
        if problem := name_problem(value, MAX_TENANT_BYTES):
            raise ValueError(problem)
        return value

    @field_validator("secret")
    @classmethod
    def _secret(cls, value: str | None) -> str | None:
        if value is not None:
            secret_bytes(value)
        return value


class WebhookChanges(WebhookFields):
    """Some fields of an endpoint, to be changed; those not given stay."""

    not_given: ClassVar[Mapping[str, str]] = not_given(
        unchangeable=("id", "tenant"),
        elsewhere={"secret": "is changed by its own call: rotate the secret"},
        of_the_store=Webhook.model_fields.keys() - WebhookFields.model_fields.keys(),
    )

    url: str = ""

    @staticmethod
    def _may_be_private(info: ValidationInfo) -> bool:
        return True  # perhaps it may already: `Webhooks.update` knows


class WebhookGiven(TypedDict, total=False):
    """The fields of an endpoint as keywords, for a change."""

    allow_private: bool
    url: str
    events: Sequence[str]
    thresholds: Sequence[int]
    min_window_s: int
    description: str | None
    enabled: bool


class NewWebhookGiven(WebhookGiven, total=False):
    """The fields of an endpoint that is to be made, as keywords."""

    tenant: str
    secret: str | None


@dataclass(frozen=True, slots=True)
class IssuedWebhook:
    """An endpoint with its secret, which is shown when it is made or rotated, and not again."""

    webhook: Webhook
    secret: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class _Known:
    """What a process knows of an endpoint without reading it: whether and when to make events for it."""

    tenant: str
    enabled: bool
    events: tuple[str, ...]
    thresholds: tuple[int, ...]
    min_window_s: int


class Webhooks:
    """The endpoints of one store. `peppers` gives the current peppers; `sender` checks where a URL leads."""

    def __init__(
        self, database: Database, peppers: Callable[[], Peppers], clock: Clock, feed: ChangeFeed, sender: Sender
    ) -> None:
        self._database = database
        self._peppers = peppers
        self._clock = clock
        self._sender = sender
        self._known: dict[str, _Known] = {}
        self._asking: dict[str, dict[str, _Known]] = {}
        """Those that want to be told of thresholds, by tenant."""
        database.after_commit(self._committed)
        feed.on_record(self._seen)

    # --- Making and changing ----------------------------------------------------------------------------------

    async def create(
        self,
        new: NewWebhook | None = None,
        /,
        *,
        context: Context | None = None,
        idempotency_key: str | None = None,
        **fields: Unpack[NewWebhookGiven],
    ) -> IssuedWebhook:
        """Make an endpoint: `create(url="https://…", tenant="acme", events=["limit.threshold"])`.

        The same call again with the same idempotency key gives back the same endpoint and secret (within a day).
        Raises InvalidInput (a URL that leads to a private address too), Denied.
        """
        new = new if new is not None else parse(NewWebhook, fields)
        own = bound_to(context)
        if own is not None and new.tenant != own:
            raise Denied(f"the caller belongs to tenant {own!r}, not to {new.tenant!r}")
        if new.allow_private or new.tenant == ALL_TENANTS:
            _for_administrators(context, "allow_private" if new.allow_private else "tenant")
        once = _once(context, idempotency_key, "create webhook", new)
        replayed = await self._database.repeated(_acting(context), once)
        if replayed is not None:
            return await self.issued_before(replayed, context=context)
        await self._sender.check(new.url, allow_private=new.allow_private)
        text = new.secret if new.secret is not None else new_secret()
        id = new_id("whk_")
        webhook = Webhook(id=id, secret=self._seal(id, secret_bytes(text)), **new.model_dump(exclude={"secret"}))

        async def body(tx: Transaction) -> Webhook:
            count = len((await tx.find(Webhook, Query(Where("tenant", "==", new.tenant), limit=MAX_PER_TENANT))).items)
            if count >= MAX_PER_TENANT or len(self._known) >= MAX_WEBHOOKS:
                most = MAX_PER_TENANT if count >= MAX_PER_TENANT else MAX_WEBHOOKS
                raise InvalidInput([Problem("tenant", f"found {most} endpoints, which is as many as there may be")])
            return await tx.create(webhook)

        try:
            made = await self._database.transaction(_writer(context, new.tenant), body, idempotency=once)
        except Replayed as done:
            return await self.issued_before(done, context=context)
        return IssuedWebhook(made, text)

    async def answered_before(self, replayed: Replayed, *, context: Context | None = None) -> Webhook:
        """The endpoint that a repeated call was answered with."""
        return await self._database.answer_of(_reader(context), Webhook, replayed)

    async def issued_before(self, replayed: Replayed, *, context: Context | None = None) -> IssuedWebhook:
        """The endpoint and the secret that a repeated call was answered with."""
        webhook = await self.answered_before(replayed, context=context)
        return IssuedWebhook(webhook, secret_text(self.unsealed(webhook)))

    async def get(self, id: str, *, context: Context | None = None) -> Webhook:
        """An endpoint by its id. NotFound for another tenant's too."""
        found = await self._database.get_or_none(_reader(context), Webhook, id)
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
        """One page of endpoints, newest first; of one tenant where the caller is bound to one."""
        own = bound_to(context)
        if own is not None and tenant is not None and own != tenant:
            return Page([], None)
        of = own if own is not None else tenant
        where = Where("tenant", "==", of) if of is not None else None
        query = Query(where, ("-created_at",), limit)
        return await self._database.find(_reader(context), Webhook, query, cursor, max_bytes=MAX_PAGE_BYTES)

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
        """Change some fields. One that is enabled again begins without failures."""
        changes = changes if changes is not None else parse(WebhookChanges, fields)
        values = {name: getattr(changes, name) for name in changes.model_fields_set}
        once = _once(context, idempotency_key, "update webhook", id, changes, expected)
        replayed = await self._database.repeated(_acting(context), once)
        if replayed is not None:
            return await self.answered_before(replayed, context=context)
        webhook = await self.get(id, context=context)
        if {"url", "allow_private"} & values.keys():
            allowed = values.get("allow_private", webhook.allow_private)
            if allowed:  # whoever may not allow private addresses may not choose one either
                _for_administrators(context, "allow_private")
            await self._sender.check(values.get("url", webhook.url), allow_private=allowed)
        if values.get("enabled"):
            values |= {"failing_since": None, "disabled_reason": None}

        async def body(tx: Transaction) -> Webhook:
            return await tx.update(Webhook, id, values, expected=expected)

        try:
            return await self._database.transaction(_writer(context, webhook.tenant), body, idempotency=once)
        except Replayed as done:
            return await self.answered_before(done, context=context)

    async def delete(
        self,
        id: str,
        *,
        context: Context | None = None,
        expected: int | None = None,
        idempotency_key: str | None = None,
    ) -> None:
        """Remove an endpoint. What was not delivered to it yet is not delivered any more."""
        once = _once(context, idempotency_key, "delete webhook", id, expected)
        if await self._database.repeated(_acting(context), once) is not None:
            return
        webhook = await self.get(id, context=context)

        async def body(tx: Transaction) -> None:
            await tx.delete(Webhook, id, expected=expected)

        try:
            await self._database.transaction(_writer(context, webhook.tenant), body, idempotency=once)
        except Replayed:
            return

    async def rotate_secret(
        self,
        id: str,
        *,
        overlap_s: int = DEFAULT_OVERLAP_S,
        context: Context | None = None,
        expected: int | None = None,
        idempotency_key: str | None = None,
    ) -> IssuedWebhook:
        """Give an endpoint a new secret. For `overlap_s` seconds more the one before signs as well, beside it; one that
        an earlier rotation left in its overlap does not any more."""
        if type(overlap_s) is not int or not 0 <= overlap_s <= MAX_OVERLAP_S:
            raise InvalidInput([Problem("overlap_s", f"found {overlap_s!r}, expected 0 to {MAX_OVERLAP_S} seconds")])
        once = _once(context, idempotency_key, "rotate webhook", id, overlap_s, expected)
        replayed = await self._database.repeated(_acting(context), once)
        if replayed is not None:
            return await self.issued_before(replayed, context=context)
        webhook = await self.get(id, context=context)
        text = new_secret()

        async def body(tx: Transaction) -> Webhook:
            now = await tx.get(Webhook, id)
            until = utc_from_us(self._clock.now_us()) + timedelta(seconds=overlap_s)
            fields = {
                "secret": self._seal(id, secret_bytes(text)),
                "previous_secret": now.secret if overlap_s else None,
                "previous_until": until if overlap_s else None,
            }
            return await tx.update(Webhook, id, fields, expected=expected)

        try:
            made = await self._database.transaction(_writer(context, webhook.tenant), body, idempotency=once)
        except Replayed as done:
            return await self.issued_before(done, context=context)
        return IssuedWebhook(made, text)

    # --- Secrets ----------------------------------------------------------------------------------------------

    def keys_of(self, webhook: Webhook) -> Sequence[bytes]:
        """The keys that sign for an endpoint now, the current one's first. Raises StoreError."""
        keys = [self.unsealed(webhook)]
        until = webhook.previous_until
        if webhook.previous_secret is not None and until is not None and utc_from_us(self._clock.now_us()) < until:
            keys.append(self._unseal(webhook.id, webhook.previous_secret))
        return keys

    def unsealed(self, webhook: Webhook) -> bytes:
        """The endpoint's key. StoreError if its pepper is not among ours any more: rotate it then."""
        return self._unseal(webhook.id, webhook.secret)

    def _seal(self, id: str, key: bytes) -> bytes:
        return self._peppers().conceal(key, f"webhook\x00{id}")

    def _unseal(self, id: str, sealed: bytes) -> bytes:
        key = self._peppers().reveal(sealed, f"webhook\x00{id}")
        if key is None:
            raise StoreError(
                f"the secret of the webhook {id} cannot be opened: its pepper is missing; rotate the secret"
            )
        return key

    # --- What the ledger asks ---------------------------------------------------------------------------------

    def thresholds(self, tenant: str, limit: Limit) -> tuple[int, ...]:
        """The thresholds (percent) of a tenant's limit that anyone wants to be told of, ascending; none: nobody does.
        Reads nothing."""
        if not self._asking:
            return ()
        found: set[int] = set()
        for known in (*self._asking.get(tenant, {}).values(), *self._asking.get(ALL_TENANTS, {}).values()):
            if not known.min_window_s or known.min_window_s <= alerts.length_s(limit.window.model_dump()):
                found.update(known.thresholds)
        return tuple(sorted(found))

    @property
    def any(self) -> bool:
        """Whether there is any endpoint at all, as far as this process has heard."""
        return bool(self._known)

    @staticmethod
    def on_crossing(crossing: Crossing) -> Sequence[Put]:
        """What the batch that makes a crossing true carries for it."""
        return alerts.operations(crossing)

    # --- What is known of all of them -------------------------------------------------------------------------

    async def load(self) -> None:
        """Read what the endpoints want to be told of. Once the feed has begun, which tells what changes."""
        cursor = None
        while True:
            page = await self._database.find(system_context(), Webhook, Query(limit=MAX_LIMIT), cursor)
            for webhook in page.items:
                self._learn(webhook.id, _known(webhook))
            cursor = page.next_cursor
            if cursor is None:
                return

    async def reload(self) -> None:
        """Read it anew, after records were missed: those that are not there any more are forgotten."""
        for id in list(self._known):
            self._learn(id, None)
        await self.load()

    def _committed(self, transaction: Transaction) -> None:
        for change in transaction.changes:
            if change.collection.name == NAME:
                entity = change.entity
                self._learn(change.operation.id, _known(entity) if isinstance(entity, Webhook) else None)

    def _seen(self, record: Record) -> None:
        """A journal record of any process. An update's has the fields that were changed."""
        if record.collection != NAME or record.action not in ("create", "update", "delete"):
            return
        after = record.after or {}
        before = self._known.get(record.entity_id)
        if record.action == "delete":
            self._learn(record.entity_id, None)
        elif record.action == "create":
            self._learn(record.entity_id, _Known(**{name: _frozen(after[name]) for name in _Known.__slots__}))
        elif before is not None:
            now = {name: _frozen(after.get(name, getattr(before, name))) for name in _Known.__slots__}
            self._learn(record.entity_id, _Known(**now))

    def _learn(self, id: str, known: _Known | None) -> None:
        for tenant in {one.tenant for one in (self._known.pop(id, None), known) if one is not None}:
            asking = self._asking.setdefault(tenant, {})
            asking.pop(id, None)
            if known is not None and known.tenant == tenant and _asks(known):
                asking[id] = known
            if not asking:
                del self._asking[tenant]
        if known is not None:
            self._known[id] = known


# --- Helpers ---------------------------------------------------------------------------------------------------


def _known(webhook: Webhook) -> _Known:
    return _Known(**{name: _frozen(getattr(webhook, name)) for name in _Known.__slots__})


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _asks(known: _Known) -> bool:
    wanted = ALL_EVENTS in known.events or LIMIT_THRESHOLD in known.events
    return known.enabled and wanted and bool(known.thresholds)


def _once(context: Context | None, key: str | None, *request: object) -> Idempotency | None:
    """A call of this caller, about whatever tenant it is: its idempotency keys are the caller's own."""
    return Idempotency.of(key, *request, scope=_acting(context).tenant or "")


def _acting(context: Context | None) -> Context:
    return context if context is not None else system_context()


def _for_administrators(context: Context | None, what: str) -> None:
    """Raise Denied unless the caller is an administrator who is bound to no tenant."""
    if context is None:
        return
    is_administrator = context.is_admin and context.claims.get("scope", "admin") == "admin"
    if not is_administrator or bound_to(context) is not None:
        raise Denied(f"only an administrator who is bound to no tenant may set {what} like this")


def _reader(context: Context | None) -> Context:
    """Endpoints are found by the system on the caller's behalf; whether the caller may see it is checked then."""
    return system_context() if context is None else system_context(actor=context.actor)


def _writer(context: Context | None, tenant: str) -> Context:
    """The caller's context, on behalf of the endpoint's tenant: the journal record is that tenant's."""
    scoped = None if tenant == ALL_TENANTS else tenant
    if context is None:
        return system_context(scoped)
    return Context(scoped, context.actor, context.claims, context.request_id)


__all__ = ["IssuedWebhook", "NewWebhook", "Webhook", "WebhookChanges", "Webhooks"]
