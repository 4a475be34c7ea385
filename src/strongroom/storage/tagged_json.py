"""How values look in engines that lack a type: nested values as tagged JSON, decimals as text in their order."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from functools import partial
from typing import Any

# --- Nested values as JSON ------------------------------------------------------------------------------------
#
# JSON has no bytes, decimals or times: they become {"$bytes": "base64"}, {"$decimal": "1.5"}, {"$time": "…Z"}.
# A map key of the user's that begins with $ gets one $ more, so that the two can never be confused.


def dumps(value: Any) -> str:
    """A port value as JSON text."""
    return json.dumps(tag(value), ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def loads(text: str | bytes) -> Any:
    """The port value behind `dumps`' text, equal and of the same types."""
    return untag(json.loads(text))


def tag(value: Any) -> Any:
    """A port value as what JSON can hold."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, dict):
        return {("$" + k if k.startswith("$") else k): tag(v) for k, v in value.items()}
    if isinstance(value, list):
        return [tag(v) for v in value]
    if isinstance(value, bytes):
        return {"$bytes": base64.b64encode(value).decode("ascii")}
    if isinstance(value, Decimal):
        return {"$decimal": str(value)}
    if isinstance(value, datetime):
        return {"$time": time_to_text(value)}
    raise TypeError(f"{type(value).__name__} is not a port value")


def text_to_time(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


_UNTAG: dict[str, Callable[[str], Any]] = {
    "$bytes": partial(base64.b64decode, validate=True),
    "$decimal": Decimal,
    "$time": text_to_time,
}


def untag(value: Any) -> Any:
    """The port value behind what `tag` gave."""
    if isinstance(value, list):
        return [untag(v) for v in value]
    if isinstance(value, dict):
        if len(value) == 1:
            (key, inner), *_ = value.items()
            if key in _UNTAG:
                return _UNTAG[key](inner)
        return {(k[1:] if k.startswith("$") else k): untag(v) for k, v in value.items()}
    return value


# --- Times ----------------------------------------------------------------------------------------------------


def time_to_text(value: datetime) -> str:
    """An aware UTC time as ISO 8601 text of fixed width, so that text order is time order."""
    return value.isoformat(timespec="microseconds")[:-6] + "Z"


# --- Decimals -------------------------------------------------------------------------------------------------
#
# A positive number is 0.d1d2d3… × 10^e: "1", then e + 5000 in four digits, then the digits without trailing zeros.
# A negative one is the same with every digit replaced by 9 - digit, a leading "0", and a closing "~", which sorts
# after every digit. Zero is "1" alone, which sorts before every positive number and after every negative one.

_BIAS = 5_000
_COMPLEMENT = str.maketrans("0123456789", "9876543210")


def decimal_to_text(value: Decimal) -> str:
    """Text that compares, byte by byte, as the number does. Exact. `value` is finite, |exponent| < 5,000."""
    sign, digits, exponent = value.as_tuple()
    if not isinstance(exponent, int):
        raise TypeError(f"{value} is not finite")
    text = "".join(map(str, digits)).lstrip("0")
    if not text:
        return "1"
    magnitude = len(text) + exponent
    body = f"{magnitude + _BIAS:04d}{text.rstrip('0')}"
    return "0" + body.translate(_COMPLEMENT) + "~" if sign else "1" + body


def text_to_decimal(text: str) -> Decimal:
    """The number behind `decimal_to_text`'s text, normalised."""
    if text == "1":
        return Decimal(0)
    negative = text[0] == "0"
    body = text[1:-1].translate(_COMPLEMENT) if negative else text[1:]
    digits = body[4:]
    exponent = int(body[:4]) - _BIAS - len(digits)
    return Decimal((1 if negative else 0, tuple(map(int, digits)), exponent))
