"""`strongroom keys update`, `claim`, `restore`, `bulk` and others: changes during a key's life."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from ..errors import ConfigError, InvalidInput, Problem
from . import options, output
from .keyoptions import (
    FIELDS,
    FILTER,
    FLAGS,
    LISTS,
    IdArgument,
    SameKeyOption,
    key_fields,
    key_filter,
)
from .keys import app
from .keyviews import ONCE, print_issued, print_key
from .options import YesOption, confirm, must_be_confirmed, with_options
from .session import EXIT_FAILED, JsonOption, StoreOption, in_store, operator

if TYPE_CHECKING:
    from ..app import Strongroom
    from ..keys import Bulk, BulkFailure, KeyChanges, KeyFilter

MAX_TOLD = 20
"""Failures that the output for people lists; a JSON document has all."""
Ids = Annotated[
    list[str] | None, typer.Argument(metavar="[ID]...", help="The keys' ids; without ids, the filter applies.")
]


@app.command()
def claim(
    id: IdArgument,
    idempotency_key: SameKeyOption = None,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Print the secret of a scheduled rotation, or of one with --hold, once.

    \b
    Example:
      strongroom keys claim key_0199f3c2…
    """
    print_issued(
        in_store(store, lambda room: room.keys.claim(id, context=operator(), idempotency_key=idempotency_key)), json
    )


@app.command()
def restore(id: IdArgument, store: StoreOption = None, json: JsonOption = False) -> None:
    """Restore a deleted key, within 30 days.

    \b
    Example:
      strongroom keys restore key_0199f3c2…
    """
    print_key(in_store(store, lambda room: room.keys.restore(id, context=operator())), json)


@app.command()
@with_options(FIELDS, "fields", dict)
def update(
    *,
    id: IdArgument,
    name: Annotated[str | None, typer.Option("--name", help="The name of the key.")] = None,
    fields: dict[str, Any],
    clear: Annotated[
        list[str] | None,
        typer.Option(metavar="OPTION", help="An option whose value is removed, for example expires."),
    ] = None,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Change a key. The given options replace its values, lists as a whole; other values stay.

    The usage of a limit stays if its resource, window, models and routes stay.

    \b
    Example:
      strongroom keys update key_0199f3c2… --limit tokens=200000/5h --expires 90d
      strongroom keys update key_0199f3c2… --clear expires --clear user
    """
    changes = _update({"name": name, **fields}, clear or [])
    print_key(in_store(store, lambda room: room.keys.update(id, changes, context=operator())), json)


def _update(given: dict[str, Any], clear: list[str]) -> KeyChanges:
    """The fields that the options of `update` set and --clear removes. Raises InvalidInput with every problem."""
    from ..keys import KeyChanges

    problems: list[Problem] = []
    fields = key_fields(given, problems)
    limits = fields.pop("limits", None)
    fields_of = {option: name for name, option in FLAGS.items()}
    for option in clear:
        name = fields_of.get(option.removeprefix("--").replace("_", "-"), "")
        if not name:
            problems.append(Problem("clear", f"found {option[:64]!r}, expected one of {', '.join(fields_of)}"))
        elif given[name] is not None:
            problems.append(Problem("clear", f"found {option!r}, which is given as well: expected one of the two"))
        else:
            fields[name] = {} if name == "metadata" else [] if name in LISTS else None
    if not (fields or limits or problems):
        problems.append(Problem("", "expected at least one option that says what to change"))
    return options.described(KeyChanges, fields, limits, problems)


@app.command("recover-administrator")
def recover_administrator(yes: YesOption = False, store: StoreOption = None, json: JsonOption = False) -> None:
    """Give the administrator's key a new secret and print it, once, after the old one was lost.

    This needs access to the store, and no key. The old secret stops working. A deleted or disabled key, or one without
    its permission, is repaired.

    \b
    Example:
      strongroom keys recover-administrator --yes
    """
    from ..config import load
    from ..server import adminkey

    if load(store=store).admin_key is not None:
        raise ConfigError("STRONGROOM_ADMIN_KEY: sets the administrator's key: change this setting instead")
    must_be_confirmed(yes, json, "the old secret stops working at once")
    confirm(yes, "Replace the administrator's key?")
    secret = in_store(store, adminkey.recover)
    if json:
        output.print_json({"id": adminkey.ID, "key": secret})
        return
    output.print_secret("key", secret, ONCE, lambda: output.print_line(f"id        {adminkey.ID}"))


@app.command("rotate-pepper")
def rotate_pepper(store: StoreOption = None, json: JsonOption = False) -> None:
    """Make a new pepper for new hashes. Every key keeps working; its hash is renewed at its next use.

    Peppers in STRONGROOM_PEPPER are rotated there instead.

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
@with_options(FILTER, "where", key_filter)
def bulk(
    *,
    action: Annotated[str, typer.Argument(metavar="ACTION", help="disable, enable, delete, purge, restore or update.")],
    ids: Ids = None,
    where: KeyFilter,
    every: Annotated[bool, typer.Option("--all", help="All keys, without another filter.")] = False,
    limits: Annotated[
        list[str] | None,
        typer.Option(
            "--limit", metavar="RESOURCE=AMOUNT/WINDOW", help="With update: the new limits; may be given again."
        ),
    ] = None,
    metadata: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="With update: the new metadata; may be given again.")
    ] = None,
    groups: Annotated[
        list[str] | None, typer.Option("--group", help="With update: the new groups; may be given again.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count the keys that would change.")] = False,
    cursor: Annotated[str | None, typer.Option(help="The cursor at which to continue interrupted work.")] = None,
    yes: YesOption = False,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Change many keys, by ids or by a filter. Exit status 1 if some could not be changed.

    Each key is changed entirely or not at all. After an interruption run the same command again; changed keys are
    counted as unchanged. Asks first; without a terminal, --yes is needed.

    \b
    Example:
      strongroom keys bulk disable --tenant acme --dry-run
      strongroom keys bulk update --owner ops --limit tokens=100000/5h --yes
    """
    work = _bulk(action, ids, where, every, _Changes(limits, metadata, groups), dry_run)
    must_be_confirmed(yes or dry_run, False, "there is no terminal to ask at")
    done = in_store(store, lambda room: _work(room, work, cursor, ask=not (yes or dry_run)))
    if json:
        output.print_json(done)
    else:
        _print_done(done)
    if done["failed"]:
        raise typer.Exit(EXIT_FAILED)


ACTIONS = ("disable", "enable", "delete", "purge", "restore", "update")


class _Changes(NamedTuple):
    """The changes of `bulk update`, as the options give them."""

    limits: list[str] | None
    metadata: list[str] | None
    groups: list[str] | None


def _bulk(action: str, ids: list[str] | None, where: KeyFilter, every: bool, given: _Changes, dry_run: bool) -> Bulk:
    """The work that the options describe. Raises InvalidInput with every problem."""
    from ..keys import Bulk, KeyFilter

    problems: list[Problem] = []
    if action not in ACTIONS:
        expected = f"{', '.join(ACTIONS[:-1])} or {ACTIONS[-1]}"
        problems.append(Problem("action", f"found {action[:64]!r}, expected {expected}"))
    filtered = where != KeyFilter()
    if bool(ids) + filtered + every != 1:
        problems.append(Problem("ids", "expected exactly one of ids, a filter and --all"))
    changes = _changes(given, problems)
    if problems:
        raise InvalidInput(problems)
    asked: Any = action
    work = Bulk(asked, None if ids else where, ids or None, changes, dry_run)
    work.check()
    return work


def _print_done(done: Mapping[str, Any]) -> None:
    would = "would be changed" if done["dry_run"] else "changed"
    output.print_line(f"{done['changed']} {would}, {done['unchanged']} unchanged, {len(done['failed'])} failed")
    for failure in done["failed"][:MAX_TOLD]:
        output.print_note(f"{failure['id']}: {failure['message']}")
    if len(done["failed"]) > MAX_TOLD:
        output.print_note(f"and {len(done['failed']) - MAX_TOLD} more: --json lists all")


def _changes(given: _Changes, problems: list[Problem]) -> KeyChanges | None:
    """The changed fields: only the given ones."""
    from ..keys import KeyChanges

    fields: dict[str, Any] = {}
    if given.metadata:
        fields["metadata"] = options.metadata(given.metadata, problems)
    if given.groups:
        fields["groups"] = given.groups
    if not (fields or given.limits):
        return None
    try:
        return options.described(KeyChanges, fields, given.limits or None)
    except InvalidInput as error:
        problems += error.problems
        return None


async def _work(room: Strongroom, work: Bulk, cursor: str | None, *, ask: bool) -> dict[str, Any]:
    """Do the work, with a progress bar on a terminal; returns the totals."""
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
                output.print_note(f"{changed} keys were changed; continue with the same command and --cursor {cursor}")
            raise
    return {
        "dry_run": work.dry_run,
        "looked_at": looked_at,
        "changed": changed,
        "unchanged": unchanged,
        "failed": [{"id": one.id, "code": one.code, "message": one.message} for one in failed],
    }


__all__ = ["app"]
