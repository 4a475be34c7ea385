"""Charges that wait, what is decided on those of one key, and what has to commit for that to be true. Pure."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from .accounts import NAME, Account, Cost, Metered, Outcome
from .errors import Conflict
from .storage.port import MAX_OPERATIONS, Create, Operation, Patch, Put

MAX_BUNDLE_CHARS = 400_000
"""Keys share a batch until their states are this long together: far from the port's MAX_BATCH_BYTES."""
MAX_ONCE = 400
"""Charges of one key that may happen only once, in one commit: with the rest they fit into a batch."""


class KeyChanged(Exception):
    """The key was changed or removed since it was read: read it again and decide again. Never leaves the library."""


@dataclass(slots=True)
class Charge:
    """One use of a key that is to be decided, or (without a future) a tally of such that only has to be written."""

    metered: Metered
    cost: Cost
    force: bool
    once: tuple[str, Create | Put] | None
    future: asyncio.Future[Outcome] | None
    count: int = 1
    used_at_us: int | None = None
    attempts: int = 0


@dataclass(slots=True)
class Decided:
    """The charges of one key with their outcomes, and what has to commit for these to be true: the guard, the usage
    document, then whatever may happen only once."""

    id: str
    account: Account
    operations: list[Operation]
    answers: list[tuple[Charge, Outcome]]


def decide(
    account: Account, group: list[Charge], now_us: int, repeated: dict[str, str]
) -> tuple[list[Operation], list[tuple[Charge, Outcome]]]:
    """The outcome of each charge of one key, and what to commit to make them true (nothing if all are denied)."""
    metered = group[0].metered
    for charge in group:
        if charge.metered.guard.expected > metered.guard.expected:
            metered = charge.metered
    extra: list[Operation] = []
    answers = []
    charged = False
    for charge in group:
        if charge.future is None:
            account.tally(charge.cost, charge.count, charge.used_at_us or now_us)
            answers.append((charge, Outcome(True, (), now_us)))
            charged = True
            continue
        if charge.future.cancelled() and not charge.force:
            continue  # its caller went away before it was decided: nothing was used
        if charge.metered.guard.expected != metered.guard.expected:
            fail(charge, KeyChanged())
            continue
        if charge.once is not None:
            id, operation = charge.once
            if id in repeated:
                if repeated[id] != operation.document["fingerprint"]:
                    fail(charge, Conflict("the idempotency key was used for a different request: take a new one"))
                    continue
                statuses = account.statuses(metered.allowances, now_us)
                answers.append((charge, Outcome(True, statuses, now_us, repeated=True)))
                continue
        outcome = account.decide(charge.metered.allowances, charge.cost, now_us, force=charge.force)
        if outcome.allowed and charge.once is not None:  # what was denied may be asked again, and decided anew
            id, operation = charge.once
            repeated[id] = operation.document["fingerprint"]
            extra.append(operation)
        charged = charged or outcome.allowed
        answers.append((charge, outcome))
    if not charged:
        return [], answers
    account.at_us = now_us
    return [metered.guard, _write(metered.id, account), *extra], answers


def _write(id: str, account: Account) -> Put | Patch:
    """What makes the store's usage document what the account is. `active_at` is left out while it stays the same, since
    SQLite writes an index anew whenever its column is named."""
    document = account.document()
    if account.version and document["active_at"] == account.stored_active_at:
        del document["active_at"]
        return Patch(NAME, id, document, account.version)
    account.stored_active_at = document["active_at"]  # if this does not commit, the account is read again
    return Put(NAME, id, document, account.version)


def for_one_batch_a_key(charges: list[Charge]) -> tuple[list[Charge], list[Charge]]:
    """The charges to decide now and those for the next round: each that may happen only once is an operation of its
    own, and a batch takes so many."""
    now, later = [], []
    once: dict[str, int] = {}
    for charge in charges:
        if charge.once is not None:
            count = once[charge.metered.id] = once.get(charge.metered.id, 0) + 1
            if count > MAX_ONCE:
                later.append(charge)
                continue
        now.append(charge)
    return now, later


def bundles_of(decided: list[Decided]) -> list[list[Decided]]:
    """The decisions in as few batches as the port's limits allow, with room to spare."""
    bundles: list[list[Decided]] = []
    operations, size = MAX_OPERATIONS, 0
    for one in decided:
        more = len(one.operations)
        write = one.operations[1]  # the second is always the usage document's
        state = len(write.fields["state"] if isinstance(write, Patch) else write.document["state"])  # type: ignore[union-attr]
        if operations + more > MAX_OPERATIONS or size + state > MAX_BUNDLE_CHARS:
            bundles.append([])
            operations, size = 0, 0
        bundles[-1].append(one)
        operations += more
        size += state
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
