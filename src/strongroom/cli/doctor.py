"""`strongroom doctor`: checks settings, store, roles, schema, clock, disk and access, with a remedy for each
problem."""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

import typer

from ..errors import ConfigError, StrongroomError
from . import output
from .session import (
    EXIT_FAILED,
    JsonOption,
    StoreOption,
    as_owner,
    registry,
    run,
    store_file,
)

if TYPE_CHECKING:
    from ..config import Settings
    from ..entities import Collection
    from ..storage.port import Store
    from ..tenants import TokenSettings

MAX_OFFSET_S = 1.0
"""A wrong machine clock shifts the times in logs and expiring links. Limits use the store's clock."""
SLOW_READ_S = 0.1
SLOW_SYNC_S = 0.02
"""Each group of writes waits for one sync: 20 ms are 50 groups a second."""
SYNCS = 5
Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Check:
    """One check: its name, status, finding, and the remedy (empty if the status is ok)."""

    name: str
    status: Status
    found: str
    remedy: str = ""


def doctor(store: StoreOption = None, json: JsonOption = False) -> None:
    """Check settings, store, roles, schema, clock, disk and the administrator's key; change nothing.

    Each check is ok, warn or fail, with a remedy. Exit status 1 if one fails.

    \b
    Example:
      strongroom doctor --store postgresql://strongroom_app@db/strongroom
    """
    checks = _checked(store)
    failed = any(check.status == "fail" for check in checks)
    if json:
        output.print_json({"ok": not failed, "checks": [asdict(check) for check in checks]})
    else:
        output.print_fields([(f"{check.status:<4}  {check.name}", _lines(check)) for check in checks])
    if failed:
        raise typer.Exit(EXIT_FAILED)


def _lines(check: Check) -> list[str]:
    return [check.found, f"→ {check.remedy}"] if check.remedy else [check.found]


def _checked(store: str | None) -> list[Check]:
    from .. import config
    from ..storage.url import shown_url

    try:
        settings = config.load(store=store)
        modules = registry(settings.entities)
    except StrongroomError as error:
        return [
            Check(
                "settings", "fail", error.message, "change the named setting; docs/configuration.md lists the settings"
            )
        ]
    warned = config.warnings(settings)
    checks = [Check("settings", "warn", text, "remove the setting, or correct its name") for text in warned]
    checks = checks or [Check("settings", "ok", f"no contradictions; limits are {settings.limits}")]
    file = store_file(settings.store_url)
    shown = shown_url(settings.store_url)
    if file is not None and not os.path.exists(file):
        remedy = "name the store (--store, STRONGROOM_STORE), or start the server, which creates it"
        return [*checks, Check("store", "fail", f"there is no file {file}", remedy)]

    async def work() -> list[Check]:
        found = [*checks, *await _of_store(settings, modules.collections, shown, file)]
        return [*found, await _sign_in(settings.sign_in)] if settings.sign_in is not None else found

    with as_owner():
        return run(work)


async def _sign_in(settings: TokenSettings) -> Check:
    """Whether the keys of the token issuer can be read."""
    from ..tenants import Jwks

    keys = Jwks(settings.jwks)
    await keys.read()
    state = keys.state()
    if state.error is not None:
        remedy = "check STRONGROOM_JWKS, and that this machine reaches the issuer; until then tokens are refused"
        return Check("sign-in", "fail", f"{state.place}: {state.error}", remedy)
    return Check("sign-in", "ok", f"{state.place}: {state.keys} key{'s' if state.keys > 1 else ''}")


async def _of_store(
    settings: Settings, collections: tuple[Collection, ...], shown: str, file: str | None
) -> list[Check]:
    """The checks of the store, as far as it can be opened."""
    from ..storage import open_store

    try:
        opened = await open_store(settings.store_url)
    except ConfigError as error:
        return [Check("store", "fail", error.message, "change the URL, or install the missing package")]
    except StrongroomError as error:
        name = "roles" if error.code == "store_error" and error.message.startswith("role ") else "store"
        remedy = (
            "name the application's role in the URL (`strongroom schema roles` prints the SQL that creates it)"
            if name == "roles"
            else "check that the store runs, and that this machine and user can reach it"
        )
        return [Check(name, "fail", error.message, remedy)]
    try:
        checks = [await _reached(opened, shown)]
        for look in (_roles, _durability, _clock):
            checks += await _guarded(look.__name__.strip("_"), look, opened)
        if file is not None:
            checks.append(_disk(os.path.dirname(file)))
        return [*checks, *await _guarded("schema", lambda store: _schema(store, collections), opened)]
    finally:
        await opened.close()


async def _guarded(name: str, look: Callable[[Store], Awaitable[list[Check]]], store: Store) -> list[Check]:
    try:
        return await look(store)
    except StrongroomError as error:
        return [Check(name, "fail", error.message, "correct the named problem, and run doctor again")]


async def _reached(store: Store, shown: str) -> Check:
    health = await store.check()
    if not health.ok:
        problem = str(health.details.get("problem") or "it does not answer")
        return Check("store", "fail", f"{shown}: {problem}", "check that the store runs and is the primary")
    took = f"{shown}, answered in {health.latency_s * 1_000:.0f} ms"
    if health.latency_s > SLOW_READ_S:
        return Check("store", "warn", took, "run the server nearer to its store: each durable debit takes this long")
    return Check("store", "ok", took)


async def _roles(store: Store) -> list[Check]:
    from ..storage.port import SchemaRights, unwrapped

    backend = unwrapped(store)
    if not isinstance(backend, SchemaRights):
        return []
    reason = await backend.unchangeable()
    if reason is not None:  # open_store has verified already that the role cannot bypass the policies
        return [Check("roles", "ok", "the role can neither alter tables nor bypass row-level security")]
    return [
        Check(
            "roles",
            "warn",
            "the role owns the schema: row-level security applies, but it could alter tables and the journal",
            "serve as the application's role (`strongroom schema roles` prints the SQL that creates it)",
        )
    ]


async def _durability(store: Store) -> list[Check]:
    from ..storage.port import Durability, unwrapped

    backend = unwrapped(store)
    if not isinstance(backend, Durability):
        return []
    off = [f"{name} is {value}" for name, value in (await backend.durability()).items() if value == "off"]
    if off:
        what = f"{', '.join(off)}: acknowledged commits may be lost when the database's machine fails"
        return [Check("disk sync", "fail", what, "turn it on in postgresql.conf or for this role")]
    return [Check("disk sync", "ok", "the server waits for its disk before it answers a commit")]


async def _clock(store: Store) -> list[Check]:
    if store.capabilities.embedded:
        return [Check("clock", "ok", "the store uses this machine's clock")]
    before = time.time()
    theirs = await store.now_us() / 1_000_000
    after = time.time()
    offset = theirs - (before + after) / 2
    found = f"the store's clock is {abs(offset):.2f} s {'ahead of' if offset > 0 else 'behind'} this machine's"
    if abs(offset) - (after - before) / 2 > MAX_OFFSET_S:
        return [Check("clock", "warn", found, "set this machine's clock (NTP); limits use the store's")]
    return [Check("clock", "ok", found)]


def _disk(folder: str) -> Check:
    """How long a small write takes until it is durable."""
    import tempfile

    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            took = []
            for _ in range(SYNCS):
                began = time.perf_counter()
                file.write(b"x" * 4_096)
                os.fsync(file.fileno())
                took.append(time.perf_counter() - began)
    except OSError as error:
        remedy = "let the server's user write there: SQLite keeps its write-ahead log beside the file"
        return Check("disk sync", "fail", f"{folder}: {error.strerror or error}", remedy)
    median = sorted(took)[SYNCS // 2]
    found = f"{folder}: {median * 1_000:.1f} ms"
    if median > SLOW_SYNC_S:
        return Check("disk sync", "warn", found, "use a faster disk, or STRONGROOM_LIMITS=leased")
    return Check("disk sync", "ok", found)


async def _schema(store: Store, collections: tuple[Collection, ...]) -> list[Check]:
    """Whether the tables match the declarations, writes are on, and an administrator key exists."""
    from ..storage.port import ChangeKind, SchemaRights, unwrapped

    changes = await store.prepare(collections, mode="plan")
    absent = {change.collection for change in changes if change.kind is ChangeKind.CREATE_COLLECTION}
    there = [collection for collection in collections if collection.name not in absent]
    if not changes:
        checks = [Check("schema", "ok", f"{len(collections)} collections fit")]
    else:
        what = "; ".join(map(str, changes[:3])) + (f"; and {len(changes) - 3} more" if len(changes) > 3 else "")
        backend = unwrapped(store)
        alone = not isinstance(backend, SchemaRights) or await backend.unchangeable() is None
        lossy = any(change.destructive for change in changes)
        remedy = "run `strongroom schema apply`" + (" with the owner's URL" if not alone else "")
        checks = [Check("schema", "warn" if alone and not lossy else "fail", f"differs: {what}", remedy)]
        if len(absent) < len(changes):
            return checks
    if there:
        await store.prepare(there)
        names = {collection.name for collection in there}
        checks += [await look(store) for name, look in _IN_THE_STORE.items() if name in names]
    return checks


async def _writes(store: Store) -> Check:
    from ..database import StoreState
    from ..database.write_state import WRITES

    state = await store.get(StoreState.__collection__.name, None, WRITES)
    if state is None or state["allowed"]:
        return Check("writes", "ok", "are on")
    where = f" (the other store is {state['other_store']})" if state["other_store"] else ""
    remedy = "name the other store, or undo the migration with `strongroom migrate --abort` or --rollback"
    return Check("writes", "fail", f"{state['reason']}{where}", remedy)


async def _switches(store: Store) -> Check:
    from ..database import WriteState

    writes = WriteState(store)
    await writes.load_switches()
    off = writes.tenants_off
    if (why := writes.why_off()) is not None:
        return Check("write switches", "warn", why, "when it is over: `strongroom writes on`")
    if off:
        what = f"writes of {off} tenants are off" if off > 1 else "writes of one tenant are off"
        return Check("write switches", "warn", what, "`strongroom writes status` names them")
    return Check("write switches", "ok", "none is off")


async def _access(store: Store) -> Check:
    from ..entities import And, Query, Where
    from ..keys import ApiKey
    from ..server.auth import Scope

    collection = ApiKey.__collection__
    where = And(Where("permissions", "array-contains", Scope.ADMIN.permission), Where("deleted_at", "==", None))
    found = await store.find(
        collection.name, None, Query(And(where, Where("enabled", "==", True)), limit=1).check(collection)
    )
    if found:
        return Check("administrator", "ok", "an enabled administrator's key exists")
    remedy = "start the server, which creates one, or run `strongroom keys recover-administrator`"
    return Check("administrator", "warn", "no enabled administrator's key exists", remedy)


_IN_THE_STORE: dict[str, Callable[[Store], Awaitable[Check]]] = {
    "store_state": _writes,
    "write_switches": _switches,
    "api_keys": _access,
}
"""The checks that read a collection, by its name."""
