"""`strongroom webhooks …`: create, list, show, update, test and delete endpoints; list and redrive deliveries."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InvalidInput, Problem
from . import output, shortforms
from .options import (
    CursorOption,
    PageOption,
    YesOption,
    confirm,
    described,
    duration_s,
    must_be_confirmed,
)
from .session import EXIT_FAILED, JsonOption, StoreOption, in_store, operator

if TYPE_CHECKING:
    from ..app import Strongroom
    from ..webhooks import Delivery, IssuedWebhook, Webhook

app = typer.Typer(help="Send events to other systems by signed webhooks.", no_args_is_help=True, rich_markup_mode=None)

IdArgument = Annotated[str, typer.Argument(metavar="ID", help="The webhook's id, as `webhooks list` shows it.")]
EventOption = Annotated[
    list[str] | None,
    typer.Option(
        "--event", help="An event type: limit.threshold, key.leaked, or * for all (the default); may be given again."
    ),
]
ThresholdOption = Annotated[
    list[int] | None,
    typer.Option(
        "--threshold", metavar="PERCENT", help="A percentage of a limit (default: 50, 80 and 100); may be given again."
    ),
]
MinWindowOption = Annotated[
    str | None,
    typer.Option(metavar="DURATION", help="Only limits whose window has at least this length, for example 1h."),
]
DescriptionOption = Annotated[str | None, typer.Option(help="A description.")]
ONCE = "Keep this secret now: it cannot be shown again."


@app.command()
def create(
    url: Annotated[str, typer.Option("--url", help="The receiver: https://…")],
    tenant: Annotated[str, typer.Option("--tenant", help="The tenant of the events; * for every tenant.")] = "default",
    event: EventOption = None,
    threshold: ThresholdOption = None,
    min_window: MinWindowOption = None,
    description: DescriptionOption = None,
    allow_private: Annotated[bool, typer.Option("--allow-private", help="Allow a private address, and http.")] = False,
    idempotency_key: Annotated[
        str | None, typer.Option(help="A retry with this value gets the same webhook (within a day).")
    ] = None,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Create a webhook and print its signing secret, once.

    \b
    Example:
      strongroom webhooks create --url https://hooks.example.com/strongroom --tenant acme \\
          --event limit.threshold --threshold 80 --threshold 100
    """
    from ..webhooks import NewWebhook

    problems: list[Problem] = []
    fields = _fields(event, threshold, min_window, description, problems)
    fields |= {"url": url, "tenant": tenant, "allow_private": allow_private}
    new = described(NewWebhook, fields, None, problems)
    made = in_store(
        store,
        lambda room: room.webhooks.create(new, context=operator(), idempotency_key=idempotency_key),
        absent="made",
    )
    _print_issued(made, json)


@app.command("list")
def list_webhooks(
    tenant: Annotated[str | None, typer.Option("--tenant", help="Only this tenant's webhooks.")] = None,
    limit: PageOption = 100,
    cursor: CursorOption = None,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """List webhooks, newest first.

    \b
    Example:
      strongroom webhooks list --tenant acme
    """
    page = in_store(store, lambda room: room.webhooks.list(tenant=tenant, limit=limit, cursor=cursor))
    if json:
        output.print_json({"items": [webhook_view(one) for one in page.items], "next_cursor": page.next_cursor})
        return
    rows = [(one.id, one.tenant, one.url, " ".join(one.events), _state(one)) for one in page.items]
    output.print_page(("ID", "TENANT", "URL", "EVENTS", "STATE"), rows, page.next_cursor, "there are no webhooks")


@app.command()
def show(id: IdArgument, store: StoreOption = None, json: JsonOption = False) -> None:
    """Show a webhook.

    \b
    Example:
      strongroom webhooks show whk_0199f3c2…
    """
    _print_webhook(in_store(store, lambda room: room.webhooks.get(id)), json)


@app.command()
def update(
    id: IdArgument,
    url: Annotated[str | None, typer.Option("--url", help="The new receiver: https://…")] = None,
    event: EventOption = None,
    threshold: ThresholdOption = None,
    min_window: MinWindowOption = None,
    description: DescriptionOption = None,
    enable: Annotated[bool | None, typer.Option("--enable/--disable", help="Whether events are sent to it.")] = None,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Change a webhook; values that are not given stay.

    \b
    Example:
      strongroom webhooks update whk_0199f3c2… --enable
    """
    from ..webhooks import WebhookChanges

    problems: list[Problem] = []
    fields = _fields(event, threshold, min_window, description, problems)
    fields |= {name: value for name, value in (("url", url), ("enabled", enable)) if value is not None}
    if not fields and not problems:
        raise InvalidInput("no change was given: expected an option such as --url")
    changes = described(WebhookChanges, fields, None, problems)
    _print_webhook(in_store(store, lambda room: room.webhooks.update(id, changes, context=operator())), json)


@app.command("rotate-secret")
def rotate_secret(
    id: IdArgument,
    overlap: Annotated[str, typer.Option(metavar="DURATION", help="How long both secrets sign.")] = "1d",
    idempotency_key: Annotated[
        str | None, typer.Option(help="A retry with this value gets the same secret (within a day).")
    ] = None,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Give a webhook a new signing secret and print it, once.

    \b
    Example:
      strongroom webhooks rotate-secret whk_0199f3c2… --overlap 1d
    """
    overlap_s = duration_s("overlap", overlap)
    made = in_store(
        store,
        lambda room: room.webhooks.rotate_secret(
            id, overlap_s=overlap_s, context=operator(), idempotency_key=idempotency_key
        ),
    )
    _print_issued(made, json)


@app.command()
def delete(
    id: IdArgument,
    yes: YesOption = False,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Delete a webhook and its waiting deliveries.

    Asks first; without a terminal, --yes is needed.

    \b
    Example:
      strongroom webhooks delete whk_0199f3c2… --yes
    """
    must_be_confirmed(yes, json, "removing a webhook cannot be undone")

    async def remove(room: Strongroom) -> Webhook:
        webhook = await room.webhooks.get(id)
        confirm(yes, f"Remove {webhook.id}, {output.shown(webhook.url)!r}?")
        await room.webhooks.delete(id, context=operator())
        return webhook

    webhook = in_store(store, remove)
    if json:
        output.print_json({"deleted": webhook.id})
    else:
        output.print_line(f"removed {webhook.id} ({webhook.url})")


@app.command("test")
def ping(id: IdArgument, store: StoreOption = None, json: JsonOption = False) -> None:
    """Send a test event to a webhook and print the result. Exit status 1 if it was not accepted.

    \b
    Example:
      strongroom webhooks test whk_0199f3c2…
    """
    delivery = in_store(store, lambda room: room.deliveries.test(id, context=operator()))
    _print_delivery(delivery, json)
    if delivery.state != "delivered":
        raise typer.Exit(EXIT_FAILED)


@app.command()
def deliveries(
    id: IdArgument,
    state: Annotated[
        str | None, typer.Option(metavar="STATE", help="Only deliveries in this state: pending, delivered or dead.")
    ] = None,
    limit: PageOption = 100,
    cursor: CursorOption = None,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """List a webhook's deliveries, newest first.

    \b
    Example:
      strongroom webhooks deliveries whk_0199f3c2… --state dead
    """
    if state not in (None, "pending", "delivered", "dead"):
        raise InvalidInput([Problem("state", f"found {state!r}, expected pending, delivered or dead")])
    page = in_store(
        store,
        lambda room: room.deliveries.list(id, state=state, limit=limit, cursor=cursor),  # type: ignore[arg-type]
    )
    if json:
        output.print_json({"items": [one.model_dump() for one in page.items], "next_cursor": page.next_cursor})
        return
    rows = [
        (one.id, one.event_type, one.state, str(one.attempts), output.moment(one.last_attempt_at), _came(one))
        for one in page.items
    ]
    columns = ("ID", "EVENT", "STATE", "ATTEMPTS", "LAST", "ANSWER")
    output.print_page(columns, rows, page.next_cursor, "there are no deliveries")


@app.command()
def redrive(
    id: Annotated[str, typer.Argument(metavar="ID", help="The delivery's id, as `webhooks deliveries` shows it.")],
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Restart a delivery, with the same event id; a server on this store sends it.

    \b
    Example:
      strongroom webhooks redrive dlv_5e1f…
    """
    _print_delivery(in_store(store, lambda room: room.deliveries.redrive(id, context=operator())), json)


# --- Reading the call -----------------------------------------------------------------------------------------


def _fields(
    event: list[str] | None,
    threshold: list[int] | None,
    min_window: str | None,
    description: str | None,
    problems: list[Problem],
) -> dict[str, Any]:
    """The given options as an endpoint's fields. Errors are added to `problems`."""
    fields: dict[str, Any] = {}
    if event:
        fields["events"] = event
    if threshold:
        fields["thresholds"] = threshold
    if min_window is not None:
        seconds = shortforms.one("min_window", min_window, shortforms.seconds, problems)
        fields |= {} if seconds is None else {"min_window_s": seconds}
    if description is not None:
        fields["description"] = description
    return fields


# --- Printing -------------------------------------------------------------------------------------------------


def webhook_view(webhook: Webhook) -> dict[str, Any]:
    """An endpoint as JSON, as over HTTP: everything except its secrets."""
    return webhook.model_dump(exclude={"secret", "previous_secret"})


def _print_issued(made: IssuedWebhook, json: bool) -> None:
    if json:
        output.print_json({**webhook_view(made.webhook), "secret": made.secret})
        return
    output.print_secret("secret", made.secret, ONCE, lambda: _print_webhook(made.webhook, json))


def _print_webhook(webhook: Webhook, json: bool) -> None:
    if json:
        output.print_json(webhook_view(webhook))
        return
    fields = [
        ("id", webhook.id),
        ("tenant", webhook.tenant),
        ("url", webhook.url),
        ("events", " ".join(webhook.events)),
        ("thresholds", " ".join(f"{threshold}%" for threshold in webhook.thresholds)),
        ("windows from", shortforms.show_seconds(webhook.min_window_s) if webhook.min_window_s else ""),
        ("about", webhook.description or ""),
        ("state", _state(webhook)),
        ("private", "allowed" if webhook.allow_private else ""),
        ("created", output.moment(webhook.created_at)),
        ("old secret until", output.moment(webhook.previous_until, "")),
        ("failing since", output.moment(webhook.failing_since, "")),
    ]
    output.print_fields(fields)


def _print_delivery(delivery: Delivery, json: bool) -> None:
    if json:
        output.print_json(delivery.model_dump())
        return
    fields = [
        ("id", delivery.id),
        ("webhook", delivery.webhook_id),
        ("event", f"{delivery.event_id} ({delivery.event_type})"),
        ("state", delivery.state),
        ("attempts", str(delivery.attempts)),
        ("answer", _came(delivery)),
        ("next attempt", output.moment(delivery.due_at, "")),
    ]
    output.print_fields(fields)


def _came(delivery: Delivery) -> str:
    """The result of the last attempt."""
    return delivery.last_error or (str(delivery.last_status) if delivery.last_status is not None else "")


def _state(webhook: Webhook) -> str:
    if not webhook.enabled:
        return f"disabled: {webhook.disabled_reason}" if webhook.disabled_reason else "disabled"
    return "failing" if webhook.failing_since is not None else "active"
