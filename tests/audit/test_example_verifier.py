"""The verifier in examples/, which knows nothing of Strongroom, agrees with Strongroom's own on good and bad files."""

from __future__ import annotations

import ast
import asyncio
import importlib.util
import json
import sys
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strongroom import Strongroom
from strongroom.errors import InvalidInput
from strongroom.journal.export import export_tree, logged_tree
from strongroom.journal.leaf import redacted_salt
from tests.helpers.faulty_store import FaultyStore
from tests.helpers.paths import ROOT
from tests.helpers.stores import opened
from tests.journal.test_exports import Signer, append, verified

EXAMPLE = ROOT / "examples" / "verify_audit_export.py"
MAX_LINES = 200
TENANT = "äcme/ü"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("verify_audit_export", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def files() -> tuple[Signer, dict[str, bytes]]:
    """Exports of a tenant, of a part of it, of the platform, and of a tree with redacted records."""
    return asyncio.run(_made())


async def _made() -> tuple[Signer, dict[str, bytes]]:
    signer = Signer()
    async with opened("json://:memory:") as (room, store):
        room.sealer.sealer.signer = signer
        await append(store, TENANT, 300)
        await room.sealer.seal_now()
        await append(store, TENANT, 7, 300)
        await append(store, "beta", 2)
        await append(store, None, 20)
        await room.sealer.seal_now()
        found = {
            "whole": await _export(store, signer, TENANT),
            "part": await _export(store, signer, TENANT, 33, 290),
            "platform": await _export(store, signer, None),
        }
        await _redact(room, store)
        return signer, {**found, "redacted": await _export(store, signer, TENANT)}


async def _export(
    store: FaultyStore, signer: Signer, tenant: str | None, first: int | None = None, end: int | None = None
) -> bytes:
    tree = await logged_tree(store, tenant)
    lines = export_tree(store, tree, await tree.checkpoint(signer.sign), first=first, end=end)
    return b"".join([line async for line in lines])


async def _redact(room: Strongroom, store: FaultyStore) -> None:
    tree = await logged_tree(store, TENANT)
    (leaf,) = [leaf async for leaf in tree.reader.leaves(5, 6)]
    assert leaf.row is not None
    salt = redacted_salt(leaf.row, frozenset({"actor", "before"}))
    await store.store.rewrite([(*leaf.row[:4], "", *leaf.row[5:10], None, leaf.row[11], salt, None, None)])


def test_the_example_is_short_and_knows_nothing_of_strongroom() -> None:
    text = EXAMPLE.read_text()
    assert len(text.splitlines()) < MAX_LINES
    modules = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            modules |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add((node.module or "").partition(".")[0])
    assert modules - set(sys.stdlib_module_names) == {"cryptography"}


@pytest.mark.parametrize("name", ["whole", "part", "platform", "redacted"])
def test_both_find_a_good_file_whole(
    name: str, files: tuple[Signer, dict[str, bytes]], example: ModuleType, tmp_path: Path
) -> None:
    signer, exports = files
    assert verified(exports[name], signer.key).findings == []
    assert status(example, exports[name], f"{signer.key}\n", tmp_path) == 0
    assert status(example, exports[name], f"{Signer().key}\n", tmp_path) == 1, "another key"


def status(example: ModuleType, content: bytes, keys: str, folder: Path) -> int:
    (folder / "export").write_bytes(content)
    (folder / "keys").write_text(keys)
    found: int = example.main([str(folder / "export"), str(folder / "keys")])
    return found


def _spoiled(value: object) -> object:
    match value:
        case bool() | None:
            return "x"
        case int():
            return value + 1
        case str():
            return value[:-1] + ("A" if value[-1:] != "A" else "B")
        case list():
            return [*value[:-1], _spoiled(value[-1])] if value else ["x"]
        case _:
            return None


@given(st.data(), st.sampled_from(["whole", "part", "platform", "redacted"]))
def test_both_refuse_every_changed_field_and_every_moved_line(
    files: tuple[Signer, dict[str, bytes]], example: ModuleType, tmp_path: Path, data: st.DataObject, name: str
) -> None:
    signer, exports = files
    lines = exports[name].splitlines(keepends=True)
    at = data.draw(st.integers(0, len(lines) - 1))
    kind = data.draw(st.sampled_from(["field", "field", "remove", "repeat", "cut"]))
    if kind == "field":
        line = json.loads(lines[at])
        ignored = {"kind", "strongroom_audit", "count", "round", *(["commitments", "after"] if "salts" in line else [])}
        field = data.draw(st.sampled_from(sorted(set(line) - ignored)))
        line[field] = _spoiled(line[field])
        lines[at] = json.dumps(line).encode() + b"\n"
    elif kind == "remove":
        del lines[at]
    elif kind == "repeat":
        lines.insert(at, lines[at])
    else:
        lines[at:] = [lines[at][: len(lines[at]) // 2]]
    content = b"".join(lines)
    with suppress(InvalidInput):
        assert verified(content, signer.key).findings
    assert status(example, content, f"{signer.key}\n", tmp_path) != 0
