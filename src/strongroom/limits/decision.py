"""The decision on the requests of one group, and what has to commit for it to be true. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from ..database import Once
from ..errors import Conflict, InvalidInput, Problem
from ..storage.port import MAX_OPERATIONS, Check, Create, Operation, Patch, Put
from . import tuning
from .admission import Charge, Decided, Group, KeyChanged, fail
from .corrections import (
    Backdate,
    Begin,
    Found,
    Special,
    TakeBack,
    Tally,
    begin_refills,
    counting,
    refill_started,
    take_back,
    tally_once,
)
from .idempotent_admission import Happened, kept_statuses, statuses_kept
from .lease import Wallet, fold, recover
from .reservation_change import HoldChange, HoldEnded
from .thresholds import Crossing, crossed, untold
from .usage_state import (
    CONCURRENCY,
    NAME,
    Account,
    Allowance,
    Cost,
    Metered,
    Outcome,
    Part,
    Status,
)
from .windows import Limit

KEYS = "api_keys"


class Watcher(Protocol):
    """Who is told when the use of a limit crosses a threshold."""

    def thresholds(self, tenant: str, limit: Limit) -> tuple[int, ...]:
        """The thresholds (percent) of a limit that anyone wants to be told of."""
        ...

    def on_crossing(self, crossing: Crossing) -> Sequence[Put]:
        """The operations that commit with a crossing."""
        ...


class Round:
    """What all decisions of one round of the group commit share. `wallets` are this node's usage leases, `repeated` the
    idempotent requests that were admitted before. `patches`: write only the fields that change."""

    __slots__ = ("accounts", "lease_us", "now_us", "patches", "repeated", "wallets", "watcher")

    def __init__(
        self,
        accounts: Mapping[str, Account],
        now_us: int,
        *,
        wallets: Mapping[str, Wallet] | None = None,
        lease_us: int | None = None,
        repeated: dict[str, Happened] | None = None,
        watcher: Watcher | None = None,
        patches: bool = True,
    ) -> None:
        self.accounts = accounts
        self.now_us = now_us
        self.wallets = wallets if wallets is not None else {}
        self.lease_us = lease_us
        self.repeated = repeated if repeated is not None else {}
        self.watcher = watcher
        self.patches = patches


class _Entry:
    """One subject of the group in this decision."""

    __slots__ = ("account", "asked", "changed", "now_us", "part", "returning")

    def __init__(self, part: Part, account: Account, now_us: int) -> None:
        self.part = part
        self.account = account
        self.now_us = now_us
        """The moment of this state alone: a subject that was charged at a wrong time does not move the others."""
        self.changed = False
        self.returning = False
        self.asked: dict[str, int] | None = None
        """The most units that one request of this group asks of each limit: the size of the next lease."""


class Decision:
    """Decides the requests of one group, in order."""

    __slots__ = ("_answers", "_due", "_entries", "_extra", "_group", "_guards", "_round", "_watched")

    def __init__(self, group: Group, round: Round) -> None:
        self._group = group
        self._round = round
        accounts, now_us = round.accounts, round.now_us
        self._entries: dict[str, _Entry] = {}
        for id, part in group.parts.items():
            account = accounts[id]
            self._entries[id] = _Entry(part, account, account.moment(now_us))
        self._watched: list[tuple[_Entry, Allowance, tuple[int, ...], int]] = []
        """Limits whose thresholds someone wants to be told of, and what was recorded of them before."""
        self._due = False
        """Whether crossings of earlier decisions are still to be told of."""
        self._guards: dict[tuple[str, str], Check] = {}
        self._extra: list[tuple[Operation, Charge | None]] = []
        self._answers: list[tuple[Charge, Outcome]] = []

    def decided(self) -> Decided:
        """The outcome of every request of the group. Nothing has to commit if all are denied."""
        round = self._round
        if round.watcher is not None:
            self._watch(round.watcher)
        for id, entry in self._entries.items():
            account, allowances, now_us = entry.account, entry.part.allowances, entry.now_us
            account.kept = _NOTHING_KEPT
            if round.wallets and (wallet := round.wallets.get(id)) is not None:
                entry.changed = wallet.record(account, now_us)
                account.kept = wallet.kept(allowances)
            if account.due:
                self._due = True
            if account.leases:
                fold(account, allowances, now_us)
        for charge in self._group.charges:
            self._charge(charge)
        return self._commitment()

    def _charge(self, charge: Charge) -> None:
        if charge.future is None or charge.special is not None:
            self._write(charge)
            return
        if charge.future.cancelled() and not charge.force:
            return  # its caller went away before it was decided: nothing was used
        if self._is_stale(charge):
            return
        metered = charge.metered
        if charge.hold is None and charge.once is None and len(metered.parts) == 1 and self._simply(charge):
            return
        if charge.once is not None and (before := self._round.repeated.get(charge.once.id)) is not None:
            self._repeat(charge, charge.once, before)
            return
        asked = [part.asked(charge.model, charge.route) for part in metered.parts]
        if charge.hold is not None and not self._may_hold(charge, charge.hold):
            return
        if not charge.force and not self._fits(charge, asked):
            return
        if charge.hold is not None:
            self._hold(charge, charge.hold, asked)
        else:
            for part, allowances in zip(metered.parts, asked, strict=True):
                entry = self._entries[part.id]
                entry.account.charge(allowances, charge.cost, entry.now_us)
                entry.account.tally(charge.cost, charge.count, entry.now_us)
                entry.changed = True
                if not charge.force:
                    self._want(entry, allowances, charge.cost)
        self._guard(metered.guard)
        statuses = self._statuses(metered, asked)
        if charge.once is not None:
            self._happens_once(charge, charge.once, statuses)
        self._answers.append((charge, Outcome(True, statuses, self._entries[metered.id].now_us)))

    def _is_stale(self, charge: Charge) -> bool:
        """Whether the key, or a quota, is known to have changed; then the request has failed."""
        for part in charge.metered.parts:
            known = self._entries[part.id].part
            if known is not part and part.guard.expected != known.guard.expected:
                fail(charge, KeyChanged())
                return True
        return False

    def _simply(self, charge: Charge) -> bool:
        """Admit what most requests are, in one go: one subject, on which nothing is held or leased. False: the request
        is another one, or not admitted; nothing was done."""
        (part,) = charge.metered.parts
        entry = self._entries[part.id]
        account = entry.account
        if part.scoped or account.reserved is not None or account.leases or account.kept:
            return False
        cost, now_us, counters = charge.cost, entry.now_us, []
        for one in part.allowances:
            counter, units = account.counter(one), cost.get(one.resource, 0)
            if not charge.force and counter.used(now_us) + units > one.most:
                return False
            counters.append((one, counter, units))
        statuses = []
        for one, counter, units in counters:
            if units and one.resource != CONCURRENCY:
                counter.add(now_us, units)
            used = counter.used(now_us)
            statuses.append(Status(one, used, counter.resets_at_us(now_us), used))
        account.tally(cost, charge.count, now_us)
        entry.changed = True
        if not charge.force:
            self._want(entry, part.allowances, cost)
        self._answers.append((charge, Outcome(True, tuple(statuses), now_us)))
        return True

    def _hold(self, charge: Charge, hold: HoldChange, asked: Sequence[tuple[Allowance, ...]]) -> None:
        """Charge what was used of a reservation where it was held, and hold what it holds from now on."""
        places = {}
        for part, allowances in zip(charge.metered.parts, asked, strict=True):
            entry = self._entries[part.id]
            account, now_us = entry.account, entry.now_us
            used = charge.cost if part.id not in hold.not_counted_on else {}
            account.charge(allowances, used, now_us)
            if used or hold.ttl_us is None:
                account.tally(used, charge.count, now_us)
            hold.give_back(part.id, account, now_us)
            if hold.ttl_us is not None and part.id not in hold.leaves:
                places[part.id] = account.hold(part, allowances, hold.cost, now_us, hold.ttl_us)
                self._want(entry, allowances, hold.cost)
            entry.changed = True
        ends_us = min((place.ends_us for place in places.values()), default=0)
        operation = hold.write(places, ends_us)
        if hold.remembers and isinstance(operation, Create | Put):
            operation.document["memo"] = kept_statuses(charge.metered, self._statuses(charge.metered, asked))
        self._extra.append((operation, charge))

    def _want(self, entry: _Entry, allowances: Iterable[Allowance], cost: Cost) -> None:
        """Remember what one request asks of each limit, for the size of the next lease."""
        if self._round.lease_us is not None:
            asked = entry.asked
            if asked is None:
                asked = entry.asked = {}
            for one in allowances:
                asked[one.id] = max(asked.get(one.id, 0), cost.get(one.resource, 0))

    def _write(self, charge: Charge) -> None:
        special = charge.special
        if isinstance(special, Backdate):
            self._backdate(charge, special.moment_us)
            return
        for part in charge.metered.parts:
            entry = self._entries[part.id]
            if special is not None:
                entry.changed = self._correct(charge, part, entry, special) or entry.changed
            elif charge.lease == "return":
                entry.returning = True
            elif charge.lease == "tell":
                entry.changed = True
        self._answers.append((charge, Outcome(True, (), self._round.now_us)))

    def _correct(self, charge: Charge, part: Part, entry: _Entry, special: Special) -> bool:
        """Correct a state; whether that changed it."""
        account, now_us = entry.account, entry.now_us
        match special:
            case Found():
                return recover(account, part.allowances, special.lease, special.spent)
            case Tally():
                used_at_us = charge.used_at_us if charge.used_at_us is not None else self._round.now_us
                return tally_once(account, special, charge.cost, charge.count, used_at_us)
            case Begin():
                return begin_refills(account, special.limits, now_us)
            case TakeBack():
                asked = part.asked(charge.model, charge.route)
                return take_back(account, asked, charge.cost, special.moment_us, now_us)
        raise AssertionError("the others are admissions")

    def _backdate(self, charge: Charge, moment_us: int) -> None:
        """Record an earlier use where it still counts; all of it, whatever the limits."""
        if self._is_stale(charge):
            return
        if charge.once is not None and (before := self._round.repeated.get(charge.once.id)) is not None:
            self._repeat(charge, charge.once, before)
            return
        parts = charge.metered.parts
        asked = [part.asked(charge.model, charge.route) for part in parts]
        entries = [self._entries[part.id] for part in parts]
        moment_us = min(moment_us, self._round.now_us)
        there = [(entry.account, own, entry.now_us) for entry, own in zip(entries, asked, strict=True)]
        found, problem = counting(there, charge.cost, moment_us)
        if problem is not None:
            fail(charge, InvalidInput([Problem("at", problem)]))
            return
        for account, one in found:
            account.counter(one).add_at(moment_us, charge.cost[one.resource])
        for entry in entries:
            entry.account.tally(charge.cost, charge.count, moment_us)
            entry.changed = True
        statuses = self._statuses(charge.metered, asked)
        if charge.once is not None:
            self._happens_once(charge, charge.once, statuses)
        self._answers.append((charge, Outcome(True, statuses, self._round.now_us)))

    def _happens_once(self, charge: Charge, once: Once, statuses: Sequence[Status]) -> None:
        """Answer the same request with this outcome from now on. A denied request may be made, and decided, again."""
        document = once.operation.document
        document["memo"] = kept_statuses(charge.metered, statuses)
        self._round.repeated[once.id] = Happened(document["fingerprint"], document["memo"])
        self._extra.append((once.operation, None))

    def _repeat(self, charge: Charge, once: Once, before: Happened) -> None:
        """Answer as the first time. Where the record holds no statuses (an earlier version wrote it), as things are."""
        if before.fingerprint not in once.alike:
            fail(charge, Conflict("the idempotency key was used for a different request: take a new one"))
            return
        statuses = statuses_kept(charge.metered, before.memo)
        if statuses is None:
            asked = [part.asked(charge.model, charge.route) for part in charge.metered.parts]
            statuses = self._statuses(charge.metered, asked)
        self._answers.append((charge, Outcome(True, statuses, self._round.now_us, repeated=True)))

    def _may_hold(self, charge: Charge, hold: HoldChange) -> bool:
        """Whether a reservation can be changed; if not the request has failed."""
        ended_us = hold.ended_us({part.id: self._entries[part.id].now_us for part in charge.metered.parts})
        if ended_us is not None:
            fail(charge, HoldEnded(ended_us))
        return ended_us is None

    def _fits(self, charge: Charge, asked: Sequence[tuple[Allowance, ...]]) -> bool:
        """Whether all limits admit a request; if not it is answered."""
        wanted = []
        for part, allowances in zip(charge.metered.parts, asked, strict=True):
            entry = self._entries[part.id]
            if charge.hold is None:
                want = [(one, charge.cost.get(one.resource, 0)) for one in allowances]
            else:
                want = charge.hold.wanted(part.id, entry.account, allowances, charge.cost, entry.now_us)
            wanted.append((part, entry, want))
        if all(entry.account.fits(want, entry.now_us) for _, entry, want in wanted):
            return True
        statuses: list[Status] = []
        for part, entry, want in wanted:
            if part.refills and refill_started(entry.account, part.allowances):
                entry.changed = True  # a restart would let it begin again, later
            statuses += entry.account.denials(want, entry.now_us)
        self._answers.append((charge, Outcome(False, tuple(statuses), self._round.now_us)))
        return False

    def _statuses(self, metered: Metered, asked: Sequence[tuple[Allowance, ...]]) -> tuple[Status, ...]:
        if len(asked) == 1:
            entry = self._entries[metered.id]
            return entry.account.statuses(asked[0], entry.now_us)
        statuses: list[Status] = []
        for part, allowances in zip(metered.parts, asked, strict=True):
            entry = self._entries[part.id]
            statuses += entry.account.statuses(allowances, entry.now_us)
        return tuple(statuses)

    # --- What has to commit -----------------------------------------------------------------------------------

    def _guard(self, guard: Check) -> None:
        if guard.expected:  # a dead process's lease is recovered whatever became of the key
            self._guards[guard.collection, guard.id] = guard

    def _commitment(self) -> Decided:
        decided = Decided(self._group, self._answers)
        if self._round.wallets:
            self._lease(decided)
        changed = [entry for entry in self._entries.values() if entry.changed]
        if not changed:
            return decided
        if len(changed) > 1:
            changed.sort(key=_id_of)  # in one order for all nodes
        for entry in changed:
            self._guard(entry.part.guard)
        operations = decided.operations
        operations += self._guards.values()
        if self._round.watcher is not None and (self._watched or self._due):
            self._tell(self._round.watcher, decided, changed)
        for entry in changed:
            account = entry.account
            account.at_us = entry.now_us
            decided.accounts[len(operations)] = account
            operations.append(usage_operation(entry.part.id, account, patches=self._round.patches))
        if self._extra:
            also = decided.also = {}
            for operation, charge in self._extra:
                if charge is not None:
                    also[len(operations)] = charge
                operations.append(operation)
        return decided

    def _watch(self, watcher: Watcher) -> None:
        for entry in self._entries.values():
            for allowance in entry.part.allowances:
                thresholds = watcher.thresholds(entry.part.tenant, allowance.limit)
                if thresholds:
                    before = entry.account.counter(allowance).used(entry.now_us)
                    self._watched.append((entry, allowance, thresholds, before))

    def _tell(self, watcher: Watcher, decided: Decided, changed: Sequence[_Entry]) -> None:
        """Have the thresholds told of that were crossed, as many in this commit as it takes events."""
        for entry, allowance, thresholds, before in self._watched:
            account, now_us = entry.account, entry.now_us
            counter = account.counter(allowance)
            used = counter.used(now_us)
            reached = crossed(before, used, allowance.most, thresholds)
            if not reached or not entry.changed:
                continue
            ends_us = counter.ends_us(now_us)
            told = account.told.get(allowance.id)
            new, remembered = untold(told, reached, allowance.limit, allowance.most, ends_us, now_us)
            account.told[allowance.id] = remembered
            account.due += [[allowance.id, threshold, used, allowance.most, ends_us, now_us] for threshold in new]
        room = MAX_OPERATIONS - len(decided.operations) - len(changed) - len(self._extra)
        for entry in changed:
            if entry.account.due:
                room -= self._tell_of(watcher, entry, decided, room)

    def _tell_of(self, watcher: Watcher, entry: _Entry, decided: Decided, room: int) -> int:
        """Put the events of a subject's crossings into the commit, while there is `room`; how many operations."""
        part, account = entry.part, entry.account
        by_id = {one.id: one for one in part.allowances}
        key_id = part.id if part.guard.collection == KEYS else None
        count, events, due = 0, [], []
        while account.due:
            limit_id, threshold, used, most, ends_us, at_us = account.due[0]
            if limit_id in by_id:  # else the limit is gone, and whoever took it away knows
                limit = by_id[limit_id].limit
                crossing = Crossing(part.id, part.tenant, key_id, limit, threshold, used, most, ends_us, at_us)
                puts = watcher.on_crossing(crossing)
                chars = sum(len(put.document["body"]) for put in puts)
                if count + len(puts) > room or decided.event_chars + chars > tuning.MAX_EVENT_CHARS:
                    due.append(part)
                    break
                self._extra += [(put, None) for put in puts]
                events += [put.id for put in puts]
                decided.event_chars += chars
                count += len(puts)
            del account.due[0]
        decided.events, decided.due = (*decided.events, *events), (*decided.due, *due)
        return count

    def _lease(self, decided: Decided) -> None:
        """Renew this node's leases on what is written anyway, or return them."""
        lease_us = self._round.lease_us
        asked_for = any(charge.lease is not None for charge in self._group.charges)
        granted, returned = [], []
        for id, entry in self._entries.items():
            wallet = self._round.wallets.get(id)
            if wallet is None:
                continue
            account, now_us = entry.account, entry.now_us
            account.kept = _NOTHING_KEPT  # it is in the lease again
            if (entry.returning and not wallet.open) or lease_us is None:
                wallet.give_back()
                returned.append(wallet)
            elif entry.returning:  # the limits may be others: what is reserved stays, and nothing more is leased
                wallet.part = entry.part
                wallet.grant(account, {}, now_us, lease_us, only_held=True)
                entry.changed = entry.changed or wallet.lease in account.leases
            elif entry.changed or asked_for:
                wallet.part = entry.part
                wallet.grant(account, entry.asked or {}, now_us, lease_us)
                entry.changed = entry.changed or wallet.lease in account.leases
            else:
                continue
            granted.append((wallet, wallet.totals_now()))  # of the new shares as well, so that they are leased
        decided.wallets, decided.returned = granted, returned


_NOTHING_KEPT: dict[str, int] = {}


def _id_of(entry: _Entry) -> str:
    return entry.part.id


def usage_operation(id: str, account: Account, *, patches: bool = True) -> Put | Patch:
    """The operation that makes the store's usage document equal to the state. With `patches`, `active_at` is left out
    while it stays the same: SQLite writes an index anew whenever a statement names its column."""
    document = account.document()
    if patches and account.version and document["active_at"] == account.stored_active_at:
        del document["active_at"]
        return Patch(NAME, id, document, account.version)
    account.stored_active_at = document["active_at"]  # if this does not commit, the account is read again
    return Put(NAME, id, document, account.version)


__all__ = ["Decision", "Round", "Watcher", "usage_operation"]
