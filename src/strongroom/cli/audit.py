"""`strongroom audit …`: who changed what, when, from what to what."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InvalidInput, Problem
from . import output, shortforms
from .options import CursorOption, PageOption
from .session import JsonOption, StoreOption, in_store

if TYPE_CHECKING:
    from ..app import Strongroom
    from ..audit import AuditRecord
    from ..entities import Page

app = typer.Typer(help="Read the journal: who changed what, when.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _group() -> None:
    """A callback, so that one command alone is still called by its name."""


@app.command("list")
def list_records(
    tenant: Annotated[str | None, typer.Option("--tenant", help="Only this tenant's records.")] = None,
    actor: Annotated[str | None, typer.Option(help="Only changes by this actor, for example key:key_0199….")] = None,
    action: Annotated[
        str | None, typer.Option(help="Only create, update, add, delete, expire or deny.", metavar="ACTION")
    ] = None,
    collection: Annotated[
        str | None, typer.Option(help="Only changes of this collection, for example api_keys.")
    ] = None,
    entity_id: Annotated[
        str | None, typer.Option(metavar="ID", help="Only changes of the document with this id.")
    ] = None,
    request_id: Annotated[str | None, typer.Option(metavar="ID", help="Only changes by this request.")] = None,
    since: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Not before this time, or how long ago (2026-11-30T12:00Z, 7d)."),
    ] = None,
    until: Annotated[str | None, typer.Option(metavar="TIME", help="Before this time, or how long ago.")] = None,
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
    from ..audit import AuditFilter

    now = datetime.now(UTC)
    times: dict[str, datetime | None] = {}
    problems = []
    for name, text in (("since", since), ("until", until)):
        try:
            times[name] = None if text is None else shortforms.past(text, now)
        except ValueError as error:
            problems.append(Problem(f"--{name}", str(error)))
    if problems:
        raise InvalidInput(problems)
    wanted = AuditFilter(tenant, actor, action, collection, entity_id, request_id, **times)

    async def read(room: Strongroom) -> Page[AuditRecord]:
        """A page that is as long as was asked for, however few records fit."""
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
    """A record for programs, as `GET /v1/audit` has it."""
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
