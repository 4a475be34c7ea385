"""Changes keys: makes, changes, disables, deletes and restores them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from typing import Any, Unpack

from ..access import acting, writer
from ..clock import Clock
from ..context import Context, new_id, system_context, utc_from_us
from ..database import Database, Idempotency, Replayed, Transaction
from ..entities import parse
from ..errors import InvalidInput, Problem
from ..limits import ClockMended, KeyUsage, Ledger, refills_that_begin
from ..storage.port import Check
from .administrators import keep_one
from .cached_key import subjects_of
from .hasher import Hasher
from .model import ApiKey, IssuedKey, KeyChanges, KeyGiven, NewKey, NewKeyGiven, due_at, no_key, schedule_problem
from .queries import KeyQueries
from .rotation import with_secret
from .token import generate, masked


class KeyEditor:
    """Changes the keys of one store. `hasher` gives the current hasher."""

    def __init__(
        self, database: Database, queries: KeyQueries, ledger: Ledger, hasher: Callable[[], Hasher], clock: Clock
    ) -> None:
        self._database = database
        self._queries = queries
        self._ledger = ledger
        self._hasher = hasher
        self._clock = clock

    # --- Making and changing ----------------------------------------------------------------------------------

    async def create(
        self,
        new: NewKey | None = None,
        /,
        *,
        context: Context | None = None,
        idempotency_key: str | None = None,
        **fields: Unpack[NewKeyGiven],
    ) -> IssuedKey:
        """Make a key: `create(name="billing worker", limits=[…])`, or from a NewKey.

        An idempotent retry (within a day) gives the same key and secret. Raises InvalidInput with every problem.
        """
        new = new if new is not None else parse(NewKey, fields)
        once = Idempotency.by(context, idempotency_key, "create key", new)
        context = writer(context, new.tenant)
        secret = generate(new.text_prefix)
        following = self._next_rotation(new.rotate_every_s)
        key = ApiKey(
            id=new_id("key_"),
            hash=self._hasher().hash(secret),
            sealed=self._hasher().seal(hashlib.sha256(secret.encode()).digest()),
            display=masked(secret),
            next_rotation_at=following,
            due_at=due_at(following, None),
            **new.model_dump(exclude={"prefix"}),
        )

        async def body(transaction: Transaction) -> ApiKey:
            if key.is_expired(now := self._now()):
                expected = f"a time after {now:%Y-%m-%dT%H:%M:%SZ}: the key would never be valid"
                raise InvalidInput(
                    [Problem("expires_at", f"found {key.expires_at:%Y-%m-%dT%H:%M:%SZ}, expected {expected}")]
                )
            return await transaction.create(key)

        try:
            made = await self._database.transaction(context, body, idempotency=with_secret(once, secret))
        except Replayed as done:
            return await self._queries.issued_before(done, context=context)
        return IssuedKey(made, secret)

    async def update(
        self,
        id: str,
        changes: KeyChanges | None = None,
        /,
        *,
        context: Context | None = None,
        expected: int | None = None,
        idempotency_key: str | None = None,
        **fields: Unpack[KeyGiven],
    ) -> ApiKey:
        """Change some fields. Usage already counted stays counted where resource and window stay the same.

        Raises Conflict where a caller (`context`) would leave nobody who can administer the whole store; `disable` and
        `delete` do too.
        """
        changes = changes if changes is not None else parse(KeyChanges, fields)
        values = {name: getattr(changes, name) for name in changes.model_fields_set}
        once = Idempotency.by(context, idempotency_key, "update key", id, changes, expected)
        return await self._change(id, values, context, expected, once)

    async def disable(self, id: str, *, context: Context | None = None, idempotency_key: str | None = None) -> ApiKey:
        """Refuse the key from now on. Idempotent."""
        once = Idempotency.by(context, idempotency_key, "disable key", id)
        return await self._change(id, {"enabled": False}, context, None, once)

    async def enable(self, id: str, *, context: Context | None = None, idempotency_key: str | None = None) -> ApiKey:
        """Accept the key again. Idempotent."""
        once = Idempotency.by(context, idempotency_key, "enable key", id)
        return await self._change(id, {"enabled": True}, context, None, once)

    async def _change(
        self,
        id: str,
        values: Mapping[str, Any],
        context: Context | None,
        expected: int | None = None,
        once: Idempotency | None = None,
    ) -> ApiKey:
        replayed = await self._database.repeated(acting(context), once)
        if replayed is not None:
            return await self._queries.answered_before(replayed, context=context)
        key = await self._queries.get(id, context=context)
        if expected is None and once is None and all(getattr(key, name) == value for name, value in values.items()):
            return key
        beginning = refills_that_begin(key.limits, values.get("limits", ()))
        if beginning:
            await self._ledger.begin_refills(subjects_of(key).all[0], beginning)

        async def body(tx: Transaction) -> ApiKey:
            now = await tx.get(ApiKey, id)
            if now.deleted_at is not None:
                raise no_key(id)
            if expected is None and all(getattr(now, name) == value for name, value in values.items()):
                return now  # only the idempotent call itself is recorded
            if context is not None:
                await keep_one(self._database, tx, now, now.model_copy(update=dict(values)), self._now())
            return await tx.update(ApiKey, id, {**values, **self._schedule(now, values)}, expected=expected)

        try:
            return await self._database.transaction(writer(context, key.tenant), body, idempotency=once)
        except Replayed as done:
            return await self._queries.answered_before(done, context=context)

    def _schedule(self, now: ApiKey, values: Mapping[str, Any]) -> dict[str, Any]:
        """The other fields that change with the schedule of a key's rotations. Raises InvalidInput if its parts do not
        fit."""
        if not {"rotate_every_s", "rotation_overlap_s"} & values.keys():
            return {}
        every_s = values.get("rotate_every_s", now.rotate_every_s)
        overlap_s = values.get("rotation_overlap_s", now.rotation_overlap_s if every_s is not None else None)
        if problem := schedule_problem(every_s, overlap_s):
            raise InvalidInput([problem])
        following = now.next_rotation_at if every_s == now.rotate_every_s else self._next_rotation(every_s)
        return {
            "rotation_overlap_s": overlap_s,
            "next_rotation_at": following,
            "due_at": due_at(following, now.deleted_at),
        }

    def _next_rotation(self, every_s: int | None) -> datetime | None:
        return None if every_s is None else self._now() + timedelta(seconds=every_s)

    # --- Removing ---------------------------------------------------------------------------------------------

    async def delete(
        self,
        id: str,
        *,
        purge: bool = False,
        context: Context | None = None,
        expected: int | None = None,
        idempotency_key: str | None = None,
    ) -> None:
        """Delete a key: its secrets are unknown from now on. For RESTORABLE_FOR_S `restore` takes the deletion back;
        then the key is removed for good. `purge`: remove the key and its usage for good now, a deleted key too.

        An idempotent retry (within a day) does nothing. Raises NotFound, Conflict.
        """
        once = Idempotency.by(context, idempotency_key, "delete key", id, expected, purge)
        if await self._database.repeated(acting(context), once) is not None:
            return
        key = await self._queries.get(id, deleted=purge, context=context)
        by = writer(context, key.tenant)

        async def mark(tx: Transaction) -> None:
            now = await tx.get(ApiKey, id)
            if now.deleted_at is not None:
                raise no_key(id)
            moment = self._now()
            if context is not None:
                await keep_one(self._database, tx, now, None, moment)
            fields = {"deleted_at": moment, "due_at": due_at(None, moment)}
            await tx.update(ApiKey, id, fields, expected=expected)

        try:
            if not purge:
                await self._database.transaction(by, mark, idempotency=once)
                return
            await self._database.authorize(by, "delete", ApiKey.__collection__, id)
            if key.deleted_at is None:
                # First marked as deleted, so that nothing is charged while its counters are removed.
                await self._database.transaction(by, mark)
                expected = None
            await self._remove(id, by, expected, once)
        except Replayed:
            return

    async def purge_due(self, id: str, guard: Check) -> bool:
        """Remove a deleted key for good if it cannot be restored any more, under the job lease `guard`. Returns whether
        it was removed. Raises Conflict if the lease is lost, NotFound."""
        key = await self._queries.get(id, deleted=True)
        if key.deleted_at is None or key.due_at is None or key.due_at > self._now():
            return False
        await self._remove(id, writer(None, key.tenant), key.version, guard=guard)
        return True

    async def _remove(
        self,
        id: str,
        by: Context,
        expected: int | None,
        once: Idempotency | None = None,
        guard: Check | None = None,
    ) -> None:
        """Remove a key that is marked as deleted, and its usage, in one commit. The rules were asked before."""

        async def body(tx: Transaction) -> None:
            tx.guard = guard
            await tx.delete(ApiKey, id, expected=expected)
            if await tx.get_or_none(KeyUsage, id) is not None:
                await tx.delete(KeyUsage, id)

        # The rules for callers do not mention counters.
        own = Context(by.tenant, by.actor, system_context().claims, by.request_id)
        await self._database.transaction(own, body, idempotency=once)
        self._ledger.removed(id)

    async def restore(self, id: str, *, context: Context | None = None, idempotency_key: str | None = None) -> ApiKey:
        """Take a deletion back: the key is as it was. Idempotent. Raises NotFound once it is too late."""
        once = Idempotency.by(context, idempotency_key, "restore key", id)
        replayed = await self._database.repeated(acting(context), once)
        if replayed is not None:
            return await self._queries.answered_before(replayed, context=context)
        key = await self._queries.get(id, deleted=True, context=context)
        if key.deleted_at is None and once is None:
            return key

        async def body(tx: Transaction) -> ApiKey:
            now = await tx.get(ApiKey, id)
            if now.deleted_at is None:
                return now
            if now.due_at is not None and now.due_at <= self._now():
                raise no_key(id)
            return await tx.update(ApiKey, id, {"deleted_at": None, "due_at": due_at(now.next_rotation_at, None)})

        try:
            return await self._database.transaction(writer(context, key.tenant), body, idempotency=once)
        except Replayed as done:
            return await self._queries.answered_before(done, context=context)

    async def mend_clock(self, id: str, *, context: Context | None = None) -> ClockMended | None:
        """Set back the usage of a key that was charged at a time ahead of the store's clock, to the clock's time. This
        frees nothing: usage of the later time counts as used now. None if the usage was not ahead.

        Raises NotFound, Unavailable."""
        await self._queries.get(id, context=context)
        return await self._ledger.set_back(id)

    def _now(self) -> datetime:
        return utc_from_us(self._clock.now_us())


__all__ = ["KeyEditor"]
