"""`/docs`: the OpenAPI document as one page of plain HTML, which needs nothing from another host."""

from __future__ import annotations

import json
from html import escape
from typing import Any

from .. import errors as library
from . import errors
from .errors import STATUS

STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}
code,pre{font:14px/1.45 ui-monospace,monospace;background:#f4f4f4;border-radius:4px}code{padding:.1em .3em}
pre{padding:.8rem;overflow:auto}summary{cursor:pointer;padding:.4rem 0}table{border-collapse:collapse}
td,th{text-align:left;padding:.2rem .8rem .2rem 0;vertical-align:top}
.method{display:inline-block;min-width:4.5em;font-weight:600}
@media(prefers-color-scheme:dark){body{color:#ddd;background:#181818}code,pre{background:#262626}a{color:#8bf}}
"""


def page(spec: dict[str, Any]) -> str:
    """The whole page."""
    info = spec["info"]
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        f"<title>{escape(info['title'])}</title><style>{STYLE}</style></head><body>",
        f"<h1>{escape(info['title'])} {escape(info['version'])}</h1>",
        *(f"<p>{_text(paragraph)}</p>" for paragraph in info["description"].split("\n\n")),
        '<p>For programs: <a href="/openapi.json">openapi.json</a>. <a href="#errors">Errors</a>.</p>',
    ]
    tag = None
    for path, method, operation in sorted(_operations(spec), key=lambda o: (o[2].get("tags", [""])[0], o[0])):
        if operation.get("tags", [""])[0] != tag:
            tag = operation.get("tags", [""])[0]
            parts.append(f"<h2>{escape(tag)}</h2>")
        parts.append(_operation(spec, path, method, operation))
    parts.append(_errors())
    parts.append("</body></html>")
    return "\n".join(parts)


def _operations(spec: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    return [(path, method, operation) for path, item in spec["paths"].items() for method, operation in item.items()]


def _row(*cells: str) -> str:
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _text(text: str) -> str:
    """Escaped text, with `code` in backticks."""
    pieces = escape(text).split("`")
    return "".join(f"<code>{piece}</code>" if number % 2 else piece for number, piece in enumerate(pieces))


def _operation(spec: dict[str, Any], path: str, method: str, operation: dict[str, Any]) -> str:
    parts = [
        f'<details><summary><span class="method">{method.upper()}</span> <code>{escape(path)}</code> '
        f"{_text(operation.get('summary', ''))}</summary>"
    ]
    if "description" in operation:
        parts.append(f"<p>{_text(operation['description'])}</p>")
    parameters = operation.get("parameters", [])
    if parameters:
        rows = (_row(f"<code>{escape(p['name'])}</code>", p["in"], _text(p.get("description", ""))) for p in parameters)
        parts.append(f"<table>{''.join(rows)}</table>")
    content = operation.get("requestBody", {}).get("content", {})
    parts += [f"<p>Body:</p>{_schema(spec, media['schema'])}" for media in content.values()]
    failures = [
        f"{status} {answer['$ref'].rpartition('/')[2].replace('-or-', ', ')}"
        for status, answer in operation["responses"].items()
        if "$ref" in answer
    ]
    parts.append(f"<p>Errors: {escape('; '.join(failures))}.</p>")
    for status, answer in operation["responses"].items():
        for media_type, media in answer.get("content", {}).items():
            if media.get("schema"):
                parts.append(
                    f"<p>{escape(status)} <code>{escape(media_type)}</code></p>{_schema(spec, media['schema'])}"
                )
    return "".join(parts) + "</details>"


def _schema(spec: dict[str, Any], schema: dict[str, Any]) -> str:
    name = schema.get("$ref", "").rpartition("/")[2]
    shown = spec["components"]["schemas"].get(name, schema) if name else schema
    return f"<pre>{escape(json.dumps(shown, indent=2, ensure_ascii=False))}</pre>"


def _errors() -> str:
    titles: dict[str, str] = {}
    for module in (library, errors):
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, library.StrongroomError):
                titles.setdefault(value.code, (value.__doc__ or "").strip().split("\n")[0])
    rows = (
        _row(str(status), f'<code id="error-{code}">{code}</code>', _text(titles.get(code, "")))
        for code, status in STATUS.items()
    )
    return f'<h2 id="errors">Errors</h2><table>{"".join(rows)}</table>'
