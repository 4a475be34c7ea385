"""Charges that wait, what is decided on those that share accounts, and what has to commit for that to be true. Pure."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import msgspec

from ..database import Once
from ..errors import Conflict, InvalidInput, Problem
from ..storage.port import MAX_OPERATIONS, Check, Create, Operation, Patch, Put
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
from .lease import Share, Wallet, fold, recover
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

MAX_BUNDLE_CHARS = 400_000
"""Accounts share a batch until their states are this long together: far from the port's MAX_BATCH_BYTES."""
KEYS = "api_keys"
MAX_ONCE = 400
"""Charges of one group that may happen only once, in one commit: with the rest they fit into a batch."""
MAX_GROUP_OPERATIONS = 450
MAX_EVENT_CHARS = 400_000
"""Of one commit's events, at most; the thresholds that are crossed beyond are told of in the next one."""


class Watcher(Protocol):
    """Who is told when the use of a limit crosses a threshold."""

    def thresholds(self, tenant: str, limit: Limit) -> tuple[int, ...]:
        """The thresholds (percent) of a limit that anyone wants to be told of."""
        ...

    def on_crossing(self, crossing: Crossing) -> Sequence[Put]:
        """What commits with a crossing."""
        ...


class KeyChanged(Exception):
    """The key, or a quota of it, was changed or removed since it was read: read it again and decide again. Never leaves
    the library."""


class Charge(msgspec.Struct, eq=False):
    """One use of a key that is to be decided; or (without a future) something that only has to be written: a tally of
    uses, a node's lease to be renewed or given back, the lease of a dead process."""

    metered: Metered
    cost: Cost
    force: bool
    once: Once | None
    future: asyncio.Future[Outcome] | None
    count: int = 1
    used_at_us: int | None = None
    attempts: int = 0
    model: str | None = None
    route: str | None = None
    hold: HoldChange | None = None
    """What becomes of a reservation. What it writes commits with the charge; if that fails, only this charge does."""
    lease: Literal["renew", "return", "tell"] | None = None
    """A node's lease is to be renewed or given back; `tell`: crossings that are due are to be told of."""
    special: Special | None = None
    lost_at: float = 0.0
    """By time.monotonic: when its first turn was lost to another node."""


@dataclass(slots=True, eq=False)
class Group:
    """Charges that share accounts, directly or by way of others: they are decided in order, and commit together."""

    charges: list[Charge] = field(default_factory=list)
    parts: dict[str, Part] = field(default_factory=dict)
    """The accounts, by id."""


@dataclass(slots=True)
class Decided:
    """The charges of a group with their outcomes, and what has to commit for these to be true: the guards, the usage
    documents, then whatever may happen only once."""

    group: Group
    operations: list[Operation] = field(default_factory=list)
    answers: list[tuple[Charge, Outcome]] = field(default_factory=list)
    accounts: dict[int, Account] = field(default_factory=dict)
    """The accounts that are written, by the index of their operation."""
    also: dict[int, Charge] = field(default_factory=dict)
    """The charges whose own operation is at an index."""
    wallets: list[tuple[Wallet, list[tuple[Share, int]]]] = field(default_factory=list)
    """Leases that were recorded and granted, and what of each share was."""
    returned: list[Wallet] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    """The ids of the events that tell of thresholds."""
    event_chars: int = 0
    due: list[Part] = field(default_factory=list)
    """Accounts with crossings that are still to be told of."""


# --- Which charges belong together -------------------------------------------------------------------------------


def groups_of(charges: Iterable[Charge], accounts: Mapping[str, Account]) -> tuple[list[Group], list[Charge]]:
    """The charges in groups that share no account, and those for the next round, because a batch takes so many."""
    groups: dict[str, Group] = {}
    later: list[Charge] = []
    for charge in charges:
        parts = charge.metered.parts
        group = groups.get(parts[0].id) or Group() if len(parts) == 1 else _merged(groups, parts)
        group.charges.append(charge)
        if len(parts) == 1 and group.parts.get(parts[0].id) is parts[0]:
            continue  # as the charge before it
        for part in parts:
            known = group.parts.get(part.id)
            if known is None or part.guard.expected > known.guard.expected:
                group.parts[part.id] = part
            groups[part.id] = group
    found: list[Group] = []
    for group in dict.fromkeys(groups.values()):
        cut, rest = _cut(group, accounts)
        found.append(cut)
        later += rest
    return found, later


def _merged(groups: dict[str, Group], parts: Sequence[Part]) -> Group:
    there = dict.fromkeys(group for part in parts if (group := groups.get(part.id)) is not None)
    if not there:
        return Group()
    first, *others = there
    for other in others:
        first.charges += other.charges
        for part_id, part in other.parts.items():
            known = first.parts.get(part_id)
            if known is None or part.guard.expected > known.guard.expected:
                first.parts[part_id] = part
            groups[part_id] = first
    return first


def _cut(group: Group, accounts: Mapping[str, Account]) -> tuple[Group, list[Charge]]:
    """As many of a group's charges as fit into one batch, and the rest."""
    if len(group.charges) <= MAX_ONCE and 2 * len(group.parts) + len(group.charges) <= MAX_GROUP_OPERATIONS:
        return group, []  # whatever they are
    once = sum(charge.once is not None or charge.hold is not None for charge in group.charges)
    if once <= MAX_ONCE and 2 * len(group.parts) + once <= MAX_GROUP_OPERATIONS:
        return group, []
    kept, rest = Group(), []
    operations = size = 0
    for charge in group.charges:
        more = 2 * sum(part.id not in kept.parts for part in charge.metered.parts)
        more += charge.once is not None or charge.hold is not None
        chars = sum(
            accounts[part.id].size for part in charge.metered.parts if part.id not in kept.parts and part.id in accounts
        )
        if kept.charges and (operations + more > MAX_GROUP_OPERATIONS or size + chars > MAX_BUNDLE_CHARS):
            rest.append(charge)
            continue
        operations, size = operations + more, size + chars
        kept.charges.append(charge)
        kept.parts.update({part.id: group.parts[part.id] for part in charge.metered.parts})
    return kept, rest


# --- The decision ------------------------------------------------------------------------------------------------


class Decision:
    """Decides one group: `accounts` are those of its parts, `wallets` this node's leases, `repeated` what happened
    before and may not happen again."""

    def __init__(
        self,
        group: Group,
        accounts: Mapping[str, Account],
        wallets: Mapping[str, Wallet],
        now_us: int,
        repeated: dict[str, Happened],
        lease_us: int | None,
        watcher: Watcher | None = None,
    ) -> None:
        self._group = group
        self._accounts = {id: accounts[id] for id in group.parts}
        self._wallets = wallets
        self._now_us = now_us
        self._moments = {id: account.moment(now_us) for id, account in self._accounts.items()}
        """Each account is decided on at its own: one that was charged at a wrong time does not move the others."""
        self._repeated = repeated
        self._lease_us = lease_us
        self._watcher = watcher
        self._watched: list[tuple[Part, Allowance, tuple[int, ...], int]] = []
        """Limits whose thresholds someone wants to be told of, and what was recorded of them before."""
        self._due = False
        """Whether crossings of before are still to be told of."""
        self._changed: set[str] = set()
        self._asked: dict[str, dict[str, int]] = {}
        self._guards: dict[tuple[str, str], Check] = {}
        self._returning: set[str] = set()
        self._extra: list[tuple[Operation, Charge | None]] = []
        self._answers: list[tuple[Charge, Outcome]] = []

    def decided(self) -> Decided:
        """What every charge of the group comes to. Nothing has to commit if all are denied."""
        if self._watcher is not None:
            self._watch(self._watcher)
        for id, account in self._accounts.items():
            wallet = self._wallets.get(id)
            allowances, now_us = self._group.parts[id].allowances, self._moments[id]
            if wallet is not None and wallet.record(account, now_us):
                self._changed.add(id)
            account.kept = wallet.kept(allowances) if wallet is not None else {}
            self._due = self._due or bool(account.due)
            fold(account, allowances, now_us)
        for charge in self._group.charges:
            self._charge(charge)
        return self._commitment()

    def _charge(self, charge: Charge) -> None:
        metered = charge.metered
        if charge.future is None or charge.special is not None:
            self._write(charge)
            return
        if charge.future.cancelled() and not charge.force:
            return  # its caller went away before it was decided: nothing was used
        if self._is_stale(charge):
            return
        if charge.hold is None and charge.once is None and len(metered.parts) == 1 and self._simply(charge):
            return
        if charge.once is not None and (before := self._repeated.get(charge.once.id)) is not None:
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
                account, now_us = self._accounts[part.id], self._moments[part.id]
                account.charge(allowances, charge.cost, now_us)
                account.tally(charge.cost, charge.count, now_us)
                self._changed.add(part.id)
                if not charge.force:
                    self._want(part.id, allowances, charge.cost)
        self._guard(metered.guard)
        statuses = self._statuses(metered, asked)
        if charge.once is not None:
            self._happens_once(charge, charge.once, statuses)
        self._answers.append((charge, Outcome(True, statuses, self._moments[metered.id])))

    def _is_stale(self, charge: Charge) -> bool:
        """Whether the key, or a quota, is known to have changed; then the charge has failed."""
        for part in charge.metered.parts:
            known = self._group.parts[part.id]
            if known is not part and part.guard.expected != known.guard.expected:
                fail(charge, KeyChanged())
                return True
        return False

    def _simply(self, charge: Charge) -> bool:
        """Charge what most charges are, in one go: one account, on which nothing is held or lent. False: it is no such
        charge, or not admitted; nothing was done."""
        (part,) = charge.metered.parts
        account = self._accounts[part.id]
        if part.scoped or account.reserved is not None or account.leases or account.kept:
            return False
        cost, now_us = charge.cost, self._moments[part.id]
        asked = []
        for one in part.allowances:
            counter, units = account.counter(one), cost.get(one.resource, 0)
            if not charge.force and counter.used(now_us) + units > one.most:
                return False
            asked.append((one, counter, units))
        statuses = []
        for one, counter, units in asked:
            if units and one.resource != CONCURRENCY:
                counter.add(now_us, units)
            used = counter.used(now_us)
            statuses.append(Status(one, used, counter.resets_at_us(now_us), used))
        account.tally(cost, charge.count, now_us)
        self._changed.add(part.id)
        if self._lease_us is not None and not charge.force:
            self._want(part.id, part.allowances, cost)
        guard = part.guard
        self._guards[guard.collection, guard.id] = guard
        self._answers.append((charge, Outcome(True, tuple(statuses), now_us)))
        return True

    def _hold(self, charge: Charge, hold: HoldChange, asked: Sequence[tuple[Allowance, ...]]) -> None:
        """Charge what was used of a reservation where it was held, and hold what it holds from now on."""
        places = {}
        for part, allowances in zip(charge.metered.parts, asked, strict=True):
            account, now_us = self._accounts[part.id], self._moments[part.id]
            used = charge.cost if part.id not in hold.not_counted_on else {}
            account.charge(allowances, used, now_us)
            if used or hold.ttl_us is None:
                account.tally(used, charge.count, now_us)
            hold.give_back(part.id, account, now_us)
            if hold.ttl_us is not None and part.id not in hold.leaves:
                places[part.id] = account.hold(part, allowances, hold.cost, now_us, hold.ttl_us)
                self._want(part.id, allowances, hold.cost)
            self._changed.add(part.id)
        ends_us = min((place.ends_us for place in places.values()), default=0)
        operation = hold.write(places, ends_us)
        if hold.remembers and isinstance(operation, Create | Put):
            operation.document["memo"] = kept_statuses(charge.metered, self._statuses(charge.metered, asked))
        self._extra.append((operation, charge))

    def _want(self, id: str, allowances: Iterable[Allowance], cost: Cost) -> None:
        """Remember what one call asks of each limit, for the size of the next lease."""
        if self._lease_us is not None:
            wants = self._asked.setdefault(id, {})
            for one in allowances:
                wants[one.id] = max(wants.get(one.id, 0), cost.get(one.resource, 0))

    def _write(self, charge: Charge) -> None:
        special = charge.special
        if isinstance(special, Backdate):
            self._backdate(charge, special.moment_us)
            return
        for part in charge.metered.parts:
            if special is not None:
                if self._correct(charge, part, special):
                    self._changed.add(part.id)
            elif charge.lease == "return":
                self._returning.add(part.id)
            elif charge.lease == "tell":
                self._changed.add(part.id)
        self._answers.append((charge, Outcome(True, (), self._now_us)))

    def _correct(self, charge: Charge, part: Part, special: Special) -> bool:
        """Correct an account; whether that changed it."""
        account = self._accounts[part.id]
        match special:
            case Found():
                return recover(account, part.allowances, special.lease, special.spent)
            case Tally():
                used_at_us = charge.used_at_us if charge.used_at_us is not None else self._now_us
                return tally_once(account, special, charge.cost, charge.count, used_at_us)
            case Begin():
                return begin_refills(account, special.limits, self._moments[part.id])
            case TakeBack():
                asked = part.asked(charge.model, charge.route)
                return take_back(account, asked, charge.cost, special.moment_us, self._moments[part.id])
        raise AssertionError("the others are charges")

    def _backdate(self, charge: Charge, moment_us: int) -> None:
        """Record a use of before where it still counts; all of it, whatever the limits."""
        if self._is_stale(charge):
            return
        if charge.once is not None and (before := self._repeated.get(charge.once.id)) is not None:
            self._repeat(charge, charge.once, before)
            return
        parts = charge.metered.parts
        asked = [part.asked(charge.model, charge.route) for part in parts]
        accounts = [self._accounts[part.id] for part in parts]
        moment_us = min(moment_us, self._now_us)
        moments = [self._moments[part.id] for part in parts]
        found, problem = counting(list(zip(accounts, asked, moments, strict=True)), charge.cost, moment_us)
        if problem is not None:
            fail(charge, InvalidInput([Problem("at", problem)]))
            return
        for account, one in found:
            account.counter(one).add_at(moment_us, charge.cost[one.resource])
        for part, account in zip(parts, accounts, strict=True):
            account.tally(charge.cost, charge.count, moment_us)
            self._changed.add(part.id)
        statuses = self._statuses(charge.metered, asked)
        if charge.once is not None:
            self._happens_once(charge, charge.once, statuses)
        self._answers.append((charge, Outcome(True, statuses, self._now_us)))

    def _happens_once(self, charge: Charge, once: Once, statuses: Sequence[Status]) -> None:
        """Whoever asks for the same again is answered by this; what was denied may be asked again, and decided anew."""
        document = once.operation.document
        document["memo"] = kept_statuses(charge.metered, statuses)
        self._repeated[once.id] = Happened(document["fingerprint"], document["memo"])
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
        self._answers.append((charge, Outcome(True, statuses, self._now_us, repeated=True)))

    def _may_hold(self, charge: Charge, hold: HoldChange) -> bool:
        """Whether a reservation can be changed; if not the charge has failed."""
        ended_us = hold.ended_us({part.id: self._moments[part.id] for part in charge.metered.parts})
        if ended_us is not None:
            fail(charge, HoldEnded(ended_us))
        return ended_us is None

    def _fits(self, charge: Charge, asked: Sequence[tuple[Allowance, ...]]) -> bool:
        """Whether all limits admit a charge; if not it is answered."""
        parts, wanted = charge.metered.parts, []
        for part, allowances in zip(parts, asked, strict=True):
            account, now_us = self._accounts[part.id], self._moments[part.id]
            if charge.hold is None:
                wanted.append([(one, charge.cost.get(one.resource, 0)) for one in allowances])
            else:
                wanted.append(charge.hold.wanted(part.id, account, allowances, charge.cost, now_us))
        judged = [
            (self._accounts[part.id], want, self._moments[part.id]) for part, want in zip(parts, wanted, strict=True)
        ]
        if all(account.fits(want, now_us) for account, want, now_us in judged):
            return True
        statuses: list[Status] = []
        for part, (account, want, now_us) in zip(parts, judged, strict=True):
            if part.refills and refill_started(account, part.allowances):
                self._changed.add(part.id)  # a restart would let it begin again, later
            statuses += account.denials(want, now_us)
        self._answers.append((charge, Outcome(False, tuple(statuses), self._now_us)))
        return False

    def _statuses(self, metered: Metered, asked: Sequence[tuple[Allowance, ...]]) -> tuple[Status, ...]:
        if len(asked) == 1:
            return self._accounts[metered.id].statuses(asked[0], self._moments[metered.id])
        statuses: list[Status] = []
        for part, allowances in zip(metered.parts, asked, strict=True):
            statuses += self._accounts[part.id].statuses(allowances, self._moments[part.id])
        return tuple(statuses)

    # --- What has to commit -----------------------------------------------------------------------------------

    def _guard(self, guard: Check) -> None:
        if guard.expected:  # a dead process's lease is set right whatever became of the key
            self._guards[guard.collection, guard.id] = guard

    def _commitment(self) -> Decided:
        decided = Decided(self._group, answers=self._answers)
        self._lend(decided)
        if not self._changed:
            return decided
        operations = decided.operations
        for id in self._changed:
            self._guard(self._group.parts[id].guard)
        operations += self._guards.values()
        if self._watcher is not None and (self._watched or self._due):
            self._tell(self._watcher, decided)
        for id in sorted(self._changed):  # in one order for all nodes
            account = self._accounts[id]
            account.at_us = self._moments[id]
            decided.accounts[len(operations)] = account
            operations.append(usage_operation(id, account))
        for operation, charge in self._extra:
            if charge is not None:
                decided.also[len(operations)] = charge
            operations.append(operation)
        return decided

    def _watch(self, watcher: Watcher) -> None:
        for part in self._group.parts.values():
            for allowance in part.allowances:
                thresholds = watcher.thresholds(part.tenant, allowance.limit)
                if thresholds:
                    before = self._accounts[part.id].counter(allowance).used(self._moments[part.id])
                    self._watched.append((part, allowance, thresholds, before))

    def _tell(self, watcher: Watcher, decided: Decided) -> None:
        """Have the thresholds told of that were crossed, in this commit as far as it takes so many events."""
        for part, allowance, thresholds, before in self._watched:
            account, now_us = self._accounts[part.id], self._moments[part.id]
            counter = account.counter(allowance)
            used = counter.used(now_us)
            reached = crossed(before, used, allowance.most, thresholds)
            if not reached or part.id not in self._changed:
                continue
            ends_us = counter.ends_us(now_us)
            told = account.told.get(allowance.id)
            new, remembered = untold(told, reached, allowance.limit, allowance.most, ends_us, now_us)
            account.told[allowance.id] = remembered
            account.due += [[allowance.id, threshold, used, allowance.most, ends_us, now_us] for threshold in new]
        room = MAX_OPERATIONS - len(decided.operations) - len(self._changed) - len(self._extra)
        for id in self._changed:
            if self._accounts[id].due:
                room -= self._tell_of(watcher, self._group.parts[id], decided, room)

    def _tell_of(self, watcher: Watcher, part: Part, decided: Decided, room: int) -> int:
        """Put the events of an account's crossings into the commit, while there is `room`; how many operations."""
        account, by_id = self._accounts[part.id], {one.id: one for one in part.allowances}
        key_id = part.id if part.guard.collection == KEYS else None
        count = 0
        while account.due:
            limit_id, threshold, used, most, ends_us, at_us = account.due[0]
            if limit_id in by_id:  # else the limit is gone, and whoever took it away knows
                limit = by_id[limit_id].limit
                crossing = Crossing(part.id, part.tenant, key_id, limit, threshold, used, most, ends_us, at_us)
                puts = watcher.on_crossing(crossing)
                chars = sum(len(put.document["body"]) for put in puts)
                if count + len(puts) > room or decided.event_chars + chars > MAX_EVENT_CHARS:
                    decided.due.append(part)
                    break
                self._extra += [(put, None) for put in puts]
                decided.events += [put.id for put in puts]
                decided.event_chars += chars
                count += len(puts)
            del account.due[0]
        return count

    def _lend(self, decided: Decided) -> None:
        """Renew this node's leases on what is written anyway, or give them back."""
        for id in self._group.parts:
            wallet = self._wallets.get(id)
            if wallet is None:
                continue
            account, now_us = self._accounts[id], self._moments[id]
            account.kept = {}  # it is in the lease again
            if (id in self._returning and not wallet.open) or self._lease_us is None:
                wallet.give_back()
                decided.returned.append(wallet)
            elif id in self._returning:  # the limits may be others: what is reserved stays, and nothing more is lent
                wallet.part = self._group.parts[id]
                wallet.grant(account, {}, now_us, self._lease_us, only_held=True)
                if wallet.lease in account.leases:
                    self._changed.add(id)
            elif id in self._changed or any(charge.lease is not None for charge in self._group.charges):
                wallet.part = self._group.parts[id]
                wallet.grant(account, self._asked.get(id, {}), now_us, self._lease_us)
                if wallet.lease in account.leases:
                    self._changed.add(id)
            else:
                continue
            decided.wallets.append((wallet, wallet.totals_now()))  # of the new shares as well, so that they are lent


def usage_operation(id: str, account: Account) -> Put | Patch:
    """What makes the store's usage document what the account is. `active_at` is left out while it stays the same, since
    SQLite writes an index anew whenever its column is named."""
    document = account.document()
    if account.version and document["active_at"] == account.stored_active_at:
        del document["active_at"]
        return Patch(NAME, id, document, account.version)
    account.stored_active_at = document["active_at"]  # if this does not commit, the account is read again
    return Put(NAME, id, document, account.version)


# --- Batches, answers --------------------------------------------------------------------------------------------


def bundles_of(decided: list[Decided]) -> list[list[Decided]]:
    """The decisions in as few batches as the port's limits allow, with room to spare."""
    bundles: list[list[Decided]] = []
    operations, size = MAX_OPERATIONS, 0
    for one in decided:
        more = len(one.operations)
        chars = one.event_chars + sum(account.size for account in one.accounts.values())
        if operations + more > MAX_OPERATIONS or size + chars > MAX_BUNDLE_CHARS:
            bundles.append([])
            operations, size = 0, 0
        bundles[-1].append(one)
        operations += more
        size += chars
    return bundles


def operations_of(bundle: list[Decided]) -> list[Operation]:
    return [operation for one in bundle for operation in one.operations]


def charges_of(bundle: list[Decided]) -> list[Charge]:
    return [charge for one in bundle for charge, _ in one.answers]


def answer(answers: list[tuple[Charge, Outcome]]) -> None:
    for charge, outcome in answers:
        if charge.future is not None and not charge.future.done():
            charge.future.set_result(outcome)


def fail(charge: Charge, error: Exception) -> None:
    if charge.future is not None and not charge.future.done():
        charge.future.set_exception(error)


__all__ = [
    "CONCURRENCY", "Charge", "Decided", "Decision", "Group", "Happened", "HoldChange", "KeyChanged", "Once",
]  # fmt: skip
