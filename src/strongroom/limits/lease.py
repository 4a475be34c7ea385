"""Limit leases as one node spends them: shares of limits that were debited in the store before they are spent here.

A *lease* is a node's entry in an account's document: of each limit so many units, until some moment. While it stands,
all of it counts as used for everyone else; so what the node admits out of it needs no commit, and no limit is ever
over-admitted, whatever becomes of the node. Now and then the node records what it has spent, in the commit that lends
it the next units (`record`, `grant`); what is left over goes back with the last one.

Every amount here is a running total since the lease began, never a difference: so a commit whose answer was lost, or a
process that was killed, leaves no doubt about what is recorded already. The document says up to which total it is
(`settled`), the node knows its own (`spent`), and `spent <= cap` holds at every moment for the cap that the store
knows of: while a commit is on its way, the lower one of the two that may be true.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Protocol

from ..context import utc_from_us
from .counters import BUCKETS_PER_WINDOW
from .lease_log import SpendLog
from .usage_state import CONCURRENCY, Account, Allowance, Lease, Part

LEAST_CALLS = 64
"""A first share is for so many calls such as the one that asked for it; the next ones are for HORIZON_S."""
HORIZON_S = 4.0
"""A share is for what was spent lately in so long."""
PART_OF_FREE = 4
"""A share is at most this part of what is free: so shares shrink near the limit, and other nodes find something."""
RENEW_AT = 2
"""A share is renewed when one part of so many is spent, so that no call has to wait for it."""
KEPT_AFTER_US = 3_600_000_000
"""A lease that ended unrecorded can be set right by whoever finds what its process had spent, for so long; after that
it is recorded as spent at its end."""
MAX_ENDED = 32
"""Leases that count no longer of which an account still knows what was recorded."""
LEAST_ELAPSED_S = 0.001
_SECOND = 1_000_000


class Holder(Protocol):
    """A reservation in memory: what it holds of each resource, and of which shares."""

    cost: Mapping[str, int]
    model: str | None
    route: str | None
    more: list[tuple[Share, str]]

    def holds(self, share: Share) -> bool: ...


class Share:
    """What this node holds of one limit. `held` is reserved by reservations in memory; `spent + held <= cap`."""

    __slots__ = (
        "allowance",
        "cap",
        "ends_us",
        "granted_at",
        "granted_spent",
        "held",
        "leased",
        "low",
        "mark_ends_us",
        "marks",
        "next_cap",
        "next_ends_us",
        "recorded",
        "reserved",
        "resets_at",
        "settled",
        "slot",
        "spent",
        "wallet",
        "width_us",
    )

    def __init__(self, wallet: Wallet, allowance: Allowance, slot: int) -> None:
        self.wallet = wallet
        self.allowance = allowance
        self.slot = slot
        self.spent = 0
        self.held = 0
        self.settled = 0
        self.cap = 0
        self.next_cap = 0
        self.next_ends_us = 0
        self.ends_us = 0
        self.low = 0
        """Above this much spent, a renewal is asked for."""
        self.granted_at = 0.0
        self.granted_spent = 0
        window = allowance.limit.window
        seconds = window.seconds if window.kind == "rolling" else 1
        self.width_us = -(-seconds * _SECOND // BUCKETS_PER_WINDOW) if window.kind == "rolling" else _SECOND
        self.marks: list[tuple[int, int]] = []
        """(moment, `spent` before it): what was spent from then on was spent in that moment's bucket."""
        self.mark_ends_us = 0
        # As of the last commit, for answers: what the others have used, and what this node had recorded.
        self.recorded = 0
        self.reserved = 0
        self.leased = 0
        self.resets_at: datetime | None = None

    def mark(self, now_us: int, before: int) -> None:
        """What is spent from now on, after `before`, is spent in another bucket than what was spent until now."""
        now_us = max(now_us, self.wallet.from_us)
        self.marks.append((now_us, before))
        self.mark_ends_us = (now_us // self.width_us + 1) * self.width_us
        self.wallet.log.moment(self.slot, now_us)

    def unsettled(self) -> Iterable[tuple[int, int]]:
        """(moment, units) of what is spent and not recorded."""
        for number, (moment_us, start) in enumerate(self.marks):
            end = self.marks[number + 1][1] if number + 1 < len(self.marks) else self.spent
            units = end - max(start, self.settled)
            if units > 0:
                yield moment_us, units

    def settle(self, total: int) -> None:
        """The store's document has what was spent up to this total."""
        self.settled = max(self.settled, total)
        while len(self.marks) > 1 and self.marks[1][1] <= self.settled:
            del self.marks[0]
        if self.marks and self.settled >= self.spent:
            self.marks.clear()
            self.mark_ends_us = 0


class Wallet:
    """What this node holds of one account's limits, and what it has used of them and not recorded.

    `part` says what the account's limits are; a change of the key gives another one, and the next commit its shares.
    """

    __slots__ = (
        "count",
        "from_us",
        "holds",
        "id",
        "known",
        "last_used_us",
        "lease",
        "log",
        "noted",
        "part",
        "renewing",
        "seen_count",
        "settled_count",
        "settled_totals",
        "shares",
        "tickets",
        "totals",
        "until_us",
    )

    def __init__(self, part: Part, log: SpendLog) -> None:
        self.id = part.id
        self.part = part
        self.log = log
        self.lease = log.lease
        self.from_us = 0
        """The moment of the grant: nothing is spent at an earlier one, whatever this node's clock says."""
        self.until_us = 0
        self.shares: dict[str, Share] = {}
        self.count = 0
        self.settled_count = 0
        self.seen_count = 0
        """`count` at the last look: a wallet that nothing was taken from since gives back what it has."""
        self.totals: dict[str, int] = {}
        self.settled_totals: dict[str, int] = {}
        self.noted: tuple[int, dict[str, int]] | None = None
        """Uses and totals as they are in a commit that is on its way, or whose answer was lost."""
        self.last_used_us = 0
        self.renewing = False
        self.tickets: set[str] = set()
        """The keys that are verified with it: see `lending`."""
        self.holds: dict[str, Holder] = {}
        """Reservations in memory that hold something of it."""
        self.known: Sequence[Allowance] = part.allowances
        """The limits that these reservations hold."""

    def share(self, allowance: Allowance) -> Share:
        """The share of a limit; a new one holds nothing yet."""
        share = self.shares.get(allowance.id)
        if share is None:
            share = self.shares[allowance.id] = Share(self, allowance, self.log.slot(self.id, allowance.id))
        share.allowance = allowance
        return share

    @property
    def open(self) -> int:
        """How many reservations in memory hold something of it."""
        return len(self.holds)

    def kept(self, allowances: Sequence[Allowance] | None = None) -> dict[str, int]:
        """Units of each limit that reservations in memory hold: nobody else may have them. `allowances`: what the
        limits are now; those that are new are held by the reservations that were made before, too."""
        if not self.holds:
            self.known = allowances if allowances is not None else self.known
            return {}
        if allowances is not None and allowances is not self.known:
            self.known = allowances
            for one in allowances:
                self._carry(self.share(one), one)
        return {id: share.held for id, share in self.shares.items() if share.held}

    def _carry(self, share: Share, allowance: Allowance) -> None:
        """Let the reservations that are open hold a limit that their account did not have when they were made."""
        for hold in self.holds.values():
            if not hold.holds(share) and allowance.limit.applies(hold.model, hold.route):
                hold.more.append((share, allowance.resource))
                share.held += hold.cost.get(allowance.resource, 0)

    @property
    def dirty(self) -> bool:
        """Whether something was used that is not recorded."""
        return self.count != self.settled_count or self.totals != self.settled_totals

    # --- In a commit ------------------------------------------------------------------------------------------

    def record(self, account: Account, now_us: int) -> bool:
        """Count in the account what was spent and is not recorded, and take this node's lease out of it; whether that
        changed anything. `now_us` is the account's moment: what was spent later, before the clock was set back, counts
        as spent now. If the account does not commit it is to be read again, and nothing is lost."""
        lease = account.leases.pop(self.lease, None)
        if lease is None:
            # There is nothing of this node in the store: what it spent from its last lease was counted whole when that
            # was taken away (an hour after its end), or was recorded by the commit that gave it all back.
            noted = self.noted if self.noted is not None else (self.settled_count, self.settled_totals)
            self.forget_spent()
            if not account.version:  # there was a document, or nothing would be lent: it was removed, with its uses
                return False
            self.settled_count, self.settled_totals = noted
            return self._tally(account)
        self._reconcile(lease)
        for share in self.shares.values():
            if share.allowance.resource != CONCURRENCY:
                counter = account.counter(share.allowance)
                for moment_us, units in share.unsettled():
                    counter.add_at(min(moment_us, now_us), units)
        self._tally(account)
        return True

    def _tally(self, account: Account) -> bool:
        """Count the uses that are not recorded; whether there were any."""
        if not self.dirty:
            return False
        settled = self.settled_totals
        totals = {name: units - settled.get(name, 0) for name, units in self.totals.items()}
        account.tally(totals, self.count - self.settled_count, self.last_used_us)
        return True

    def _reconcile(self, lease: Lease) -> None:
        """Believe the store about what of this node's it has."""
        if self.noted is not None and lease[1] == self.noted[0]:
            self.settled_count, self.settled_totals = self.noted
        self.noted = None
        for id, (units, settled, _) in lease[2].items():
            share = self.shares.get(id)
            if share is not None:
                share.settle(settled)
                share.cap = min(share.cap, settled + units) if share.cap else settled + units

    def forget_spent(self) -> None:
        """What was spent is counted in the store already, or gone with its key."""
        for share in self.shares.values():
            share.settle(share.spent)
            share.cap = share.spent
        self.settled_count, self.settled_totals, self.noted = self.count, dict(self.totals), None

    def grant(
        self, account: Account, asked: Mapping[str, int], now_us: int, lease_us: int, *, only_held: bool = False
    ) -> None:
        """Lend this node the next units, after `record` and whatever is decided in the same commit. `asked`: of each
        limit what one call asks for. `only_held`: no more than its reservations hold."""
        until_us = now_us + lease_us
        moment = time.monotonic()
        plan = []
        for allowance in self.part.allowances:
            share = self.share(allowance)
            recorded, reserved, leased = account.standing(allowance, now_us)
            free = allowance.most - recorded - reserved - leased
            gone_us, ends_us = _ends(account, allowance, until_us, now_us)
            wants = asked.get(allowance.id, 0)
            units = 0 if gone_us < 0 else self._units(share, free, wants, moment)
            plan.append((share, units, max(gone_us, 0), ends_us if free >= 0 else 0, wants))
            share.recorded, share.reserved, share.leased = recorded - share.spent, reserved, leased
            resets_us = account.counter(allowance).resets_at_us(now_us)
            share.resets_at = None if resets_us is None else utc_from_us(resets_us)
        # Where one limit has nothing to lend for a call, what the others lend could not be spent.
        useful = all(units or not wants for _, units, _, _, wants in plan)
        lent: dict[str, list[int]] = {}
        for share, units, gone_us, ends_us, _ in plan:
            if only_held or not useful:
                units = min(units, share.held)
            lent[share.allowance.id] = [units, share.spent, gone_us]
            share.next_cap, share.next_ends_us = share.spent + units, ends_us
            # While the commit is on its way both leases may be the true one: what both allow may be spent.
            share.cap, share.ends_us = min(share.cap, share.next_cap), min(share.ends_us, ends_us)
            share.granted_at, share.granted_spent = moment, share.spent
        for id, share in self.shares.items():
            if id not in lent:  # of a limit that the key has no longer
                share.next_cap, share.next_ends_us = share.spent, 0
                share.cap, share.ends_us = min(share.cap, share.spent), 0
        self.from_us, self.until_us = now_us, until_us
        self.noted = (self.count, dict(self.totals))
        if any(units for units, _, _ in lent.values()):
            account.leases[self.lease] = [until_us, self.count, lent]
        else:
            for share in self.shares.values():
                share.ends_us = share.next_ends_us = 0

    def _units(self, share: Share, free: int, asked: int, moment: float) -> int:
        """How much to lend: what lasts for HORIZON_S as things went lately, not too much of what is free, and nothing
        if that would not do for one call. What is reserved in memory stays lent."""
        if share.allowance.resource == CONCURRENCY:
            wanted = max(2 * share.held, LEAST_CALLS)
        else:
            elapsed_s = max(moment - share.granted_at, LEAST_ELAPSED_S)
            spent = share.spent - share.granted_spent + share.held
            # What is left shrinks by halves where little is used: a commit that asks for nothing does not end it.
            left = (share.cap - share.spent) // 2
            wanted = max(LEAST_CALLS * asked, round(spent * HORIZON_S / elapsed_s), 2 * share.held, left)
        units = min(wanted, free // PART_OF_FREE)
        if units < asked:
            units = 0
        return max(units, min(share.held, free), 0)

    def give_back(self) -> None:
        """Lend nothing any more: the commit after `record` is the last."""
        for share in self.shares.values():
            share.next_cap, share.next_ends_us = share.spent, 0
            share.cap, share.ends_us = min(share.cap, share.spent), 0
        self.noted = (self.count, dict(self.totals))

    def committed(self, spent: Sequence[tuple[Share, int]]) -> None:
        """The commit is durable: `spent` is what of each share it recorded."""
        if self.noted is not None:
            self.settled_count, self.settled_totals = self.noted
            self.noted = None
        for share, total in spent:
            share.settle(total)
            share.cap, share.ends_us = share.next_cap, share.next_ends_us
            share.low = share.spent + (share.cap - share.spent) // RENEW_AT
        self.renewing = False

    def totals_now(self) -> list[tuple[Share, int]]:
        """What of each share is spent now, for `committed`."""
        return [(share, share.spent) for share in self.shares.values()]


def _ends(account: Account, allowance: Allowance, until_us: int, now_us: int) -> tuple[int, int]:
    """When a lease that is granted now counts no longer (0: never; -1: there can be none), and until when it may be
    spent."""
    window = allowance.limit.window
    if allowance.resource == CONCURRENCY:
        return until_us, until_us
    if window.kind == "rolling":
        window_us = window.seconds * _SECOND
        width_us = -(-window_us // BUCKETS_PER_WINDOW)
        return (until_us // width_us + 1) * width_us + window_us, until_us
    if window.kind == "total":
        return 0, until_us
    end_us = account.counter(allowance).ends_us(now_us)
    if end_us is None:  # no anchored window runs: the first use starts one, and has to be recorded for that
        return -1, until_us
    return end_us, min(until_us, end_us)


def fold(account: Account, allowances: Iterable[Allowance], now_us: int) -> None:
    """Record leases whose time to be set right is over as spent at their end, and leave out what counts no longer."""
    if not account.leases:
        return
    by_id = {allowance.id: allowance for allowance in allowances}
    for lease_id, (until_us, _, shares) in list(account.leases.items()):
        if now_us < until_us:
            continue
        for id, (units, _, gone_us) in list(shares.items()):
            if gone_us and now_us >= gone_us:
                del shares[id]
            elif now_us >= until_us + KEPT_AFTER_US and id in by_id:
                account.counter(by_id[id]).add_at(until_us, units)
                del shares[id]
        # Its node may only be cut off: then what it counts by is here, so that no use is lost and none counts twice.
        if not shares and now_us >= until_us + KEPT_AFTER_US:
            del account.leases[lease_id]
    over = [id for id, (_, _, shares) in account.leases.items() if not shares]
    for lease_id in over[:-MAX_ENDED]:
        del account.leases[lease_id]


def recover(
    account: Account, allowances: Iterable[Allowance], lease_id: str, found: Mapping[str, tuple[int, int]]
) -> bool:
    """Set the lease of a dead process right: what it had spent is recorded, the rest is given back. `found`: of each
    limit the total it had spent, and when last. Whether there was such a lease."""
    lease = account.leases.get(lease_id)
    if lease is None:
        return False
    by_id = {allowance.id: allowance for allowance in allowances}
    until_us, _, shares = lease
    used: dict[str, int] = {}
    for id, (units, settled, _) in list(shares.items()):
        allowance = by_id.get(id)
        if allowance is None:
            continue  # a limit that the key has no longer, or that is not known here: it stays as it is
        if allowance.resource != CONCURRENCY:
            total, moment_us = found.get(id, (settled + units, until_us))
            spent = min(max(total - settled, 0), units)
            account.counter(allowance).add_at(min(moment_us or until_us, until_us), spent)
            used[allowance.resource] = max(used.get(allowance.resource, 0), spent)  # several limits count one use
        del shares[id]
    # How many uses it was the log does not say; what they used it does.
    account.tally(used, 0, min(until_us, account.at_us) or until_us)
    if not shares:
        del account.leases[lease_id]
    return True


__all__ = ["Share", "Wallet", "fold", "recover"]
