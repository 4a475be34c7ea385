"""What a charge would come to, on accounts that nobody else uses and nothing is written from. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from .lease import fold
from .usage_state import Account, Cost, Metered, Outcome, Status


def peeked(
    metered: Metered, accounts: Sequence[Account], cost: Cost, now_us: int, model: str | None, route: str | None
) -> Outcome:
    """The outcome that a charge would have now; `accounts` are those of the parts, and are changed."""
    now_us = max(account.moment(now_us) for account in accounts)
    statuses: list[Status] = []
    asked = []
    for part, account in zip(metered.parts, accounts, strict=True):
        fold(account, part.allowances, now_us)
        allowances = part.asked(model, route)
        asked.append((account, allowances, [(one, cost.get(one.resource, 0)) for one in allowances]))
    allowed = all(account.fits(wanted, now_us) for account, _, wanted in asked)
    for account, allowances, wanted in asked:
        if allowed:
            account.charge(allowances, cost, now_us)
            statuses += account.statuses(allowances, now_us)
        else:
            statuses += account.denials(wanted, now_us)
    return Outcome(allowed, tuple(statuses), now_us)


__all__ = ["peeked"]
