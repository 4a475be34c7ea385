"""Reads a key's fields from a body."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from ...entities import parse
from ...keys import KeyFields

K = TypeVar("K", bound=KeyFields)


def parsed(model: type[K], given: Mapping[str, Any]) -> K:
    """A key's fields. Raises InvalidInput with every problem."""
    return parse(model, given)
