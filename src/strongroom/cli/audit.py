"""`strongroom audit …`: who changed what, when, from what to what; exports, checkpoints and verification."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InvalidInput, Problem
from . import audit_upkeep, audit_verify, output, shortforms
from .files import check_target, named, new_file, write_lines
from .options import CursorOption, Options, PageOption, with_options
from .session import JsonOption, StoreOption, in_store, operator

if TYPE_CHECKING:
    from ..app import Strongroom
    from ..audit import AuditFilter, AuditRecord
    from ..entities import Page

app = typer.Typer(
    help="Read, export and verify the journal: who changed what, when.", no_args_is_help=True, rich_markup_mode=None
)
app.command("verify")(audit_verify.verify)
for _command in (audit_upkeep.retention, audit_upkeep.hold, audit_upkeep.redact):
    app.command()(_command)


def _option(help: str, metavar: str | None = None) -> Any:
    return Annotated[str | None, typer.Option(metavar=metavar, help=help)]


FILTER: Options = {
    "tenant": _option("Only this tenant's records."),
    "actor": _option("Only changes by this actor, for example key:key_0199…."),
    "action": _option("Only create, update, add, delete, expire, deny, redact, drop or rotate.", "ACTION"),
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

    from ..audit import view

    page = in_store(store, read)
    if json:
        output.print_json({"items": [view(record) for record in page.items], "next_cursor": page.next_cursor})
        return
    rows = [
        (
            str(record.sequence),
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
    columns = ("SEQUENCE", "AT", "TENANT", "ACTOR", "ACTION", "WHAT", "FIELDS", "REQUEST")
    output.print_page(columns, rows, page.next_cursor, "there are no records")


SequenceArgument = Annotated[int, typer.Argument(metavar="SEQUENCE", help="The record's sequence, as `list` has it.")]
TreeOption = Annotated[str | None, typer.Option("--tenant", help="The tenant; without it the platform.")]
FormatOption = Annotated[str, typer.Option("--format", metavar="FORMAT", help="jsonl, csv, cef or ocsf (OCSF 1.6).")]
ProofsOption = Annotated[
    bool, typer.Option("--proofs", help="Write sealed records with their proofs, for `audit verify FILE`.")
]
FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="The file to write; only its owner may read it.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Overwrite the file if it is there.")]


@app.command("show")
def show(
    sequence: SequenceArgument, tenant: TreeOption = None, store: StoreOption = None, json: JsonOption = False
) -> None:
    """Show one record, and what it changed field by field.

    \b
    Example:
      strongroom audit show 1042 --tenant acme
    """
    from ..audit import changes_of, view

    record = in_store(store, lambda room: room.audit.record(sequence, tenant))
    changes = changes_of(record)
    if json:
        output.print_json({**view(record), "changes": changes})
        return
    output.print_fields(
        [
            ("at", output.moment(record.at)),
            ("tenant", record.tenant or "(the platform)"),
            ("actor", record.actor or "(redacted)"),
            ("action", record.action),
            ("what", f"{record.collection}/{record.entity_id}" if record.entity_id else record.collection),
            ("request", record.request_id),
            ("sequence", str(record.sequence)),
            ("index", "not sealed yet" if record.index is None else str(record.index)),
        ]
    )
    if changes:
        output.print_line()
        rows = [(one["field"], _value(one["before"]), _value(one["after"])) for one in changes]
        output.print_table(("FIELD", "BEFORE", "AFTER"), rows)


def _value(value: Any) -> str:
    """A value as one line."""
    import msgspec

    return "" if value is None else value if isinstance(value, str) else msgspec.json.encode(value).decode()


@app.command("export")
@with_options(FILTER, "wanted", _filter)
def export(
    *,
    file: FileArgument,
    wanted: AuditFilter,
    format: FormatOption = "jsonl",
    proofs: ProofsOption = False,
    force: ForceOption = False,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Write the matching records to a new file.

    With --proofs, the sealed records of one tenant (without --tenant: of the platform) with everything that `audit
    verify` needs on a machine without the store.

    \b
    Example:
      strongroom audit export trail.csv --tenant acme --since 30d --format csv
      strongroom audit export acme.jsonl --tenant acme --proofs
    """
    chosen = _format(format, proofs, wanted)

    async def write(room: Strongroom) -> int:
        if proofs:
            lines = room.audit.proved(wanted.tenant, since=wanted.since, until=wanted.until)
        else:
            lines = room.audit.exported(chosen, wanted)
        return await write_lines(file, force, lines)

    with named(file):
        check_target(file, force)
    count = in_store(store, write)
    records = count - 2 if proofs else count - 1  # without the first line, and the last one of proofs
    if json:
        output.print_json({"file": str(file), "format": format, "proofs": proofs, "records": records})
    else:
        what = "records and rounds of sealing" if proofs and wanted.tenant is None else "records"
        output.print_line(f"wrote {records} {what} to {file}")


def _format(format: str, proofs: bool, wanted: AuditFilter) -> Any:
    """The format. Raises InvalidInput for one that does not exist, and for filters that proofs cannot have."""
    from ..audit import FORMATS

    problems = []
    if format not in FORMATS:
        problems.append(Problem("--format", f"found {format!r}, expected one of {', '.join(FORMATS)}"))
    elif proofs and format != "jsonl":
        problems.append(Problem("--format", f"found {format!r}, expected jsonl: other formats have no proofs"))
    if proofs:
        for name in ("actor", "action", "collection", "entity_id", "request_id"):
            if getattr(wanted, name) is not None:
                found = "proofs are of all records of a time range: leave this filter out"
                problems.append(Problem(f"--{name.replace('_', '-')}", found))
    if problems:
        raise InvalidInput(problems)
    return format


@app.command("checkpoint")
def checkpoint(tenant: TreeOption = None, store: StoreOption = None, json: JsonOption = False) -> None:
    """Print the latest signed checkpoint. Keep it elsewhere: it finds a rewritten journal and an old copy.

    \b
    Example:
      strongroom audit checkpoint > checkpoint-2026-12-01
      strongroom audit checkpoint --tenant acme > acme-checkpoint
    """
    note = in_store(store, lambda room: room.proofs.checkpoint(tenant))
    if json:
        output.print_json({"tenant": tenant, "checkpoint": note})
    else:
        output.print_text(note)


@app.command("keys")
def keys(
    rotate: Annotated[bool, typer.Option("--rotate", help="Make a new key, which signs from now on.")] = False,
    make: Annotated[
        Path | None, typer.Option("--make", metavar="FILE", help="Make a file with a first key, for a new store.")
    ] = None,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Print the public keys of the log, one a line, the current ones first. Keep them apart from the store.

    Each key is there twice: for Ed25519, and for ML-DSA-44, which also a quantum computer cannot forge.

    \b
    Example:
      strongroom audit keys > keys.txt
      strongroom audit keys --rotate
      strongroom audit keys --make /etc/strongroom/journal-key
    """
    if make is not None:
        _make_key(make, json)
        return
    found = in_store(store, lambda room: room.proofs.rotate(operator()) if rotate else room.proofs.verifiers())
    if json:
        output.print_json({"keys": [str(key) for key in found]})
        return
    if not found:
        output.print_note("there is no signing key (STRONGROOM_JOURNAL_SIGNING_KEY): checkpoints stay unsigned")
    for key in found:
        output.print_line(str(key))


def _make_key(file: Path, json: bool) -> None:
    from ..journal.signing_key import SigningKeys

    with named(file):
        check_target(file, False)
    SigningKeys(file, make=True).read()
    if json:
        output.print_json({"file": str(file)})
    else:
        output.print_line(f"made {file}: set STRONGROOM_JOURNAL_SIGNING_KEY to it on every node, and keep a copy")


@app.command("evidence")
def evidence(
    file: FileArgument,
    since: Annotated[
        str | None, typer.Option("--from", metavar="TIME", help="Records from this time on (2026-11-30T12:00Z, 90d).")
    ] = None,
    until: Annotated[str | None, typer.Option("--to", metavar="TIME", help="Records before this time.")] = None,
    force: ForceOption = False,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Write the pack that an auditor takes away: all records with proofs, checkpoints, statements, and access lists.

    `audit verify FILE` checks it without the store.

    \b
    Example:
      strongroom audit evidence evidence.zip --from 2026-01-01T00:00Z --to 2026-07-01T00:00Z
    """
    wanted = _times(since, until)
    with named(file):
        check_target(file, force)

    async def write(room: Strongroom) -> Any:
        with named(file), new_file(file, force) as new:
            return await room.evidence.write(new, wanted.since, wanted.until, context=operator())

    manifest = in_store(store, write)
    records = sum(part.records or 0 for part in manifest.parts)
    if json:
        output.print_json({"file": str(file), "parts": len(manifest.parts), "records": records})
    else:
        output.print_line(f"wrote {records} records in {len(manifest.parts)} parts to {file}")


def _times(since: str | None, until: str | None) -> AuditFilter:
    """The filter of a range of times. Raises InvalidInput."""
    given: dict[str, str | None] = dict.fromkeys(FILTER)
    try:
        found = _filter(**{**given, "since": since, "until": until})
        found.check()
    except InvalidInput as error:
        names = {"since": "--from", "until": "--to", "--since": "--from", "--until": "--to"}
        problems = [
            Problem(names.get(one.path, one.path), one.message.replace("after since", "after --from"))
            for one in error.problems
        ]
        raise InvalidInput(problems) from None
    return found
