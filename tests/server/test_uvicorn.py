"""What the server takes from inside uvicorn, which promises none of it: a release that moves it fails here by name."""

from __future__ import annotations

import ast
import asyncio
import inspect
import textwrap
from typing import Any

import pytest
import uvicorn
from uvicorn.protocols.http import flow_control, httptools_impl
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from strongroom.server.cycles import Cycle, Flow
from strongroom.server.protocol import Protocol
from tests.server.test_protocol import Wire, configured

CYCLE_ARGUMENTS = {
    "scope", "transport", "flow", "logger", "access_logger", "access_log", "default_headers", "message_event",
    "expect_100_continue", "keep_alive", "on_response",
}  # fmt: skip
CYCLE_ATTRIBUTES = (
    "body", "disconnected", "keep_alive", "message_event", "more_body", "response_complete", "response_started",
    "waiting_for_100_continue", "run_asgi", "send", "send_500_response",
)  # fmt: skip
FLOW_ATTRIBUTES = (
    "drain", "pause_reading", "pause_writing", "read_paused", "resume_reading", "resume_writing", "write_paused",
)  # fmt: skip
STATE_ATTRIBUTES = ("connections", "default_headers", "tasks", "total_requests")
SERVER_ATTRIBUTES = (
    "capture_signals",
    "config",
    "handle_exit",
    "on_tick",
    "serve",
    "should_exit",
    "shutdown",
    "startup",
)


async def _unused(scope: Any, receive: Any, send: Any) -> None:
    raise AssertionError("nothing is asked of it")


def _theirs(cls: type) -> set[str]:
    """The attributes of `self` that a class reads and does not define itself."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and _is_self(node.value)]
    own = {name.attr for name in names if isinstance(name.ctx, ast.Store)} | set(vars(cls))
    return {name.attr for name in names} - own


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


async def test_a_connection_of_uvicorn_has_every_attribute_that_ours_reads() -> None:
    connection = HttpToolsProtocol(configured(_unused), ServerState(), {}, asyncio.get_running_loop())
    connection.connection_made(Wire())
    read = _theirs(Protocol) | {"app_state", "cycle", "flow", "headers", "parser", "pipeline", "scope", "transport"}
    assert len(read) > 15, "the list is made from the source: it has lost its way"
    missing = sorted(name for name in read if not hasattr(connection, name))
    assert not missing, f"uvicorn {uvicorn.__version__}: a connection has no {', '.join(missing)}"
    connection.connection_lost(None)


def test_what_a_connection_of_ours_answers_is_still_called_by_uvicorn() -> None:
    """A method that overrides none would be called by nobody."""
    ours = {name for name, value in vars(Protocol).items() if callable(value) and not name.startswith("_")}
    ours -= {"start_whole"}  # called by `Direct`
    gone = sorted(name for name in ours if not hasattr(HttpToolsProtocol, name))
    assert not gone, f"uvicorn {uvicorn.__version__}: a connection is not asked for {', '.join(gone)}"


async def test_a_request_of_uvicorn_is_made_and_kept_as_ours_expects() -> None:
    parameters = set(inspect.signature(RequestResponseCycle).parameters)
    assert parameters == CYCLE_ARGUMENTS, f"uvicorn {uvicorn.__version__}: a request is made otherwise"
    arguments: Any = dict.fromkeys(CYCLE_ARGUMENTS)
    cycle = Cycle(**arguments)
    missing = sorted(name for name in CYCLE_ATTRIBUTES if not hasattr(cycle, name))
    assert not missing, f"uvicorn {uvicorn.__version__}: a request has no {', '.join(missing)}"
    assert cycle.body == b""


@pytest.mark.parametrize(
    ("made", "names"),
    [
        (Flow(Wire()), FLOW_ATTRIBUTES),
        (ServerState(), STATE_ATTRIBUTES),
        (uvicorn.Server(configured(_unused)), SERVER_ATTRIBUTES),
        (httptools_impl, ("STATUS_LINE",)),
        (flow_control, ("HIGH_WATER_LIMIT",)),
    ],
    ids=["flow control", "server state", "server", "httptools_impl", "flow_control"],
)
def test_uvicorn_has_what_else_the_server_uses(made: Any, names: tuple[str, ...]) -> None:
    missing = sorted(name for name in names if not hasattr(made, name))
    assert not missing, f"uvicorn {uvicorn.__version__}: there is no {', '.join(missing)}"


async def test_reading_is_paused_and_resumed_as_ours_expects() -> None:
    wire = Wire()
    flow = FlowControl(wire)
    flow.pause_reading()
    assert (flow.read_paused, wire.paused) == (True, True)
    flow.resume_reading()
    assert (flow.read_paused, wire.paused) == (False, False)
    flow.pause_writing()
    assert flow.write_paused
    flow.resume_writing()
    assert not flow.write_paused
