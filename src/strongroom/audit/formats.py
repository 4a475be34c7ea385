"""The forms in which audit records leave: JSON Lines, CSV, CEF and OCSF 1.6. Pure: records in, lines out."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, Literal, get_args

import msgspec

from ..context import us_from_utc
from ..storage import tagged_json
from .record import AuditRecord

Format = Literal["jsonl", "csv", "cef", "ocsf"]
FORMATS: tuple[str, ...] = get_args(Format)
COLUMNS = (
    "sequence", "index", "tenant", "at", "actor", "request_id", "action", "collection", "entity_id", "before", "after",
)  # fmt: skip
OCSF_VERSION = "1.6.0"
_VERSION = version("strongroom")
MAX_CEF_VALUE = 4_000
"""Characters of a value in CEF; collectors cut longer ones. The other formats have whole values."""


def header_of(format: Format) -> bytes:
    """What stands before the records."""
    return _row(COLUMNS) if format == "csv" else b""


def formatter(format: Format) -> Callable[[AuditRecord], bytes]:
    """The function that makes a record's line."""
    return _FORMATTERS[format]


def view(record: AuditRecord) -> dict[str, Any]:
    """A record as JSON, as in `GET /v1/audit`."""
    return {name: getattr(record, name) for name in COLUMNS}


def changes_of(record: AuditRecord) -> list[dict[str, Any]]:
    """What changed, field by field: `{field, before, after}`; a side that did not exist is null."""
    before, after = record.before or {}, record.after or {}
    return [
        {"field": name, "before": before.get(name), "after": after.get(name)}
        for name in dict.fromkeys([*before, *after])
        if name not in before or name not in after or before[name] != after[name]
    ]


# --- JSON Lines and CSV ---------------------------------------------------------------------------------------

_encode = msgspec.json.Encoder(decimal_format="number").encode


def _jsonl(record: AuditRecord) -> bytes:
    return _encode(view(record)) + b"\n"


def _csv(record: AuditRecord) -> bytes:
    cells = view(record)
    cells["at"] = record.at.isoformat().replace("+00:00", "Z")
    for name in ("before", "after"):
        cells[name] = _text(cells[name])
    return _row([_harmless(cell) for cell in cells.values()])


def _text(document: dict[str, Any] | None) -> str:
    return "" if document is None else tagged_json.quick_dumps(document)


def _harmless(cell: Any) -> str:
    """A text that no spreadsheet takes for a formula: names come from anyone."""
    text = "" if cell is None else str(cell)
    return "'" + text if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text


def _row(cells: Any) -> bytes:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(cells)
    return buffer.getvalue().encode()


# --- CEF ------------------------------------------------------------------------------------------------------

_CEF_SEVERITY = {"deny": 6, "delete": 4, "expire": 2}
_CEF_HEADER = str.maketrans({"\\": "\\\\", "|": "\\|", "\n": " ", "\r": " "})
_CEF_VALUE = str.maketrans({"\\": "\\\\", "=": "\\=", "\n": "\\n", "\r": "\\r"})


def _cef(record: AuditRecord) -> bytes:
    denied = record.action == "deny"
    after = record.after or {}
    values: dict[str, Any] = {
        "rt": us_from_utc(record.at) // 1_000,
        "suser": record.actor,
        "act": record.action,
        "outcome": "failure" if denied else "success",
        "reason": after.get("reason") if denied else None,
        "externalId": record.sequence,
        "cn1": record.index, "cn1Label": "index",
        "cs1": record.tenant, "cs1Label": "tenant",
        "cs2": record.collection, "cs2Label": "collection",
        "cs3": record.entity_id, "cs3Label": "entityId",
        "cs4": record.request_id, "cs4Label": "requestId",
        "cs5": _text(record.before), "cs5Label": "before",
        "cs6": _text(record.after), "cs6Label": "after",
    }  # fmt: skip
    given = {name: value for name, value in values.items() if value not in (None, "")}
    extension = " ".join(
        f"{name}={str(value)[:MAX_CEF_VALUE].translate(_CEF_VALUE)}"
        for name, value in given.items()
        if not name.endswith("Label") or name.removesuffix("Label") in given
    )
    name = f"{record.action} {record.collection}"
    header = ("CEF:0", "Strongroom", "Strongroom", _VERSION, record.action, name)
    parts = [part.translate(_CEF_HEADER) for part in header]
    return "|".join([*parts, str(_CEF_SEVERITY.get(record.action, 3)), extension]).encode() + b"\n"


# --- OCSF -----------------------------------------------------------------------------------------------------

_ENTITY_MANAGEMENT = (3004, "Entity Management", 3, "Identity & Access Management")
_API_ACTIVITY = (6003, "API Activity", 6, "Application Activity")
_ACTIVITIES = {
    "create": (1, "Create"),
    "get": (2, "Read"),
    "list": (2, "Read"),
    "find": (2, "Read"),
    "watch": (2, "Read"),
    "update": (3, "Update"),
    "replace": (3, "Update"),
    "add": (3, "Update"),
    "delete": (4, "Delete"),
    "expire": (4, "Delete"),
}
_OTHER = 99


def _ocsf(record: AuditRecord) -> bytes:
    return _encode(ocsf_event(record)) + b"\n"


def ocsf_event(record: AuditRecord) -> dict[str, Any]:
    """A change as Entity Management, a denial as API Activity."""
    denied = record.action == "deny"
    after = record.after or {}
    operation = str(after.get("operation", record.action)) if denied else record.action
    class_uid, class_name, category_uid, category_name = _API_ACTIVITY if denied else _ENTITY_MANAGEMENT
    activity, activity_name = _ACTIVITIES.get(operation, (_OTHER, operation))
    metadata: dict[str, Any] = {
        "version": OCSF_VERSION,
        "product": {"name": "Strongroom", "vendor_name": "Strongroom", "version": _VERSION},
        "log_name": "journal",
        "sequence": record.sequence,
    }
    if record.request_id:
        metadata["correlation_uid"] = record.request_id
    if record.tenant is not None:
        metadata["tenant_uid"] = record.tenant
    event: dict[str, Any] = {
        "class_uid": class_uid,
        "class_name": class_name,
        "category_uid": category_uid,
        "category_name": category_name,
        "activity_id": activity,
        "activity_name": activity_name,
        "type_uid": class_uid * 100 + activity,
        "type_name": f"{class_name}: {activity_name}",
        "severity_id": 3 if denied else 1,
        "severity": "Medium" if denied else "Informational",
        "status_id": 2 if denied else 1,
        "status": "Failure" if denied else "Success",
        "time": us_from_utc(record.at) // 1_000,
        "metadata": metadata,
        "actor": {"user": {"name": record.actor or "redacted"}},
        "unmapped": {"index": record.index, "time_us": us_from_utc(record.at)},
    }
    if denied:
        event["api"] = {"operation": f"{operation} {record.collection}", "service": {"name": "Strongroom"}}
        if record.request_id:
            event["api"]["request"] = {"uid": record.request_id}
        event["src_endpoint"] = {"name": "unknown"}  # the journal keeps no addresses
        event["resources"] = [_resource(record)]
        event["status_detail"] = str(after.get("reason", ""))
        event["count"] = int(after.get("count", 1))
        event["unmapped"]["after"] = tagged_json.tag(after)
    else:
        event["entity"] = _entity(record, record.before)
        event["entity_result"] = _entity(record, record.after)
    return event


def _resource(record: AuditRecord) -> dict[str, Any]:
    resource = {"name": record.collection, "type": record.collection}
    return {**resource, "uid": record.entity_id} if record.entity_id else resource


def _entity(record: AuditRecord, document: dict[str, Any] | None) -> dict[str, Any]:
    entity = _resource(record)
    return {**entity, "data": tagged_json.tag(document)} if document is not None else entity


_FORMATTERS: dict[str, Callable[[AuditRecord], bytes]] = {"jsonl": _jsonl, "csv": _csv, "cef": _cef, "ocsf": _ocsf}

__all__ = ["COLUMNS", "FORMATS", "Format", "changes_of", "formatter", "header_of", "ocsf_event", "view"]
