"""`strongroom keys …`: issue, list, show, verify, rotate, disable, enable, delete, statistics."""

from __future__ import annotations

import sys
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InvalidInput, Problem
from . import output, shortforms
from .keyoptions import FIELDS, FILTER, IdArgument, SameKeyOption, key_fields, key_filter
from .keyviews import (
    key_view,
    print_answer,
    print_issued,
    print_key,
    state_of,
    stats_view,
)
from .limitviews import limit_texts, print_limits, print_mended
from .options import (
    CursorOption,
    PageOption,
    YesOption,
    confirm,
    described,
    duration_s,
    is_interactive,
    must_be_confirmed,
    with_options,
)
from .session import EXIT_FAILED, JsonOption, StoreOption, in_store, operator

if TYPE_CHECKING:
    from ..app import Strongroom
    from ..entities import Page
    from ..keys import ApiKey, KeyFilter

app = typer.Typer(help="Issue, verify and manage API keys.", no_args_is_help=True, rich_markup_mode=None)


@app.command()
@with_options(FIELDS, "fields", dict)
def create(
    *,
    name: Annotated[str, typer.Option("--name", help="The name of the key.")],
    tenant: Annotated[str, typer.Option("--tenant", help="The tenant of the key.")] = "default",
    fields: dict[str, Any],
    prefix: Annotated[
        str | None, typer.Option(help="The beginning of the secret (default: sr, or sr_test in the environment test).")
    ] = None,
    environment: Annotated[
        str | None, typer.Option("--environment", metavar="live|test", help="The environment (default: live).")
    ] = None,
    idempotency_key: SameKeyOption = None,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Create a key and print its secret, once.

    \b
    Example:
      strongroom keys create --name "billing worker" --tenant acme --permission chat:write \\
          --limit tokens=100000/5h --limit requests=60/60s --expires 90d

    \b
    Limits are RESOURCE=AMOUNT/WINDOW, and all of them apply:
        tokens=100000/5h                          the last five hours (rolling)
        tokens=100000/anchored:5h                 five hours from the first use
        cost=25.50/calendar:month@Europe/Berlin   the calendar month there
        requests=1000/total                       for ever
    """
    from ..keys import NewKey

    problems: list[Problem] = []
    given = {"name": name, "tenant": tenant, "prefix": prefix, "environment": environment, **fields}
    read = key_fields(given, problems)
    new = described(NewKey, read, read.pop("limits", None), problems)
    issued = in_store(
        store, lambda room: room.keys.create(new, context=operator(), idempotency_key=idempotency_key), absent="made"
    )
    print_issued(issued, json)


@app.command("list")
@with_options(FILTER, "where", key_filter)
def list_keys(
    *,
    where: KeyFilter,
    every: Annotated[bool, typer.Option("--all", help="All pages.")] = False,
    limit: PageOption = 100,
    cursor: CursorOption = None,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """List keys, newest first; with --name-prefix by name. --limit is the size of a page.

    \b
    Example:
      strongroom keys list --tenant acme
    """

    async def read(room: Strongroom) -> Page[ApiKey]:
        page = await room.keys.page(where, limit=limit, cursor=cursor)
        items = [*page.items]
        # With some filters a page may be empty although more pages follow.
        while page.next_cursor is not None and (every or not items):
            page = await room.keys.page(where, limit=limit, cursor=page.next_cursor)
            items += page.items
        return replace(page, items=items)

    page = in_store(store, read)
    if json:
        output.print_json({"items": [key_view(key) for key in page.items], "next_cursor": page.next_cursor})
        return
    now = datetime.now(UTC)
    rows = [
        (
            key.id,
            key.tenant,
            key.name,
            key.display,
            state_of(key, now),
            output.moment(key.expires_at),
            "  ".join(limit_texts(key.limits)),
        )
        for key in page.items
    ]
    columns = ("ID", "TENANT", "NAME", "KEY", "STATE", "EXPIRES", "LIMITS")
    output.print_page(columns, rows, page.next_cursor, "there are no keys")


@app.command()
def show(id: IdArgument, store: StoreOption = None, json: JsonOption = False) -> None:
    """Show a key, also a deleted one.

    \b
    Example:
      strongroom keys show key_0199f3c2…
    """
    print_key(in_store(store, lambda room: room.keys.get(id, deleted=True)), json)


@app.command()
def verify(
    key: Annotated[
        str, typer.Argument(metavar="[KEY]", help="The key's secret; - (default) reads a line of standard input.")
    ] = "-",
    cost: Annotated[
        list[str] | None,
        typer.Option(metavar="RESOURCE=AMOUNT", help="The cost of the call (default: requests=1); may be given again."),
    ] = None,
    permission: Annotated[str | None, typer.Option(help="A permission that the key must have.")] = None,
    ip: Annotated[str | None, typer.Option("--ip", help="The caller's address.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="The model of the call.")] = None,
    route: Annotated[str | None, typer.Option("--route", help="The route of the call.")] = None,
    tenant: Annotated[str | None, typer.Option("--tenant", help="The key must belong to this tenant.")] = None,
    peek: Annotated[bool, typer.Option("--peek", help="A dry run: the same answer, without a debit.")] = False,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Verify a key and debit its limits. Exit status 1 if it is not valid.

    Every user of the machine can see a command line: pass the secret on standard input.

    \b
    Example:
      strongroom keys verify --cost tokens=250 --permission chat:write < key.txt
    """
    secret = _asked_for("Key: ") if key == "-" else key
    problems: list[Problem] = []
    costs = shortforms.by_name("cost", cost or [], _cost, problems)
    if problems:
        raise InvalidInput(problems)
    answer = in_store(
        store,
        lambda room: room.keys.verify(
            secret,
            cost=costs or None,
            permission=permission,
            ip=ip,
            model=model,
            route=route,
            tenant=tenant,
            peek=peek,
        ),
    )
    print_answer(answer, json)
    if not answer.valid:
        raise typer.Exit(EXIT_FAILED)


@app.command()
def rotate(
    id: IdArgument,
    overlap: Annotated[
        str, typer.Option(metavar="DURATION", help="How long the old secret keeps working, for example 1h.")
    ] = "0s",
    hold: Annotated[
        bool, typer.Option("--hold", help="Do not print the new secret: keep it for `keys claim`.")
    ] = False,
    idempotency_key: SameKeyOption = None,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Give a key a new secret and print it, once. Id, limits and usage stay.

    \b
    Example:
      strongroom keys rotate key_0199f3c2… --overlap 1h
    """
    overlap_s = duration_s("overlap", overlap)
    issued = in_store(
        store,
        lambda room: room.keys.rotate(
            id, overlap_s=overlap_s, hold=hold, context=operator(), idempotency_key=idempotency_key
        ),
    )
    print_issued(issued, json)


@app.command()
def disable(id: IdArgument, store: StoreOption = None, json: JsonOption = False) -> None:
    """Disable a key; `enable` reverses this.

    \b
    Example:
      strongroom keys disable key_0199f3c2…
    """
    print_key(in_store(store, lambda room: room.keys.disable(id, context=operator())), json)


@app.command()
def enable(id: IdArgument, store: StoreOption = None, json: JsonOption = False) -> None:
    """Enable a disabled key.

    \b
    Example:
      strongroom keys enable key_0199f3c2…
    """
    print_key(in_store(store, lambda room: room.keys.enable(id, context=operator())), json)


@app.command()
def delete(
    id: IdArgument,
    purge: Annotated[
        bool, typer.Option("--purge", help="Remove the key and its usage for good, also an already deleted key.")
    ] = False,
    yes: YesOption = False,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Delete a key: its secrets stop working. `restore` reverses this within 30 days.

    Asks first; without a terminal, --yes is needed.

    \b
    Example:
      strongroom keys delete key_0199f3c2… --yes
    """
    must_be_confirmed(yes, json, "purging a key cannot be undone" if purge else "it stops working at once")

    async def remove(room: Strongroom) -> ApiKey:
        key = await room.keys.get(id, deleted=purge)
        what = f"{key.id}, {output.shown(key.name)!r} of {output.shown(key.tenant)!r}"
        confirm(yes, f"Remove {what}, and its usage, for good?" if purge else f"Delete {what}?")
        await room.keys.delete(id, purge=purge, context=operator())
        return key

    key = in_store(store, remove)
    if json:
        output.print_json({"deleted": key.id})
    elif purge:
        output.print_line(f"removed {key.id} ({key.name}) for good")
    else:
        output.print_line(f"deleted {key.id} ({key.name}); strongroom keys restore {key.id} reverses this")


@app.command()
def stats(id: IdArgument, store: StoreOption = None, json: JsonOption = False) -> None:
    """Show a key's usage: each limit's window, and lifetime totals.

    \b
    Example:
      strongroom keys stats key_0199f3c2…
    """
    found = in_store(store, lambda room: room.keys.stats(id))
    if json:
        output.print_json(stats_view(found))
        return
    key = found.key
    fields = [
        ("id", key.id),
        ("name", key.name),
        ("state", "expired" if found.expired else state_of(key, datetime.now(UTC))),
        ("uses", str(found.count)),
        ("last used", output.moment(found.last_used_at)),
        *((f"total {name}", str(amount)) for name, amount in found.totals.items()),
    ]
    output.print_fields(fields)
    print_limits(found.limits)


@app.command("mend-clock")
def mend_clock(id: IdArgument, store: StoreOption = None, json: JsonOption = False) -> None:
    """Reset the time of a key that was used while the clock was wrong and ahead.

    This frees no usage: usage of the later time counts as used now. A key whose time is more than a day ahead is reset
    automatically.

    \b
    Example:
      strongroom keys mend-clock key_0199f3c2…
    """
    print_mended(in_store(store, lambda room: room.keys.mend_clock(id)), json)


# --- Reading the call -----------------------------------------------------------------------------------------


def _cost(text: str) -> tuple[str, Any]:
    name, value = shortforms.pair(text)
    return name, shortforms.amount(value)


def _asked_for(prompt: str) -> str:
    """A line of standard input; on a terminal after a prompt, without echo."""
    if is_interactive():
        import getpass

        return getpass.getpass(prompt, stream=sys.stderr)
    return sys.stdin.readline().rstrip("\r\n")
