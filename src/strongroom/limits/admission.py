"""Admission requests that wait, the groups that are decided together, and the batches that they commit in. Pure."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, Protocol

import msgspec

from ..database import Once
from ..storage.port import MAX_OPERATIONS, Operation
from . import tuning
from .corrections import Special
from .lease import Share, Wallet
from .reservation_change import HoldChange
from .usage_state import Account, Cost, Metered, Outcome, Part


class KeyChanged(Exception):
    """The key or one of its quotas has changed or was removed since it was read: read it again and decide again. Never
    leaves the library."""


class Owner(Protocol):
    """Who is told what became of a request that has no future."""

    def recorded(self, request: Charge) -> None:
        """The request is durable."""
        ...

    def failed(self, request: Charge) -> None:
        """The request could not be committed, or its answer was lost."""
        ...

    def gone(self, request: Charge) -> None:
        """The key, or the quota, was removed, and its usage with it."""
        ...

    async def described(self, id: str) -> Part | None:
        """The present limits of a subject; None to go on with those of the request."""
        ...


class Charge(msgspec.Struct, eq=False):
    """One use of a key that is to be decided. Without a future it is something that only has to be written: aggregated
    use, a usage lease to be renewed or returned, the lease of a dead process. Its `owner` is then told the outcome."""

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
    """The change of a reservation. What it writes commits with the request; if that fails, only this request does."""
    lease: Literal["renew", "return", "tell"] | None = None
    """A node's lease is to be renewed or returned; `tell`: events of crossed thresholds are still to be written."""
    special: Special | None = None
    lost_at: float = 0.0
    """By time.monotonic: when another node first committed before this request."""
    owner: Owner | None = None


class Group:
    """Requests that share subjects, directly or through others: they are decided in order, and commit together."""

    __slots__ = ("charges", "parts")

    def __init__(self) -> None:
        self.charges: list[Charge] = []
        self.parts: dict[str, Part] = {}
        """The subjects, by id."""


class Decided:
    """The requests of a group with their outcomes, and the operations that make these outcomes true: the checks, the
    usage documents, then what may happen only once."""

    __slots__ = ("accounts", "also", "answers", "due", "event_chars", "events", "group", "operations", "returned",
                 "wallets")  # fmt: skip

    def __init__(self, group: Group, answers: list[tuple[Charge, Outcome]]) -> None:
        self.group = group
        self.answers = answers
        self.operations: list[Operation] = []
        self.accounts: dict[int, Account] = {}
        """The states that are written, by the index of their operation."""
        self.also: Mapping[int, Charge] = {}
        """The requests whose own operation is at an index."""
        self.wallets: Sequence[tuple[Wallet, list[tuple[Share, int]]]] = ()
        """Usage leases that were recorded and granted, with what was spent of each limit."""
        self.returned: Sequence[Wallet] = ()
        self.events: Sequence[str] = ()
        """The ids of the events that tell of crossed thresholds."""
        self.event_chars = 0
        self.due: Sequence[Part] = ()
        """Subjects with crossings that are still to be told of."""


# --- Groups --------------------------------------------------------------------------------------------------------


def groups_of(charges: Iterable[Charge], accounts: Mapping[str, Account]) -> tuple[list[Group], list[Charge]]:
    """The requests in groups that share no subject, and those for the next round, because a batch takes so many."""
    groups: dict[str, Group] = {}
    later: list[Charge] = []
    for charge in charges:
        parts = charge.metered.parts
        if len(parts) == 1:
            (part,) = parts
            group = groups.get(part.id)
            if group is None:
                group = groups[part.id] = Group()
                group.parts[part.id] = part
            elif (known := group.parts[part.id]) is not part and part.guard.expected > known.guard.expected:
                group.parts[part.id] = part
            group.charges.append(charge)
            continue
        group = _merged(groups, parts)
        group.charges.append(charge)
        for part in parts:
            before = group.parts.get(part.id)
            if before is None or part.guard.expected > before.guard.expected:
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
    """As many of a group's requests as fit into one batch, and the rest."""
    most, once_most = tuning.MAX_GROUP_OPERATIONS, tuning.MAX_ONCE
    if len(group.charges) <= once_most and 2 * len(group.parts) + len(group.charges) <= most:
        return group, []  # whatever they are
    once = sum(charge.once is not None or charge.hold is not None for charge in group.charges)
    if once <= once_most and 2 * len(group.parts) + once <= most:
        return group, []
    kept, rest = Group(), []
    operations = size = 0
    for charge in group.charges:
        more = 2 * sum(part.id not in kept.parts for part in charge.metered.parts)
        more += charge.once is not None or charge.hold is not None
        chars = sum(
            accounts[part.id].size for part in charge.metered.parts if part.id not in kept.parts and part.id in accounts
        )
        if kept.charges and (operations + more > most or size + chars > tuning.MAX_BUNDLE_CHARS):
            rest.append(charge)
            continue
        operations, size = operations + more, size + chars
        kept.charges.append(charge)
        kept.parts.update({part.id: group.parts[part.id] for part in charge.metered.parts})
    return kept, rest


# --- Batches, answers ------------------------------------------------------------------------------------------------


def bundles_of(decided: Iterable[Decided]) -> list[list[Decided]]:
    """The decisions in as few batches as the port's limits allow, with room to spare."""
    bundles: list[list[Decided]] = []
    operations, size, most = MAX_OPERATIONS, 0, tuning.MAX_BUNDLE_CHARS
    for one in decided:
        more, chars = len(one.operations), one.event_chars
        for account in one.accounts.values():
            chars += account.size
        if operations + more > MAX_OPERATIONS or size + chars > most:
            bundles.append([])
            operations, size = 0, 0
        bundles[-1].append(one)
        operations += more
        size += chars
    return bundles


def operations_of(bundle: Iterable[Decided]) -> list[Operation]:
    return [operation for one in bundle for operation in one.operations]


def charges_of(bundle: Iterable[Decided]) -> list[Charge]:
    return [charge for one in bundle for charge, _ in one.answers]


def answer(answers: Iterable[tuple[Charge, Outcome]]) -> None:
    """Tell each caller, or each owner, the outcome, which is durable."""
    for charge, outcome in answers:
        future = charge.future
        if future is None:
            if charge.owner is not None:
                charge.owner.recorded(charge)
        elif not future.done():
            future.set_result(outcome)


def fail(charge: Charge, error: Exception) -> None:
    """Tell a request's caller, or its owner, that it failed."""
    if charge.future is None:
        if charge.owner is not None:
            charge.owner.failed(charge)
    elif not charge.future.done():
        charge.future.set_exception(error)


__all__ = [
    "Charge", "Decided", "Group", "KeyChanged", "Owner", "answer", "bundles_of", "charges_of", "fail", "groups_of",
    "operations_of",
]  # fmt: skip
