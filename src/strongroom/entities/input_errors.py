"""Messages for wrong input: Pydantic's errors as "found …, expected …". Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from datetime import date, datetime
from decimal import Decimal
from typing import Any

from pydantic import ValidationError

from ..context import kind_of
from ..errors import Problem

MAX_SHOWN_CHARS = 64
RESOURCE_PATTERN = r"^[a-z][a-z0-9_.:-]{0,63}$"
"""The name of what a limit counts, such as `requests` or `tokens`."""
UNKNOWN_FIELD = "is not a known field"
REQUIRED = "is required"
A_TIME = "a time with a zone, such as 2027-01-01T00:00:00Z"
Item = Mapping[str, Any]
_BRANCH = re.compile(
    r"(int|float|str|bool|bytes|decimal|datetime|date|time|none|url|uuid|any|[A-Z]\w*"
    r"|(list|dict|tuple|set|frozenset|nullable|literal|enum|constrained|function|lax|strict|json|is)[\[-].*)"
)
"""A step that Pydantic puts into the path for one way of a union."""

_EXPECTED: dict[str, str] = {
    **dict.fromkeys(("string_type", "string_sub_type", "string_not_ascii"), "text"),
    "string_unicode": "text in valid Unicode",
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "a whole number"),
    "int_parsing_size": "a whole number of fewer digits",
    **dict.fromkeys(("float_type", "float_parsing", "decimal_type", "decimal_parsing"), "a number"),
    **dict.fromkeys(("complex_type", "complex_str_parsing"), "a complex number"),
    "finite_number": "a finite number",
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    "none_required": "null",
    **dict.fromkeys(
        ("list_type", "tuple_type", "set_type", "frozen_set_type", "iterable_type", "iteration_error"), "a list"
    ),
    "set_item_not_hashable": "a single value",
    **dict.fromkeys(
        (
            "dict_type", "mapping_type", "model_type", "model_attributes_type", "dataclass_type",
            "dataclass_exact_type", "arguments_type", "get_attribute_error", "no_such_attribute",
        ),
        "an object",
    ),
    "invalid_key": "a name that is text",
    **dict.fromkeys(
        (
            "datetime_type", "datetime_parsing", "datetime_from_date_parsing", "datetime_object_invalid",
            "timezone_aware", "timezone_offset",
        ),
        A_TIME,
    ),
    "datetime_past": "a time in the past",
    "datetime_future": "a time in the future",
    "timezone_naive": "a time without a zone",
    **dict.fromkeys(
        ("date_type", "date_parsing", "date_from_datetime_parsing", "date_from_datetime_inexact"),
        "a date such as 2027-01-31",
    ),
    "date_past": "a date in the past",
    "date_future": "a date in the future",
    **dict.fromkeys(("time_type", "time_parsing"), "a time of day such as 23:59:59"),
    **dict.fromkeys(("time_delta_type", "time_delta_parsing"), "a duration such as PT1H30M"),
    **dict.fromkeys(("json_type", "json_invalid"), "JSON"),
    "bytes_type": "base64",
    "bytes_invalid_encoding": "base64",
    **dict.fromkeys(("url_type", "url_parsing", "url_syntax_violation"), "a URL such as https://example.com/path"),
    **dict.fromkeys(("uuid_type", "uuid_parsing", "uuid_version"), "a UUID"),
    "callable_type": "a function",
    "missing_sentinel_error": "nothing: leave it out",
}  # fmt: skip
"""What is expected, for errors that need no details."""


def problems_of(error: ValidationError, prefix: str = "", secrets: Collection[str] = ()) -> list[Problem]:
    """All of Pydantic's errors as Problems: the path, what was found and what was expected.

    No value of the fields in `secrets` is shown."""
    items = error.errors(include_url=False)
    found = []
    for same in _ways(items):
        location = same[0]["loc"] if len(same) == 1 else same[0]["loc"][:-1]
        path = ".".join(str(step) for step in location)
        hidden = bool(location) and location[0] in secrets
        messages = list(dict.fromkeys(message_of(item, hidden) for item in same))
        found.append(Problem(f"{prefix}{path}", _either(messages)))
    return found


def _ways(items: Iterable[Item]) -> list[list[Item]]:
    """The errors in groups: the errors of all alternatives of one union are a group."""
    groups: list[list[Item]] = []
    for item in items:
        location = item["loc"]
        last = groups[-1][0] if groups else None
        if (
            last is not None
            and len(location) > 0
            and len(last["loc"]) == len(location)
            and last["loc"][:-1] == location[:-1]
            and last["loc"][-1] != location[-1]
            and last["input"] is item["input"]
            and all(_BRANCH.fullmatch(str(one["loc"][-1])) for one in (last, item))
        ):
            groups[-1].append(item)
        else:
            groups.append([item])
    return groups


def _either(messages: list[str]) -> str:
    """One message for the alternatives of a union."""
    first, *more = messages
    stem = first.partition(", expected ")[0]
    expected = [one.partition(", expected ")[2] for one in messages]
    if not more or not all(expected) or any(one.partition(", expected ")[0] != stem for one in more):
        return "; or ".join(messages)
    return f"{stem}, expected {' or '.join(expected)}"


def message_of(item: Item, hidden: bool = False) -> str:
    """The message for one of Pydantic's errors. `hidden`: the value is a secret."""
    kind, context, value = item["type"], item.get("ctx", {}), item.get("input")
    if kind in ("value_error", "assertion_error"):  # raised by a validator, ours or the user's
        return str(item["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if kind in _WHOLE:
        return _WHOLE[kind](context, value, hidden)
    found = found_in(value, hidden)
    if kind in _EXPECTED:
        return f"found {found}, expected {_EXPECTED[kind]}"
    if kind in _BOUNDS:
        return f"found {found}, expected {_BOUNDS[kind](context)}"
    # A kind of error that a validator defines, or a new one of Pydantic: its text becomes the end of our sentence.
    text = str(item["msg"]).rstrip(".")
    expected = re.sub(r"^(Input|Value|Data|String|URL) (should be|is not|must be|should) ?", "", text)
    return f"found {found}, expected {expected[:1].lower()}{expected[1:]}"


def found_in(value: object, hidden: bool = False) -> str:
    """A value as a message shows it: texts and numbers up to MAX_SHOWN_CHARS, of other values the kind."""
    if hidden or value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value] if not hidden else kind_of(value)  # type: ignore[index]
    if isinstance(value, str):
        return repr(value[:MAX_SHOWN_CHARS])
    if isinstance(value, int | float | Decimal):
        return str(value)[:MAX_SHOWN_CHARS]
    if isinstance(value, datetime | date):
        return value.isoformat()
    return kind_of(value)


def size_of(value: object) -> str:
    """What a message shows where a list of a certain length was expected."""
    return f"{len(value)} entries" if isinstance(value, list) else found_in(value)


def listed(names: Iterable[str]) -> str:
    """`a, b or c`."""
    *before, last = names
    return f"{', '.join(before)} or {last}" if before else last


def _size(of: str, bound: str, amount: str) -> Callable[[Item, Any, bool], str]:
    def message(context: Item, value: Any, hidden: bool) -> str:
        size = context.get("actual_length")
        size = size if size is not None else len(value) if hasattr(value, "__len__") else None
        count = context[amount]
        if size == 0 and count == 1 and of == "character":
            return "found an empty text, expected at least one character"
        found = f"{size} {_plural(of, size)}" if size is not None else found_in(value, hidden)
        return f"found {found}, expected {bound} {count}"

    return message


def _plural(word: str, count: int) -> str:
    return word if count == 1 else f"{word[:-1]}ies" if word.endswith("y") else f"{word}s"


def _unquoted(text: str) -> str:
    return re.sub(r"'([^']*)'", r"\1", text)


_WHOLE: dict[str, Callable[[Item, Any, bool], str]] = {
    "missing": lambda context, value, hidden: REQUIRED,
    "missing_argument": lambda context, value, hidden: REQUIRED,
    "missing_keyword_only_argument": lambda context, value, hidden: REQUIRED,
    "missing_positional_only_argument": lambda context, value, hidden: REQUIRED,
    "extra_forbidden": lambda context, value, hidden: UNKNOWN_FIELD,
    "unexpected_keyword_argument": lambda context, value, hidden: UNKNOWN_FIELD,
    "unexpected_positional_argument": lambda context, value, hidden: UNKNOWN_FIELD,
    "frozen_field": lambda context, value, hidden: "cannot be changed",
    "frozen_instance": lambda context, value, hidden: "cannot be changed",
    "recursion_loop": lambda context, value, hidden: "found a value that holds itself, expected one that ends",
    "string_too_short": _size("character", "at least", "min_length"),
    "string_too_long": _size("character", "at most", "max_length"),
    "bytes_too_short": _size("byte", "at least", "min_length"),
    "bytes_too_long": _size("byte", "at most", "max_length"),
    "url_too_long": _size("character", "at most", "max_length"),
    "too_short": _size("entry", "at least", "min_length"),
    "too_long": _size("entry", "at most", "max_length"),
    "union_tag_not_found": lambda context, value, hidden: (
        f"found no {_unquoted(str(context['discriminator']))}, expected one"
    ),
    "union_tag_invalid": lambda context, value, hidden: (
        f"found {_unquoted(str(context['discriminator']))} {str(context['tag'])[:MAX_SHOWN_CHARS]!r}, "
        f"expected {listed(_unquoted(str(context['expected_tags'])).split(', '))}"
    ),
}
_PATTERNS = {
    RESOURCE_PATTERN: "a lower-case letter, then lower-case letters, digits and _ . : -, at most 64 characters in all",
}
_BOUNDS: dict[str, Callable[[Item], str]] = {
    "greater_than": lambda context: f"more than {context['gt']}",
    "greater_than_equal": lambda context: f"at least {context['ge']}",
    "less_than": lambda context: f"less than {context['lt']}",
    "less_than_equal": lambda context: f"at most {context['le']}",
    "multiple_of": lambda context: f"a multiple of {context['multiple_of']}",
    "string_pattern_mismatch": lambda context: (
        _PATTERNS.get(context["pattern"]) or f"text that matches {context['pattern']}"
    ),
    "literal_error": lambda context: _unquoted(str(context["expected"])),
    "enum": lambda context: _unquoted(str(context["expected"])),
    "decimal_max_digits": lambda context: f"at most {context['max_digits']} digits",
    "decimal_max_places": lambda context: f"at most {context['decimal_places']} decimals",
    "decimal_whole_digits": lambda context: f"at most {context['whole_digits']} digits before the point",
    "url_scheme": lambda context: f"a URL that begins with {_unquoted(str(context['expected_schemes']))}",
    "is_instance_of": lambda context: str(context["class"]),
    "is_subclass_of": lambda context: str(context["class"]),
}
