"""The JSON Schemas of the OpenAPI document: each has one name, and none is looser than the code."""

from __future__ import annotations

from typing import Any

REF = "#/components/schemas/{model}"
_BEFORE = REF.format(model="")
Schema = dict[str, Any]


class Components:
    """The document's named schemas. `answers`: the schemas of answers, from FastAPI."""

    def __init__(self, answers: dict[str, Schema]) -> None:
        self.schemas = answers
        for schema in answers.values():
            close(schema)

    def answer(self, schema: Schema) -> Schema:
        """The schema of an answer, with its definitions moved here."""
        for name, definition in schema.pop("$defs", {}).items():
            self.schemas.setdefault(name, close(definition))
        return schema

    def request(self, schema: Schema) -> Schema:
        """A reference to the schema of a request's body, moved here. Its definitions get names that end in `In`,
        because the same model in an answer requires fields that a request may leave out."""
        definitions = schema.pop("$defs", {})
        renamed = {_BEFORE + name: _BEFORE + _named_in(name) for name in definitions}
        for name, definition in definitions.items():
            self.schemas.setdefault(_named_in(name), _open(_renamed(definition, renamed)))
        schema = _renamed(schema, renamed)
        if "properties" not in schema:
            return schema
        self.schemas[schema["title"]] = _open(schema)
        return {"$ref": _BEFORE + schema["title"]}


def _named_in(name: str) -> str:
    return name if name.endswith(("In", ".new", ".changes")) else f"{name}In"


def _renamed(value: Any, names: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _renamed(item, names) for key, item in value.items()}
    if isinstance(value, list):
        return [_renamed(item, names) for item in value]
    return names.get(value, value) if isinstance(value, str) else value


def close(schema: Schema) -> Schema:
    """Forbid unnamed fields in an answer."""
    for part in _parts(schema):
        if "properties" in part:
            part.setdefault("additionalProperties", False)
    return schema


def _open(schema: Schema) -> Schema:
    """Allow other fields in a body whose model ignores them."""
    for part in _parts(schema):
        if "properties" in part:
            part.setdefault("additionalProperties", True)
    return schema


def _parts(value: Any) -> list[Schema]:
    """Every schema inside a schema, except the values of `default`, `enum` and similar keywords."""
    found: list[Schema] = []
    waiting: list[Any] = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, list):
            waiting += one
        elif isinstance(one, dict):
            found.append(one)
            for key, item in one.items():
                if key in ("properties", "patternProperties", "$defs"):
                    waiting += item.values()
                elif key in ("items", "anyOf", "oneOf", "allOf", "additionalProperties", "prefixItems"):
                    waiting.append(item)
    return found


def given(parameter: dict[str, Any]) -> dict[str, Any]:
    """The schema of a query parameter without null, which a query string cannot express."""
    schema = parameter["schema"]
    options = [option for option in schema.get("anyOf", ()) if option != {"type": "null"}]
    if len(options) == 1:
        rest = {name: value for name, value in schema.items() if name != "anyOf"}
        parameter["schema"] = {**options[0], **rest}
    return parameter
