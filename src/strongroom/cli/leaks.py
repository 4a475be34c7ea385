"""`strongroom leaks …`: report leaked keys, list leaks, set leak policies."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InvalidInput, Problem
from . import output, shortforms
from .options import CursorOption, PageOption
from .session import JsonOption, StoreOption, in_store, operator

if TYPE_CHECKING:
    from ..app import Strongroom
    from ..keys import Finding, Leak, LeakPolicy, Sighting

app = typer.Typer(
    help="Report and list leaked keys, and set leak policies.", no_args_is_help=True, rich_markup_mode=None
)


@app.command()
def report(
    file: Annotated[
        str, typer.Argument(metavar="[FILE]", help="A file with the secrets; - (default) is standard input.")
    ] = "-",
    url: Annotated[str, typer.Option("--url", help="The URL where they were found.")] = "",
    source: Annotated[str, typer.Option("--source", help="The kind of place: content, commit, log, …")] = "",
    type: Annotated[str, typer.Option("--type", help="The scanner's name for this type of secret.")] = "",
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Report leaked keys; the tenant's policy is applied to each.

    The input has one secret a line, or is a JSON array of {"token", "type", "url", "source"}. A secret that was
    reported before has no further effect.

    \b
    Example:
      strongroom leaks report --url https://code.example/app/settings.py < found.txt
    """
    sightings = _sightings(_content(file), type=type, url=url, source=source)
    found = in_store(store, lambda room: room.leaks.report(sightings, reporter=operator().actor))
    _print_found(sightings, found, json)


@app.command("list")
def list_leaks(
    tenant: Annotated[str | None, typer.Option("--tenant", help="Only this tenant's.")] = None,
    key: Annotated[str | None, typer.Option("--key", metavar="ID", help="Only this key's.")] = None,
    limit: PageOption = 100,
    cursor: CursorOption = None,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """List leaks, newest first.

    \b
    Example:
      strongroom leaks list --tenant acme
    """
    page = in_store(store, lambda room: room.leaks.list(tenant=tenant, key_id=key, limit=limit, cursor=cursor))
    if json:
        output.print_json({"items": [_view(leak) for leak in page.items], "next_cursor": page.next_cursor})
        return
    rows = [
        (output.moment(leak.created_at), leak.key_id, leak.tenant, leak.display, _done(leak), leak.url or leak.source)
        for leak in page.items
    ]
    columns = ("REPORTED", "ID", "TENANT", "KEY", "DONE", "FOUND AT")
    output.print_page(columns, rows, page.next_cursor, "no leak was reported")


@app.command()
def policy(
    tenant: Annotated[str, typer.Argument(metavar="TENANT", help="The tenant; '*' for keys of no single tenant.")],
    action: Annotated[
        str | None, typer.Option("--set", metavar="ACTION", help="The policy: notify, disable or rotate.")
    ] = None,
    overlap: Annotated[
        str | None,
        typer.Option(metavar="DURATION", help="With rotate: how long a leaked secret keeps working (default 24h)."),
    ] = None,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Show, or with --set change, the leak policy of a tenant.

    \b
    Example:
      strongroom leaks policy acme --set rotate --overlap 1h
    """
    problems: list[Problem] = []
    overlap_s = None if overlap is None else shortforms.one("overlap", overlap, shortforms.seconds, problems)
    if overlap is not None and action is None:
        problems.append(Problem("overlap", "expected --set rotate beside it"))
    if problems:
        raise InvalidInput(problems)

    async def asked(room: Strongroom) -> LeakPolicy:
        if action is None:
            return await room.leaks.policy(tenant, context=operator())
        given = {"action": action} if overlap_s is None else {"action": action, "overlap_s": overlap_s}
        return await room.leaks.set_policy(tenant, context=operator(), **given)

    found = in_store(store, asked, absent="refused" if action is None else "made")
    if json:
        output.print_json(found.model_dump(include={"tenant", "action", "overlap_s", "updated_at"}))
        return
    fields = [("tenant", found.tenant), ("action", found.action)]
    if found.overlap_s is not None:
        fields.append(("overlap", shortforms.show_seconds(found.overlap_s)))
    output.print_fields([*fields, ("set", output.moment(found.updated_at))])


# --- Reading the call -----------------------------------------------------------------------------------------


def _content(file: str) -> str:
    try:
        return sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InvalidInput([Problem("file", f"{file}: {reason}")]) from None


def _sightings(content: str, **given: str) -> list[Sighting]:
    """The secrets of a file: a scanner's JSON array, or one a line, for which `given` has the other fields."""
    from ..keys import Sighting

    if content.lstrip().startswith("["):
        return _from_array(content, given)
    found = [Sighting(line.strip(), **given) for line in content.splitlines() if line.strip()]
    if not found:
        raise InvalidInput([Problem("file", "found no secret, expected one a line")])
    return found


def _from_array(content: str, given: dict[str, str]) -> list[Sighting]:
    import msgspec

    from ..keys import Sighting

    try:
        items = msgspec.json.decode(content, type=list[dict[str, Any]])
    except (msgspec.MsgspecError, ValueError) as error:
        raise InvalidInput([Problem("file", f"expected an array of objects: {error}")]) from None
    found = []
    problems = []
    for number, item in enumerate(items):
        fields = {name: item.get(name) or given.get(name, "") for name in ("token", "type", "url", "source")}
        wrong = [name for name, value in fields.items() if not isinstance(value, str)]
        wrong += ["token"] if fields["token"] == "" else []
        problems += [Problem(f"{number}.{name}", "expected text") for name in wrong]
        if not wrong:
            found.append(Sighting(**fields))
    if problems:
        raise InvalidInput(problems)
    return found


# --- Printing -------------------------------------------------------------------------------------------------


def _view(leak: Leak) -> dict[str, Any]:
    return leak.model_dump(exclude={"version", "updated_at"})


def _done(leak: Leak) -> str:
    return leak.done if leak.ends_at is None else f"{leak.done}, ends {output.moment(leak.ends_at)}"


def _print_found(sightings: list[Sighting], found: list[Finding], json: bool) -> None:
    from ..keys import masked

    shown = [masked(sighting.token) for sighting in sightings]
    if json:
        items = [
            {"display": text, "new": finding.new, "leak": None if finding.leak is None else _view(finding.leak)}
            for text, finding in zip(shown, found, strict=True)
        ]
        output.print_json({"items": items})
        return
    rows = []
    for text, finding in zip(shown, found, strict=True):
        leak = finding.leak
        if leak is None:
            rows.append((text, "", "", "is no key of this store"))
        else:
            rows.append((text, leak.key_id, leak.tenant, _done(leak) if finding.new else "was reported before"))
    output.print_table(("KEY", "ID", "TENANT", "DONE"), rows)
