"""`strongroom tenants …`: create, list, show, update, suspend, resume, export, import and delete tenants."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InvalidInput, Problem
from . import options, output
from .files import check_target, named, new_file
from .options import CursorOption, PageOption, YesOption, confirm, described, must_be_confirmed
from .session import JsonOption, StoreOption, in_store, operator

if TYPE_CHECKING:
    from ..app import Strongroom
    from ..tenants import DeletionStatement, Imported, Tenant

app = typer.Typer(help="Create, suspend, export and delete tenants.", no_args_is_help=True, rich_markup_mode=None)

TenantArgument = Annotated[str, typer.Argument(metavar="TENANT", help="The tenant, as paths and keys name it.")]
NameOption = Annotated[str | None, typer.Option(help="The name that people see.")]
PlanOption = Annotated[str | None, typer.Option(help="The plan that the tenant has.")]
ContactOption = Annotated[str | None, typer.Option(help="An e-mail address.")]
RegionOption = Annotated[str | None, typer.Option(help="Where the tenant's data belongs, for example eu-central-1.")]
MetadataOption = Annotated[
    list[str] | None, typer.Option("--metadata", metavar="NAME=VALUE", help="A value to keep; may be given again.")
]
ReasonOption = Annotated[str | None, typer.Option(help="Why, for the journal.")]
IdempotencyOption = Annotated[str | None, typer.Option(help="A retry with this value changes nothing (within a day).")]


@app.command()
def create(
    tenant: TenantArgument,
    name: NameOption = None,
    plan: PlanOption = None,
    contact_email: ContactOption = None,
    region: RegionOption = None,
    metadata: MetadataOption = None,
    idempotency_key: IdempotencyOption = None,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Create a tenant. A name that has data already keeps it.

    \b
    Example:
      strongroom tenants create acme --name "Acme Inc." --plan gold
    """
    from ..tenants import NewTenant

    problems: list[Problem] = []
    fields = _fields(name, plan, contact_email, region, metadata, problems)
    new = described(NewTenant, {"id": tenant, **fields}, None, problems)
    made = in_store(
        store,
        lambda room: room.tenants.create(new, context=operator(), idempotency_key=idempotency_key),
        absent="made",
    )
    _print_tenant(made, json)


@app.command("list")
def list_tenants(
    status: Annotated[str | None, typer.Option(help="Only these: active, suspended or deleting.")] = None,
    plan: Annotated[str | None, typer.Option(help="Only tenants with this plan.")] = None,
    limit: PageOption = 100,
    cursor: CursorOption = None,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """List tenants, by name: also names that nobody created and that have data.

    \b
    Example:
      strongroom tenants list --status suspended
    """
    page = in_store(store, lambda room: room.tenants.list(status=status, plan=plan, limit=limit, cursor=cursor))
    if json:
        output.print_json({"items": [one.model_dump() for one in page.items], "next_cursor": page.next_cursor})
        return
    rows = [
        (one.id, one.status, one.plan or "", output.moment(one.created_at, "in use"), one.name or "", one.reason or "")
        for one in page.items
    ]
    columns = ("TENANT", "STATUS", "PLAN", "CREATED", "NAME", "REASON")
    output.print_page(columns, rows, page.next_cursor, "there are no tenants")


@app.command()
def show(tenant: TenantArgument, store: StoreOption = None, json: JsonOption = False) -> None:
    """Show a tenant.

    \b
    Example:
      strongroom tenants show acme
    """
    _print_tenant(in_store(store, lambda room: room.tenants.get(tenant)), json)


@app.command()
def update(
    tenant: TenantArgument,
    name: NameOption = None,
    plan: PlanOption = None,
    contact_email: ContactOption = None,
    region: RegionOption = None,
    metadata: MetadataOption = None,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Change some fields of a tenant. An empty text removes a value.

    \b
    Example:
      strongroom tenants update acme --plan silver
    """
    from ..tenants import TenantChanges

    problems: list[Problem] = []
    fields = _fields(name, plan, contact_email, region, metadata, problems)
    if not fields and not problems:
        raise InvalidInput("found nothing to change, expected an option such as --plan")
    changes = described(TenantChanges, {n: v if v != "" else None for n, v in fields.items()}, None, problems)
    _print_tenant(in_store(store, lambda room: room.tenants.update(tenant, changes, context=operator())), json)


@app.command()
def suspend(
    tenant: TenantArgument, reason: ReasonOption = None, store: StoreOption = None, json: JsonOption = False
) -> None:
    """Suspend a tenant: its keys verify as DISABLED and its writes are refused, everywhere within a second.

    \b
    Example:
      strongroom tenants suspend acme --reason "invoice 17 is unpaid"
    """
    _print_tenant(in_store(store, lambda room: room.tenants.suspend(tenant, reason, context=operator())), json)


@app.command()
def resume(tenant: TenantArgument, store: StoreOption = None, json: JsonOption = False) -> None:
    """Take a suspension back.

    \b
    Example:
      strongroom tenants resume acme
    """
    _print_tenant(in_store(store, lambda room: room.tenants.resume(tenant, context=operator())), json)


@app.command()
def export(
    tenant: TenantArgument,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The file to write; only its owner may read it.")],
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file if it is there.")] = False,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Write everything that a tenant has, and its journal, to a file of JSON Lines. No secret is in it in clear.

    \b
    Example:
      strongroom tenants export acme acme.jsonl
    """

    async def work(room: Strongroom) -> int:
        lines = await room.tenants.export(tenant, context=operator())
        with named(file), new_file(file, force) as new, output.progress("reading") as progress:
            return await _written(lines, new, progress)

    with named(file):
        check_target(file, force)
    count = in_store(store, work)
    if json:
        output.print_json({"tenant": tenant, "file": str(file), "lines": count})
    else:
        output.print_line(f"wrote {count} lines of {tenant} to {file}")


@app.command("import")
def import_tenant(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file that `tenants export` wrote.")],
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Import an exported tenant, which must be empty here. The whole file is checked before anything is written.

    Its keys work as before. Webhooks, secrets in documents, and the journal's history stay behind.

    \b
    Example:
      strongroom tenants import acme.jsonl
    """

    def lines() -> Iterator[bytes]:
        with named(file), file.open("rb") as opened:
            yield from opened

    told = in_store(store, lambda room: room.tenants.import_file(lines, context=operator()), absent="made")
    _print_imported(told, json)


@app.command()
def delete(
    tenant: TenantArgument,
    reason: ReasonOption = None,
    yes: YesOption = False,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Delete a tenant and everything it has, and print the signed statement of it. Its journal stays.

    Asks first; without a terminal, --yes is needed. Run it again if it was stopped: it goes on.

    \b
    Example:
      strongroom tenants delete acme --reason "the contract ended" --yes
    """
    must_be_confirmed(yes, json, "deleting a tenant cannot be undone")

    async def work(room: Strongroom) -> DeletionStatement:
        found = await room.tenants.get(tenant)
        confirm(yes, f"Delete the tenant {output.shown(found.id)!r} and everything it has?")
        statement = await room.tenants.delete(tenant, reason, context=operator())
        assert statement is not None  # noqa: S101 - it has all the time it needs
        return statement

    statement = in_store(store, work)
    if json:
        output.print_json(statement.model_dump())
    else:
        output.print_line(statement.note.rstrip("\n"))


@app.command()
def statements(
    tenant: Annotated[str | None, typer.Option("--tenant", help="Only the deletions of this tenant.")] = None,
    limit: PageOption = 100,
    cursor: CursorOption = None,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """List the statements of deleted tenants, newest first.

    \b
    Example:
      strongroom tenants statements --tenant acme
    """
    page = in_store(store, lambda room: room.tenants.deletions.statements(tenant, limit, cursor))
    if json:
        output.print_json({"items": [one.model_dump() for one in page.items], "next_cursor": page.next_cursor})
        return
    rows = [
        (one.id, one.tenant, output.moment(one.finished_at), str(sum(one.counts.values())), one.actor, one.reason or "")
        for one in page.items
    ]
    columns = ("ID", "TENANT", "DELETED", "DOCUMENTS", "BY", "REASON")
    output.print_page(columns, rows, page.next_cursor, "no tenant was deleted")


# --- Reading the call -----------------------------------------------------------------------------------------


def _fields(
    name: str | None,
    plan: str | None,
    contact_email: str | None,
    region: str | None,
    metadata: list[str] | None,
    problems: list[Problem],
) -> dict[str, Any]:
    """The given options. Wrong ones are added to `problems`."""
    fields: dict[str, Any] = {"name": name, "plan": plan, "contact_email": contact_email, "region": region}
    if metadata is not None:
        fields["metadata"] = options.metadata(metadata, problems)
    return {name: value for name, value in fields.items() if value is not None}


# --- Files and printing ---------------------------------------------------------------------------------------


async def _written(lines: Any, new: IO[bytes], progress: Callable[[int, int], None]) -> int:
    count = 0
    async for line in lines:
        new.write(line)
        count += 1
        progress(count, count)
    return count


def _print_tenant(tenant: Tenant, json: bool) -> None:
    if json:
        output.print_json(tenant.model_dump())
        return
    output.print_fields(
        [
            ("tenant", tenant.id),
            ("name", tenant.name or ""),
            ("status", tenant.status),
            ("reason", tenant.reason or ""),
            ("suspended", output.moment(tenant.suspended_at, "")),
            ("plan", tenant.plan or ""),
            ("contact", tenant.contact_email or ""),
            ("region", tenant.region or ""),
            ("metadata", _pairs(tenant.metadata)),
            ("settings", _pairs(tenant.settings)),
            ("created", output.moment(tenant.created_at, "by its use")),
            ("changed", output.moment(tenant.updated_at, "")),
        ]
    )


def _pairs(values: Mapping[str, Any]) -> list[str]:
    return [f"{name}={value}" for name, value in values.items()]


def _print_imported(told: Imported, json: bool) -> None:
    if json:
        output.print_json({"tenant": told.tenant, "written": told.written, "left_out": told.left_out})
        return
    output.print_line(f"imported the tenant {told.tenant}")
    output.print_fields([(collection, str(count)) for collection, count in sorted(told.written.items())])
    for reason, count in told.left_out.items():
        output.print_note(f"left out {count} {reason}")
