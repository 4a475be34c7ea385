"""`open_store(url)`: the one place that knows which backend serves which URL; backends are imported only when used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import unquote, urlsplit

from ..errors import ConfigError
from .port import Store

SCHEMES = ("sqlite", "json", "postgresql", "postgres", "firestore")
_FILES = ("sqlite", "json")


def store_for(url: str) -> Store:
    """A backend for `url`, not yet opened.

    `sqlite:///relative/path.db`, `sqlite:////absolute/path.db`, `json:///path.json`, `json://:memory:`,
    `postgresql://user:password@host:port/database?schema=…` (its options: `PostgresStore`),
    `firestore://project/database?collection=…&emulator=host:port`.
    Raises ConfigError for anything else.
    """
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in SCHEMES:
        known = ", ".join(f"{s}:///path" for s in _FILES)
        raise ConfigError(
            f"store {_masked(url)!r}: expected a URL such as {known}, json://:memory:, "
            "postgresql://user@host/database or firestore://project/database"
        )
    if scheme in ("postgresql", "postgres"):
        with _needing("postgres", "a postgresql:// store"):
            from .postgres.store import PostgresStore

        return PostgresStore(url)
    if scheme == "firestore":
        with _needing("firestore", "a firestore:// store"):
            from .firestore.store import FirestoreStore

        return FirestoreStore.from_url(url)
    path = unquote(rest.partition("?")[0])
    if scheme == "json" and path == ":memory:":
        from .jsonfile.store import JsonStore

        return JsonStore(None)
    if not path.startswith("/") or path == "/":
        raise ConfigError(
            f"store {url!r}: expected {scheme}:/// and a path, for example {scheme}:///data/strongroom.db"
        )
    path = path[1:]
    if scheme == "json":
        from .jsonfile.store import JsonStore

        return JsonStore(path)
    from .sqlite.store import SqliteStore

    return SqliteStore(path)


@contextmanager
def _needing(extra: str, what: str) -> Iterator[None]:
    """Guards imports that need an extra of the package. ConfigError names the extra if it is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "strongroom":
            raise
        raise ConfigError(f"{what} needs the module {error.name}: pip install 'strongroom[{extra}]'") from None


def _masked(url: str) -> str:
    try:
        parts = urlsplit(url)
    except ValueError:
        return url.partition(":")[0] + ":…"
    return url.replace(parts.password, "***") if parts.password else url


async def open_store(url: str) -> Store:
    """As `store_for`, opened."""
    store = store_for(url)
    await store.open()
    return store
