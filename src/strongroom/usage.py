"""The usage ledger: charges against limits, decided exactly and written durably before they are answered.

How it is exact. All that one key has used is one document (`KeyUsage`): its counters, its totals, when it was last
used. A charge is decided on the document as it is in memory, and committed under the version it was decided on,
together with a check that the key itself has not changed. If anyone else, another process or machine, changed either
meanwhile, nothing is applied; the document is read again and the charge decided again. So of two nodes that would
spend the same remainder, one commits and the other learns of it: a limit cannot be over-admitted, and all limits of a
key are charged together or not at all.

By which time. Each node has the store's clock (`clock.py`), and along the versions of a usage document time never goes
back (`Account` says why a limit therefore holds whatever the clocks do).

How it is fast. Charges that arrive while a commit is under way are decided together and share the next one: one row
is written for a key, however many charges it had. The answer waits for that commit. Where nodes compete for one key,
the loser waits a little before it tries again, without holding up other keys, and the winner lets others have a turn;
what arrives meanwhile is decided with it, so that each turn settles more.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from dataclasses import dataclass, field

from .accounts import NAME, Account, Allowance, Cost, KeyUsage, Metered, Outcome, Status
from .charges import (
    Charge,
    Decided,
    KeyChanged,
    answer,
    bundles_of,
    charges_of,
    decide,
    fail,
    for_one_batch_a_key,
    operations_of,
)
from .clock import Clock, MachineClock
from .context import utc_from_us
from .database import Database, IdempotentCall
from .errors import AlreadyExists, Conflict, NotFound, StrongroomError, TooManyRequests, Unavailable
from .storage.port import Check, Create, Put, Store
from .transaction import is_expired

MAX_WAITING = 50_000
"""Charges that may wait for a commit; the next one is refused (429) instead of filling the memory."""
MAX_ACCOUNTS = 100_000
"""Usage documents kept in memory."""
MAX_ATTEMPTS = 200
MAX_PAUSE_S = 0.02
COURTESY_COMMITS = 16
"""After losing a key to another node, for so many of its commits a pause follows in which the other has its turn."""
MAX_PATIENCE = 128
"""A node that never loses a key would not learn that another cannot win it. So after FIRST_PATIENCE commits of one key
it pauses once, for as long as others need; while nobody shows up it goes on for twice as many commits each time, up to
this many."""
MAX_CONTENDED = 10_000
"""Keys remembered as being used by other nodes as well."""
COMMITS_APART = 50
"""After a conflict, for so many commits each key has a batch of its own."""
LAZY_FLUSH_S = 1.0
"""Keys without limits decide nothing by their usage: it is written at most this much later, many uses in one write."""

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Tally:
    """What a key without limits has used since the last write."""

    metered: Metered
    count: int = 0
    cost: dict[str, int] = field(default_factory=dict)
    used_at_us: int = 0


class Ledger:
    """Charges keys. One for a store and process; it belongs to the event loop it is used on."""

    def __init__(self, database: Database, store: Store, clock: Clock | None = None) -> None:
        self._database = database
        self._store = store
        self._clock = clock if clock is not None else MachineClock()
        self._held: dict[str, list[Charge]] = {}
        """Keys that wait for their turn, and what is charged to them meanwhile."""
        self._contended: dict[str, int] = {}
        """Keys lost to another node, and after how many more commits a pause is to follow."""
        self._commit_s = 0.0
        self._shared = store.capabilities.multi_process
        self.retries = 0
        """Charges decided again because another node was faster."""
        self._accounts: dict[str, Account] = {}
        self._waiting: list[Charge] = []
        self._tallies: dict[str, _Tally] = {}
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._apart = 0
        self._closed = False

    # --- What callers do --------------------------------------------------------------------------------------

    def charge(
        self, metered: Metered, cost: Cost, *, force: bool = False, once: tuple[str, Create] | None = None
    ) -> asyncio.Future[Outcome]:
        """Decide and charge; the outcome comes once it is durable (a denial, which writes nothing, as soon as decided).

        `once` is an id and an operation that fails with AlreadyExists if this very charge was made before. The future
        raises KeyChanged, TooManyRequests, Unavailable.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Outcome] = loop.create_future()
        if self._closed:
            future.set_exception(Unavailable("the ledger is closed"))
            return future
        if len(self._waiting) >= MAX_WAITING:
            future.set_exception(TooManyRequests("too many charges are waiting for the store: try again in a moment"))
            return future
        self._waiting.append(Charge(metered, cost, force, once, future))
        self._wake(loop)
        return future

    def tally(self, metered: Metered, cost: Cost) -> None:
        """Count the use of a key that has no limits: nothing is decided by it, so nobody waits for its write."""
        self._tally(metered, cost, 1, self._clock.now_us())

    def _tally(self, metered: Metered, cost: Cost, count: int, used_at_us: int) -> None:
        tally = self._tallies.get(metered.id)
        if tally is None:
            tally = self._tallies[metered.id] = _Tally(metered)
        tally.metered = metered
        tally.count += count
        tally.used_at_us = max(tally.used_at_us, used_at_us)
        for resource, units in cost.items():
            tally.cost[resource] = tally.cost.get(resource, 0) + units
        if self._timer is None and not self._closed:
            self._timer = asyncio.get_running_loop().call_later(LAZY_FLUSH_S, self._flush_tallies)

    async def account(self, id: str) -> Account:
        """A key's usage as the store has it now, with what is still to be written added: for statistics."""
        account = Account(await self._store.get(NAME, None, id))
        tally = self._tallies.get(id)
        if tally is not None:
            account.tally(tally.cost, tally.count, tally.used_at_us)
        return account

    def forget(self, id: str) -> None:
        """The key was changed: read its usage again at the next charge."""
        self._accounts.pop(id, None)

    async def close(self) -> None:
        """Write everything that waits. Afterwards nothing can be charged."""
        self._closed = True
        self._flush_tallies()
        while self._task is not None or self._held:
            if self._task is None:
                for id in list(self._held):
                    self._release(id)
            if self._task is not None:
                await self._task
        if self._tallies:
            _log.warning("the last uses of %d keys without limits could not be written", len(self._tallies))

    # --- Group commit -----------------------------------------------------------------------------------------

    def _wake(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._task is None:
            # The task starts in the loop's next turn, so that all that arrives in this one shares its commit.
            self._task = loop.create_task(self._run())

    async def _run(self) -> None:
        try:
            while self._waiting:
                charges, self._waiting = self._waiting, []
                try:
                    await self._settle(charges)
                except BaseException as error:  # nobody may wait for ever, whatever went wrong
                    # (those of a held key are not concerned: they were not decided in this round)
                    for charge in charges:
                        self._accounts.pop(charge.metered.id, None)  # it may hold charges that did not happen
                        fail(charge, Unavailable(f"the charge could not be decided: {type(error).__name__}"))
                    raise
                self._evict()
        finally:
            self._task = None
            if self._waiting:  # only if something unforeseen ended the loop: do not leave the others waiting
                self._wake(asyncio.get_running_loop())

    async def _settle(self, charges: list[Charge]) -> None:
        """Decide the charges of each key, commit them, answer."""
        charges, later = for_one_batch_a_key(charges)
        self._waiting[:0] = later
        groups: dict[str, list[Charge]] = {}
        for charge in charges:
            groups.setdefault(charge.metered.id, []).append(charge)
        for id in self._held.keys() & groups.keys():
            self._held[id] += groups.pop(id)
        charges = [charge for group in groups.values() for charge in group]
        now_us = self._clock.now_us()
        try:
            repeated = await self._repeated(charges, now_us)
            await self._load([id for id in groups if id not in self._accounts])
        except StrongroomError as error:
            for charge in charges:
                self._failed(charge, error)
            return
        now_us = self._clock.now_us()
        decided = []
        for id, group in groups.items():
            account = self._accounts[id]
            operations, answers = decide(account, group, account.moment(now_us), repeated)
            if operations:
                decided.append(Decided(id, account, operations, answers))
            else:
                answer(answers)
        await self._commit(decided, now_us)

    async def _commit(self, decided: list[Decided], now_us: int) -> None:
        """Make the decisions true, many keys in one batch, and answer.

        A batch fails whole, so if one key's charge cannot be, each key is committed alone. Where other nodes change the
        same keys that is likely, so for a while no batches of many are tried.
        """
        together = self._apart == 0
        self._apart = max(0, self._apart - 1)
        bundles = bundles_of(decided) if together else [[one] for one in decided]
        began = time.perf_counter()
        commits = [self._database.commit_counters(operations_of(bundle), now_us) for bundle in bundles]
        again: list[Decided] = []
        for bundle, commit in zip(bundles, commits, strict=True):
            try:
                committed = await commit
            except Exception as error:
                # Unavailable is no key's fault, and may mean that the answer was lost and all of it committed.
                if len(bundle) > 1 and isinstance(error, StrongroomError) and not isinstance(error, Unavailable):
                    again += bundle
                else:
                    await self._not_committed(error, bundle)
            else:
                position = 0
                for one in bundle:
                    one.account.version = committed.versions[position + 1]
                    position += len(one.operations)
                    answer(one.answers)
                    self._had_turn(one)
        if commits:
            self._commit_s = time.perf_counter() - began
        if again:
            self._apart = COMMITS_APART
            await self._commit(again, now_us)

    async def _load(self, ids: list[str]) -> None:
        if not ids:
            return
        documents = await asyncio.gather(*(self._store.get(NAME, None, id) for id in ids))
        for id, document in zip(ids, documents, strict=True):
            self._accounts[id] = Account(document)

    def _evict(self) -> None:
        if len(self._accounts) > MAX_ACCOUNTS:  # those read longest ago go
            for id in list(self._accounts)[: MAX_ACCOUNTS // 10]:
                del self._accounts[id]

    async def _repeated(self, charges: list[Charge], now_us: int) -> dict[str, str]:
        """Which of the charges that may happen only once have happened, within the time that this is remembered, and
        the fingerprint of what each was."""
        found: dict[str, str] = {}
        once = [(charge, *charge.once) for charge in charges if charge.once is not None]
        if not once:
            return found
        documents = await asyncio.gather(*(self._store.get(op.collection, None, id) for _, id, op in once))
        now = utc_from_us(now_us)
        for (charge, id, operation), stored in zip(once, documents, strict=True):
            if stored is None:
                charge.once = id, Create(operation.collection, id, operation.document)
            elif is_expired(IdempotentCall.__collection__, stored, now):
                charge.once = id, Put(operation.collection, id, operation.document, stored["version"])
            else:
                found[id] = stored["fingerprint"]
        return found

    async def _not_committed(self, error: Exception, bundle: list[Decided]) -> None:
        """Someone else changed the usage: decide again. Someone changed the key: its caller must. Else: it failed."""
        for one in bundle:
            self._accounts.pop(one.id, None)  # it holds charges that did not happen
        if isinstance(error, Conflict) and error.details.get("operation") == 0:
            for charge in charges_of(bundle):
                await self._key_changed(charge)
        elif isinstance(error, Conflict | AlreadyExists | NotFound):
            for one in bundle:
                self._lost(one)
        else:
            for charge in charges_of(bundle):
                self._failed(charge, error)

    # --- Keys that other nodes use as well --------------------------------------------------------------------

    def _lost(self, one: Decided) -> None:
        """Another node was faster: its charges are decided again, at once the first time, since the winner is done."""
        again = []
        for charge in charges_of([one]):
            charge.attempts += 1
            if charge.attempts < MAX_ATTEMPTS:
                again.append(charge)
            else:
                fail(charge, Unavailable("this key's usage is being changed by too many nodes at once: try again"))
        self.retries += len(again)
        if len(self._contended) >= MAX_CONTENDED:
            self._contended.clear()
        self._contended[one.id] = COURTESY_COMMITS
        if not again:
            return
        attempts = max(charge.attempts for charge in again)
        self._waiting[:0] = again  # before what came later
        if attempts > 1:
            # No longer than a commit: whoever is faster than the others' pauses gets its turn in one of them.
            self._hold(one.id, 0, self._commit_s)

    def _had_turn(self, one: Decided) -> None:
        """This node has committed a key. Others that use it must read before they write, so without a pause whoever
        won once would go on winning."""
        left = self._contended.get(one.id)
        if left is not None:
            if left > 1:
                self._contended[one.id] = left - 1
            else:
                del self._contended[one.id]
            self._hold(one.id, 0, 2 * self._commit_s)
            return
        account = one.account
        account.turns += 1
        if account.turns >= account.patience:
            account.turns, account.patience = 0, min(2 * account.patience, MAX_PATIENCE)
            if self._shared:
                self._hold(one.id, 4 * self._commit_s, 4 * self._commit_s)

    def _hold(self, id: str, least_s: float, most_s: float) -> None:
        """Decide nothing on this key for a while."""
        if id not in self._held:
            self._held[id] = []
            delay_s = min(random.uniform(least_s, most_s), MAX_PAUSE_S)  # noqa: S311 - jitter, not a secret
            asyncio.get_running_loop().call_later(delay_s, self._release, id)

    def _release(self, id: str) -> None:
        charges = self._held.pop(id, None)
        if charges:
            self._waiting[:0] = charges
            self._wake(asyncio.get_running_loop())

    async def _key_changed(self, charge: Charge) -> None:
        if charge.future is not None:
            fail(charge, KeyChanged())
            return
        guard = charge.metered.guard
        try:
            key = await self._store.get(guard.collection, None, guard.id)
        except StrongroomError as error:
            self._failed(charge, error)
            return
        if key is not None:  # a tally counts, whatever was changed; but what a removed key had used is gone with it
            charge.metered = Metered(charge.metered.id, Check(guard.collection, guard.id, key["version"]), ())
            self._waiting.append(charge)

    def _failed(self, charge: Charge, error: Exception) -> None:
        if charge.future is None:
            self._tally(charge.metered, charge.cost, charge.count, charge.used_at_us or 0)  # at the next flush
        else:
            fail(charge, error)

    def _flush_tallies(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        tallies, self._tallies = self._tallies, {}
        for tally in tallies.values():
            charge = Charge(tally.metered, tally.cost, True, None, None, tally.count, tally.used_at_us)
            self._waiting.append(charge)
        if self._waiting:
            self._wake(asyncio.get_running_loop())


__all__ = [
    "Account",
    "Allowance",
    "Cost",
    "KeyChanged",
    "KeyUsage",
    "Ledger",
    "Metered",
    "Outcome",
    "Status",
]
