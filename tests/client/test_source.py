"""The source of both clients: one source, few imports, every route of the server, every field of its answers; laws of
the pure parts."""

from __future__ import annotations

import ast
import asyncio
import dataclasses
import inspect
import subprocess
import sys
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import strongroom.client as package
from strongroom.client import (
    Client,
    InvalidInput,
    NoAnswer,
    Retries,
    StrongroomError,
    models,
)
from strongroom.client._amounts import added, less
from strongroom.client._events import MAX_EVENT_BYTES, Event, Parser, Resumption
from strongroom.client._unasync import SOURCE, NotTranslated, stale, translate
from strongroom.client._wire import filters, path, query
from strongroom.client.errors import UnexpectedAnswer, error_of, retry_after_s
from strongroom.limits import windows
from tests.helpers.paths import DOCS
from tests.helpers.server_app import serving

ROOT = Path(package.__file__).parent

# --- One source -------------------------------------------------------------------------------------------------


def test_the_synchronous_client_is_up_to_date_with_its_generator() -> None:
    assert [path.name for path in stale()] == [], "run `python src/strongroom/client/_unasync.py`"


def test_the_generator_renames_identifiers_and_keeps_strings() -> None:
    source = '''async def f(a: AsyncThing) -> str:
    """await AsyncThing, async with __aenter__"""
    async with a.aclose() as b:  # await nothing
        return [await  x async for x in b] or 'async await' + f"{await_} async" + \\
            await g(anext)
'''
    assert (
        translate(source)
        == '''def f(a: Thing) -> str:
    """await AsyncThing, async with __aenter__"""
    with a.close() as b:  # await nothing
        return [x for x in b] or 'async await' + f"{await_} async" + \\
            g(next)
'''
    )


@pytest.mark.parametrize("source", ["import asyncio\n", "def f() -> Awaitable[int]: ...\n"])
def test_the_generator_refuses_what_it_cannot_translate(source: str) -> None:
    with pytest.raises(NotTranslated, match="<text>:1"):
        translate(source)


def _members(cls: type) -> Iterator[tuple[str, Any]]:
    for name, value in inspect.getmembers(cls):
        if not name.startswith("_") and (inspect.isfunction(value) or isinstance(value, property)):
            yield ("close" if name == "aclose" else name), value


def test_both_clients_have_the_same_methods_with_the_same_documentation() -> None:
    pairs = [name for name in package.__all__ if name.startswith("Async")]
    assert len(pairs) >= 5
    for name in pairs:
        one, other = getattr(package, name), getattr(package, name.removeprefix("Async"))
        assert inspect.getdoc(one) == inspect.getdoc(other)
        asynchronous, synchronous = dict(_members(one)), dict(_members(other))
        assert asynchronous.keys() == synchronous.keys()
        for member, value in asynchronous.items():
            assert inspect.getdoc(value), f"{name}.{member} has no documentation"
            assert inspect.getdoc(value) == inspect.getdoc(synchronous[member])


def test_the_documentation_names_every_client_method() -> None:
    page = (DOCS / "client.md").read_text()
    with Client("http://127.0.0.1") as client:
        nouns = [type(value) for name, value in vars(client).items() if not name.startswith("_")]
    assert len(nouns) >= 6
    for cls in (Client, package.Collection, package.Hold, *nouns):
        for name, _ in _members(cls):
            assert f"`{name}`" in page or f".{name}" in page, f"{cls.__name__}.{name}"


def test_the_shared_source_does_not_mention_asyncio() -> None:
    for source in SOURCE.glob("*.py"):
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                words = node.value.replace("`", " ").split()
                assert not {"await", "async", "asyncio", "coroutine", "task"} & set(words), f"{source.name}: {words}"


# --- Few imports ------------------------------------------------------------------------------------------------


def _run(code: str) -> str:
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_the_client_needs_nothing_of_the_server() -> None:
    heavy = "pydantic sqlalchemy apsw cryptography fastapi starlette uvicorn typer strongroom.app strongroom.entities"
    code = f"import sys, strongroom.client; print([m for m in {heavy.split()!r} if m in sys.modules])"
    assert _run(code) == "[]\n"


def test_without_httpx_one_sentence_says_what_is_missing() -> None:
    code = """
import sys
sys.modules["httpx"] = None  # as if it were not installed
import strongroom
try:
    import strongroom.client
except ModuleNotFoundError as error:
    print(error)
"""
    assert _run(code) == "the client needs httpx: pip install 'strongroom[client]'\n"


# --- The server's description -----------------------------------------------------------------------------------

LEFT_OUT: dict[tuple[str, str], str] = {
    ("POST", "/v1/tenants/{tenant}"): "the same as POST /v1/tenants, with the name in the path",
}
"""Routes without a method, and why."""
ENTITY = "/v1/tenants/{tenant}/{collection}"
SHAPES: dict[str, type[msgspec.Struct]] = {
    "KeyOut": models.ApiKey,
    "KeyStatsOut": models.KeyStats,
    "LimitStatusOut": models.LimitStatus,
    "VerifyOut": models.Verification,
    "UsageOut": models.Recorded,
    "StatsOut": models.OwnStats,
    "CurrentUsageOut": models.CurrentUsage,
    "ReadyOut": models.Readiness,
    "DependencyOut": models.Dependency,
    "BulkOut": models.BulkStep,
    "QuotaOut": models.Quota,
    "QuotaStatsOut": models.QuotaStats,
    "WebhookOut": models.Webhook,
    "DeliveryOut": models.Delivery,
    "LeakOut": models.Leak,
    "AuditRecordOut": models.AuditRecord,
    "ProofOut": models.AuditProof,
    "LabelOut": models.LeakLabel,
    "PolicyOut": models.LeakPolicy,
    "VerifyIn": models.Ask,
    "UsageIn": models.Used,
    "UsageBatchOut": models.RecordedBatch,
    "ReservationOut": models.Reservation,
    "TenantOut": models.TenantRecord,
    "WritesOut": models.WriteSwitch,
    "WritesStatusOut": models.WritesStatus,
    "DeletionStatementOut": models.DeletionStatement,
}


def _texts(arguments: Iterable[ast.expr]) -> Iterator[str]:
    for one in arguments:
        if isinstance(one, ast.IfExp):
            yield from _texts([one.body, one.orelse])
        elif isinstance(one, ast.Constant) and isinstance(one.value, str):
            yield one.value


def called() -> set[tuple[str, str]]:
    """Method and path of every call in the client's source."""
    found = set()
    for source in SOURCE.glob("*.py"):
        for node in ast.walk(ast.parse(source.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            texts = list(_texts(node.args))
            match node.func.attr:
                case "send" if len(texts) >= 2:
                    found |= {(texts[0], route) for route in texts[1:]}
                case "items" if texts:
                    found.add(("GET", texts[0]))
                case "stream" if texts and texts[0] != "GET":
                    found.add(("GET", texts[0]))
    return found


@cache
def described() -> dict[str, Any]:
    """What the server says of itself; it is the same for every test."""

    async def ask() -> dict[str, Any]:
        async with serving() as served:
            document: dict[str, Any] = (await served.get("/openapi.json")).json
            return document

    return asyncio.run(ask())


def _template(route: str) -> str:
    """A route as the client's source has it: collections are parameters there, and so is each id."""
    parts = route.split("/")
    if not route.startswith("/v1/tenants/") or len(parts) < 5 or parts[4] in ("suspend", "resume", "export"):
        return route
    _, colon, verb = parts[4].partition(":")
    return "/".join([*parts[:4], "{collection}" + colon + verb, *parts[5:]])


def test_every_route_of_the_server_has_a_method_or_is_left_out_on_purpose() -> None:
    paths = described()["paths"]
    served = {(method.upper(), _template(route)) for route, item in paths.items() for method in item}
    served |= {("GET", "/openapi.json")}  # which describes all but itself
    ours = called()
    assert served - ours - LEFT_OUT.keys() == set(), "routes without a method of the client"
    assert ours - served == set(), "calls of routes that the server does not have"
    assert LEFT_OUT.keys() <= served - ours, "left out for no reason"


@pytest.mark.parametrize("name", SHAPES)
def test_the_answers_have_every_field_that_the_server_describes(name: str) -> None:
    schema = described()["components"]["schemas"][name]
    ours = {field.encode_name for field in msgspec.structs.fields(SHAPES[name])}
    assert schema["properties"].keys() - ours == set()


def test_limits_and_windows_have_every_field_of_the_servers_own() -> None:
    def fields(model: Any) -> set[str]:
        return {field.name for field in msgspec.structs.fields(model)}

    assert windows.Limit.model_fields.keys() <= fields(models.Limit)
    assert windows.Refill.model_fields.keys() <= fields(models.Refill)
    for window in (windows.Rolling, windows.Anchored, windows.Calendar, windows.Total):
        assert window.model_fields.keys() <= fields(models.Window)


# --- Laws of the pure parts -------------------------------------------------------------------------------------

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), min_size=1, max_size=40)
words = st.text("abc :é", max_size=12)


@given(texts)
def test_a_path_segment_is_encoded_as_one_segment_and_decodes_unchanged(value: str) -> None:
    encoded = path("/v1/keys/{id}/stats", {"id": value})
    assert encoded.count("/") == 4
    segment = encoded.split("/")[3]
    assert unquote(segment) == value
    assert segment not in (".", "..")


@given(st.lists(st.tuples(st.sampled_from(["create", "ready"]), words, st.none() | words.map(str.strip))), st.data())
def test_events_parse_the_same_however_the_stream_is_split(
    events: list[tuple[str, str, str | None]], data: Any
) -> None:
    end = data.draw(st.sampled_from(["\n", "\r\n"]))
    blocks = []
    for name, text, id in events:
        lines = [f"event: {name}", f"data: {text}", *([f"id: {id}"] if id is not None else []), ": a comment"]
        blocks.append("".join(line + end for line in lines) + end)
    stream = "".join(blocks).encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    parser = Parser()
    found = []
    for start, stop in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        found += parser.feed(stream[start:stop])
    assert found == [Event(name, text.encode(), id) for name, text, id in events]


def test_an_id_without_data_moves_the_cursor_and_a_retry_is_remembered() -> None:
    parser = Parser()
    assert parser.feed(b"retry: 1500\n\n: \nid: 7\n\nid\n\n") == [
        Event("message", None, "7"),
        Event("message", None, ""),
    ]
    assert parser.retry_ms == 1500


def test_an_endless_event_is_refused() -> None:
    parser = Parser()
    for _ in range(16):
        assert parser.feed(b"x" * (MAX_EVENT_BYTES // 16)) == []
    with pytest.raises(UnexpectedAnswer):
        parser.feed(b"x")


@given(st.lists(st.integers(1, 4), max_size=8), st.data())
def test_a_watch_gives_each_change_once_wherever_its_connection_breaks(pages: list[int], data: Any) -> None:
    """A page of the server has its cursor on the last event; after a break it begins with the page after the cursor."""
    numbers = iter(range(100))
    written = [[next(numbers) for _ in range(size)] for size in pages]
    stands = Resumption("0")
    seen: list[int] = []
    for _ in range(data.draw(st.integers(0, 5))):
        limit = data.draw(st.integers(0, 12))
        _deliver(stands, written, seen, limit)
    _deliver(stands, written, seen, 10_000)
    assert seen == [number for page in written for number in page]


def _deliver(stands: Resumption, pages: list[list[int]], seen: list[int], limit: int) -> None:
    for position, page in enumerate(pages[int(stands.cursor or 0) :], int(stands.cursor or 0) + 1):
        for number in page:
            if limit == 0:
                return
            limit -= 1
            body = b'{"id": "d%d", "action": "update", "version": %d}' % (number, number)
            change = stands.take(Event("update", body, str(position) if number == page[-1] else None))
            if change is not None:
                seen.append(change.version or 0)


whole = st.integers(0, 10**15) | st.decimals(0, 10**15, places=0)
money = st.integers(0, 10**9) | st.decimals(0, 10**9, places=9)
costs = st.fixed_dictionaries({}, optional={"tokens": whole, "requests": whole, "cost": money})


@given(st.lists(costs, max_size=20))
def test_sums_of_amounts_are_exact(parts: list[dict[str, Any]]) -> None:
    total: Any = {}
    for part in parts:
        total = added(total, part)
    wanted = {name: sum(int(Decimal(part.get(name, 0)) * 10**9) for part in parts) for name in total}
    assert {name: int(amount * 10**9) for name, amount in total.items()} == wanted
    assert less(total, total) == {}
    assert added({}, {"cost": 0.1})["cost"] == Decimal("0.1")
    for resource, amount, what in (("tokens", 0.5, "a whole number"), ("cost", 0.1234567891, "at most 9 decimals")):
        with pytest.raises(InvalidInput, match=what):  # the server would refuse it in the end, when it is too late
            added({}, {resource: amount})


@pytest.mark.parametrize("amount", [-1, float("nan"), float("inf"), True, "5", None, Decimal("-0.1")])
def test_an_invalid_amount_is_refused(amount: Any) -> None:
    with pytest.raises(InvalidInput, match=r"cost\.tokens"):
        added({}, {"tokens": amount})


def test_filters_are_written_as_the_server_reads_them() -> None:
    moment = datetime(2030, 1, 1, tzinfo=UTC)
    asked = {
        "a": True,
        "b__in": [1, 2],
        "c": None,
        "d__ne": None,
        "e": b"\xff",
        "f__ge": moment,
        "limit": 5,
        "where__lt": 1,
    }
    assert filters(asked, {"field": "x", "op": "==", "value": Decimal("0.10")}, ["-a", "b"]) == [
        ("a", "true"), ("b__in", "1"), ("b__in", "2"), ("c__null", "true"), ("d__null", "false"), ("e", "/w=="),
        ("f__ge", "2030-01-01T00:00:00+00:00"), ("limit__eq", "5"), ("where__lt", "1"),
        ("where", '{"field":"x","op":"==","value":"0.10"}'), ("order_by", "-a,b"),
    ]  # fmt: skip
    assert query({"a": None, "b": 1}) == [("b", "1")]


@given(st.integers(0, 30), st.floats(0, 100), st.none() | st.floats(0, 100))
def test_retries_never_leave_their_bounds(tried: int, elapsed_s: float, told_s: float | None) -> None:
    retries = Retries(times=5, base_s=0.5, most_s=4, budget_s=50)
    error = NoAnswer(outcome="unknown", **({} if told_s is None else {"retry_after_s": told_s}))
    wait_s = retries.wait_s(error, repeatable=True, tried=tried, elapsed_s=elapsed_s)
    if wait_s is not None:
        assert tried < 5
        assert (told_s or 0) <= wait_s <= (told_s or 0) + min(4, 0.5 * 2**tried)
        assert elapsed_s + wait_s <= 50
    assert retries.wait_s(error, repeatable=False, tried=0, elapsed_s=0) is None


def test_retry_after_may_be_a_date() -> None:
    later = (datetime.now(UTC) + timedelta(seconds=90)).strftime("%a, %d %b %Y %H:%M:%S GMT")
    assert 80 < (retry_after_s(later) or 0) <= 90
    assert (retry_after_s("7"), retry_after_s("soon"), retry_after_s(None)) == (7.0, None, None)
    assert retry_after_s("Thu, 01 Jan 1970 00:00:00 GMT") == 0


@given(st.integers(300, 599), st.binary(max_size=60))
def test_no_response_breaks_the_error_map(status: int, body: bytes) -> None:
    assert isinstance(error_of(status, {}, body), StrongroomError)


def test_every_exported_name_exists() -> None:
    assert sorted(package.__all__) == sorted(set(package.__all__))
    assert all(hasattr(package, name) for name in package.__all__)
    assert Client.__module__.startswith("strongroom.client._sync")
    assert dataclasses.is_dataclass(Retries)
