"""`strongroom audit …`: who changed what, when, from what to what."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InvalidInput, Problem
from . import output, shortforms
from .options import CursorOption, Options, PageOption, with_options
from .session import JsonOption, StoreOption, in_store

if TYPE_CHECKING:
    from ..app import Strongroom
    from ..audit import AuditFilter, AuditRecord
    from ..entities import Page

app = typer.Typer(help="Read the journal: who changed what, when.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _group() -> None:
    """Without this callback Typer would drop the name of the group's only command."""


def _option(help: str, metavar: str | None = None) -> Any:
    return Annotated[str | None, typer.Option(metavar=metavar, help=help)]


FILTER: Options = {
    "tenant": _option("Only this tenant's records."),
    "actor": _option("Only changes by this actor, for example key:key_0199…."),
    "action": _option("Only create, update, add, delete, expire or deny.", "ACTION"),
    "collection": _option("Only changes of this collection, for example api_keys."),
    "entity_id": _option("Only changes of the document with this id.", "ID"),
    "request_id": _option("Only changes by this request.", "ID"),
    "since": _option("Not before this time, or how long ago (2026-11-30T12:00Z, 7d).", "TIME"),
    "until": _option("Before this time, or how long ago.", "TIME"),
}


def _filter(**given: Any) -> AuditFilter:
    """The filter from the options. Raises InvalidInput with every problem."""
    from ..audit import AuditFilter

    now = datetime.now(UTC)
    problems: list[Problem] = []
    for name in ("since", "until"):
        if given[name] is not None:
            given[name] = shortforms.one(f"--{name}", given[name], lambda text: shortforms.past(text, now), problems)
    if problems:
        raise InvalidInput(problems)
    return AuditFilter(**given)


@app.command("list")
@with_options(FILTER, "wanted", _filter)
def list_records(
    *,
    wanted: AuditFilter,
    limit: PageOption = 100,
    cursor: CursorOption = None,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """List changes, oldest first: when, by whom, what, in which request.

    --json also has the values before and after.

    \b
    Example:
      strongroom audit list --tenant acme --since 7d
      strongroom audit list --collection api_keys --entity-id key_0199f3c2 --json
    """

    async def read(room: Strongroom) -> Page[AuditRecord]:
        """A full page, even if many records do not match: an empty page need not be the last."""
        page = await room.audit.page(wanted, limit=limit, cursor=cursor)
        while page.next_cursor is not None and len(page.items) < limit:
            more = await room.audit.page(wanted, limit=limit - len(page.items), cursor=page.next_cursor)
            page = type(page)([*page.items, *more.items], more.next_cursor)
        return page

    page = in_store(store, read)
    if json:
        output.print_json({"items": [view(record) for record in page.items], "next_cursor": page.next_cursor})
        return
    rows = [
        (
            output.moment(record.at),
            record.tenant or "",
            record.actor,
            record.action,
            f"{record.collection}/{record.entity_id}" if record.entity_id else record.collection,
            " ".join(sorted({*(record.before or {}), *(record.after or {})})) if record.action == "update" else "",
            record.request_id,
        )
        for record in page.items
    ]
    columns = ("AT", "TENANT", "ACTOR", "ACTION", "WHAT", "FIELDS", "REQUEST")
    output.print_page(columns, rows, page.next_cursor, "there are no records")


def view(record: AuditRecord) -> dict[str, Any]:
    """A record as JSON, as in `GET /v1/audit`."""
    return {
        "sequence": record.sequence,
        "index": record.index,
        "tenant": record.tenant,
        "at": record.at,
        "actor": record.actor,
        "request_id": record.request_id,
        "action": record.action,
        "collection": record.collection,
        "entity_id": record.entity_id,
        "before": record.before,
        "after": record.after,
    }
