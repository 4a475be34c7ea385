"""The usage ledger: charges against limits, decided exactly and written durably before they are answered.

How it is exact. All that one key has used is one document (`KeyUsage`): its counters, its totals, when it was last
used; and so is what the keys that share a quota have used together. A charge is decided on the documents as they are in
memory, and committed under the versions it was decided on, together with a check that neither the key nor a quota has
changed. If anyone else, another process or machine, changed one of them meanwhile, nothing is applied; the documents
are read again and the charge decided again. So of two nodes that would spend the same remainder, one commits and the
other learns of it: a limit cannot be over-admitted, and all limits are charged together or not at all.

A node that lends itself a share of the limits in such a commit may spend it without another one: `lease_manager.py`.

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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from ..clock import Clock, MachineClock
from ..context import new_id, utc_from_us
from ..database import Database, IdempotentCall, Once, is_expired
from ..entities import Document
from ..errors import (
    AlreadyExists,
    Conflict,
    NotFound,
    StrongroomError,
    TooManyRequests,
    Unavailable,
)
from ..storage.port import Check, Create, Operation, Put, Store
from .backoff import Patience
from .corrections import Backdate, Begin, TakeBack, Tally, tally_once
from .decision import (
    Charge,
    Decided,
    Decision,
    KeyChanged,
    Watcher,
    answer,
    bundles_of,
    charges_of,
    fail,
    groups_of,
    operations_of,
    usage_operation,
)
from .idempotent_admission import Happened
from .lease_manager import Lending
from .preview import peeked
from .reservation_change import HoldChange
from .usage_state import (
    NAME,
    Account,
    Allowance,
    Cost,
    KeyUsage,
    Metered,
    Outcome,
    Part,
    Status,
)

MAX_WAITING = 50_000
"""Charges that may wait for a commit; the next one is refused (429) instead of filling the memory."""
MAX_ACCOUNTS = 30_000
"""Usage documents kept in memory."""
LOST_FOR_S = 10.0
"""A charge whose turns are all lost to other nodes is decided again for so long, however many turns that are."""
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
"""After a conflict, for so many commits each group has a batch of its own."""
BELIEVED_FOR_S = 0.25
"""What others hold or have been lent of an account comes back without a word: so long it is believed to be out."""
GATHER_PART, MAX_GATHER_S = 0.5, 0.000_5
GATHERED_PART = 0.8
"""The commit of an embedded store holds up the loop, so that nobody's request arrives meanwhile; but one commit of
thirty charges takes hardly longer than one of ten. So while fewer wait than this part of what usually does, the loop
turns before the commit, for at most that part of the time that a commit takes. A caller that is alone never waits."""
MAX_LOOKS, LOOK_AGAIN_S, SHOWN_WITHOUT_S = 5, 0.002, 1.0
"""Statistics wait until a tally is written that they would miss; not for ever, where another node holds its key."""
CLOSING_FLUSHES = 3
"""On close: once what is there, once what waited for that to be written, and once what was fought over."""
LAZY_FLUSH_S = 1.0
"""Keys without limits decide nothing by their usage: it is written at most this much later, many uses in one write."""

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Uses:
    """What a key without limits has used since the last write."""

    metered: Metered
    count: int = 0
    cost: dict[str, int] = field(default_factory=dict)
    used_at_us: int = 0


@dataclass(frozen=True, slots=True)
class ClockMended:
    """The time at which an account stood, ahead of the store's clock, and the time from which it goes on."""

    before: datetime
    now: datetime


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
        self._gathers = store.capabilities.embedded
        self._usual = 0.0
        """How many charges wait when a commit begins, as a moving mean."""
        self._shared = store.capabilities.multi_process
        self.unreachable = False
        """Whether the last commit found the store out of reach."""
        self.retries = 0
        """Charges decided again because another node was faster."""
        self.lending: Lending | None = None
        """This node's leases, where there are any: `Lending` sets it."""
        self.watcher: Watcher | None = None
        """Who is told of thresholds, in the commit that crosses them; `on_crossed` is called after it."""
        self.on_crossed: Callable[[Sequence[str]], None] | None = None
        self._accounts: dict[str, Account] = {}
        self._forgotten: set[str] | None = None
        """While accounts are being read: those that were forgotten meanwhile, so that an old state is not kept."""
        self._waiting: list[Charge] = []
        self._tallies: dict[str, _Uses] = {}
        self._written: set[str] = set()
        """Keys whose tally is being written. The next one waits for that, so that numbers are written in order."""
        self._unsure: dict[str, Charge] = {}
        """Tallies that could not be written, or whose answer was lost: written again as they were, with the number."""
        self._writer, self._number = new_id()[-12:], 0
        self._flushes = 0
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._apart = 0
        self._closed = False

    # --- What callers do --------------------------------------------------------------------------------------

    def charge(
        self,
        metered: Metered,
        cost: Cost,
        *,
        force: bool = False,
        once: Once | None = None,
        model: str | None = None,
        route: str | None = None,
        hold: HoldChange | None = None,
        count: int = 1,
        at_us: int | None = None,
    ) -> asyncio.Future[Outcome]:
        """Decide and charge; the outcome comes once it is durable (a denial, which writes nothing, as soon as decided).

        `once` has an operation that fails with AlreadyExists if this very charge was made before. `hold` is what
        becomes of a reservation: what it writes commits with the charge, and its error is the charge's. `count` is how
        many uses it stands for. `at_us`: the use was then; it is recorded, whatever the limits, where it still counts.
        The future raises KeyChanged, TooManyRequests, HoldEnded, InvalidInput (none of the limits that `at_us` concerns
        counts it), Unavailable.
        """
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        charge = Charge(metered, cost, force, once, future, count, None, 0, model, route, hold)
        if at_us is not None:
            charge.special = Backdate(at_us)
        self.submit(charge)
        return future

    def submit(self, charge: Charge) -> None:
        """Let a charge wait for its turn; its future, if it has one, fails if that cannot be."""
        if self._closed:
            self._failed(charge, Unavailable("the ledger is closed"))
            return
        if len(self._waiting) >= MAX_WAITING:
            self._failed(charge, TooManyRequests("too many charges are waiting for the store: try again in a moment"))
            return
        self._waiting.append(charge)
        self._wake(asyncio.get_running_loop())

    def tally(self, metered: Metered, cost: Cost, count: int = 1) -> None:
        """Count the use of a key that has no limits: nothing is decided by it, so nobody waits for its write."""
        tally = self._tallies.get(metered.id)
        if tally is None:
            tally = self._tallies[metered.id] = _Uses(metered)
        tally.metered = metered
        tally.count += count
        tally.used_at_us = max(tally.used_at_us, self._clock.now_us())
        for resource, units in cost.items():
            tally.cost[resource] = tally.cost.get(resource, 0) + units
        if self._timer is None:
            self._flush_later()

    def _flush_later(self) -> None:
        if self._timer is None and not self._closed:
            self._timer = asyncio.get_running_loop().call_later(LAZY_FLUSH_S, self._flush_tallies)

    async def account(self, id: str) -> Account:
        """A key's usage as the store has it now, with what is still to be written added: for statistics."""
        flushes, account = -1, Account(None)
        looks = 0
        while flushes != self._flushes and looks < MAX_LOOKS:  # none began meanwhile
            looks += 1
            await self._written_off(id)
            flushes, account = self._flushes, Account(await self._store.get(NAME, None, id))
        if self.lending is not None:
            self.lending.show(id, account)
        unsure, tally = self._unsure.get(id), self._tallies.get(id)
        if unsure is not None and isinstance(unsure.special, Tally):
            tally_once(account, unsure.special, unsure.cost, unsure.count, unsure.used_at_us or 0)
        if tally is not None:
            account.tally(tally.cost, tally.count, tally.used_at_us)
        return account

    async def _written_off(self, id: str) -> None:
        """Wait while a tally of this key is being written: it is not here any more, and not yet, for certain, there."""
        until = time.monotonic() + SHOWN_WITHOUT_S
        while id in self._written and time.monotonic() < until:  # noqa: ASYNC110 - an event for each write costs more
            await asyncio.sleep(LOOK_AGAIN_S)

    async def moments(self, ids: Iterable[str], now_us: int) -> dict[str, int]:
        """What time it is in each of these accounts."""
        found = await self._stored([(NAME, id) for id in ids])
        return {id: Account(document).moment(now_us) for id, document in zip(ids, found, strict=True)}

    async def set_back(self, id: str) -> ClockMended | None:
        """Let an account's time, which ran ahead of the store's clock, be the clock's. None if it is not ahead. Raises
        Unavailable."""
        patience = Patience("this account's usage is being changed too quickly")
        while await patience.another():
            account, now_us = Account(await self._store.get(NAME, None, id)), self._clock.now_us()
            before_us = account.at_us
            if before_us <= now_us:
                return None
            account.set_back(now_us)
            self.forget(id)
            try:
                await self._database.commit_counters([usage_operation(id, account)], now_us)
            except (Conflict, NotFound):
                continue
            self.forget(id)
            return ClockMended(utc_from_us(before_us), utc_from_us(now_us))
        raise patience.over()

    async def statuses(self, metered: Metered, now_us: int) -> tuple[Status, ...]:
        """Where all limits of a key stand, as the store has it now: its own, then those that it shares."""
        found: list[Status] = []
        for part in metered.parts:
            if part.allowances:
                account = Account(await self._store.get(NAME, None, part.id))
                if self.lending is not None:
                    self.lending.show(part.id, account, part.allowances)
                found += account.statuses(part.allowances, account.moment(now_us))
        return tuple(found)

    async def peek(self, metered: Metered, cost: Cost, model: str | None, route: str | None) -> Outcome:
        """What `charge` would come to now, by what the store has and this node has spent. Nothing is counted."""
        now_us = self._clock.now_us()
        found = await self._stored([(NAME, part.id) for part in metered.parts])
        accounts = [Account(document) for document in found]
        if self.lending is not None:
            for part, account in zip(metered.parts, accounts, strict=True):
                self.lending.show(part.id, account, part.allowances)
        return peeked(metered, accounts, cost, now_us, model, route)

    async def begin_refills(self, part: Part, limits: tuple[str, ...]) -> None:
        """Before totals get a refill: let it give back from now on, durably, whenever they are used again. Raises
        Unavailable, TooManyRequests."""
        own = Metered(part.id, Check(part.guard.collection, part.guard.id, 0), part.allowances, (), part.tenant)
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self.submit(Charge(own, {}, True, None, future, special=Begin(limits)))
        await future

    async def take_back(
        self, metered: Metered, cost: Cost, moment_us: int, model: str | None, route: str | None
    ) -> None:
        """Take back what was charged at a moment. Raises KeyChanged, TooManyRequests, Unavailable."""
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        charge = Charge(metered, cost, True, None, future, model=model, route=route, special=TakeBack(moment_us))
        self.submit(charge)
        await future

    async def settled(self) -> None:
        """Wait until nothing waits that could be decided now."""
        while self._task is not None:
            await asyncio.wait([self._task])

    def forget(self, id: str) -> None:
        """The key, or the quota, was changed or removed: read its usage again at the next charge."""
        self._accounts.pop(id, None)
        if self._forgotten is not None:
            self._forgotten.add(id)

    def forget_all(self) -> None:
        """Read every account again at its next charge."""
        for id in list(self._accounts):
            self.forget(id)

    def removed(self, id: str) -> None:
        """The key, or the quota, was removed with its usage: what this node was lent of it is gone as well."""
        self.forget(id)
        if self.lending is not None:
            self.lending.gone(id)

    def used(self) -> list[str]:
        """The ids of the accounts in memory: of keys that this process has used, and of their quotas."""
        return list(self._accounts)

    async def close(self) -> None:
        """Write everything that waits, and give back what was lent. Afterwards nothing can be charged."""
        if self.lending is not None:
            await self.lending.close()
        self._closed = True
        for _ in range(CLOSING_FLUSHES):
            self._flush_tallies()
            while self._task is not None or self._held:
                if self._task is None:
                    for id in list(self._held):
                        self._release(id)
                if self._task is not None:
                    await self._task
            if self.unreachable or not (self._tallies or self._unsure):
                break
        lost = self._tallies.keys() | self._unsure.keys()
        if lost:
            _log.warning("the last uses of %d keys without limits could not be written", len(lost))

    # --- Group commit -----------------------------------------------------------------------------------------

    def _wake(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._task is None:
            # The task starts in the loop's next turn, so that all that arrives in this one shares its commit.
            self._task = loop.create_task(self._run())

    async def _run(self) -> None:
        try:
            while self._waiting:
                if self._gathers:
                    await self._gather()
                charges, self._waiting = self._waiting, []
                try:
                    await self._settle(charges)
                except BaseException as error:  # nobody may wait for ever, whatever went wrong
                    # (those of a held key are not concerned: they were not decided in this round)
                    for charge in charges:
                        for part in charge.metered.parts:
                            self._accounts.pop(part.id, None)  # it may hold charges that did not happen
                        self._failed(charge, Unavailable(f"the charge could not be decided: {type(error).__name__}"))
                    raise
                self._evict()
        finally:
            self._task = None
            if self._waiting:  # only if something unforeseen ended the loop: do not leave the others waiting
                self._wake(asyncio.get_running_loop())

    async def _gather(self) -> None:
        """Let those come whose charges may share the next commit: callers that were just answered ask again."""
        enough = self._usual * GATHERED_PART
        if len(self._waiting) < enough:
            until = time.perf_counter() + min(self._commit_s * GATHER_PART, MAX_GATHER_S)
            while len(self._waiting) < enough and time.perf_counter() < until:  # noqa: ASYNC110 - it is turns that count
                await asyncio.sleep(0)
        come = len(self._waiting)
        self._usual += (come - self._usual) / (2 if come > self._usual else 8)

    async def _settle(self, charges: list[Charge]) -> None:
        """Decide the charges of each group, commit them, answer."""
        if self._held:
            charges = self._not_held(charges)
        groups, later = groups_of(charges, self._accounts)
        self._waiting[:0] = later
        charges = [charge for group in groups for charge in group.charges]
        now_us = self._clock.now_us()
        try:
            repeated = await self._repeated(charges, now_us)
            self._forget_without_holds(charges, now_us)
            await self._load({id for group in groups for id in group.parts})
        except StrongroomError as error:
            for charge in charges:
                self._failed(charge, error)
            return
        now_us = self._clock.now_us()
        lending = self.lending
        wallets = lending.wallets_for(groups) if lending is not None else {}
        lease_us = lending.lease_us if lending is not None else None
        decided = []
        for group in groups:
            one = Decision(group, self._accounts, wallets, now_us, repeated, lease_us, self.watcher).decided()
            if one.operations:
                decided.append(one)
            else:
                if lending is not None:
                    lending.committed(one)  # there was nothing to be made true
                self._answer(one)
        await self._commit(decided, now_us)

    def _not_held(self, charges: list[Charge]) -> list[Charge]:
        """Those charges whose accounts are not waiting for their turn; the others wait with them."""
        free = []
        for charge in charges:
            held = next((part.id for part in charge.metered.parts if part.id in self._held), None)
            if held is None:
                free.append(charge)
            else:
                self._held[held].append(charge)
        return free

    async def _commit(self, decided: list[Decided], now_us: int) -> None:
        """Make the decisions true, many groups in one batch, and answer.

        A batch fails whole, so if one group's charges cannot be, each group is committed alone. Where other nodes
        change the same usage that is likely to go on, so for a while no batches of many are tried; a key that was
        changed (the background does so once a minute to one that is used) is not.
        """
        together = self._apart == 0
        self._apart = max(0, self._apart - 1)
        bundles = bundles_of(decided) if together else [[one] for one in decided]
        began = time.perf_counter()
        commits = [self._database.commit_counters(operations_of(bundle), now_us) for bundle in bundles]
        again: list[Decided] = []
        contended = False
        for bundle, commit in zip(bundles, commits, strict=True):
            try:
                committed = await commit
            except Exception as error:
                self.unreachable = isinstance(error, Unavailable)
                # Unavailable is no key's fault, and may mean that the answer was lost and all of it committed.
                if len(bundle) > 1 and isinstance(error, StrongroomError) and not isinstance(error, Unavailable):
                    again += bundle
                    contended = contended or not isinstance(_failed_operation(error, bundle), Check)
                else:
                    await self._not_committed(error, bundle)
            else:
                self.unreachable = False
                position, read_at = 0, time.monotonic()
                for one in bundle:
                    for index, account in one.accounts.items():
                        account.version = committed.versions[position + index]
                        account.read_at = read_at
                    position += len(one.operations)
                    if self.lending is not None:
                        self.lending.committed(one)
                    self._answer(one)
                    if one.events and self.on_crossed is not None:
                        self.on_crossed(one.events)
                    for part in one.due:  # at once: the next use of the key may be far away
                        own = Metered(part.id, part.guard, part.allowances, (), part.tenant)
                        self._waiting.append(Charge(own, {}, True, None, None, lease="tell"))
                    self._had_turn(one)
        if commits:
            self._commit_s = time.perf_counter() - began
        if again:
            self._apart = COMMITS_APART if contended else 1
            await self._commit(again, now_us)

    async def _load(self, wanted: set[str]) -> None:
        """Have all wanted accounts in memory. An account that is forgotten while others are read is read again: what
        was read of it before may be of before the change, and a denial commits nothing that would tell."""
        ids = [id for id in wanted if self._unread(id)]
        while ids:
            read_at = time.monotonic()
            forgotten: set[str] = set()
            self._forgotten = forgotten
            try:
                documents = await self._stored([(NAME, id) for id in ids])
            finally:
                self._forgotten = None
            for id, document in zip(ids, documents, strict=True):
                if id not in forgotten:
                    self._accounts[id] = Account(document, read_at)
            ids = [id for id in wanted if id not in self._accounts]

    async def _stored(self, names: Sequence[tuple[str, str]]) -> list[Document | None]:
        """The documents of these collections and ids; None for one that is not there."""
        get = self._store.get
        if self._store.capabilities.embedded:  # which reads at once: a task for each would cost more than the read
            return [await get(collection, None, id) for collection, id in names]
        return await asyncio.gather(*(get(collection, None, id) for collection, id in names))

    def _forget_without_holds(self, charges: list[Charge], now_us: int) -> None:
        """A reservation that is not known here may be another node's, made or extended since its account was read."""
        for charge in charges:
            if charge.hold is None:
                continue
            for part in charge.metered.parts:
                account = self._accounts.get(part.id)
                if account is not None and not charge.hold.is_known(part.id, account, account.moment(now_us)):
                    del self._accounts[part.id]

    def _unread(self, id: str) -> bool:
        account = self._accounts.get(id)
        if account is None:
            return True
        # What others give back is not told of: without a look, this node would go on denying for it.
        own = self.lending.log.lease if self.lending is not None else None
        others = any(shares and id != own for id, (_, _, shares) in account.leases.items())
        lent = self._shared and (account.reserved is not None or others)
        return bool(lent) and time.monotonic() - account.read_at > BELIEVED_FOR_S

    def _evict(self) -> None:
        if len(self._accounts) > MAX_ACCOUNTS:  # those read longest ago go
            for id in list(self._accounts)[: MAX_ACCOUNTS // 10]:
                del self._accounts[id]

    async def _repeated(self, charges: list[Charge], now_us: int) -> dict[str, Happened]:
        """Which of the charges that may happen only once have happened, within the time that this is remembered."""
        found: dict[str, Happened] = {}
        once = [(charge, *charge.once) for charge in charges if charge.once is not None]
        if not once:
            return found
        documents = await self._stored([(operation.collection, id) for _, id, operation, _ in once])
        now = utc_from_us(now_us)
        for (charge, id, operation, alike), stored in zip(once, documents, strict=True):
            name, document = operation.collection, operation.document
            if stored is None:
                charge.once = Once(id, Create(name, id, document), alike)
            elif is_expired(IdempotentCall.__collection__, stored, now):
                charge.once = Once(id, Put(name, id, document, stored["version"]), alike)
            else:
                found[id] = Happened(stored["fingerprint"], stored["memo"])
        return found

    async def _not_committed(self, error: Exception, bundle: list[Decided]) -> None:
        """Someone else changed the usage: decide again. Someone changed the key: its caller must. Else: it failed."""
        for one in bundle:
            for id in one.group.parts:
                self._accounts.pop(id, None)  # it holds charges that did not happen
            if self.lending is not None:
                self.lending.not_committed(one)
        if not isinstance(error, Conflict | AlreadyExists | NotFound) or len(bundle) > 1:
            for charge in charges_of(bundle):
                self._failed(charge, error)
            return
        (one,) = bundle
        operation = _failed_operation(error, bundle)
        number = error.details.get("operation")
        own = one.also.get(number) if isinstance(number, int) else None
        if isinstance(operation, Check):
            changed = [charge for charge, _ in one.answers if _guarded(charge, operation)]
            again = [charge for charge, _ in one.answers if not _guarded(charge, operation)]
            self._waiting[:0] = again
            for charge in changed:
                await self._key_changed(charge)
        elif own is not None:
            fail(own, error)
            self._waiting[:0] = [charge for charge, _ in one.answers if charge is not own]
        else:
            self._lost(one)

    # --- Keys that other nodes use as well --------------------------------------------------------------------

    def _lost(self, one: Decided) -> None:
        """Another node was faster: its charges are decided again, at once the first time, since the winner is done."""
        again = []
        now = time.monotonic()
        for charge in charges_of([one]):
            charge.attempts += 1
            if charge.attempts == 1:
                charge.lost_at = now
            if now - charge.lost_at <= LOST_FOR_S:
                again.append(charge)
            else:
                error = Unavailable("this key's usage is being changed by too many nodes at once: try again")
                self._failed(charge, error)
        self.retries += len(again)
        if len(self._contended) >= MAX_CONTENDED:
            self._contended.clear()
        for id in one.group.parts:
            self._contended[id] = COURTESY_COMMITS
        if not again:
            return
        attempts = max(charge.attempts for charge in again)
        self._waiting[:0] = again  # before what came later
        if attempts > 1:
            # No longer than a commit: whoever is faster than the others' pauses gets its turn in one of them.
            self._hold(next(iter(one.group.parts)), 0, self._commit_s)

    def _had_turn(self, one: Decided) -> None:
        """This node has committed a key. Others that use it must read before they write, so without a pause whoever
        won once would go on winning."""
        lost = [id for id in one.group.parts if id in self._contended] if self._contended else ()
        for id in lost:
            self._contended[id] -= 1
            if not self._contended[id]:
                del self._contended[id]
        if lost:
            self._hold(lost[0], 0, 2 * self._commit_s)
            return
        for index, account in one.accounts.items():
            account.turns += 1
            if account.turns >= account.patience:
                account.turns, account.patience = 0, min(2 * account.patience, MAX_PATIENCE)
                if self._shared:
                    self._hold(one.operations[index].id, 4 * self._commit_s, 4 * self._commit_s)  # type: ignore[union-attr]

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
        now: Part | None = None
        try:
            document = await self._store.get(guard.collection, None, guard.id)
            if document is not None and charge.lease is not None and self.lending is not None:
                now = await self.lending.described(charge.metered.id)
        except StrongroomError as error:
            self._failed(charge, error)
            return
        if document is not None:  # it counts, whatever was changed; what a removed key had used is gone with it
            guard = Check(guard.collection, guard.id, document["version"])
            own = charge.metered.parts[0] if now is None else now
            charge.metered = Metered(own.id, guard, own.allowances, (), own.tenant)
            if charge.lease == "renew":
                charge.lease = "return"  # the limits may be others: the next use is lent something by those
            self._waiting.append(charge)
        elif isinstance(charge.special, Tally):
            self._written.discard(charge.metered.id)
        elif self.lending is not None:
            self.lending.gone(charge.metered.id)

    def _failed(self, charge: Charge, error: Exception) -> None:
        if charge.future is not None:
            fail(charge, error)
        elif isinstance(charge.special, Tally):
            self._written.discard(charge.metered.id)
            charge.attempts = 0
            self._unsure[charge.metered.id] = charge
            self._flush_later()
        elif self.lending is not None:
            self.lending.failed(charge.metered.id)

    def _answer(self, one: Decided) -> None:
        """What was decided is true."""
        answer(one.answers)
        if self._written:
            for charge in one.group.charges:
                if isinstance(charge.special, Tally):
                    self._written.discard(charge.metered.id)

    def _flush_tallies(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._flushes += 1
        unsure, self._unsure = self._unsure, {}
        for id, charge in unsure.items():
            self._written.add(id)
            self._waiting.append(charge)
        tallies, self._tallies = self._tallies, {}
        for id, tally in tallies.items():
            if id in self._written:
                self._tallies[id] = tally
                continue
            self._written.add(id)
            self._number += 1
            special = Tally(self._writer, self._number)
            charge = Charge(tally.metered, tally.cost, True, None, None, tally.count, tally.used_at_us, special=special)
            self._waiting.append(charge)
        if self._tallies:
            self._flush_later()
        if self._waiting:
            self._wake(asyncio.get_running_loop())


def _failed_operation(error: StrongroomError, bundle: list[Decided]) -> Operation | None:
    """The operation that a batch failed for, where the store says so."""
    number = error.details.get("operation")
    return operations_of(bundle)[number] if isinstance(number, int) else None


def _guarded(charge: Charge, guard: Check) -> bool:
    return any((part.guard.collection, part.guard.id) == (guard.collection, guard.id) for part in charge.metered.parts)


__all__ = [
    "Account",
    "Allowance",
    "ClockMended",
    "Cost",
    "KeyChanged",
    "KeyUsage",
    "Ledger",
    "Metered",
    "Outcome",
    "Status",
]
