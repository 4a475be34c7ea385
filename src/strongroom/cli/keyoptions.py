"""Options that several commands on keys take: the fields of a key, and the conditions of a filter."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from ..errors import InvalidInput, Problem
from . import shortforms
from .options import LimitsOption, Options, metadata

if TYPE_CHECKING:
    from ..keys import KeyFilter

IdArgument = Annotated[str, typer.Argument(metavar="ID", help="The key's id, as `keys list` shows it.")]
SameKeyOption = Annotated[
    str | None,
    typer.Option("--idempotency-key", help="A retry with this value gets the same key (within a day)."),
]


def _option(*names: str, help: str, metavar: str | None = None) -> Any:
    return Annotated[str | None, typer.Option(*names, metavar=metavar, help=help)]


def _list(name: str, *, help: str, metavar: str | None = None) -> Any:
    return Annotated[list[str] | None, typer.Option(name, metavar=metavar, help=f"{help}; may be given again.")]


FIELDS: Options = {
    "user_id": _option("--user", help="The user of the key."),
    "permissions": _list("--permission", help="A permission"),
    "limits": LimitsOption,
    "expires_at": _option(
        "--expires", metavar="TIME", help="The expiry: 2027-01-01T00:00:00Z, or 30d from now."
    ),
    "allowed_ips": _list("--allow-ip", metavar="RANGE", help="An allowed address or range"),
    "metadata": _list("--metadata", metavar="NAME=VALUE", help="An entry of the key's metadata"),
    "owner": _option("--owner", help="The person responsible for the key."),
    "description": _option("--description", help="A description."),
    "groups": _list("--group", help="A group whose quota the key shares"),
    "allowed_models": _list("--model", help="An allowed model, or name*"),
    "allowed_routes": _list("--route", help="An allowed route, or name*"),
    "rotate_every_s": _option("--rotate-every", metavar="DURATION", help="The period of rotations, for example 90d."),
    "rotation_overlap_s": _option(
        "--rotation-overlap", metavar="DURATION", help="How long the old secret then works, for example 7d."
    ),
}  # fmt: skip
"""The fields that creation and changes of a key share."""
FLAGS = {name: option.__metadata__[0].default.removeprefix("--") for name, option in FIELDS.items()}
"""The option, without its dashes, that sets a field."""
LISTS = frozenset(("permissions", "allowed_ips", "groups", "allowed_models", "allowed_routes", "limits"))

FILTER: Options = {
    "tenant": _option("--tenant", help="Only this tenant's keys."),
    "user_id": _option("--user", help="Only this user's keys."),
    "owner": _option("--owner", help="Only this owner's keys."),
    "environment": _option("--environment", metavar="live|test", help="Only keys of this environment."),
    "name_prefix": _option("--name-prefix", help="Only keys whose names begin with this."),
    "created_after": _option(
        "--created-after", metavar="TIME", help="Only keys created after this time, or within this period (7d)."
    ),
    "created_before": _option(
        "--created-before", metavar="TIME", help="Only keys created before this time, or longer ago than this (7d)."
    ),
    "deleted": Annotated[bool, typer.Option("--deleted", help="Only deleted keys that can be restored.")],
    "name_contains": _option("--name-contains", help="Only keys whose names contain this, in any case."),
    "state": _option("--state", help="Only keys that are active, disabled or expired."),
    "group": _option("--in-group", help="Only keys of this group."),
    "permission": _option("--permission", help="Only keys with exactly this permission."),
    "expires_after": _option(
        "--expires-after",
        metavar="TIME",
        help="Only keys that expire after this time, or after this period from now (30d).",
    ),
    "expires_before": _option(
        "--expires-before",
        metavar="TIME",
        help="Only keys that expire before this time, or within this period from now.",
    ),
    "used_after": _option(
        "--used-after", metavar="TIME", help="Only keys last used after this time, or within this period (7d)."
    ),
    "used_before": _option(
        "--used-before", metavar="TIME", help="Only keys not used since this time or for this long (7d), or never used."
    ),
}
"""The conditions of a filter: a key must meet all given ones."""


# --- Reading the call ----------------------------------------------------------------------------------------


def key_fields(given: Mapping[str, Any], problems: list[Problem]) -> dict[str, Any]:
    """The fields from the options, except `limits`, which stay in their short form. Errors are added to `problems`."""
    fields = {name: value for name, value in given.items() if value is not None}
    if "metadata" in fields:
        fields["metadata"] = metadata(fields["metadata"], problems)
    if "expires_at" in fields:
        now = datetime.now(UTC)
        fields["expires_at"] = shortforms.one(
            "expires_at", fields["expires_at"], lambda text: shortforms.moment(text, now), problems
        )
    for name in ("rotate_every_s", "rotation_overlap_s"):
        if name in fields:
            fields[name] = shortforms.one(name, fields[name], shortforms.seconds, problems)
    return fields


def key_filter(**given: Any) -> KeyFilter:
    """The filter from the options. Raises InvalidInput with every problem."""
    from ..keys import KeyFilter, KeyState
    from ..keys.filter import TIMES

    problems: list[Problem] = []
    times: dict[str, Any] = {}
    now = datetime.now(UTC)
    for name in TIMES:
        text = given.pop(name)
        read = shortforms.moment if name.startswith("expires") else shortforms.past
        times[name] = (
            shortforms.one(name, text, functools.partial(read, now=now), problems) if text is not None else None
        )
    if given["state"] not in (None, *get_args(KeyState)):
        problems.append(Problem("state", f"found {given['state'][:64]!r}, expected active, disabled or expired"))
    if given["environment"] not in (None, "live", "test"):
        problems.append(Problem("environment", f"found {given['environment']!r}, expected live or test"))
    if problems:
        raise InvalidInput(problems)
    return KeyFilter(**given, **times)


__all__ = [
    "FIELDS",
    "FILTER",
    "FLAGS",
    "LISTS",
    "IdArgument",
    "SameKeyOption",
    "key_fields",
    "key_filter",
]
