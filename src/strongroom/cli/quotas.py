"""`strongroom quotas …`: limits that a tenant, a user or a group shares: set, list, show, statistics, delete."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InvalidInput, Problem
from . import output
from .limitviews import limit_texts, print_limits, print_mended
from .options import (
    CursorOption,
    LimitsOption,
    PageOption,
    YesOption,
    confirm,
    described,
    must_be_confirmed,
)
from .session import JsonOption, StoreOption, in_store, operator

if TYPE_CHECKING:
    from ..app import Strongroom
    from ..quotas import Quota
    from ..quotas.service import NewQuota

app = typer.Typer(
    help="Limit the shared usage of a tenant's, user's or group's keys.", no_args_is_help=True, rich_markup_mode=None
)

OfTenant = Annotated[str, typer.Option("--tenant", help="The tenant.")]
OfUser = Annotated[str | None, typer.Option("--user", help="The quota of this user of the tenant.")]
OfGroup = Annotated[str | None, typer.Option("--group", help="The quota of this group of the tenant's keys.")]


@app.command("set")
def set_quota(
    tenant: OfTenant,
    user: OfUser = None,
    group: OfGroup = None,
    limit: LimitsOption = None,
    description: Annotated[str | None, typer.Option(help="A description.")] = None,
    idempotency_key: Annotated[
        str | None, typer.Option(help="A retry with this value changes nothing (within a day).")
    ] = None,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Set the limits that the keys of a tenant, a user or a group share; replaces the old ones.

    The usage of a limit stays if its resource, window, models and routes stay.

    \b
    Example:
      strongroom quotas set --tenant acme --limit cost=100/total+10/day@Europe/Berlin --limit concurrency=20
      strongroom quotas set --tenant acme --user u1 --limit "tokens=100000/5h models=gpt-*"
    """
    kind, name = _subject(user, group)
    problems: list[Problem] = []
    if not limit:  # else a call without limits would silently remove all limits
        expected = "expected one --limit at least (`strongroom quotas delete` removes a quota)"
        problems.append(Problem("limits", f"found none, {expected}"))
    new = _new_quota(kind, tenant, name, limit or [], description, problems)
    _print_quota(
        in_store(
            store,
            lambda room: room.quotas.put(new, context=operator(), idempotency_key=idempotency_key),
            absent="made",
        ),
        json,
    )


@app.command("list")
def list_quotas(
    tenant: Annotated[str | None, typer.Option("--tenant", help="Only this tenant's quotas.")] = None,
    kind: Annotated[str | None, typer.Option("--kind", help="Only quotas of this kind: tenant, user or group.")] = None,
    limit: PageOption = 100,
    cursor: CursorOption = None,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """List quotas, by tenant, kind and name.

    \b
    Example:
      strongroom quotas list --tenant acme --kind user
    """
    page = in_store(store, lambda room: room.quotas.list(tenant=tenant, kind=kind, limit=limit, cursor=cursor))
    if json:
        output.print_json({"items": [one.model_dump() for one in page.items], "next_cursor": page.next_cursor})
        return
    rows = [
        (one.tenant, one.kind, one.name, "  ".join(limit_texts(one.limits)), one.description or "")
        for one in page.items
    ]
    columns = ("TENANT", "KIND", "NAME", "LIMITS", "DESCRIPTION")
    output.print_page(columns, rows, page.next_cursor, "there are no quotas")


@app.command()
def show(
    tenant: OfTenant, user: OfUser = None, group: OfGroup = None, store: StoreOption = None, json: JsonOption = False
) -> None:
    """Show a quota.

    \b
    Example:
      strongroom quotas show --tenant acme --user u1
    """
    kind, name = _subject(user, group)
    _print_quota(in_store(store, lambda room: room.quotas.get(kind, tenant, name)), json)


@app.command()
def stats(
    tenant: OfTenant, user: OfUser = None, group: OfGroup = None, store: StoreOption = None, json: JsonOption = False
) -> None:
    """Show a quota's usage by all its keys: each limit's window, and totals.

    \b
    Example:
      strongroom quotas stats --tenant acme
    """
    kind, name = _subject(user, group)
    found = in_store(store, lambda room: room.quotas.stats(kind, tenant, name))
    if json:
        output.print_json(found.shown())
        return
    output.print_fields(
        [
            *_subject_fields(found.quota),
            ("uses", str(found.count)),
            ("last used", output.moment(found.last_used_at)),
            *((f"total {resource}", str(amount)) for resource, amount in found.totals.items()),
        ]
    )
    print_limits(found.limits)


@app.command()
def delete(
    tenant: OfTenant,
    user: OfUser = None,
    group: OfGroup = None,
    yes: YesOption = False,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Delete a quota and its usage.

    Asks first; without a terminal, --yes is needed.

    \b
    Example:
      strongroom quotas delete --tenant acme --group free --yes
    """
    kind, name = _subject(user, group)
    must_be_confirmed(yes, json, "removing a quota cannot be undone")

    async def remove(room: Strongroom) -> Quota:
        quota = await room.quotas.get(kind, tenant, name)
        confirm(yes, f"Remove the quota of {_shown_subject(quota)}?")
        await room.quotas.delete(kind, tenant, name, context=operator())
        return quota

    quota = in_store(store, remove)
    if json:
        output.print_json({"deleted": quota.id})
    else:
        output.print_line(f"removed the quota of {_shown_subject(quota)}")


@app.command("mend-clock")
def mend_clock(
    tenant: OfTenant, user: OfUser = None, group: OfGroup = None, store: StoreOption = None, json: JsonOption = False
) -> None:
    """Reset the time of a quota that was used while the clock was wrong and ahead.

    This frees no usage: usage of the later time counts as used now. A quota whose time is more than a day ahead is
    reset automatically.

    \b
    Example:
      strongroom quotas mend-clock --tenant acme --group free
    """
    kind, name = _subject(user, group)
    print_mended(in_store(store, lambda room: room.quotas.mend_clock(kind, tenant, name, context=operator())), json)


# --- Reading the call -----------------------------------------------------------------------------------------


def _subject(user: str | None, group: str | None) -> tuple[str, str]:
    """The kind and the name of the quota that the options name."""
    if user is not None and group is not None:
        raise InvalidInput(
            [Problem("group", "cannot be combined with --user: a quota belongs to a user or to a group")]
        )
    if user is not None:
        return "user", user
    return ("group", group) if group is not None else ("tenant", "")


def _new_quota(
    kind: str, tenant: str, name: str, limits: list[str], description: str | None, problems: list[Problem]
) -> NewQuota:
    """The quota from the options. Raises InvalidInput with every problem."""
    from ..quotas.service import NewQuota

    fields = {"kind": kind, "tenant": tenant, "name": name, "description": description}
    return described(NewQuota, fields, limits, problems)


# --- Printing -------------------------------------------------------------------------------------------------


def _print_quota(quota: Quota, json: bool) -> None:
    if json:
        output.print_json(quota.model_dump())
        return
    output.print_fields(
        [
            *_subject_fields(quota),
            ("limits", limit_texts(quota.limits)),
            ("description", quota.description or ""),
            ("created", output.moment(quota.created_at)),
            ("changed", output.moment(quota.updated_at)),
        ]
    )


def _subject_fields(quota: Quota) -> list[tuple[str, str]]:
    own = [] if quota.kind == "tenant" else [(quota.kind, quota.name)]
    return [("tenant", quota.tenant), *own]


def _shown_subject(quota: Quota) -> str:
    of_tenant = f"the tenant {output.shown(quota.tenant)!r}"
    return of_tenant if quota.kind == "tenant" else f"the {quota.kind} {output.shown(quota.name)!r} of {of_tenant}"
