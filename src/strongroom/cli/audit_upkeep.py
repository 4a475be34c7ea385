"""`strongroom audit retention|hold|redact`: how long records are kept, legal holds, and redaction."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InvalidInput, Problem
from . import output, shortforms
from .options import confirm, must_be_confirmed
from .session import JsonOption, StoreOption, in_store, operator

if TYPE_CHECKING:
    from ..app import Strongroom
    from ..audit import Kept, LegalHold, Redaction

FLAGS = {"entity_id": "id", "floor_days": "floor"}
"""The option, without its dashes, that sets a field."""

OfTenant = Annotated[str | None, typer.Option("--tenant", help="Only this tenant.")]
User = Annotated[str | None, typer.Option("--user", help="What this user did: the actor of the records.")]
Collection = Annotated[str | None, typer.Option("--collection", help="Records of this collection.")]
Id = Annotated[str | None, typer.Option("--id", help="With --collection: of the document with this id.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]


def retention(
    tenant: OfTenant = None,
    platform: Annotated[bool, typer.Option("--platform", help="Only the platform's own records.")] = False,
    days: Annotated[int | None, typer.Option(help="Keep records so many days.")] = None,
    floor: Annotated[int | None, typer.Option(help="The least days that must be kept. It is never lowered.")] = None,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Show how long records are kept, or set it: for all tenants, or for one.

    \b
    Example:
      strongroom audit retention --tenant acme --days 2557 --floor 183
      strongroom audit retention --floor 183
    """

    if platform and tenant is not None:
        raise InvalidInput([Problem("--platform", "found it beside --tenant, expected one of the two")])

    async def work(room: Strongroom) -> Kept:
        everyone = tenant is None and not platform
        if days is None and floor is None:
            return await room.retention.of(tenant, everyone=everyone)
        return await room.retention.set(tenant, everyone=everyone, days=days, floor_days=floor, context=operator())

    kept = in_store(store, work)
    if json:
        output.print_json({"tenant": kept.tenant, "days": kept.days, "floor_days": kept.floor_days})
        return
    how_long = "for ever" if kept.days is None else f"{kept.days} days"
    output.print_line(f"records are kept {how_long}; the floor is {kept.floor_days} days")


def hold(
    reason: Annotated[str | None, typer.Option(help="Why: for the journal. Without it the holds are listed.")] = None,
    tenant: OfTenant = None,
    user: User = None,
    collection: Collection = None,
    id: Id = None,
    since: Annotated[str | None, typer.Option(metavar="TIME", help="Records not before this time.")] = None,
    until: Annotated[str | None, typer.Option(metavar="TIME", help="Records before this time.")] = None,
    lift: Annotated[str | None, typer.Option(metavar="HOLD", help="Lift the legal hold with this id.")] = None,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Place a legal hold on records, lift one, or list the active ones.

    Until it is lifted, retention, redaction and the deletion of the tenant are blocked.

    \b
    Example:
      strongroom audit hold --tenant acme --user user:ada --reason "case 2026-17"
      strongroom audit hold
      strongroom audit hold --lift 1a22fe130a41d0a1b2 --reason "case closed"
    """
    problems: list[Problem] = []
    now = datetime.now(UTC)
    begin, end = (
        None if text is None else shortforms.one(name, text, lambda one: shortforms.past(one, now), problems)
        for name, text in (("--since", since), ("--until", until))
    )
    subject = {"tenant": tenant, "user": user, "collection": collection, "entity_id": id, "since": begin, "until": end}
    given = [name for name, value in subject.items() if value is not None]
    if lift is not None and given:
        problems.append(Problem("--lift", "takes no other option than --reason"))
    if lift is not None and reason is None:
        problems.append(Problem("--reason", "is needed to lift a legal hold"))
    if lift is None and reason is None and set(given) - {"tenant"}:
        problems.append(Problem("--reason", "is needed to place a legal hold"))
    if problems:
        raise InvalidInput(problems)

    async def work(room: Strongroom) -> list[LegalHold]:
        if reason is None:
            return [one for one in await room.legal_holds.active() if tenant is None or one.concerns(tenant)]
        if lift is not None:
            return [await room.legal_holds.lift(lift, reason, context=operator())]
        return [await room.legal_holds.place(reason, **subject, context=operator())]  # type: ignore[arg-type]

    found = in_store(store, work)
    if json:
        output.print_json({"items": [_view(one) for one in found]} if reason is None else _view(found[0]))
    elif reason is None:
        rows = [(one.id, one.tenant or "all", _subject(one), one.placed_by, one.reason) for one in found]
        output.print_page(("ID", "TENANT", "WHAT", "BY", "REASON"), rows, None, "there are no legal holds")
    else:
        output.print_line(f"legal hold {found[0].id} {'placed' if lift is None else 'lifted'}")


def redact(
    reason: Annotated[str, typer.Option(help="Why: the records show it.")],
    tenant: OfTenant = None,
    user: User = None,
    collection: Collection = None,
    id: Id = None,
    yes: Yes = False,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Remove what the journal says of one document or one user of a tenant, in the archive too.

    Without --tenant the platform's own records are meant. The leaves stay, so every proof still holds.

    \b
    Example:
      strongroom audit redact --tenant acme --user user:ada --reason "erasure request 12" --yes
      strongroom audit redact --tenant acme --collection notes --id n1 --reason "erasure request 12" --yes
    """
    must_be_confirmed(yes, json, "what is removed cannot be restored")
    confirm(yes, "What is removed cannot be restored. Go on?")

    async def work(room: Strongroom) -> Redaction:
        from ..audit import Subject

        return await room.redactions.redact(Subject(tenant, user, collection, id), reason, context=operator())

    done = in_store(store, work)
    if json:
        output.print_json({"record": done.record, "records": done.records, "archived": done.archived})
    else:
        output.print_line(f"{done.records} records redacted, and {done.archived} in the archive")


def _view(hold: LegalHold) -> dict[str, Any]:
    return hold.model_dump(mode="json", exclude={"version", "updated_at"})


def _subject(hold: LegalHold) -> str:
    parts = [hold.user or "", f"{hold.collection}/{hold.entity_id or '*'}" if hold.collection else ""]
    if hold.since or hold.until:
        parts.append(
            f"{output.moment(hold.since) if hold.since else ''}..{output.moment(hold.until) if hold.until else ''}"
        )
    return " ".join(filter(None, parts)) or "all records"
