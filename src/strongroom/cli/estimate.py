"""`strongroom estimate`: the monthly cost of a load on Google's backends, with the prices of seed 000."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InvalidInput, Problem
from . import output
from .session import JsonOption, StoreOption, in_store

if TYPE_CHECKING:
    from ..app import Strongroom

SOURCE = (
    "ADR 006 (seed 000), cost comparison, 2024, US dollars, one region; deletes from Google's price list of that time"
)


SAMPLE = 50
"""The sample of documents from which a collection's size is estimated."""


@dataclass(frozen=True, slots=True)
class Prices:
    """A backend's prices in dollars: a GB and month, a million reads, writes and deletes, and the range of the monthly
    base price."""

    backend: str
    gb: float
    reads: float
    writes: float
    deletes: float
    base: tuple[float, float] = (0.0, 0.0)


PRICES = (
    Prices("GCS", 0.02, 0.40, 5.00, 0.0),
    Prices("Firestore", 0.15, 0.30, 0.90, 0.10),
    Prices("Cloud SQL", 0.24, 0.0, 0.0, 0.0, (30.0, 50.0)),
)


@dataclass(frozen=True, slots=True)
class Load:
    """Documents read, written and deleted in a month, and the stored amount."""

    reads: float = 0
    writes: float = 0
    deletes: float = 0
    gb: float = 0

    def __add__(self, other: Load) -> Load:
        return Load(
            self.reads + other.reads, self.writes + other.writes, self.deletes + other.deletes, self.gb + other.gb
        )

    def times(self, count: float) -> Load:
        return Load(self.reads * count, self.writes * count, self.deletes * count, self.gb * count)


OPERATIONS: Mapping[str, tuple[str, Load]] = {
    "get": ("read an entity by its id", Load(reads=1)),
    "list-20": ("list 20 entities, the filters pushed down", Load(reads=20)),
    "create": ("create an entity: itself, its record in the journal, the head of that", Load(writes=3)),
    "update": ("change an entity: it is read first", Load(reads=1, writes=3)),
    "delete": ("delete an entity: it is read first", Load(reads=1, writes=2, deletes=1)),
    "unique": ("… and for each unique index, when a document is created", Load(writes=1)),
    "create-key": ("issue an API key: as an entity, and where its id is", Load(writes=4)),
    "verify-cold": ("find a key that this node has not in memory", Load(reads=1)),
    "verify": ("decide limits durably: the usage, and that the key is unchanged", Load(writes=2)),
    "verify-unlimited": ("verify a key without limits that is in memory", Load()),
    "poll": ("ask whether anything changed: each node does so four times a second", Load(reads=1)),
}  # fmt: skip
"""Firestore's reads and writes for each operation of a warm process. A tenant's first write in a process costs one more
write; a process's first record in a shard one more read. Concurrent verifications of one key share two."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Dollars a month on one backend. The base price is a range, so the total is one too."""

    backend: str
    storage: float
    reads: float
    writes: float
    deletes: float
    least: float
    most: float


def estimate(load: Load) -> list[Estimate]:
    """The monthly cost of a load on each backend."""
    found = []
    for price in PRICES:
        parts = (
            load.gb * price.gb,
            load.reads / 1e6 * price.reads,
            load.writes / 1e6 * price.writes,
            load.deletes / 1e6 * price.deletes,
        )
        found.append(Estimate(price.backend, *parts, sum(parts) + price.base[0], sum(parts) + price.base[1]))
    return found


def load_of(counts: Mapping[str, float]) -> Load:
    """The documents that this many operations read and write. Raises InvalidInput for an unknown operation."""
    total = Load()
    for name, count in counts.items():
        if name not in OPERATIONS or count < 0:
            known = ", ".join(OPERATIONS)
            raise InvalidInput([Problem("do", f"found {name}={count:g}, expected one of {known}, and 0 or more of it")])
        total += OPERATIONS[name][1].times(count)
    return total


def command(
    reads: Annotated[float, typer.Option(min=0, help="Documents read in a month.")] = 0,
    writes: Annotated[float, typer.Option(min=0, help="Documents written in a month.")] = 0,
    deletes: Annotated[float, typer.Option(min=0, help="Documents deleted in a month.")] = 0,
    gb: Annotated[
        float | None, typer.Option(min=0, help="Gigabytes stored (default: the size of --store, else 0).")
    ] = None,
    do: Annotated[
        list[str] | None,
        typer.Option(
            "--do",
            metavar="WHAT=COUNT",
            help="The number of an operation, for example verify=1000; may be given again.",
        ),
    ] = None,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Estimate what a month's load costs on Cloud Storage, Firestore and Cloud SQL.

    With --store and without --gb it estimates the size of that store from a sample of each collection of each tenant.
    Without --do it also lists the reads and writes of each operation on Firestore. The prices are dated: check the
    current ones.

    \b
    Example:
      strongroom estimate --gb 2 --do create-key=10000 --do verify=5000000
    """
    stored = in_store(store, _stored_gb) if gb is None and store is not None else gb or 0
    load = Load(reads, writes, deletes, stored) + load_of(dict(map(_counted, do or ())))
    found = estimate(load)
    if json:
        operations = {name: {"what": what, **asdict(cost)} for name, (what, cost) in OPERATIONS.items()}
        output.print_json(
            {"source": SOURCE, "load": asdict(load), "estimates": [asdict(e) for e in found], "operations": operations}
        )
        return
    output.print_table(
        ("BACKEND", "STORAGE", "READS", "WRITES", "DELETES", "A MONTH"),
        [
            (e.backend, *(f"${part:,.2f}" for part in (e.storage, e.reads, e.writes, e.deletes)), _range(e))
            for e in found
        ],
    )
    if not do:
        output.print_line()
        output.print_table(
            ("OPERATION", "READS", "WRITES", "DELETES", "WHAT"),
            [
                (name, f"{cost.reads:g}", f"{cost.writes:g}", f"{cost.deletes:g}", what)
                for name, (what, cost) in OPERATIONS.items()
            ],
        )
    output.print_note(f"{load.reads:,.0f} reads, {load.writes:,.0f} writes, {load.deletes:,.0f} deletes. {SOURCE}")


async def _stored_gb(room: Strongroom) -> float:
    """The estimated size of a store's documents, as the port counts bytes."""
    from ..entities import Aggregate, Query
    from ..storage.port import document_size

    tenants: list[str] = []
    while page := await room.store.tenants(tenants[-1] if tenants else None):
        tenants += page
    size = 0.0
    for collection in room.database.registry.collections:
        for tenant in tenants if collection.tenant_scoped else [None]:
            sample = await room.store.find(collection.name, tenant, Query(limit=SAMPLE))
            if sample:
                counted = await room.store.aggregate(collection.name, tenant, [Aggregate("count")], None)
                size += counted["count"] * sum(map(document_size, sample)) / len(sample)
    return size / 1e9


def _range(found: Estimate) -> str:
    return f"${found.least:,.2f}" + (f" to ${found.most:,.2f}" if found.most > found.least else "")


def _counted(text: str) -> tuple[str, float]:
    name, separator, count = text.partition("=")
    try:
        return name, float(count if separator else "nothing")
    except ValueError:
        raise InvalidInput([Problem("do", f"found {text!r}, expected WHAT=COUNT such as verify=5000000")]) from None
