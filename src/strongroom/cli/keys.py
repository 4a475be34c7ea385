"""`strongroom keys …`: issue, list, show, verify, rotate, disable, enable, delete, statistics."""

from __future__ import annotations

import sys
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from ..errors import InvalidInput, Problem
from . import output, shortforms
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
    LimitsOption,
    PageOption,
    YesOption,
    confirm,
    described,
    duration_s,
    is_interactive,
    metadata,
    must_be_confirmed,
)
from .session import EXIT_FAILED, JsonOption, StoreOption, in_store, operator

if TYPE_CHECKING:
    from ..app import Strongroom
    from ..database import Page
    from ..keys import ApiKey, KeyFilter, NewKey

app = typer.Typer(help="Issue, verify and manage API keys.", no_args_is_help=True, rich_markup_mode=None)

IdArgument = Annotated[str, typer.Argument(metavar="ID", help="The key's id, as `keys list` shows it.")]
OwnerOption = Annotated[str | None, typer.Option("--owner", help="Only this owner's keys.")]
EnvironmentOption = Annotated[
    str | None, typer.Option("--environment", metavar="live|test", help="Only keys of this environment.")
]
ContainsOption = Annotated[
    str | None, typer.Option("--name-contains", help="Only keys whose names have this part, in capitals or not.")
]
StateOption = Annotated[str | None, typer.Option("--state", help="Only keys that are active, disabled or expired.")]
GroupFilterOption = Annotated[str | None, typer.Option("--in-group", help="Only keys that share this quota.")]
PermissionOption = Annotated[
    str | None, typer.Option("--permission", help="Only keys with exactly this permission among theirs.")
]
ExpiresAfterOption = Annotated[
    str | None,
    typer.Option(
        "--expires-after", metavar="TIME", help="Only keys that expire after this time, or this long from now (30d)."
    ),
]
ExpiresBeforeOption = Annotated[
    str | None,
    typer.Option(
        "--expires-before", metavar="TIME", help="Only keys that expire before that; not those that never expire."
    ),
]
UsedAfterOption = Annotated[
    str | None,
    typer.Option(
        "--used-after", metavar="TIME", help="Only keys last used after this time, or since so long ago (7d)."
    ),
]
UsedBeforeOption = Annotated[
    str | None,
    typer.Option("--used-before", metavar="TIME", help="Only keys that were not used since then, or never were."),
]
PrefixOption = Annotated[str | None, typer.Option("--name-prefix", help="Only keys whose names begin so.")]
AfterOption = Annotated[
    str | None,
    typer.Option("--created-after", metavar="TIME", help="Only keys made after this time, or since so long ago (7d)."),
]
BeforeOption = Annotated[
    str | None,
    typer.Option("--created-before", metavar="TIME", help="Only keys made before this time, or so long ago (7d)."),
]
DeletedOption = Annotated[
    bool, typer.Option("--deleted", help="The deleted keys that can be restored, instead of the others.")
]


@app.command()
def create(
    name: Annotated[str, typer.Option("--name", help="What the key is for.")],
    tenant: Annotated[str, typer.Option("--tenant", help="Whose key it is.")] = "default",
    user: Annotated[str | None, typer.Option("--user", help="The user it belongs to.")] = None,
    permission: Annotated[list[str] | None, typer.Option(help="A permission; may be given again.")] = None,
    limit: LimitsOption = None,
    expires: Annotated[
        str | None, typer.Option(metavar="TIME", help="When it ends: 2027-01-01T00:00:00Z, or 30d from now.")
    ] = None,
    allow_ip: Annotated[
        list[str] | None,
        typer.Option(metavar="RANGE", help="An address or range it may be used from; may be given again."),
    ] = None,
    metadata: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="A note on the key; may be given again.")
    ] = None,
    prefix: Annotated[
        str | None, typer.Option(help="What the text begins with (default: sr, of a test key sr_test).")
    ] = None,
    owner: Annotated[str | None, typer.Option("--owner", help="Who is responsible for it.")] = None,
    description: Annotated[str | None, typer.Option(help="What else there is to say of it.")] = None,
    environment: Annotated[
        str | None, typer.Option("--environment", metavar="live|test", help="What it is for (default: live).")
    ] = None,
    group: Annotated[
        list[str] | None, typer.Option(help="A quota of its tenant that it shares; may be given again.")
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="A model it may be used for, or name*; may be given again.")
    ] = None,
    route: Annotated[
        list[str] | None, typer.Option(help="A route it may be used for, or name*; may be given again.")
    ] = None,
    rotate_every: Annotated[
        str | None, typer.Option(metavar="DURATION", help="Rotate it so often, for example 90d.")
    ] = None,
    rotation_overlap: Annotated[
        str | None, typer.Option(metavar="DURATION", help="How long the old text then works on, for example 7d.")
    ] = None,
    idempotency_key: Annotated[
        str | None, typer.Option(help="The same call again with this text gives the same key (within a day).")
    ] = None,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Make a key and print its text, once.

    \b
    Example:
      strongroom keys create --name "billing worker" --tenant acme --permission chat:write \\
          --limit tokens=100000/5h --limit requests=60/60s --expires 90d

    \b
    Limits are RESOURCE=AMOUNT/WINDOW, and all of them hold:
        tokens=100000/5h                          the last five hours (rolling)
        tokens=100000/anchored:5h                 five hours from the first use
        cost=25.50/calendar:month@Europe/Berlin   the calendar month there
        requests=1000/total                       for ever
    """
    new = _new_key(
        name=name,
        tenant=tenant,
        user_id=user,
        permissions=permission or [],
        limits=limit or [],
        expires_at=expires,
        allowed_ips=allow_ip or [],
        metadata=metadata or [],
        prefix=prefix,
        owner=owner,
        description=description,
        environment=environment,
        groups=group or [],
        allowed_models=model or [],
        allowed_routes=route or [],
        rotate_every_s=rotate_every,
        rotation_overlap_s=rotation_overlap,
    )
    issued = in_store(
        store, lambda room: room.keys.create(new, context=operator(), idempotency_key=idempotency_key), absent="made"
    )
    print_issued(issued, json)


@app.command("list")
def list_keys(
    tenant: Annotated[str | None, typer.Option("--tenant", help="Only this tenant's keys.")] = None,
    user: Annotated[str | None, typer.Option("--user", help="Only this user's keys.")] = None,
    owner: OwnerOption = None,
    environment: EnvironmentOption = None,
    name_prefix: PrefixOption = None,
    created_after: AfterOption = None,
    created_before: BeforeOption = None,
    deleted: DeletedOption = False,
    every: Annotated[bool, typer.Option("--all", help="All pages, one after the other.")] = False,
    name_contains: ContainsOption = None,
    state: StateOption = None,
    group: GroupFilterOption = None,
    permission: PermissionOption = None,
    expires_after: ExpiresAfterOption = None,
    expires_before: ExpiresBeforeOption = None,
    used_after: UsedAfterOption = None,
    used_before: UsedBeforeOption = None,
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
    wanted = key_filter(
        tenant=tenant,
        user_id=user,
        owner=owner,
        environment=environment,
        name_prefix=name_prefix,
        created_after=created_after,
        created_before=created_before,
        deleted=deleted,
        name_contains=name_contains,
        state=state,
        group=group,
        permission=permission,
        expires_after=expires_after,
        expires_before=expires_before,
        used_after=used_after,
        used_before=used_before,
    )

    async def read(room: Strongroom) -> Page[ApiKey]:
        page = await room.keys.page(wanted, limit=limit, cursor=cursor)
        items = [*page.items]
        # Of some filters a page may be empty, and not the last.
        while page.next_cursor is not None and (every or not items):
            page = await room.keys.page(wanted, limit=limit, cursor=page.next_cursor)
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
    """Show a key, a deleted one too.

    \b
    Example:
      strongroom keys show key_0199f3c2…
    """
    print_key(in_store(store, lambda room: room.keys.get(id, deleted=True)), json)


@app.command()
def verify(
    key: Annotated[
        str, typer.Argument(metavar="[KEY]", help="The key's text; - (the default) reads a line of standard input.")
    ] = "-",
    cost: Annotated[
        list[str] | None,
        typer.Option(metavar="RESOURCE=AMOUNT", help="What it is used for (default: requests=1); may be given again."),
    ] = None,
    permission: Annotated[str | None, typer.Option(help="A permission it must have.")] = None,
    ip: Annotated[str | None, typer.Option("--ip", help="The address it is used from.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="The model it is used for.")] = None,
    route: Annotated[str | None, typer.Option("--route", help="The route it is used for.")] = None,
    tenant: Annotated[str | None, typer.Option("--tenant", help="Only a key of this tenant will do.")] = None,
    peek: Annotated[bool, typer.Option("--peek", help="A dry run: the same answer, and nothing is counted.")] = False,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Verify a key as a service would, and debit its limits. Exit status 1 if it is not valid.

    What stands on a command line can be seen by every user of the machine: pass the text on standard input.

    \b
    Example:
      strongroom keys verify --cost tokens=250 --permission chat:write < key.txt
    """
    text = _asked_for("Key: ") if key == "-" else key
    problems: list[Problem] = []
    costs = shortforms.by_name("cost", cost or [], _cost, problems)
    if problems:
        raise InvalidInput(problems)
    answer = in_store(
        store,
        lambda room: room.keys.verify(
            text,
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
        str, typer.Option(metavar="DURATION", help="How long the old text works on, for example 1h.")
    ] = "0s",
    hold: Annotated[
        bool, typer.Option("--hold", help="Do not print the new text: keep it until `keys claim` asks for it.")
    ] = False,
    idempotency_key: Annotated[
        str | None, typer.Option(help="The same call again with this text gives the same key (within a day).")
    ] = None,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Give a key a new text and print it, once. Id, limits and usage stay.

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
    """Refuse a key from now on; `enable` takes it back.

    \b
    Example:
      strongroom keys disable key_0199f3c2…
    """
    print_key(in_store(store, lambda room: room.keys.disable(id, context=operator())), json)


@app.command()
def enable(id: IdArgument, store: StoreOption = None, json: JsonOption = False) -> None:
    """Accept a disabled key again.

    \b
    Example:
      strongroom keys enable key_0199f3c2…
    """
    print_key(in_store(store, lambda room: room.keys.enable(id, context=operator())), json)


@app.command()
def delete(
    id: IdArgument,
    purge: Annotated[
        bool, typer.Option("--purge", help="Remove it and its usage for good, one that was deleted before too.")
    ] = False,
    yes: YesOption = False,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Delete a key: its texts are unknown from now on. `restore` takes that back for 30 days.

    Asks first; without a terminal, --yes is needed.

    \b
    Example:
      strongroom keys delete key_0199f3c2… --yes
    """
    must_be_confirmed(yes, json, "removing a key for good cannot be undone" if purge else "it stops working at once")

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
        output.print_line(f"deleted {key.id} ({key.name}); strongroom keys restore {key.id} takes that back")


@app.command()
def stats(id: IdArgument, store: StoreOption = None, json: JsonOption = False) -> None:
    """Show what a key has used: each limit's window, and lifetime totals.

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
    """Let a key that was used while the clock was wrong, and ahead, go on from the present time.

    Nothing is freed by it: what was counted at the later time counts as used now. A key whose time is more than a day
    ahead does so by itself.

    \b
    Example:
      strongroom keys mend-clock key_0199f3c2…
    """
    print_mended(in_store(store, lambda room: room.keys.mend_clock(id)), json)


# --- Reading the call -----------------------------------------------------------------------------------------


def _new_key(**given: Any) -> NewKey:
    """The key that the options describe. InvalidInput names everything that is wrong with them at once."""
    from ..keys import NewKey

    problems: list[Problem] = []
    fields = {name: value for name, value in given.items() if value is not None}
    fields["metadata"] = metadata(given["metadata"], problems)
    if given["expires_at"] is not None:
        now = datetime.now(UTC)
        fields["expires_at"] = shortforms.one(
            "expires_at", given["expires_at"], lambda text: shortforms.moment(text, now), problems
        )
    for name in ("rotate_every_s", "rotation_overlap_s"):
        if given[name] is not None:
            fields[name] = shortforms.one(name, given[name], shortforms.seconds, problems)
    return described(NewKey, fields, fields.pop("limits"), problems)


def key_filter(**given: Any) -> KeyFilter:
    """The filter that the options describe. InvalidInput names everything that is wrong with them at once."""
    from ..keys import KeyFilter, KeyState
    from ..keys.filter import TIMES

    problems: list[Problem] = []
    times: dict[str, Any] = {}
    now = datetime.now(UTC)
    for name in TIMES:
        text = given.pop(name, None)
        read = shortforms.moment if name.startswith("expires") else shortforms.past
        times[name] = shortforms.one(name, text, partial(read, now=now), problems) if text is not None else None
    if given.get("state") not in (None, *get_args(KeyState)):
        problems.append(Problem("state", f"found {given['state'][:64]!r}, expected active, disabled or expired"))
    if given["environment"] not in (None, "live", "test"):
        problems.append(Problem("environment", f"found {given['environment']!r}, expected live or test"))
    if problems:
        raise InvalidInput(problems)
    return KeyFilter(**given, **times)


def _cost(text: str) -> tuple[str, Any]:
    name, value = shortforms.pair(text)
    return name, shortforms.amount(value)


def _asked_for(prompt: str) -> str:
    """A line of standard input; at a terminal it is asked for and not echoed."""
    if is_interactive():
        import getpass

        return getpass.getpass(prompt, stream=sys.stderr)
    return sys.stdin.readline().rstrip("\r\n")
