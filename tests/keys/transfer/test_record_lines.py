"""Record files as spreadsheets write them: read, or refused with the reason."""

from __future__ import annotations

import codecs
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strongroom.keys.transfer.key_file import Finding, KeyFileError
from strongroom.keys.transfer.record_file import KeyRecord, Record, RecordReader
from strongroom.keys.transfer.record_lines import is_records

SHA256 = "ab" * 32
NOW_US = 1_700_000_000_000_000


def read(data: bytes) -> tuple[list[Record | None], list[Finding]]:
    """The records of a file with these bytes, and what was found of them."""
    assert is_records(data)
    found = list(RecordReader("acme", NOW_US).read(data.splitlines(keepends=True)))
    return [record for record, _ in found], [finding for _, findings in found for finding in findings]


def names(data: bytes) -> list[str]:
    records, findings = read(data)
    assert findings == []
    return [record.name for record in records if isinstance(record, KeyRecord)]


PLAIN = f"Name,Hash\r\nbilling,{SHA256}\r\n"


@pytest.mark.parametrize(
    "text",
    [
        PLAIN,
        f"NAME;HASH\r\nbilling;{SHA256}\r\n",
        f"sep=;\r\nName;Hash\r\nbilling;{SHA256}\r\n",
        f'"SEP=|"\r\nname|hash\r\nbilling|{SHA256}\r\n',
        f"sep=\t\nname\thash\nbilling\t{SHA256}\n",
        f' Name ,"Hash",Created At\r\nbilling,{SHA256},2026-01-01T00:00:00Z\r\n',
        f"\r\n\r\n{PLAIN}",
        f"{PLAIN},\r\n , \r\n",
        f"Name,Hash,,\r\nbilling,{SHA256},,\r\n",
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be-bom"])
def test_csv_of_spreadsheets_is_read(text: str, encoding: str) -> None:
    if encoding == "utf-16-be-bom":
        assert names(codecs.BOM_UTF16_BE + text.encode("utf-16-be")) == ["billing"]
    else:
        assert names(text.encode(encoding)) == ["billing"]


def test_separators_and_quotes_inside_quotes_belong_to_the_name() -> None:
    data = f'Name;"Hash";"Note; with ""quotes"", and commas"\nbilling;{SHA256};x\n'.encode()
    records, findings = read(data)
    assert isinstance(records[0], KeyRecord)
    assert [finding.message for finding in findings] == ["is no field of a key and is not carried over"]
    with pytest.raises(KeyFileError, match=r"its first line has 'name;', 'hash'$"):
        read(f'"Name;",Hash\nbilling,{SHA256}\n'.encode())


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (PLAIN.encode("utf-16-le"), "zero bytes, expected UTF-8, or UTF-16 with its byte order mark"),
        (PLAIN.encode("utf-16") + b"\x00", "is not UTF-16, which its first bytes say it is"),
        (PLAIN.replace("billing", "Käse").encode("latin-1"), "line 2: is not UTF-8"),
        (b"Name,name,hash\n", "has two columns 'name'"),
        (b"Title,Digest\n", "its first line has 'title', 'digest'"),
        (b"sep=;\n", "its first line has"),
        (b"nonsense", "is neither JSON nor CSV"),
    ],
)
def test_unreadable_csv_is_refused_with_its_reason(data: bytes, reason: str) -> None:
    with pytest.raises(KeyFileError, match=reason):
        read(data)


def test_a_cell_without_a_column_name_is_refused() -> None:
    records, findings = read(f"Name,Hash,\nbilling,{SHA256},stray\n".encode())
    assert records == [None]
    assert findings[0].message == "found 'stray' in a column without a name, expected nothing there"


@given(st.text(max_size=40), st.sampled_from(["utf-8", "utf-16", "utf-16-le", "utf-32"]))
def test_no_csv_text_raises_an_unexpected_error(text: str, encoding: str) -> None:
    data = text.encode(encoding, "surrogatepass")
    if is_records(data):
        with suppress(KeyFileError):
            list(RecordReader("acme", NOW_US).read(data.splitlines(keepends=True)))
