"""`strongroom keys claim`, `restore`, `bulk` and `rotate-pepper`: what else happens to keys in their life."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InvalidInput, Problem
from . import options, output
from .keys import (
    AfterOption,
    BeforeOption,
    DeletedOption,
    EnvironmentOption,
    IdArgument,
    OwnerOption,
    PrefixOption,
    app,
    key_filter,
)
from .keyviews import print_issued, print_key
from .options import YesOption, confirm, must_be_confirmed
from .session import EXIT_FAILED, JsonOption, StoreOption, in_store, operator

if TYPE_CHECKING:
    from ..apikey import KeyChanges
    from ..app import Strongroom
    from ..bulk import Bulk, BulkFailure

MAX_TOLD = 20
"""Failures that are told one by one where people read; a JSON document has them all."""
Ids = Annotated[list[str] | None, typer.Argument(metavar="[ID]...", help="The keys' ids; without them, a filter.")]


@app.command()
def claim(
    id: IdArgument,
    idempotency_key: Annotated[
        str | None, typer.Option(help="The same call again with this text gives the same key (within a day).")
    ] = None,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Print the text that a scheduled rotation, or one with --hold, has kept; it is forgotten with that.

    \b
    Example:
      strongroom keys claim key_0199f3c2…
    """
    print_issued(
        in_store(store, lambda room: room.keys.claim(id, context=operator(), idempotency_key=idempotency_key)), json
    )


@app.command()
def restore(id: IdArgument, store: StoreOption = None, json: JsonOption = False) -> None:
    """Take the deletion of a key back, within 30 days: it is as it was.

    \b
    Example:
      strongroom keys restore key_0199f3c2…
    """
    print_key(in_store(store, lambda room: room.keys.restore(id, context=operator())), json)


@app.command("rotate-pepper")
def rotate_pepper(store: StoreOption = None, json: JsonOption = False) -> None:
    """Make new hashes with a new secret from now on. Every key works on; its hash is renewed at its next use.

    Peppers that the configuration gives (STRONGROOM_PEPPER) are rotated there.

    \b
    Example:
      strongroom keys rotate-pepper
    """

    async def rotate(room: Strongroom) -> str:
        await room.rotate_pepper()
        return room.keys.hasher.current_id

    current = in_store(store, rotate)
    if json:
        output.print_json({"pepper": current})
    else:
        output.print_line(f"new hashes are made with pepper {current}")


@app.command()
def bulk(
    action: Annotated[str, typer.Argument(metavar="ACTION", help="disable, enable, delete, purge, restore or update.")],
    ids: Ids = None,
    tenant: Annotated[str | None, typer.Option("--tenant", help="Only this tenant's keys.")] = None,
    user: Annotated[str | None, typer.Option("--user", help="Only this user's keys.")] = None,
    owner: OwnerOption = None,
    environment: EnvironmentOption = None,
    name_prefix: PrefixOption = None,
    created_after: AfterOption = None,
    created_before: BeforeOption = None,
    deleted: DeletedOption = False,
    every: Annotated[bool, typer.Option("--all", help="All keys: there is no other filter.")] = False,
    limit: Annotated[
        list[str] | None,
        typer.Option(metavar="RESOURCE=AMOUNT/WINDOW", help="With update: the new limits; may be given again."),
    ] = None,
    metadata: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="With update: the new notes; may be given again.")
    ] = None,
    group: Annotated[
        list[str] | None, typer.Option(help="With update: the quotas that they share; may be given again.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say how many would be changed.")] = False,
    cursor: Annotated[str | None, typer.Option(help="Where work that was broken off is to go on.")] = None,
    yes: YesOption = False,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Change many keys: those with these ids, or all that a filter means. Exit status 1 if some could not be.

    Each key is changed whole or not at all. What was broken off goes on by the same call again: what was done is found
    unchanged. Asks first; without a terminal, --yes is needed.

    \b
    Example:
      strongroom keys bulk disable --tenant acme --dry-run
      strongroom keys bulk update --owner ops --limit tokens=100000/5h --yes
    """
    from ..bulk import Bulk
    from ..keyfilter import KeyFilter

    where = key_filter(
        tenant=tenant,
        user_id=user,
        owner=owner,
        environment=environment,
        name_prefix=name_prefix,
        created_after=created_after,
        created_before=created_before,
        deleted=deleted,
    )
    problems: list[Problem] = []
    if action not in ("disable", "enable", "delete", "purge", "restore", "update"):
        expected = "disable, enable, delete, purge, restore or update"
        problems.append(Problem("action", f"found {action[:64]!r}, expected {expected}"))
    filtered = where != KeyFilter()
    if bool(ids) + filtered + every != 1:
        problems.append(Problem("ids", "expected ids, or a filter, or --all, and only one of them"))
    changes = _changes(limit, metadata, group, problems)
    if problems:
        raise InvalidInput(problems)
    asked: Any = action
    work = Bulk(asked, None if ids else where, ids or None, changes, dry_run)
    work.check()
    must_be_confirmed(yes or dry_run, False, "there is no terminal to ask at")
    done = in_store(store, lambda room: _work(room, work, cursor, ask=not (yes or dry_run)))
    if json:
        output.print_json(done)
    else:
        would = "would be changed" if dry_run else "changed"
        output.print_line(
            f"{done['changed']} {would}, {done['unchanged']} were so already, {len(done['failed'])} failed"
        )
        for failure in done["failed"][:MAX_TOLD]:
            output.print_note(f"{failure['id']}: {failure['message']}")
        if len(done["failed"]) > MAX_TOLD:
            output.print_note(f"and {len(done['failed']) - MAX_TOLD} more: --json tells them all")
    if done["failed"]:
        raise typer.Exit(EXIT_FAILED)


def _changes(
    limit: list[str] | None, metadata: list[str] | None, group: list[str] | None, problems: list[Problem]
) -> KeyChanges | None:
    """What an update sets: only what is given."""
    from ..apikey import KeyChanges

    fields: dict[str, Any] = {}
    if metadata:
        fields["metadata"] = options.metadata(metadata, problems)
    if group:
        fields["groups"] = group
    if not (fields or limit):
        return None
    try:
        return options.described(KeyChanges, fields, limit or None)
    except InvalidInput as error:
        problems += error.problems
        return None


async def _work(room: Strongroom, work: Bulk, cursor: str | None, *, ask: bool) -> dict[str, Any]:
    """Do it, with a bar where there is a terminal; what was done, in all."""
    context = operator()
    total = await room.keys.count(work.filter, context=context) if work.filter is not None else len(work.ids or ())
    confirm(not ask, f"{work.action} {total} keys?")
    looked_at = changed = unchanged = 0
    failed: list[BulkFailure] = []
    with output.progress(work.action) as show:
        try:
            async for step in room.keys.bulk(work, cursor=cursor, context=context):
                looked_at += step.looked_at
                changed += step.changed
                unchanged += step.unchanged
                failed += step.failed
                cursor = step.cursor
                show(looked_at, total)
        except BaseException:
            if cursor is not None:
                output.print_note(f"{changed} keys were changed; the rest: the same call with --cursor {cursor}")
            raise
    return {
        "dry_run": work.dry_run,
        "looked_at": looked_at,
        "changed": changed,
        "unchanged": unchanged,
        "failed": [{"id": one.id, "code": one.code, "message": one.message} for one in failed],
    }


__all__ = ["app"]
