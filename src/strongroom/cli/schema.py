"""`strongroom schema …`: what the declared entities ask of the store, and their JSON Schema."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from . import output
from .session import JsonOption, StoreOption, run

if TYPE_CHECKING:
    from ..entity import Registry
    from ..storage.port import SchemaChange

app = typer.Typer(
    help="Compare the declared entities with the store, and make it fit.", no_args_is_help=True, rich_markup_mode=None
)

EntitiesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--entities",
        metavar="MODULE",
        help="A Python module that declares entities, seen from here; may be given again.",
    ),
]
DestructiveOption = Annotated[
    bool, typer.Option("--allow-destructive", help="Also what loses data: fields dropped or of another type.")
]


@app.command()
def plan(
    entities: EntitiesOption = None,
    allow_destructive: DestructiveOption = False,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Say how the store differs from the declarations; change nothing.

    \b
    Example:
      strongroom schema plan --entities myapp.entities
    """
    _print_changes(_prepare(entities, store, "plan", allow_destructive), json, "would be made")


@app.command()
def apply(
    entities: EntitiesOption = None,
    allow_destructive: DestructiveOption = False,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Make the store fit the declarations. What loses data is refused without --allow-destructive.

    \b
    Example:
      strongroom schema apply --entities myapp.entities
    """
    _print_changes(_prepare(entities, store, "apply", allow_destructive), json, "made")


@app.command()
def export(
    entities: EntitiesOption = None,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Print the JSON Schema of every entity, by collection (always JSON; the store is not opened).

    \b
    Example:
      strongroom schema export --entities myapp.entities > schema.json
    """
    from ..config import load

    output.print_json(_registry(entities or load(store=store).entities).json_schema())


def _prepare(
    modules: Sequence[str] | None, store: str | None, mode: Literal["plan", "apply"], allow_destructive: bool
) -> tuple[SchemaChange, ...]:
    from ..config import load
    from ..storage import open_store

    settings = load(store=store)
    registry = _registry(modules or settings.entities)

    async def work() -> tuple[SchemaChange, ...]:
        opened = await open_store(settings.store_url)
        try:
            return await opened.prepare(registry.collections, mode=mode, allow_destructive=allow_destructive)
        finally:
            await opened.close()

    return run(work)


def _registry(modules: Sequence[str]) -> Registry:
    """Strongroom's own entities and those that the modules declare. Raises ConfigError, SchemaError."""
    from ..app import SYSTEM_ENTITIES
    from ..config import load_entities
    from ..entity import Registry

    return Registry((*SYSTEM_ENTITIES, *load_entities(modules)))


def _print_changes(changes: tuple[SchemaChange, ...], json: bool, done: str) -> None:
    if json:
        items = [
            {
                "kind": str(c.kind),
                "collection": c.collection,
                "name": c.name,
                "destructive": c.destructive,
                "detail": c.detail,
            }
            for c in changes
        ]
        output.print_json({"changes": items})
        return
    for change in changes:
        output.print_line(f"{change}{' (loses data)' if change.destructive else ''}")
    output.print_note(f"{len(changes)} changes {done}" if changes else "the store fits the declarations")
