"""What OpenAPI promises holds, on requests that follow it and on requests that do not, made up by schemathesis."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any
from urllib.parse import quote

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.checks import load_all_checks, not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance

from tests.serving import ADMIN, Reply, Served, serving

load_all_checks()
EXAMPLES = max(3, settings().max_examples // 10)
"""Of each operation and mode: 3, or 20 with `--hypothesis-profile=thorough`."""
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
def test_every_operation_answers_as_it_promises(mode: GenerationMode, loop: Loop) -> None:
    schema = schemathesis.openapi.from_dict(loop.spec)
    seen: dict[str, set[int]] = {}
    for result in schema.get_all_operations():
        operation = result.ok()  # type: ignore[union-attr]  # an Err fails the test
        if operation.path.endswith(":watch"):
            continue  # it has no end

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck), deadline=None, derandomize=True)
        def one(case: Case[Any]) -> None:
            answer = loop.call(case)
            seen.setdefault(f"{case.method} {case.path}", set()).add(answer.status_code)
            case.validate_response(answer, checks=CHECKS)
            Reply(answer)  # every error has the one shape

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
