"""What callers say of a key in a body, as its fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from ...apikey import KeyFields, parse
from ...errors import InvalidInput, Problem

K = TypeVar("K", bound=KeyFields)


def parsed(model: type[K], given: Mapping[str, Any]) -> K:
    """A key's fields. A time is a text, not seconds since some epoch. Raises InvalidInput with every problem."""
    fields = dict(given)
    problems = []
    if not isinstance(fields.get("expires_at"), str | None):
        del fields["expires_at"]
        problems.append(Problem("expires_at", "expected a time such as 2027-01-01T00:00:00Z"))
    try:
        found = parse(model, fields)
    except InvalidInput as error:
        raise InvalidInput([*problems, *error.problems]) from None
    if problems:
        raise InvalidInput(problems)
    return found
