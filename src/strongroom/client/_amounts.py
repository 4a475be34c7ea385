"""Sums of amounts by resource, exact. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Context, Decimal

from ..errors import InvalidInput, Problem
from .models import Amount, Cost

Amounts = Mapping[str, Amount]
MONEY, MONEY_DECIMALS = "cost", 9
_EXACT = Context(prec=60)
"""Enough digits for every amount. The caller's own context may round."""


def exact(resource: str, amount: object) -> Amount:
    """An amount without rounding: a float counts as its decimal text. Raises InvalidInput."""
    if isinstance(amount, bool) or not isinstance(amount, int | float | Decimal):
        raise InvalidInput([Problem(f"cost.{resource[:64]}", f"found {type(amount).__name__}, expected a number")])
    number = Decimal(repr(amount)) if isinstance(amount, float) else amount
    if isinstance(number, Decimal) and not number.is_finite():
        raise InvalidInput([Problem(f"cost.{resource[:64]}", f"found {number}, expected a finite number")])
    if number < 0:
        raise InvalidInput([Problem(f"cost.{resource[:64]}", f"found {number}, expected at least 0")])
    if isinstance(number, Decimal):  # the server would refuse it only at the end of the hold
        decimals = MONEY_DECIMALS if resource == MONEY else 0
        if number != round(number, decimals):
            what = f"at most {MONEY_DECIMALS} decimals" if decimals else "a whole number"
            raise InvalidInput([Problem(f"cost.{resource[:64]}", f"found {number}, expected {what}")])
    return number


def added(amounts: Amounts, more: Cost) -> Amounts:
    """The sum of both. Raises InvalidInput for other values than amounts."""
    found = dict(amounts)
    for resource, amount in more.items():
        number = exact(resource, amount)
        found[resource] = _sum(found[resource], number) if resource in found else number
    return found


def less(amounts: Amounts, told: Amounts) -> Amounts:
    """The amounts that were not reported yet."""
    rest = {name: _sum(amount, -told.get(name, 0)) for name, amount in amounts.items()}
    return {name: amount for name, amount in rest.items() if amount > 0}


def _sum(one: Amount, other: Amount) -> Amount:
    if isinstance(one, int) and isinstance(other, int):
        return one + other
    return _EXACT.add(Decimal(one), Decimal(other))
