"""Shared by commands that work on a store: its URL, opening it, the acting user, and Ctrl-C."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar
from urllib.parse import quote

import typer

from ..errors import ConfigError, StrongroomError
from . import output

if TYPE_CHECKING:
    from ..app import Strongroom
    from ..context import Context
    from ..entities import Registry

EXIT_FAILED = 1
EXIT_WRONG_CALL = 2
EXIT_INTERRUPTED = 130
DEBUG_VARIABLE = "STRONGROOM_DEBUG"

StoreOption = Annotated[
    str | None,
    typer.Option(
        "--store", metavar="URL", help="The store (default: STRONGROOM_STORE, else sqlite:///data/strongroom.db)."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output, nothing else.")]
TenantOption = Annotated[str, typer.Option("--tenant", help="The tenant.")]

T = TypeVar("T")
Absent = Literal["refused", "made", "own", "imagined"]


class Interrupted(StrongroomError):
    """Stopped. Earlier commits remain, and nothing is half done."""

    code = "interrupted"


def in_store(store: str | None, work: Callable[[Strongroom], Awaitable[T]], *, absent: Absent = "refused") -> T:
    """Open the store, do the work, close it. Raises the errors of both, Interrupted on Ctrl-C, and ConfigError if the
    file of the store does not exist and `absent` does not allow this."""
    from .. import config
    from ..app import Strongroom
    from ..served_entities import served_entities

    settings = config.load(store=store)
    entities = served_entities(settings.entities)

    async def opened() -> T:
        async with Strongroom.open(
            url,
            entities=entities,
            peppers=settings.pepper_texts,
            signing_key=settings.journal_signing_key,
            journal_days=settings.journal_days,
            archive=settings.archive,
        ) as room:
            return await work(room)

    with standing(store, settings.store_url, absent) as url:
        return run(opened)


@contextmanager
def standing(store: str | None, url: str, absent: Absent) -> Iterator[str]:
    """The URL of a store to open; `store` is the value of the option. `absent` decides for a file that does not exist:

    refused    raises ConfigError, because a mistyped name must not become a new store
    made       makes a new store, with a note
    own        makes a new store, without a note
    imagined   uses an empty temporary store of the same kind
    """
    file = store_file(url)
    if file is None or absent == "own" or os.path.exists(file):
        yield url
    elif absent == "made":
        output.print_note(f"making a new store: {file}")
        yield url
    elif absent == "imagined":
        import tempfile

        with tempfile.TemporaryDirectory(prefix="strongroom-") as folder:
            yield f"{url.partition(':')[0]}:///{quote(folder)}/store"
    else:
        from .. import config

        who = "--store" if store is not None else config.named_by(config.load())
        raise ConfigError(
            f"{who}: found {url!r}, where there is no file; expected a store (`strongroom serve`, `keys create` and "
            "others that write make a new one)"
        )


def store_file(url: str) -> str | None:
    """The path of the file in a store's URL; None for a server or an empty URL."""
    from ..storage.url import store_file as file_of

    return file_of(url)


def registry(modules: Sequence[str]) -> Registry:
    """Every entity of a server whose STRONGROOM_ENTITIES names these modules. Raises ConfigError, SchemaError."""
    from ..app import SYSTEM_ENTITIES
    from ..entities import Registry
    from ..served_entities import served_entities
    from ..tenants import refuse_reserved

    own = served_entities(modules)
    refuse_reserved(own)
    return Registry((*SYSTEM_ENTITIES, *own))


def run(work: Callable[[], Awaitable[T]]) -> T:
    """Run asynchronous work to its end. Raises Interrupted on Ctrl-C, after the work closed everything that it
    opened."""
    import asyncio

    async def entered() -> T:
        return await work()

    try:
        return asyncio.run(entered())
    except KeyboardInterrupt:
        raise Interrupted from None


@contextmanager
def as_owner() -> Iterator[None]:
    """Silence the warning that the owner of a PostgreSQL schema should not serve: these commands need the owner."""
    with without_warnings("strongroom.storage.postgres.roles"):
        yield


@contextmanager
def without_warnings(name: str) -> Iterator[None]:
    """Silence the warnings of a logger, of which the command itself prints what matters."""
    import logging

    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def operator() -> Context:
    """The context of the person at the command line: an administrator, named in the journal by the login name."""
    import getpass

    from ..context import system_context

    try:
        name = getpass.getuser()
    except (OSError, KeyError):  # the container has no such user
        name = "unknown"
    return system_context(actor=f"cli:{name}")
