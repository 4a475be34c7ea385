"""`strongroom writes …`: turn the writes of all tenants, or of one, off and on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from . import output
from .options import CursorOption, PageOption
from .session import JsonOption, StoreOption, in_store, operator, without_warnings

if TYPE_CHECKING:
    from ..tenants import WritesChange, WritesOf

app = typer.Typer(
    help="Turn writes off for all tenants or one, and on again.", no_args_is_help=True, rich_markup_mode=None
)

SWITCHES = "strongroom.database.write_state"
"""The logger that warns of switches that are off: before `on` has turned them, too."""

OfTenant = Annotated[str | None, typer.Option("--tenant", help="Only this tenant (default: all).")]


@app.command()
def off(
    reason: Annotated[str, typer.Option(help="Why: callers are told, and the journal keeps it.")],
    tenant: OfTenant = None,
    no_usage: Annotated[
        bool, typer.Option("--no-usage", help="Refuse verification, usage and reservations too.")
    ] = False,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Turn writes off. Every server refuses them within a second; reads go on.

    \b
    Example:
      strongroom writes off --reason "rolling back to this morning's backup"
    """
    from ..entities import parse
    from ..tenants import WritesChange

    fields = {"allowed": False, "tenant": tenant, "usage": not no_usage, "reason": reason}
    _turn(parse(WritesChange, fields), store, json)


@app.command()
def on(
    tenant: OfTenant = None,
    reason: Annotated[str | None, typer.Option(help="Why, for the journal.")] = None,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Turn writes on again. What a migration turned off, only `strongroom migrate` turns on.

    \b
    Example:
      strongroom writes on
    """
    from ..entities import parse
    from ..tenants import WritesChange

    _turn(parse(WritesChange, {"allowed": True, "tenant": tenant, "reason": reason}), store, json)


@app.command()
def status(
    tenant: OfTenant = None,
    limit: PageOption = 100,
    cursor: CursorOption = None,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Show whether writes are on, and each tenant whose own writes are off.

    \b
    Example:
      strongroom writes status
    """
    with without_warnings(SWITCHES):
        found = in_store(store, lambda room: room.writes.status(tenant, limit=limit, cursor=cursor))
    if json:
        output.print_json(found.model_dump())
        return
    if found.migration is not None:
        output.print_note(f"a migration lets nothing be written: {found.migration}")
    rows = [_row(one) for one in (found, *found.items)]
    output.print_page(("WRITES OF", "STATE", "SINCE", "BY", "REASON"), rows, found.next_cursor, "")


def _turn(change: WritesChange, store: str | None, json: bool) -> None:
    with without_warnings(SWITCHES):
        made = in_store(store, lambda room: room.writes.set(change, context=operator()))
    if json:
        output.print_json(made.model_dump())
        return
    output.print_page(("WRITES OF", "STATE", "SINCE", "BY", "REASON"), [_row(made)], None, "")


def _row(one: WritesOf) -> tuple[str, str, str, str, str]:
    state = "on" if one.allowed else "off" if one.usage else "off, usage too"
    return one.tenant or "all tenants", state, output.moment(one.changed_at, ""), one.by or "", one.reason or ""
