"""The server answers as the OpenAPI document says, for valid and invalid requests that schemathesis generates."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any
from urllib.parse import quote

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.checks import load_all_checks, not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance

from tests.helpers.server_app import ADMIN, Reply, Served, serving

load_all_checks()
EXAMPLES = max(2, settings().max_examples // 10)
"""Of each operation and mode: 2, or 20 with `--hypothesis-profile=thorough`."""
UNSAID = re.compile(
    # What JSON Schema has no words for: one field beside another, what is stored, what a word means elsewhere.
    r"IANA|9 decimals|whole number|valid integer|printable|differs from|"
    r"cannot be combined with|concurrency counts|whsec_"
    r"|as a key:|is not a cursor|address or a range|found two limits|less than rotate_every_s|needs rotate_every_s"
    r"|there is no such key|not JSON|at most 10 different|at least one condition|exactly one of filter and ids"
    r"|is needed with|is not after|found nothing, expected|beside|a time after since|give both"
    r"|required to turn writes off|which the log covers|below the size|expected a size"
    r"|is not a URL|host|action \w+, expected|inside a list|levels|outside int64|digits|exponent|quoted version"
)
"""Of requests that follow the document, so much may be wrong with them nevertheless."""
CHECKS = [not_a_server_error, content_type_conformance, response_schema_conformance]


class Loop:
    """The application in an event loop that hypothesis's synchronous examples can call into."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._runner = self._stack.enter_context(asyncio.Runner())
        self._context = serving()
        self.served: Served = self._runner.run(self._context.__aenter__())
        self.spec: dict[str, Any] = self._runner.run(self.served.get("/openapi.json")).answer.json()

    def close(self) -> None:
        self._runner.run(self._context.__aexit__(None, None, None))
        self._stack.close()

    def call(self, case: Case[Any]) -> httpx.Response:
        kwargs = case.as_transport_kwargs(base_url="http://strongroom")
        # An id is one segment of the path; a dot would be taken for a step in it.
        path = case.path
        for name, value in (case.path_parameters or {}).items():
            path = path.replace("{" + name + "}", quote(str(value), safe="").replace(".", "%2E") or "x")
        headers = {n.encode(): str(v).encode("latin-1", "replace") for n, v in (kwargs.get("headers") or {}).items()}
        request = self.served.client.build_request(
            case.method,
            path,
            params=kwargs.get("params"),
            headers={**headers, b"Authorization": f"Bearer {ADMIN}".encode()},
            content=kwargs.get("data"),
            json=kwargs.get("json"),
        )
        return self._runner.run(self._send(request))

    async def _send(self, request: httpx.Request) -> httpx.Response:
        return await self.served.client.send(request)


@pytest.fixture(scope="module")
def loop() -> Iterator[Loop]:
    made = Loop()
    yield made
    made.close()


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_every_operation_answers_as_the_openapi_document_says(mode: GenerationMode, loop: Loop) -> None:
    schema = schemathesis.openapi.from_dict(loop.spec)
    seen: dict[str, set[int]] = {}
    for result in schema.get_all_operations():
        operation = result.ok()  # type: ignore[union-attr]  # an Err fails the test
        if operation.path.endswith(":watch"):
            continue  # it has no end

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(
            max_examples=EXAMPLES,
            suppress_health_check=list(HealthCheck),
            deadline=None,
            derandomize=True,
            phases=[Phase.generate],
        )
        def one(case: Case[Any]) -> None:
            answer = loop.call(case)
            seen.setdefault(f"{case.method} {case.path}", set()).add(answer.status_code)
            case.validate_response(answer, checks=CHECKS)
            reply = Reply(answer)  # every error has the one shape
            if mode is GenerationMode.POSITIVE and answer.status_code == 422:
                untold = [error for error in reply.json["errors"] if not UNSAID.search(error["message"])]
                assert not untold, f"{case.method} {case.path} {case.query} {case.body!r}: the document is looser"

        try:
            one()
        except Exception as error:
            if "Unsatisfiable" in type(error).__name__ or "SerializationNotPossible" in type(error).__name__:
                continue  # nothing can be wrong with an operation that takes nothing
            raise
    assert len(seen) > 20
    if mode is GenerationMode.POSITIVE:
        made = {name for name, statuses in seen.items() if statuses & {200, 201}}
        assert {"POST /v1/keys/verify", "GET /v1/keys", "POST /v1/tenants/{tenant}/actions"} <= made, seen
