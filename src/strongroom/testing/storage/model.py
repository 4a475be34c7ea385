"""The whole port compared with a model: dicts, and the rules of port.py, in a page of Python."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from ...entities import INT64_MAX, INT64_MIN, Aggregate, Document, Query, Where, aggregate, evaluate
from ...errors import (
    AlreadyExists,
    BoundExceeded,
    Conflict,
    NotFound,
    StrongroomError,
)
from ...storage.port import (
    Add,
    Append,
    Batch,
    Check,
    Committed,
    Create,
    Delete,
    Operation,
    Patch,
    Put,
    Store,
)
from .backend import Backend
from .samples import COLLECTIONS, ITEMS, NOW, item, record, shared, stored

Where_ = tuple[str | None, str]  # tenant, collection
Held = dict[Where_, dict[str, Document]]
Last = dict[tuple[Where_, str], int]  # the greatest version that each id had

TENANTS = ("acme", "other")
IDS = ("a", "b", "a/b")


class Refused(Exception):
    def __init__(self, error: type[StrongroomError]) -> None:
        self.error = error


MADE = -1
"""The version of a document that the current batch has changed; the store's answer gives it."""


def apply(held: Held, tenant: str, operation: Operation, now_us: int) -> tuple[bool, int | None]:
    """Apply one operation to `held`; returns whether it makes a version, and the result of an Add."""
    assert not isinstance(operation, Append)
    where = (None if operation.collection == "shared" else tenant, operation.collection)
    documents = held.setdefault(where, {})
    id = operation.id
    old = documents.get(id)
    found = old["version"] if old else 0
    if isinstance(operation, Create) and old:
        raise Refused(AlreadyExists)
    if isinstance(operation, Patch | Delete | Add) and not old:
        raise Refused(NotFound)
    if not isinstance(operation, Create | Add) and operation.expected not in (None, found):
        raise Refused(Conflict)
    if isinstance(operation, Check):
        return False, None
    if isinstance(operation, Delete):
        del documents[id]
        return False, None
    value = None
    if isinstance(operation, Add):
        assert old
        value = old[operation.field] + operation.amount
        low = INT64_MIN if operation.at_least is None else operation.at_least
        high = INT64_MAX if operation.at_most is None else operation.at_most
        if not low <= value <= high:
            raise Refused(BoundExceeded)
        new = {**old, operation.field: value}
    elif isinstance(operation, Patch):
        new = {**(old or {}), **operation.fields}
    else:
        new = dict(operation.document)
    code = new["code"]
    if code is not None and any(d["code"] == code for other, d in documents.items() if other != id):
        raise Refused(AlreadyExists)
    created = old["created_at"] if old else None
    documents[id] = stored(
        id, {k: v for k, v in new.items() if k in _FIELDS[operation.collection]}, version=MADE, updated_us=now_us
    )
    documents[id]["created_at"] = created or documents[id]["updated_at"]
    return True, value


_FIELDS = {collection.name: collection.fields.keys() for collection in COLLECTIONS}


# --- Generated batches ----------------------------------------------------------------------------------------

_places = st.tuples(st.sampled_from(["items", "items", "shared"]), st.sampled_from(IDS))
_codes = st.sampled_from([None, None, "c", "d"])
_expectations = st.sampled_from([None, None, 0, "current", "stale"])


@st.composite
def _operations(draw: Any) -> tuple[str, dict[str, Any]]:
    """An operation without its expected version, which the model fills in."""
    collection, id = draw(_places)
    kind = draw(st.sampled_from(["create", "create", "put", "patch", "delete", "add", "check"]))
    taken: dict[str, Any] = {"collection": collection, "id": id}
    if kind in ("create", "put"):
        make = item if collection == "items" else shared
        taken["document"] = make(draw(st.sampled_from("xyz")), code=draw(_codes), used=draw(st.integers(0, 3)))
    if kind == "patch":
        taken["fields"] = draw(
            st.sampled_from([{"label": "p"}, {"code": "c"}, {"code": None}, {"label": "q", "used": 1}])
        )
    if kind == "add":
        bounds = st.none() | st.integers(-3, 6)
        taken |= {
            "field": "used",
            "amount": draw(st.integers(-3, 3)),
            "at_most": draw(bounds),
            "at_least": draw(bounds),
        }
    if kind in ("put", "patch", "delete"):
        taken["expected"] = draw(_expectations)
    if kind == "check":
        taken["expected"] = draw(st.sampled_from([0, "current", "current", "stale"]))
    return kind, taken


_CLASSES: dict[str, Callable[..., Operation]] = {
    "create": Create,
    "put": Put,
    "patch": Patch,
    "delete": Delete,
    "add": Add,
    "check": Check,
}
_batches = st.tuples(
    st.lists(_operations(), min_size=1, max_size=4),
    st.integers(-3, 3),  # the clock, which may go back
    st.booleans(),  # with a journal record
)


class PortMachine(RuleBasedStateMachine):
    """Random batches, alone and in groups. After each, the store must equal the model."""

    def __init__(self, runner: asyncio.Runner, backend: Backend) -> None:
        super().__init__()
        self.runner = runner
        self.backend = backend
        self.held: Held = {}
        self.last: Last = {}
        self.journal: dict[str, list[str]] = {tenant: [] for tenant in TENANTS}

    @initialize()
    def start(self) -> None:
        async def opened() -> Store:
            store = await self.backend.open(self.backend.new_url())
            await store.prepare(COLLECTIONS)
            return store

        self.store = self.runner.run(opened())

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.runner.run(self.store.close())

    def _made(self, tenant: str, kind: str, taken: dict[str, Any]) -> Operation:
        where = (None if taken["collection"] == "shared" else tenant, taken["collection"])
        current = self.held.get(where, {}).get(taken["id"], {}).get("version", 0)
        expected = {"current": current, "stale": self.last.get((where, taken["id"]), 5) - 1}
        taken = {k: expected.get(v, v) if k == "expected" else v for k, v in taken.items()}
        return _CLASSES[kind](**taken)

    @rule(tenant=st.sampled_from(TENANTS), group=st.lists(_batches, min_size=1, max_size=5))
    def commit(self, tenant: str, group: list[tuple[list[tuple[str, dict[str, Any]]], int, bool]]) -> None:
        """Commit some batches of one tenant at once, and compare each answer with the model's."""
        given: list[Batch] = []
        for makings, tick, with_record in group:
            operations = [self._made(tenant, kind, taken) for kind, taken in makings]
            if with_record:
                operations.append(Append(record(f"{len(self.journal[tenant])}-{len(given)}", tenant)))
            given.append(Batch(tenant, tuple(operations), NOW + tick))

        async def run() -> list[Committed | BaseException]:
            return await asyncio.gather(*[self.store.commit(b) for b in given], return_exceptions=True)

        for one, outcome in zip(given, self.runner.run(run()), strict=True):
            self._follow(one, outcome)

    def _follow(self, given: Batch, outcome: Committed | BaseException) -> None:
        held = copy.deepcopy(self.held)
        makes: list[bool] = []
        values: dict[int, int] = {}
        expected: type[StrongroomError] | None = None
        for number, operation in enumerate(given.operations):
            if isinstance(operation, Append):
                makes.append(False)
                continue
            try:
                made, value = apply(held, given.tenant or "", operation, given.now_us)
            except Refused as refused:
                expected = refused.error
                break
            makes.append(made)
            if value is not None:
                values[number] = value
        if expected is not None:
            assert type(outcome) is expected, f"expected {expected.__name__}, found {outcome!r}"
            assert outcome.details["operation"] == len(makes)
            return
        assert isinstance(outcome, Committed), f"expected success, found {outcome!r}"
        assert [version > 0 for version in outcome.versions] == makes
        assert dict(outcome.values) == values
        self.held = held
        self._learn(given, outcome)
        appended = [o.record.entity_id for o in given.operations if isinstance(o, Append)]
        assert (outcome.sequence is not None) == bool(appended)
        self.journal[given.tenant or ""] += appended

    def _learn(self, given: Batch, outcome: Committed) -> None:
        """Adopt the store's new versions, each greater than every earlier version of its id."""
        latest: dict[tuple[Where_, str], int] = {}
        for operation, version in zip(given.operations, outcome.versions, strict=True):
            if version and not isinstance(operation, Append):
                place = (
                    (None if operation.collection == "shared" else given.tenant, operation.collection),
                    operation.id,
                )
                assert version > self.last.get(place, 0), "a version came twice, or went back"
                assert version >= latest.get(place, 0)
                latest[place] = version
        self.last |= latest
        for (where, id), version in latest.items():
            if id in self.held[where]:
                self.held[where][id]["version"] = version

    @rule(
        tenant=st.sampled_from(TENANTS), label=st.sampled_from("xyzpq"), order=st.sampled_from(["id", "-used", "code"])
    )
    def find(self, tenant: str, label: str, order: str) -> None:
        query = Query(Where("label", "==", label), (order,), limit=2)
        documents = self.held.get((tenant, "items"), {}).values()
        assert self.runner.run(self.store.find("items", tenant, query)) == evaluate(query, documents)
        asked = [Aggregate("count"), Aggregate("sum", "used"), Aggregate("average", "used")]
        found = self.runner.run(self.store.aggregate("items", tenant, asked, query.where))
        assert found == aggregate(asked, query.where, ITEMS, documents)

    @rule(tenant=st.sampled_from(TENANTS), id=st.sampled_from(IDS))
    def get(self, tenant: str, id: str) -> None:
        assert self.runner.run(self.store.get("items", tenant, id)) == self.held.get((tenant, "items"), {}).get(id)

    @invariant()
    def everything_is_as_in_the_model(self) -> None:
        if not hasattr(self, "store"):
            return
        for tenant, collection in ((None, "shared"), ("acme", "items"), ("other", "items")):
            found = self.runner.run(self.store.find(collection, tenant, Query()))
            expected = sorted(self.held.get((tenant, collection), {}).values(), key=lambda d: str(d["id"]).encode())
            assert found == expected, f"{tenant}/{collection}: found {found}, expected {expected}"
        page = self.runner.run(self.store.changes(None))
        for tenant, names in self.journal.items():
            assert [one.entity_id for one in page.records if one.tenant == tenant] == names
            mine = self.runner.run(self.store.changes(None, tenant=tenant))
            assert [one.entity_id for one in mine.records] == names
        assert len(page.records) == sum(map(len, self.journal.values()))


class TestModel:
    def test_the_store_does_what_the_model_does(self, backend: Backend) -> None:
        with asyncio.Runner() as runner:

            class Machine(PortMachine):
                def __init__(self) -> None:
                    super().__init__(runner, backend)

            count = max(10, settings().max_examples)
            run_state_machine_as_test(
                Machine, settings=settings(max_examples=count, stateful_step_count=20, deadline=None)
            )
