"""Messages about wrong input, Pydantic's included, say what was found and what was expected."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from decimal import Decimal
from enum import Enum
from typing import Annotated, Any, Literal, get_args

import pytest
from pydantic import BaseModel, Field, ValidationError
from pydantic_core import InitErrorDetails, core_schema

from strongroom import Entity, Secret
from strongroom.cli import main
from strongroom.config import load
from strongroom.entities import parse
from strongroom.entities.input_errors import problems_of
from strongroom.errors import ConfigError, InvalidInput
from strongroom.keys.model import KeyChanges, NewKey
from strongroom.quotas.service import QuotaChanges
from strongroom.webhooks.model import WebhookChanges
from tests.helpers.server_app import serving

CONTEXTS: dict[str, Any] = {
    "error": "why", "error_type": "why", "class_name": "Thing", "class": "Thing", "gt": 1, "ge": 1, "lt": 1, "le": 1,
    "multiple_of": 2, "min_length": 1, "max_length": 1, "actual_length": 0, "field_type": "List", "pattern": "^a$",
    "expected": "'a' or 'b'", "discriminator": "'kind'", "tag": "c", "expected_tags": "'a', 'b'", "tz_expected": 0,
    "tz_actual": 1, "expected_schemes": "'https'", "expected_version": 4, "max_digits": 1, "decimal_places": 1,
    "whole_digits": 1, "method_name": "m", "function_name": "f", "encoding": "utf8", "encoding_error": "why",
    "attribute": "a",
}  # fmt: skip
NOTHING_EXPECTED = {
    "missing", "extra_forbidden", "frozen_field", "frozen_instance", "missing_argument", "value_error",
    "missing_keyword_only_argument", "missing_positional_only_argument", "unexpected_keyword_argument",
    "unexpected_positional_argument", "assertion_error",
}  # fmt: skip
"""Where nothing was found, or nothing is expected; and what a validator says itself."""


def message_for(kind: Any, value: Any = "value") -> str:
    context = CONTEXTS
    if kind in ("value_error", "assertion_error"):
        context = {"error": ValueError("found 1, expected 2")}
    details = InitErrorDetails(type=kind, loc=("field",), input=value, ctx=context)
    (problem,) = problems_of(ValidationError.from_exception_data("x", [details]))
    assert problem.path == "field"
    return problem.message


@pytest.mark.parametrize("kind", get_args(core_schema.ErrorType))
def test_every_error_of_pydantic_says_what_was_found_and_what_was_expected(kind: str) -> None:
    message = message_for(kind)
    if kind not in NOTHING_EXPECTED:
        assert message.startswith("found "), message
        assert ", expected " in message
    for pydantics in ("Input should", "Field required", "Value error", "Extra inputs", "valid dictionary", "class "):
        assert pydantics not in message
    assert not message.endswith(".")


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Sample(BaseModel, extra="forbid"):
    name: Annotated[str, Field(min_length=1, max_length=3)] = "a"
    code: Annotated[str, Field(pattern="^[a-z]+$")] = "a"
    count: Annotated[int, Field(ge=1, le=5)] = 1
    price: Annotated[Decimal, Field(max_digits=3)] = Decimal(1)
    rate: float = 1.0
    on: bool = True
    at: datetime | None = None
    kind: Literal["live", "test"] = "live"
    colour: Colour = Colour.RED
    items: Annotated[list[int], Field(min_length=1, max_length=2)] = [1]
    either: int | list[str] = 1
    inner: dict[str, int] = {}


@pytest.mark.parametrize(
    ("field", "value", "path", "message"),
    [
        ("name", "", "name", "found an empty text, expected at least one character"),
        ("name", "abcd", "name", "found 4 characters, expected at most 3"),
        ("name", 5, "name", "found 5, expected text"),
        ("code", "A", "code", "found 'A', expected text that matches ^[a-z]+$"),
        ("count", 0, "count", "found 0, expected at least 1"),
        ("count", 6, "count", "found 6, expected at most 5"),
        ("count", "x", "count", "found 'x', expected a whole number"),
        ("count", 1.5, "count", "found 1.5, expected a whole number"),
        ("count", None, "count", "found null, expected a whole number"),
        ("price", "12345", "price", "found '12345', expected at most 3 digits"),
        ("price", "a", "price", "found 'a', expected a number"),
        ("rate", {}, "rate", "found an object, expected a number"),
        ("on", "perhaps", "on", "found 'perhaps', expected true or false"),
        ("at", "soon", "at", "found 'soon', expected a time with a zone, such as 2027-01-01T00:00:00Z"),
        ("kind", "prod", "kind", "found 'prod', expected live or test"),
        ("colour", "green", "colour", "found 'green', expected red or blue"),
        ("items", [], "items", "found 0 entries, expected at least 1"),
        ("items", [1, 2, 3], "items", "found 3 entries, expected at most 2"),
        ("items", "no", "items", "found 'no', expected a list"),
        ("items", [1, "x"], "items.1", "found 'x', expected a whole number"),
        ("either", "x", "either", "found 'x', expected a whole number or a list"),
        ("inner", [], "inner", "found a list, expected an object"),
        ("inner", {"a": "x"}, "inner.a", "found 'x', expected a whole number"),
        ("more", 1, "more", "is not a known field"),
    ],
)
def test_field_messages_name_the_found_and_the_expected_value(field: str, value: Any, path: str, message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Sample.model_validate({field: value})
    (problem,) = problems_of(caught.value)
    assert (problem.path, problem.message) == (path, message)


class Guarded(Entity, collection="guarded"):
    pin: Annotated[int, Secret(), Field(le=10)] = 1
    word: Annotated[Literal["a", "b"], Secret()] = "a"


def test_the_value_of_a_secret_is_never_shown() -> None:
    with pytest.raises(InvalidInput) as caught:
        Guarded.parse({"pin": 4711, "word": "hunter2"})
    assert {p.path: p.message for p in caught.value.problems} == {
        "pin": "found a number, expected at most 10",
        "word": "found text, expected a or b",
    }


def test_every_invalid_item_of_a_list_is_reported() -> None:
    with pytest.raises(InvalidInput) as caught:
        parse(
            NewKey,
            {
                "name": "a",
                "permissions": ["a b", "strongroom:x", "ok"],
                "allowed_ips": ["10.0.0.1/33", "10.0.0.1", "x"],
                "groups": ["x ", "y "],
                "allowed_models": ["a**", ""],
                "limits": [{"resource": "A", "limit": 1, "window": {"kind": "total"}}],
            },
        )
    told = {problem.path: problem.message for problem in caught.value.problems}
    assert "'a b'" in told["permissions"]
    assert "'strongroom:x'" in told["permissions"]
    assert "'10.0.0.1/33'" in told["allowed_ips"]
    assert "'x'" in told["allowed_ips"]
    assert "'x '" in told["groups"]
    assert "'y '" in told["groups"]
    assert "'a**'" in told["allowed_models"]
    assert "''" in told["allowed_models"]
    assert told["limits.0.resource"].startswith("found 'A', expected a lower-case letter, then")
    with pytest.raises(InvalidInput, match=r"…$"):
        parse(NewKey, {"name": "a", "groups": [f"{number} " for number in range(9)]})


@pytest.mark.parametrize(
    ("model", "field", "message"),
    [
        (KeyChanges, "tenant", "cannot be changed"),
        (KeyChanges, "id", "cannot be changed"),
        (KeyChanges, "environment", "cannot be changed"),
        (KeyChanges, "prefix", "cannot be changed"),
        (KeyChanges, "enabled", "is changed by its own calls: enable and disable"),
        (KeyChanges, "key", "is changed by its own call: rotate"),
        (KeyChanges, "usage_count", "cannot be given: it is set by Strongroom"),
        (KeyChanges, "colour", "is not a known field"),
        (NewKey, "created_at", "cannot be given: it is set by Strongroom"),
        (NewKey, "colour", "is not a known field"),
        (QuotaChanges, "tenant", "cannot be changed"),
        (QuotaChanges, "version", "cannot be given: it is set by Strongroom"),
        (WebhookChanges, "tenant", "cannot be changed"),
        (WebhookChanges, "secret", "is changed by its own call: rotate the secret"),
    ],
)
def test_an_unchangeable_field_is_reported_as_such_and_not_as_unknown(
    model: type[BaseModel], field: str, message: str
) -> None:
    given: Mapping[str, Any] = {"name": "a", field: "x"} if model is NewKey else {field: "x"}
    with pytest.raises(InvalidInput) as caught:
        parse(model, given)
    assert [(p.path, p.message) for p in caught.value.problems] == [(field, message)]


async def test_http_errors_use_the_same_messages() -> None:
    async with serving() as served:
        key = await served.make_key()
        changed = await served.call("PATCH", f"/v1/keys/{key['id']}", {"tenant": "other", "rotate_every_s": 1})
        assert {e["path"]: e["message"] for e in changed.json["errors"]} == {
            "tenant": "cannot be changed",
            "rotate_every_s": "found 1, expected at least 3600",
        }
        listed = await served.get("/v1/keys?limit=0&deleted=perhaps&colour=red")
        assert {e["path"]: e["message"] for e in listed.json["errors"]} == {
            "limit": "found '0', expected at least 1",
            "deleted": "found 'perhaps', expected true or false",
            "colour": "is not a known parameter",
        }


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--bogus", "found --bogus, which is not an option of this command (see"),
        ("--tennant", "found --tennant, which is not an option of this command; did you mean --tenant? (see"),
    ],
)
def test_an_option_is_suggested_only_if_it_resembles_the_given_one(
    option: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["keys", "list", option]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("serve", "--port", "x"), "--port: found 'x', expected a whole number (see strongroom serve --help)"),
        (("serve", "--port", "99999"), "--port: found '99999', expected at most 65535 (see strongroom serve --help)"),
        (("bench", "--seconds", "x"), "--seconds: found 'x', expected a number (see strongroom bench --help)"),
        (("schema", "retain", "x"), "DAYS: found 'x', expected a whole number (see strongroom schema retain --help)"),
        (("keys", "list", "--state", "lost"), "--state: found 'lost', expected active, disabled or expired"),
        (("keys", "list", "--used-before", "soon"), "--used-before: found 'soon', expected a time such as"),
        (("keys", "create", "--name", "a", "--expires", "x", "--limit", "y"), "--expires: found 'x', expected a time"),
        (("keys", "create", "--name", "a", "--expires", "x", "--limit", "y"), "--limit: found 'y', expected for"),
        (("keys", "create", "--name", "a", "--limit", "a=1/1h", "--limit", "y"), "--limit: found 'y', expected for"),
        (
            ("keys", "create", "--name", "a", "--metadata", "a=1", "--metadata", "a=2"),
            "--metadata: found 'a' more than",
        ),
        (("keys", "verify", "x", "--cost", "tokens=1", "--cost", "tokens=2"), "--cost: found 'tokens' more than once"),
        (("keys", "rotate", "a", "--overlap", "x"), "--overlap: found the duration 'x', expected a number and s, m"),
    ],
)
def test_an_invalid_value_is_reported_with_its_option(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_an_invalid_setting_is_reported_under_the_name_that_was_used() -> None:
    with pytest.raises(ConfigError, match=r"^--store: found"):
        load(store="nope://x")
    with pytest.raises(ConfigError, match=r"^--workers: found 0, expected"):
        load(workers=0)
    with pytest.raises(ConfigError, match=r"^TARGET: found"):
        load(store="nope://x", store_is="TARGET")
