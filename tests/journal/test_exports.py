"""Exports that prove themselves: whole ones verify without their store, and each change of the file is found."""

from __future__ import annotations

import base64
import io
import json
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519

from strongroom import Strongroom
from strongroom.errors import InvalidInput, NotFound
from strongroom.journal import export_format
from strongroom.journal import verify_export as verifying
from strongroom.journal.export import export_tree, logged_tree, range_of_times
from strongroom.journal.export_format import Closing, Header, line_of
from strongroom.journal.findings import Report
from strongroom.journal.leaf import leaf_of, redacted_salt
from strongroom.journal.merkle import Frontier
from strongroom.journal.signed_note import ED25519, Checkpoint, Signature, SignedNote, VerifierKey, signed_message
from strongroom.journal.tree_reader import TreeReader
from strongroom.storage.port import Append, Batch, Record
from tests.helpers.faulty_store import FaultyStore

NOW_US = 1_800_000_000_000_000


class Signer:
    """A log's key."""

    def __init__(self, name: str = "log.example") -> None:
        self._private = ed25519.Ed25519PrivateKey.generate()
        self.key = VerifierKey(name, ED25519, self._private.public_key().public_bytes_raw())

    def sign(self, checkpoint: Checkpoint, time_s: int = 0) -> str:
        content = self._private.sign(signed_message(ED25519, self.key.name, checkpoint.text, 0))
        return str(SignedNote(checkpoint.text, (Signature(self.key.name, self.key.id, content),)))


async def append(store: FaultyStore, tenant: str | None, count: int, begin: int = 0) -> None:
    records = [
        Append(
            Record(
                f"{tenant}-{number}", tenant, NOW_US + number, "key:ä", "r", "update", "notes", f"n{number}",
                {"text": "a"}, {"text": f"b{number}"}, salt=number.to_bytes(16, "big"),
            )
        )
        for number in range(begin, begin + count)
    ]  # fmt: skip
    for at in range(0, count, 500):
        await store.store.commit(Batch(tenant, tuple(records[at : at + 500]), 1))


@pytest.fixture
def signer() -> Signer:
    return Signer()


@pytest.fixture
async def sealed(room: Strongroom, store: FaultyStore, signer: Signer) -> FaultyStore:
    """600 records of a tenant and 300 of the platform, sealed in two rounds."""
    room.sealer.sealer.signer = signer
    await append(store, "acme", 400)
    await room.sealer.seal_now()
    await append(store, "acme", 200, 400)
    await append(store, None, 300)
    await append(store, "beta", 3)
    await room.sealer.seal_now()
    return store


async def exported(store: FaultyStore, signer: Signer, tenant: str | None = "acme", **part: Any) -> bytes:
    tree = await logged_tree(store, tenant)
    return b"".join([line async for line in export_tree(store, tree, await tree.checkpoint(signer.sign), **part)])


def verified(content: bytes, *keys: VerifierKey, **options: Any) -> Report:
    return verifying.verify_export(io.BytesIO(content), "file", keys=keys, **options)


def kinds(report: Report) -> list[tuple[str, int | None]]:
    return [(one.kind, one.index) for one in report.findings]


async def test_whole_exports_verify_without_the_store(
    sealed: FaultyStore, signer: Signer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verifying, "BLOCK_BYTES", 3_000)
    for tenant in ("acme", None):
        size = (await logged_tree(sealed, tenant)).reader.size
        assert size == 600 if tenant else size > 300
        content = await exported(sealed, signer, tenant)
        report = verified(content, signer.key)
        assert (report.findings, report.checked, report.notes) == ([], size, [])
        assert len(report.signers) == 1
        for first, end in ((0, 1), (3, 300), (256, 512), (255, 257), (511, 600), (599, 600), (0, 0), (299, 302)):
            if end <= size:
                part = verified(await exported(sealed, signer, tenant, first=first, end=end), signer.key)
                assert (part.findings, part.checked) == ([], end - first), (tenant, first, end)


async def test_a_large_export_is_verified_in_several_processes(
    sealed: FaultyStore, signer: Signer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verifying, "BLOCK_BYTES", 20_000)
    content = await exported(sealed, signer)
    assert verified(content, signer.key, workers=2).findings == []
    bad = content.replace(b'\\"b450\\"', b'\\"b451\\"')
    assert kinds(verified(bad, signer.key, workers=2)) == [("altered", 450)]


Change = Callable[[list[bytes]], list[bytes]]


def edited(at: int, **fields: Any) -> Change:
    def change(lines: list[bytes]) -> list[bytes]:
        line = {**json.loads(lines[at]), **fields}
        lines[at] = json.dumps(line, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"
        return lines

    return change


def again(index: int) -> Change:
    """Index and leaf hash made to fit, as somebody would who knows the format."""

    def change(lines: list[bytes]) -> list[bytes]:
        line = json.loads(lines[index + 1])
        line["after"] = '{"text":"other"}'
        row = (
            0, line["id"], line["tenant"], line["at_us"], line["actor"], line["request_id"], line["action"],
            line["collection"], line["entity_id"], 0, line["before"], line["after"],
            int(line["entity_id"][1:]).to_bytes(16, "big"), None, None,
        )  # fmt: skip
        line["leaf"] = base64.b64encode(leaf_of(row)).decode()
        return [
            *lines[: index + 1],
            json.dumps(line, separators=(",", ":"), ensure_ascii=False).encode() + b"\n",
            *lines[index + 2 :],
        ]

    return change


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (edited(11, actor="key:b"), ("altered", 10)),
        (edited(11, before=None), ("altered", 10)),
        (edited(11, at_us=1), ("altered", 10)),
        (edited(11, claims="{}"), ("altered", 10)),
        (edited(11, salts=[None] * 4), ("altered", 10)),
        (edited(11, tenant="beta"), ("inserted", 10)),
        (edited(1, index=0.5), ("damaged", 0)),
        (again(10), ("forked", None)),
        (lambda lines: [*lines[:11], *lines[12:]], ("deleted", 10)),
        (lambda lines: [*lines[:-2], lines[-1]], ("truncated", 599)),
        (lambda lines: [*lines[:11], lines[11], *lines[11:]], ("inserted", 11)),
        (lambda lines: [*lines[:11], lines[12], lines[11], *lines[13:]], ("deleted", 10)),
        (lambda lines: lines[:-1], ("truncated", 599)),
        (lambda lines: [*lines[:300], lines[300][:50]], ("truncated", 299)),
        (lambda lines: [*lines[:300], b"garbage\n", *lines[300:]], ("damaged", 299)),
        (lambda lines: [*lines[:300], b"[" * 100_000 + b"\n", *lines[300:]], ("damaged", 299)),
        (lambda lines: [lines[0]], ("truncated", 0)),
        (edited(-1, after=[base64.b64encode(bytes(32)).decode()]), ("damaged", None)),
    ],
)
async def test_each_change_of_the_file_is_found(
    change: Change, expected: tuple[str, int | None], sealed: FaultyStore, signer: Signer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(verifying, "BLOCK_BYTES", 50_000)
    lines = (await exported(sealed, signer)).splitlines(keepends=True)
    report = verified(b"".join(change(lines)), signer.key)
    assert kinds(report)[:1] == [expected], report.findings


async def test_a_cut_file_names_an_index_only_if_a_record_comes_before(sealed: FaultyStore, signer: Signer) -> None:
    lines = (await exported(sealed, signer)).splitlines(keepends=True)
    for kept, where in ((1, ""), (3, " after index 0")):
        (finding,) = verified(b"".join(lines[:kept]), signer.key).findings
        assert finding.message == f"the file has no last line: it was cut{where}"


async def test_a_line_without_end_is_refused_before_it_fills_the_memory(
    sealed: FaultyStore, signer: Signer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_format, "MAX_LINE_BYTES", 100_000)
    monkeypatch.setattr(verifying, "BLOCK_BYTES", 10_000)
    header = (await exported(sealed, signer)).splitlines(keepends=True)[0]
    endless = io.BytesIO(header + b"x" * 5_000_000)
    assert kinds(verifying.verify_export(endless, "file")) == [("truncated", 0)]
    assert endless.tell() < 300_000


@pytest.mark.parametrize("content", [b"", b"\n", b"garbage", b"{}", b"[" * 200_000, bytes(100)])
def test_what_is_no_export_is_refused(content: bytes) -> None:
    with pytest.raises(InvalidInput, match="not an export"):
        verified(content)


async def test_the_signature_is_checked_with_the_given_keys(sealed: FaultyStore, signer: Signer) -> None:
    content = await exported(sealed, signer)
    other = Signer()
    found = verified(content, other.key).findings
    assert [one.kind for one in found] == ["signature", "signature"]
    assert len({one.message for one in found}) == 2, "each names its note: the tenant's and the platform's"
    assert verified(content, other.key, signer.key).findings == []
    assert [note for note in verified(content).notes if "not checked" in note]
    resigned = await exported(sealed, other)
    assert [one.kind for one in verified(resigned, signer.key).findings] == ["signature"]


async def test_a_saved_checkpoint_finds_another_history_and_an_older_file(
    room: Strongroom, sealed: FaultyStore, signer: Signer
) -> None:
    content = await exported(sealed, signer)
    tree = await logged_tree(sealed, "acme")
    origin = f"{tree.log['origin']}/tenants/acme"
    for size in (0, 1, 256, 300, 600):
        good = Checkpoint(origin, size, await tree.reader.root(size))
        assert verified(content, signer.key, saved=good).findings == []
        if size:
            bad = Checkpoint(origin, size, bytes(32))
            assert [one.kind for one in verified(content, signer.key, saved=bad).findings] == ["forked"], size
    later = Checkpoint(origin, 601, bytes(32))
    assert [one.kind for one in verified(content, saved=later).findings] == ["old_copy"]
    part = await exported(sealed, signer, first=300, end=400)
    assert verified(part, saved=Checkpoint(origin, 10, bytes(32))).notes[-1].startswith("the saved checkpoint")
    platform = Checkpoint.parse(SignedNote.parse(tree.log["checkpoint"]).text)
    assert verified(content, signer.key, saved=platform).findings == []
    forked = Checkpoint(platform.origin, platform.size, bytes(32))
    assert [one.kind for one in verified(content, signer.key, saved=forked).findings] == ["forked"]
    with pytest.raises(InvalidInput, match="expected one of"):
        verified(content, saved=Checkpoint("other.example", 1, bytes(32)))


async def test_a_tenants_checkpoint_is_tied_to_the_platforms(sealed: FaultyStore, signer: Signer) -> None:
    lines = (await exported(sealed, signer)).splitlines(keepends=True)
    closing = json.loads(lines[-1])
    for name, value in (("number", 9), ("index", 0), ("path", []), ("entry", ["x", 600, "00"]), ("count", 10**30)):
        changed = {**closing, "round": {**closing["round"], name: value}}
        report = verified(b"".join(lines[:-1]) + json.dumps(changed).encode(), signer.key)
        assert report.findings, name


async def test_a_redacted_record_verifies_and_is_counted(sealed: FaultyStore, signer: Signer) -> None:
    tree = await logged_tree(sealed, "acme")
    (leaf,) = [leaf async for leaf in tree.reader.leaves(450, 451)]
    assert leaf.row is not None
    gone = redacted_salt(leaf.row, frozenset({"actor", "entity_id", "before", "after"}))
    after = '{"redacted":{"by":"a","reason":"r","at":"2027","record":"id"}}'
    await sealed.store.rewrite([(*leaf.row[:4], "", *leaf.row[5:8], "", leaf.row[9], None, after, gone, None, None)])
    report = verified(await exported(sealed, signer), signer.key)
    assert (report.findings, report.trees[0].redacted) == ([], 1)
    for name, value in (("actor", "eve"), ("claims", "{}"), ("entity_id", "n"), ("before", "{}"), ("after", "{}")):
        lines = (await exported(sealed, signer)).splitlines(keepends=True)
        lines[451] = json.dumps({**json.loads(lines[451]), name: value}).encode() + b"\n"
        found = [(one.kind, one.index) for one in verified(b"".join(lines), signer.key).findings]
        assert found == [("altered", 450)], f"{name}: nothing may stand in the place of what was redacted"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"actor":', b'"actor":"eve","actor":'),
        (b'"actor":', b'"\\u0061ctor":"eve","actor":'),
        (b'"actor":', b'"actor" :'),
        (b'"actor":', b'"Actor":"eve","actor":'),
        (b"}\n", b"}\r\n"),
    ],
)
async def test_a_line_must_be_written_as_exports_are(
    old: bytes, new: bytes, sealed: FaultyStore, signer: Signer
) -> None:
    """Else another reader could take something else from it than the verifier."""
    lines = (await exported(sealed, signer)).splitlines(keepends=True)
    lines[451] = lines[451].replace(old, new, 1)
    found = [(one.kind, one.index) for one in verified(b"".join(lines), signer.key).findings]
    assert found == [("altered", 450)]


async def test_the_index_of_a_record_and_the_range_of_times(sealed: FaultyStore, signer: Signer) -> None:
    for tenant in ("acme", None):
        tree = await logged_tree(sealed, tenant)
        leaves = [leaf async for leaf in tree.reader.leaves(0)]
        assert [leaf.index for leaf in leaves] == list(range(tree.reader.size))
        for leaf in leaves[::37]:
            if leaf.row is not None:
                assert await tree.reader.index_of(leaf.row[0]) == leaf.index
        assert await tree.reader.index_of(10**9) is None
    acme = await logged_tree(sealed, "acme")
    assert await range_of_times(sealed, acme, NOW_US + 10, NOW_US + 590) == (10, 590)
    assert await range_of_times(sealed, acme, NOW_US + 600, None) is None
    assert await range_of_times(sealed, acme, None, None) == (0, 600)
    with pytest.raises(NotFound, match="no record of tenant 'nobody' is sealed yet"):
        await logged_tree(sealed, "nobody")
    assert isinstance(acme.reader, TreeReader)


def long_export(count: int) -> Iterator[bytes]:
    """The lines of an export that no store made."""
    frontier = Frontier()
    yield line_of(Header(1, "log.example", "log.example", None, 0, count, count, []))
    for number in range(count):
        row: Any = (
            number, f"{number}", None, number, "a", "r", "update", "notes", "n", 1, None, '{"text":"b"}',
            number.to_bytes(16, "big"), None, None,
        )  # fmt: skip
        leaf = leaf_of(row)
        frontier.add(leaf)
        yield line_of(export_format.exported(row, number, leaf))
    note = str(SignedNote(Checkpoint("log.example", count, frontier.root()).text))
    yield line_of(Closing(count, [], note))


def test_the_memory_is_the_same_for_any_number_of_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifying, "BLOCK_BYTES", 50_000)
    peaks = []
    for count in (1_000, 1_000, 10_000):  # the first one also imports
        file = tmp_path / f"{count}.jsonl"
        file.write_bytes(b"".join(long_export(count)))
        tracemalloc.start()
        with file.open("rb") as opened:
            report = verifying.verify_export(opened, str(file))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert (report.findings, report.checked) == ([], count)
    assert peaks[2] < 1.3 * peaks[1]
