"""Leaked keys: a secret that was seen in public is recorded once, told to webhooks, and handled by its tenant's policy.

Whoever reports a secret has it. So the policy of its tenant alone decides what happens to the key, never the report.
Everything that one report does to one key is one commit.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal, TypedDict, Unpack
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from ..access import ALL_TENANTS, bound_to, reader, writer
from ..clock import Clock
from ..context import (
    Context,
    check_tenant,
    check_tenant_name,
    next_id,
    system_context,
    us_from_utc,
    utc_from_us,
)
from ..database import Database, Idempotency, Replayed, Transaction
from ..entities import MAX_IN, MAX_PAGE_BYTES, And, Entity, Filter, Index, Page, Query, Where, parse
from ..errors import AlreadyExists, InvalidInput, Problem, TooManyRequests
from ..events import KEY_LEAKED, Event, event
from .administrators import ADMINISTRATOR, is_last_administrator
from .model import MANAGEMENT, MAX_OVERLAP_S, ApiKey
from .rotation import new_secret
from .service import Keys
from .token import masked

Action = Literal["notify", "disable", "rotate"]
Done = Literal["notified", "disabled", "rotated", "overlap shortened"]
DEFAULT_OVERLAP_S = 86_400
MAX_SIGHTINGS = 2_000
"""Secrets in one report."""
MAX_URL_CHARS = 2_000
MAX_WORD_CHARS = 200
AT_ONCE = 16
"""Secrets of one report that are looked up at the same time."""
_log = logging.getLogger(__name__)


class LeakPolicy(Entity, collection="leak_policies", scope="global"):
    """The action on a tenant's keys that leak. The id is the tenant (`*`: keys that act for all tenants).

    `overlap_s`: how long a leaked secret works after its rotation. The collection is global as that of keys is: one
    commit reads and checks a policy together with keys of any tenant.
    """

    tenant: str
    action: Action = "notify"
    overlap_s: int | None = None


class Leak(
    Entity,
    collection="leaks",
    scope="global",
    indexes=[Index("tenant", "-created_at"), Index("key_id", "-created_at"), Index("-created_at")],
):
    """One secret of a key that was seen in public. The secret itself is not stored here.

    `type`, `url`, `source` and `reporter` are those of the first report. `ends_at`: when the secret stops working; null
    if it goes on working. `last_administrator`: the disabled key was the last key that could administer this store
    over HTTP.
    """

    tenant: str
    key_id: str
    display: str
    type: str
    url: str
    source: str
    reporter: str
    done: Done
    ends_at: datetime | None = None
    last_administrator: bool = False


class PolicyFields(BaseModel):
    """The fields of a policy that a caller may set."""

    model_config = ConfigDict(
        extra="forbid",
        hide_input_in_errors=True,
        json_schema_extra={
            "if": {"properties": {"action": {"const": "rotate"}}},
            "else": {"properties": {"overlap_s": {"type": "null"}}},
        },
    )

    action: Action
    overlap_s: int | None = Field(None, ge=0, le=MAX_OVERLAP_S, strict=True)

    @field_validator("overlap_s")
    @classmethod
    def _belongs_to_rotate(cls, value: int | None, info: ValidationInfo) -> int | None:
        action = info.data.get("action", "rotate")
        if value is not None and action != "rotate":
            raise ValueError(f"found {value} beside the action {action}, which has no overlap")
        return value


class PolicyGiven(TypedDict, total=False):
    """The fields of a policy, as keywords."""

    action: Action
    overlap_s: int | None


@dataclass(frozen=True, slots=True, repr=False)  # a URL may hold the secret as well
class Sighting:
    """A text that was seen in public, its type as the finder names it, and the place."""

    token: str
    type: str = ""
    url: str = ""
    source: str = ""


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of a sighting. `leak`: the secret belongs to a key; None: to no key that the reporter may know of.
    `new`: this is the first report of it."""

    leak: Leak | None
    new: bool = False


class Leaks:
    """The leaks of one store, and the policies for them."""

    def __init__(self, database: Database, keys: Keys, clock: Clock) -> None:
        self._database = database
        self._keys = keys
        self._clock = clock

    # --- Policies ---------------------------------------------------------------------------------------------

    async def policy(self, tenant: str, *, context: Context | None = None) -> LeakPolicy:
        """A tenant's policy; the default is to notify. Raises InvalidInput, Denied."""
        check_tenant(tenant)
        found = await self._database.get_or_none(writer(context, tenant), LeakPolicy, tenant)
        return found if found is not None else LeakPolicy(id=tenant, tenant=tenant)

    async def set_policy(
        self,
        tenant: str,
        *,
        context: Context | None = None,
        idempotency_key: str | None = None,
        **fields: Unpack[PolicyGiven],
    ) -> LeakPolicy:
        """Set a tenant's policy: `action`, and for rotate `overlap_s` (DEFAULT_OVERLAP_S if it is not given).

        Raises InvalidInput with every problem, Denied.
        """
        check_tenant_name(tenant)
        asked = parse(PolicyFields, fields)
        overlap_s = asked.overlap_s
        if asked.action == "rotate" and overlap_s is None:
            overlap_s = DEFAULT_OVERLAP_S
        policy = LeakPolicy(id=tenant, tenant=tenant, action=asked.action, overlap_s=overlap_s)
        once = Idempotency.by(context, idempotency_key, "set leak policy", tenant, asked)
        try:
            return await self._database.transaction(
                writer(context, tenant), lambda tx: tx.replace(policy), idempotency=once
            )
        except Replayed as replayed:
            return await self.policy_set_before(replayed, context=context)

    async def policy_set_before(self, replayed: Replayed, *, context: Context | None = None) -> LeakPolicy:
        """The policy that an idempotent call was answered with."""
        return await self._database.answer_of(reader(context), LeakPolicy, replayed)

    # --- Leaks ------------------------------------------------------------------------------------------------

    async def report(
        self, sightings: Sequence[Sighting], *, reporter: str, tenant: str | None = None, request_id: str = ""
    ) -> list[Finding]:
        """Record and handle secrets that were seen in public, in their order. `reporter` is the actor in the journal;
        with `tenant`, the reporter may know of that tenant's keys only.

        A secret that was reported before changes nothing, whoever reports it and wherever it was seen. After
        Unavailable or StorageFull, some secrets may have been handled: report all of them again. After TooManyRequests
        all were handled but those whose slow hashes cannot be compared now: each new report leaves fewer of them.
        Raises InvalidInput for more than MAX_SIGHTINGS.
        """
        if len(sightings) > MAX_SIGHTINGS:
            raise InvalidInput([Problem("", f"found {len(sightings)} secrets, expected at most {MAX_SIGHTINGS}")])
        distinct = list({sighting.token: sighting for sighting in reversed(sightings)}.values())  # the first of each
        findings: dict[str, Finding] = {}
        put_off = 0
        for start in range(0, len(distinct), AT_ONCE):
            some = distinct[start : start + AT_ONCE]
            work = [self._deal_with(sighting, reporter, tenant, request_id or next_id()) for sighting in some]
            for sighting, result in zip(some, await asyncio.gather(*work, return_exceptions=True), strict=True):
                if isinstance(result, TooManyRequests):
                    put_off += 1  # the other secrets of the report need not wait for it
                elif isinstance(result, BaseException):
                    raise result
                else:
                    findings[sighting.token] = result
        if put_off:
            raise TooManyRequests(
                f"{put_off} of {len(distinct)} secrets begin as imported keys do and cannot be compared with their "
                "slow hashes yet, the others were handled: report all of them again"
            )
        return [findings[sighting.token] for sighting in sightings]

    async def list(
        self,
        *,
        tenant: str | None = None,
        key_id: str | None = None,
        limit: int = 100,
        cursor: str | None = None,
        context: Context | None = None,
    ) -> Page[Leak]:
        """One page of leaks, newest first. A caller who is bound to one tenant gets the leaks of that tenant."""
        own = bound_to(context)
        if own is not None and tenant is not None and own != tenant:
            return Page([], None)
        wanted = {"tenant": own if own is not None else tenant, "key_id": key_id}
        filters: list[Filter] = [Where(name, "==", value) for name, value in wanted.items() if value is not None]
        query = Query(And(*filters) if filters else None, ("-created_at",), limit)
        return await self._database.find(system_context(), Leak, query, cursor, max_bytes=MAX_PAGE_BYTES)

    async def _deal_with(self, sighting: Sighting, reporter: str, tenant: str | None, request_id: str) -> Finding:
        known = await self._keys.identify(sighting.token)
        if known is None or (tenant is not None and known.tenant != tenant):
            return Finding(None)
        candidates = self._keys.hasher.candidates(sighting.token)
        ids = [_leak_id(known.id, candidate) for candidate in candidates[:MAX_IN]]
        before = await self._before(ids)
        if before is not None:
            return Finding(before)
        context = Context(None if known.tenant == ALL_TENANTS else known.tenant, reporter, _POLICY, request_id)

        async def body(tx: Transaction) -> Leak | None:
            return await self._leaked(tx, known.id, sighting, candidates, ids[0])

        try:
            leak = await self._database.transaction(context, body)
        except AlreadyExists:  # another node got a report of it at the same time
            return Finding(await self._before(ids))
        if leak is None:
            return Finding(None)
        _tell(leak)
        return Finding(leak, new=True)

    async def _before(self, ids: Sequence[str]) -> Leak | None:
        """The leak that an earlier report of the same secret made. Each pepper gives another id."""
        found = (await self._database.find(system_context(), Leak, Query(Where("id", "in", ids), limit=1))).items
        return found[0] if found else None

    # --- What is done -----------------------------------------------------------------------------------------

    async def _leaked(
        self, tx: Transaction, key_id: str, sighting: Sighting, candidates: Sequence[str], leak_id: str
    ) -> Leak | None:
        """Handle one leak in one transaction. None if the secret stopped being the key's meanwhile."""
        key = await tx.get_or_none(ApiKey, key_id)
        if key is None:
            return None
        now = utc_from_us(self._clock.now_us())
        old_until = key.previous_until if key.previous_hash in candidates else None
        if old_until is not None and old_until <= now:
            return None
        # An imported key that was not used yet has another hash than those made here of its secret.
        if old_until is None and key.hash not in candidates and key.verifier is None:
            return None
        policy = await tx.get_or_none(LeakPolicy, key.tenant) or LeakPolicy(tenant=key.tenant)
        done, ends_at, changes = self._decide(key, policy, now, old_until)
        leak = Leak(
            id=leak_id,
            tenant=key.tenant,
            key_id=key.id,
            display=masked(sighting.token),
            type=_plain(sighting.type, sighting.token, MAX_WORD_CHARS),
            url=_plain(sighting.url, sighting.token, MAX_URL_CHARS),
            source=_plain(sighting.source, sighting.token, MAX_WORD_CHARS),
            reporter=tx.context.actor,
            done=done,
            ends_at=ends_at,
            last_administrator=done == "disabled" and await is_last_administrator(self._database, tx, key, now),
        )
        changed = await tx.update(ApiKey, key.id, {"leaked_at": now, **changes})
        leak = await tx.create(leak)
        await tx.create(_event(changed, leak, now))
        return leak

    def _decide(
        self, key: ApiKey, policy: LeakPolicy, now: datetime, old_until: datetime | None
    ) -> tuple[Done, datetime | None, Mapping[str, Any]]:
        """The action, when the leaked secret stops working, and the fields of the key that change.

        `old_until`: the secret was rotated away, and works until then.
        """
        action = policy.action
        if action == "rotate" and is_management(key):
            action = "disable"  # the finder of the old secret could claim the new one with it
        if action == "disable":
            return "disabled", now, {"enabled": False}
        if action == "notify":
            return "notified", old_until, {}
        ends_at = now + timedelta(seconds=policy.overlap_s or 0)
        if old_until is None:
            rotated = self._keys.rotation.replaced(key, new_secret(key), policy.overlap_s or 0, True)
            return "rotated", rotated["previous_until"] or now, rotated
        if old_until <= ends_at:
            return "notified", old_until, {}
        # The current secret did not leak. Another rotation would end the leaked secret at once, for all users of the
        # key who have not changed over yet.
        if ends_at > now:
            return "overlap shortened", ends_at, {"previous_until": ends_at}
        return "overlap shortened", now, {"previous_hash": None, "previous_until": None}


# --- Helpers --------------------------------------------------------------------------------------------------

_POLICY: Mapping[str, Any] = system_context().claims
"""The claims of the write: the tenant's policy acts, whoever made the report."""


def is_management(key: ApiKey) -> bool:
    """Whether a key may do anything over the management API."""
    return key.tenant == ALL_TENANTS or any(name.startswith(MANAGEMENT) for name in key.permissions)


def _event(key: ApiKey, leak: Leak, now: datetime) -> Event:
    """The event for webhooks, in the commit of the leak itself."""
    data = {
        "key_id": key.id,
        "name": key.name,
        "user_id": key.user_id,
        "owner": key.owner,
        "leaked_at": now,
        "leak": leak.model_dump(exclude={"tenant", "key_id", "version", "created_at", "updated_at"}),
    }
    return event(KEY_LEAKED, key.tenant, data, now_us=us_from_utc(now))


def _leak_id(key_id: str, candidate: str) -> str:
    """One id for one secret of one key. It is made of the hash under the pepper: without the pepper nobody can guess
    the secret of an imported key from it."""
    return hashlib.sha256(f"leak\x00{key_id}\x00{candidate}".encode()).hexdigest()


def _plain(text: str, token: str, most: int) -> str:
    """A text of a stranger, made safe to keep: without the secret, which a URL may contain, without control characters,
    and cut to a length."""
    for form in (token, quote(token), quote(token, safe="")):
        text = text.replace(form, masked(token))
    text = "".join(c if c.isprintable() else "\ufffd" for c in text)
    return text if len(text) <= most else text[: most - 1] + "…"


def _tell(leak: Leak) -> None:
    where = (leak.url or leak.source or "an unknown place")[:MAX_WORD_CHARS]
    _log.warning("key %s of tenant %s was found in public (%s): %s", leak.key_id, leak.tenant, where, leak.done)
    if leak.last_administrator:
        _log.error(
            "key %s was the last that could administer this store over HTTP. To get back in, make another on the "
            "server: strongroom keys create --name administrator --tenant '*' --permission %s",
            leak.key_id,
            ADMINISTRATOR,
        )
