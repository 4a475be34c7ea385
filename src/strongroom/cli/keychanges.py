"""`strongroom keys update`, `claim`, `restore`, `bulk` and others: what else happens to keys in their life."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError, InvalidInput, Problem
from . import options, output, shortforms
from .keys import (
    AfterOption,
    BeforeOption,
    ContainsOption,
    DeletedOption,
    EnvironmentOption,
    ExpiresAfterOption,
    ExpiresBeforeOption,
    GroupFilterOption,
    IdArgument,
    OwnerOption,
    PermissionOption,
    PrefixOption,
    StateOption,
    UsedAfterOption,
    UsedBeforeOption,
    app,
    key_filter,
)
from .keyviews import ONCE, print_issued, print_key
from .options import LimitsOption, YesOption, confirm, must_be_confirmed
from .session import EXIT_FAILED, JsonOption, StoreOption, in_store, operator

if TYPE_CHECKING:
    from ..app import Strongroom
    from ..keys import Bulk, BulkFailure, KeyChanges

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


@app.command()
def update(
    id: IdArgument,
    name: Annotated[str | None, typer.Option("--name", help="What the key is for.")] = None,
    user: Annotated[str | None, typer.Option("--user", help="The user it belongs to.")] = None,
    permission: Annotated[list[str] | None, typer.Option(help="A permission; may be given again.")] = None,
    limit: LimitsOption = None,
    expires: Annotated[
        str | None, typer.Option(metavar="TIME", help="When it ends: 2027-01-01T00:00:00Z, or 30d from now.")
    ] = None,
    allow_ip: Annotated[
        list[str] | None, typer.Option(metavar="RANGE", help="An address or range; may be given again.")
    ] = None,
    metadata: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="A note on the key; may be given again.")
    ] = None,
    owner: Annotated[str | None, typer.Option("--owner", help="Who is responsible for it.")] = None,
    description: Annotated[str | None, typer.Option(help="What else there is to say of it.")] = None,
    group: Annotated[list[str] | None, typer.Option(help="A quota that it shares; may be given again.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="A model it may be used for; may be given again.")] = None,
    route: Annotated[list[str] | None, typer.Option(help="A route it may be used for; may be given again.")] = None,
    rotate_every: Annotated[
        str | None, typer.Option(metavar="DURATION", help="Rotate it so often, for example 90d.")
    ] = None,
    rotation_overlap: Annotated[
        str | None, typer.Option(metavar="DURATION", help="How long the old text then works on, for example 7d.")
    ] = None,
    clear: Annotated[
        list[str] | None,
        typer.Option(metavar="OPTION", help="An option whose value is to be removed, for example expires."),
    ] = None,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Change a key. What is given replaces what was set, lists as a whole; everything else stays as it is.

    What was used stays counted where a limit's resource and window stay the same.

    \b
    Example:
      strongroom keys update key_0199f3c2… --limit tokens=200000/5h --expires 90d
      strongroom keys update key_0199f3c2… --clear expires --clear user
    """
    given: dict[str, Any] = {
        "name": name, "user_id": user, "permissions": permission, "expires_at": expires, "allowed_ips": allow_ip,
        "owner": owner, "description": description, "groups": group, "allowed_models": model, "allowed_routes": route,
        "rotate_every_s": rotate_every, "rotation_overlap_s": rotation_overlap, "limits": limit, "metadata": metadata,
    }  # fmt: skip
    changes = _update(given, clear or [])
    print_key(in_store(store, lambda room: room.keys.update(id, changes, context=operator())), json)


OPTION_OF = {
    "user_id": "user", "permissions": "permission", "expires_at": "expires", "allowed_ips": "allow-ip",
    "owner": "owner", "description": "description", "groups": "group", "allowed_models": "model",
    "allowed_routes": "route", "rotate_every_s": "rotate-every", "rotation_overlap_s": "rotation-overlap",
    "limits": "limit", "metadata": "metadata",
}  # fmt: skip
"""Fields of a key that can be cleared, and the options that set them."""


def _update(given: dict[str, Any], clear: list[str]) -> KeyChanges:
    """What the options of `update` set, and what --clear removes. InvalidInput names everything that is wrong."""
    from ..keys import KeyChanges

    problems: list[Problem] = []
    fields = {name: value for name, value in given.items() if value is not None}
    limits = fields.pop("limits", None)
    if "metadata" in fields:
        fields["metadata"] = options.metadata(fields["metadata"], problems)
    if "expires_at" in fields:
        now = datetime.now(UTC)
        fields["expires_at"] = shortforms.one(
            "expires_at", fields["expires_at"], lambda text: shortforms.moment(text, now), problems
        )
    for name in ("rotate_every_s", "rotation_overlap_s"):
        if name in fields:
            fields[name] = shortforms.one(name, fields[name], shortforms.seconds, problems)
    fields_of = {option: name for name, option in OPTION_OF.items()}
    for option in clear:
        name = fields_of.get(option.removeprefix("--").replace("_", "-"), "")
        if not name:
            problems.append(Problem("clear", f"found {option[:64]!r}, expected one of {', '.join(fields_of)}"))
        elif given[name] is not None:
            problems.append(Problem("clear", f"found {option!r}, which is given as well: expected one of the two"))
        else:
            fields[name] = {} if name == "metadata" else [] if name in _LISTS else None
    if not (fields or limits or problems):
        problems.append(Problem("", "expected at least one option that says what to change"))
    return options.described(KeyChanges, fields, limits, problems)


_LISTS = ("permissions", "allowed_ips", "groups", "allowed_models", "allowed_routes", "limits")


@app.command("recover-administrator")
def recover_administrator(yes: YesOption = False, store: StoreOption = None, json: JsonOption = False) -> None:
    """Give the administrator's key a new text and print it, once: for whoever has lost the old one.

    It needs the store itself and no key. The old text is unknown from now on. A key that is deleted, disabled or
    without its permission is made whole again.

    \b
    Example:
      strongroom keys recover-administrator --yes
    """
    from ..config import load
    from ..server import adminkey

    if load(store=store).admin_key is not None:
        raise ConfigError("STRONGROOM_ADMIN_KEY: is the administrator's key wherever it is set: change it there")
    must_be_confirmed(yes, json, "the old text stops working at once")
    confirm(yes, "Replace the administrator's key?")
    text = in_store(store, adminkey.recover)
    if json:
        output.print_json({"id": adminkey.ID, "key": text})
        return
    output.print_secret("key", text, ONCE, lambda: output.print_line(f"id        {adminkey.ID}"))


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
    name_contains: ContainsOption = None,
    state: StateOption = None,
    in_group: GroupFilterOption = None,
    permission: PermissionOption = None,
    expires_after: ExpiresAfterOption = None,
    expires_before: ExpiresBeforeOption = None,
    used_after: UsedAfterOption = None,
    used_before: UsedBeforeOption = None,
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
    from ..keys import Bulk, KeyFilter

    where = key_filter(
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
        group=in_group,
        permission=permission,
        expires_after=expires_after,
        expires_before=expires_before,
        used_after=used_after,
        used_before=used_before,
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
    from ..keys import KeyChanges

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
