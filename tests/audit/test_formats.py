"""The forms in which audit records leave: OCSF as its schemas have it, CEF and CSV that nobody can break out of."""

from __future__ import annotations

import csv
import io
import json
import re
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ocsf_json_schema import OcsfJsonSchemaEmbedded, get_ocsf_schema

from strongroom.audit.formats import COLUMNS, FORMATS, changes_of, formatter, header_of
from strongroom.audit.record import AuditRecord

AT = datetime(2026, 5, 5, 12, 0, 0, 1, tzinfo=UTC)


def record(**fields: Any) -> AuditRecord:
    given = {
        "sequence": 7, "index": 3, "tenant": "acme", "at": AT, "actor": "key:k1", "request_id": "r1",
        "action": "update", "collection": "notes", "entity_id": "n1", "before": {"text": "a"}, "after": {"text": "b"},
    }  # fmt: skip
    return AuditRecord(**{**given, **fields})


RECORDS = [
    record(),
    record(action="create", before=None, after={"amount": Decimal("1.50"), "at": AT, "bytes": b"x", "tags": ["a"]}),
    record(action="delete", after=None, index=None),
    record(action="expire", after=None, tenant=None, request_id=""),
    record(action="add", before={"count": 1}, after={"count": 2}),
    record(
        action="redact", collection="journal", actor="", before=None, after={"redacted": {"by": "a", "reason": "b"}}
    ),
    record(action="deny", before=None, entity_id="", after={"operation": "list", "reason": "no right", "count": 12}),
    record(action="deny", before=None, after={"operation": "rollback", "reason": "no", "attempted": {"a": None}}),
]


@pytest.fixture(scope="module")
def schemas() -> dict[int, Any]:
    found = OcsfJsonSchemaEmbedded(get_ocsf_schema("1.6.0"))
    return {
        3004: jsonschema_rs.validator_for(found.get_class_schema("entity_management")),
        6003: jsonschema_rs.validator_for(found.get_class_schema("api_activity")),
    }


@pytest.mark.parametrize("number", range(len(RECORDS)))
def test_an_ocsf_event_is_valid_by_the_schemas_of_version_1_6(number: int, schemas: dict[int, Any]) -> None:
    event = json.loads(formatter("ocsf")(RECORDS[number]))
    assert [error.message for error in schemas[event["class_uid"]].iter_errors(event)] == []
    assert event["type_uid"] == event["class_uid"] * 100 + event["activity_id"]
    assert event["metadata"]["version"] == "1.6.0"
    assert event["time"] == 1_777_982_400_000


def test_a_denial_is_api_activity_that_failed(schemas: dict[int, Any]) -> None:
    event = json.loads(formatter("ocsf")(RECORDS[6]))
    assert (event["class_uid"], event["activity_name"], event["status_id"], event["count"]) == (6003, "Read", 2, 12)
    del event["actor"]
    assert not schemas[6003].is_valid(event)


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(texts, texts, texts)
def test_no_text_breaks_out_of_its_place_in_cef(actor: str, collection: str, value: str) -> None:
    """A reader that knows the escapes finds the eight parts, and each value whole."""
    given = record(actor=actor, collection=collection, request_id=value)
    (line, rest) = formatter("cef")(given).decode().split("\n")
    assert rest == ""
    parts = re.findall(r"((?:[^\\|]|\\.)*)(?:\||$)", line, re.DOTALL)[:8]
    assert parts[5].replace("\\|", "|").replace("\\\\", "\\") == re.sub(r"[\r\n]", " ", f"update {collection}")
    found = re.search(r" suser=((?:[^\\=]|\\.)*?) act=update ", line, re.DOTALL)
    unescaped = re.sub(r"\\(.)", lambda one: {"n": "\n", "r": "\r"}.get(one[1], one[1]), found[1]) if found else ""
    assert unescaped == actor


def test_a_cef_line_has_its_escapes() -> None:
    line = formatter("cef")(record(collection="a|b\\c", actor="x=y\nz", index=None)).decode()
    head = "CEF:0|Strongroom|Strongroom|"
    assert line.startswith(head)
    assert "|update|update a\\|b\\\\c|3|" in line
    assert " suser=x\\=y\\nz " in line
    assert "cn1" not in line


@given(st.sampled_from(["=1+1", "+1", "-1", "@x", "\tx", "plain", "a,b\n\"c'"]))
def test_a_csv_cell_is_no_formula_and_reads_back(name: str) -> None:
    content = (header_of("csv") + formatter("csv")(record(actor=name))).decode()
    (row,) = csv.DictReader(io.StringIO(content))
    assert tuple(row) == COLUMNS
    assert row["actor"] in (name, "'" + name)
    assert row["actor"][:1] not in "=+-@\t"
    assert json.loads(row["after"]) == {"text": "b"}


def test_json_lines_are_what_http_answers() -> None:
    (line,) = formatter("jsonl")(record()).splitlines()
    found = json.loads(line)
    assert tuple(found) == COLUMNS
    assert (found["at"], found["after"]) == ("2026-05-05T12:00:00.000001Z", {"text": "b"})
    assert FORMATS == ("jsonl", "csv", "cef", "ocsf")


def test_changes_name_each_field_with_both_sides() -> None:
    changed = record(before={"a": 1, "b": 2}, after={"a": 1, "b": 3})
    assert changes_of(changed) == [{"field": "b", "before": 2, "after": 3}]
    assert changes_of(record(before=None, after={"a": None})) == [{"field": "a", "before": None, "after": None}]
    assert changes_of(record(before={"a": 1}, after=None)) == [{"field": "a", "before": 1, "after": None}]
