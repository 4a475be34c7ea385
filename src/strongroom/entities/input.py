"""Input of callers: validated against a model, and refused with every problem at once. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ValidationError, WithJsonSchema

from ..context import MAX_TENANT_BYTES
from ..errors import InvalidInput, Problem
from .input_errors import UNKNOWN_FIELD, problems_of

_KIND_IN_PATH = re.compile(r"(?<=\.window)\.(?:rolling|anchored|calendar|total)(?=\.|$)")
M = TypeVar("M", bound=BaseModel)


def described(most: int, **more: Any) -> WithJsonSchema:
    """The JSON Schema of a text that a validator of its model checks."""
    return WithJsonSchema({"type": "string", "minLength": 1, "maxLength": most, "pattern": "^[^\\u0000]*$", **more})


TenantName = Annotated[str, described(MAX_TENANT_BYTES)]


def not_given(
    *,
    unchangeable: Iterable[str] = (),
    elsewhere: Mapping[str, str] = MappingProxyType({}),
    of_the_store: Iterable[str],
) -> Mapping[str, str]:
    """Messages for fields that exist and that a caller cannot give, by the field's name."""
    return MappingProxyType(
        {
            **dict.fromkeys(of_the_store, "cannot be given: it is set by Strongroom"),
            **dict.fromkeys(unchangeable, "cannot be changed"),
            **elsewhere,
        }
    )


def parse(model: type[M], fields: Mapping[str, Any]) -> M:
    """A caller's fields as a model. Raises InvalidInput with every problem; the model's `not_given` says why a caller
    cannot give a field."""
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        # Pydantic puts the window's kind into the path, where the caller's input has no such step.
        known: Mapping[str, str] = getattr(model, "not_given", MappingProxyType({}))
        found = [
            Problem(
                _KIND_IN_PATH.sub("", p.path), known.get(p.path, p.message) if p.message == UNKNOWN_FIELD else p.message
            )
            for p in problems_of(error)
        ]
        raise InvalidInput(found) from None


__all__ = ["TenantName", "described", "not_given", "parse"]
