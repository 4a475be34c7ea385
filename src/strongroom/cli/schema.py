"""`strongroom schema …`: compares the declared entities with the store; roles, index advice, JSON Schema."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import typer

from ..errors import ConfigError, SchemaError
from . import output
from .session import (
    Absent,
    JsonOption,
    StoreOption,
    as_owner,
    registry,
    run,
    standing,
)

if TYPE_CHECKING:
    from ..entities import Registry
    from ..storage.port import Advice, SchemaChange, Store

T = TypeVar("T")

app = typer.Typer(
    help="Compare the declared entities with the store and apply the changes; roles, indexes, retention.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

EntitiesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--entities",
        metavar="MODULE",
        help="A Python module that declares entities, importable from this folder; may be given again.",
    ),
]
DestructiveOption = Annotated[
    bool, typer.Option("--allow-destructive", help="Include changes that lose data: removed fields, changed types.")
]


@app.command()
def plan(
    entities: EntitiesOption = None,
    allow_destructive: DestructiveOption = False,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Show how the store differs from the declarations; change nothing.

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
    """Change the store to match the declarations. A loss of data needs --allow-destructive.

    \b
    Example:
      strongroom schema apply --entities myapp.entities
    """
    _print_changes(_prepare(entities, store, "apply", allow_destructive), json, "made")


@app.command()
def export(
    entities: EntitiesOption = None,
    format: Annotated[
        Literal["json-schema", "firestore"],
        typer.Option("--format", help="JSON Schema of every entity, or the files for Firestore's deployment."),
    ] = "json-schema",
    directory: Annotated[
        Path, typer.Option("--directory", metavar="DIR", help="The folder for Firestore's files.")
    ] = Path(),
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Print the JSON Schema of every entity, by collection, always as JSON; or write firestore.indexes.json and
    firestore.rules. The store is not opened.

    \b
    Example:
      strongroom schema export --entities myapp.entities > schema.json
      strongroom schema export --format firestore --directory deploy
    """
    from ..config import load

    settings = load(store=store)
    declared = registry(entities or settings.entities)
    if format == "json-schema":
        output.print_json(declared.json_schema())
        return
    files = _deployment(declared, settings.firestore_collection)
    if json:
        output.print_json(files)
        return
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name).write_text(text)
        print(f"wrote {directory / name}")


def _deployment(registry: Registry, keys_collection: str) -> dict[str, str]:
    """What is deployed beside Firestore, whichever store is configured: the files do not depend on a project."""
    from urllib.parse import quote

    from ..storage import store_for

    named = store_for(f"firestore://project?collection={quote(keys_collection, safe='')}")
    files: dict[str, str] = named.deployment(registry.collections)  # type: ignore[attr-defined]  # Firestore's own
    return files


@app.command()
def roles(
    owner: Annotated[
        str, typer.Option("--owner", help="The role that owns the tables and migrates.")
    ] = "strongroom_owner",
    application: Annotated[
        str,
        typer.Option(
            "--application", help="The role of the nodes: reads and writes documents, appends to the journal."
        ),
    ] = "strongroom_app",
    retention: Annotated[
        str, typer.Option("--retention", help="The role that drops the journal's old partitions.")
    ] = "strongroom_retention",
    reader: Annotated[
        str,
        typer.Option(
            "--reader", help="The role that reads the journal of all tenants; the application role switches to it."
        ),
    ] = "strongroom_reader",
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Print the SQL of PostgreSQL's roles and grants, for an administrator to run (the store is not opened).

    \b
    Example:
      strongroom schema roles --application api | psql --host db --username postgres strongroom
    """
    from ..config import load
    from ..storage import store_for

    named = store_for(load(store=store).store_url)
    roles_sql = getattr(named, "roles_sql", None)
    if roles_sql is None:
        raise ConfigError(f"a {named.capabilities.name} store has no roles: name a postgresql:// store")
    sql: str = roles_sql(owner, application, retention, reader)
    if json:
        output.print_json({"sql": sql})
    else:
        sys.stdout.write(sql)


@app.command()
def views(
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Print the SQL of the views over usage, for the tables' owner to run (the store is not opened).

    \b
    Example:
      strongroom schema views | sqlite3 data/strongroom.db
    """
    from ..config import load
    from ..limits import views_sql
    from ..storage import store_for

    named = store_for(load(store=store).store_url)
    schema: str = getattr(getattr(named, "settings", None), "schema", "")
    sql = views_sql(named.capabilities.name, schema)
    if json:
        output.print_json({"sql": sql})
    else:
        sys.stdout.write(sql)


@app.command()
def advise(
    entities: EntitiesOption = None,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Show indexes that serve no counted query, and counted queries that no index serves.

    \b
    Example:
      strongroom schema advise --entities myapp.entities
    """
    from ..database import index_advice as advice

    async def work(opened: Store, declared: Registry) -> list[Advice]:
        collections = {c.name: c for c in (*declared.collections, advice.QueryShape.__collection__)}
        missing = await opened.prepare(list(collections.values()), mode="plan")
        if missing:
            raise SchemaError(
                f"the store does not match the declarations yet ({len(missing)} changes): run `strongroom schema apply`"
            )
        await opened.prepare(list(collections.values()))
        return await advice.advise(opened, list(collections.values()))

    found = _with_store(entities, store, work)
    if json:
        output.print_json({"advice": found})
        return
    for item in found:
        output.print_line(str(item))
    output.print_note(f"{len(found)} pieces of advice" if found else "no advice for the counted queries")


@app.command()
def retain(
    days: Annotated[int, typer.Argument(min=1, help="Only partitions of months that ended so many days ago.")],
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Drop the journal's empty old partitions and create those of the next months (PostgreSQL only).

    Nodes do this by themselves. The records are dropped by retention: see `strongroom audit retention`.

    \b
    Example:
      strongroom schema retain 400 --store postgresql://strongroom_retention@db/strongroom
    """

    async def work(opened: Store) -> tuple[int, int]:
        from ..storage.port import JournalPartitions, unwrapped

        journal = unwrapped(opened)
        if not isinstance(journal, JournalPartitions):
            raise ConfigError(f"a {opened.capabilities.name} store has no partitions of its journal to drop")
        made = await journal.make_journal_partitions()
        return made, await journal.drop_journal_before(await opened.now_us() - days * 86_400_000_000)

    made, dropped = _opened(store, work)
    if json:
        output.print_json({"made": made, "dropped": dropped})
    else:
        output.print_line(f"{dropped} partitions dropped, {made} made")


def _prepare(
    modules: Sequence[str] | None, store: str | None, mode: Literal["plan", "apply"], allow_destructive: bool
) -> tuple[SchemaChange, ...]:
    async def work(opened: Store, declared: Registry) -> tuple[SchemaChange, ...]:
        return await opened.prepare(declared.collections, mode=mode, allow_destructive=allow_destructive)

    with output.log_on_terminal("strongroom.storage"):
        return _with_store(modules, store, work, "imagined" if mode == "plan" else "made")


def _with_store(
    modules: Sequence[str] | None,
    store: str | None,
    work: Callable[[Store, Registry], Awaitable[T]],
    absent: Absent = "refused",
) -> T:
    """Work on the store, with the declared entities, before it is prepared."""
    from ..config import load

    declared = registry(modules or load(store=store).entities)
    return _opened(store, lambda opened: work(opened, declared), absent)


def _opened(store: str | None, work: Callable[[Store], Awaitable[T]], absent: Absent = "refused") -> T:
    from ..config import load
    from ..storage import open_store

    settings = load(store=store)

    async def opened() -> T:
        held = await open_store(url)
        try:
            return await work(held)
        finally:
            await held.close()

    with as_owner(), standing(store, settings.store_url, absent) as url:
        return run(opened)


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
    output.print_note(f"{len(changes)} changes {done}" if changes else "the store matches the declarations")
