"""`strongroom import` and `strongroom export` of key files in the two public shapes; `keyrecords` imports records."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..errors import InvalidInput, Problem
from . import output
from .files import check_target, new_file
from .session import (
    EXIT_FAILED,
    Interrupted,
    JsonOption,
    StoreOption,
    in_store,
    operator,
)

if TYPE_CHECKING:
    from ..app import Strongroom
    from ..keys.transfer import Checksums, ChunkedKeyFile, Finding, Plan

MAX_SHOWN = 100
"""Rows of each kind that the output for people lists; --json lists all kept rows."""

MAX_WORKERS = 2
"""Processes that read a large file. SQLite has one writer, which more readers would not make faster."""

TenantOption = Annotated[str, typer.Option("--tenant", help="The tenant of the keys.")]


# --- Import ---------------------------------------------------------------------------------------------------


def import_keys(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="A file of keys: JSON in either public shape, or records (JSON Lines, CSV)."
        ),
    ],
    tenant: TenantOption = "default",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done, and write nothing.")] = False,
    skip_invalid: Annotated[
        bool, typer.Option("--skip-invalid", help="Import the valid rows even if others are invalid.")
    ] = False,
    update: Annotated[
        bool, typer.Option("--update", help="Overwrite a key in the store that differs from the file.")
    ] = False,
    hmac_secret_file: Annotated[
        Path | None,
        typer.Option("--hmac-secret-file", metavar="FILE", help="A file with the secret of the HMAC hashes."),
    ] = None,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Import API keys from a file.

    The keys keep their secrets, live usage windows and lifetime totals. The file has
    {"keys": [{"key", "name", "token_limit_per_5h", "usage_windows", ...}]},
    {"keys": {"<SHA-256>": {"name", "user_id", "usage_count", ...}}}, or records as JSON Lines or CSV:
    {"hash", "prefix", "name", "tenant", "limits", ...}, with the hashes of another system (SHA-2, HMAC, bcrypt,
    Argon2, PBKDF2), or the output of `strongroom export --shape records`.

    All rows are checked first: if one is invalid, nothing is imported (unless --skip-invalid). A second import changes
    nothing, and the same command completes an import that was stopped. A key that was deleted since the last import
    comes back: disable it instead, or remove it from the file.

    \b
    Example:
      strongroom import apikeys.json --tenant acme --dry-run
      strongroom import apikeys.json --tenant acme
    """
    from ..keys.transfer import survey
    from .keyrecords import RecordsImport, is_records, read_secret

    if is_records(file):
        with _named(hmac_secret_file or file):
            secret = read_secret(hmac_secret_file)
        RecordsImport(file, tenant, secret=secret, dry_run=dry_run, skip_invalid=skip_invalid, update=update).run(
            store, json
        )
        return
    if hmac_secret_file is not None:
        raise InvalidInput([Problem("hmac_secret_file", "is for files of records (JSON Lines or CSV)")])
    now_us = time.time_ns() // 1_000
    with _named(file), output.progress("reading") as progress:
        source = survey(file, now_us, progress)
    found = source.file
    job = _Import(file, tenant, source, dry_run, skip_invalid, update)
    if found.refused and not skip_invalid:
        job.refuse(json)
    try:
        in_store(store, job.work, absent="imagined" if dry_run else "made")
    except Interrupted:
        raise Interrupted(
            f"stopped: {job.committed} keys were imported completely; the same command imports the rest"
        ) from None
    if job.foreign and not skip_invalid:
        job.refuse(json)
    job.report(json)


class _Import:
    """One import: its options and its results."""

    def __init__(
        self, file: Path, tenant: str, source: ChunkedKeyFile, dry_run: bool, skip_invalid: bool, update: bool
    ) -> None:
        self.file = file
        self.tenant = tenant
        self.source = source
        self.found = source.file
        self.dry_run = dry_run
        self.skip_invalid = skip_invalid
        self.update = update
        self.plan: Plan | None = None
        self.committed = 0
        self.checksums: Checksums | None = None

    async def work(self, room: Strongroom) -> None:
        from ..keys.transfer import KeyImport

        await room.feed.close()  # nothing listens: the feed would read every imported key again
        shape = self.found.shape
        job = KeyImport(
            room.database,
            room.keys.hasher,
            shape,
            self.tenant,
            operator(),
            workers=min(MAX_WORKERS, os.cpu_count() or 1),
        )
        with output.progress("comparing") as progress:
            self.plan = await job.compare(self.source, progress)
        if self.dry_run or (self.foreign and not self.skip_invalid):
            return
        try:
            with output.progress("importing") as progress:
                await job.carry_out(self.source, self.plan, update=self.update, progress=progress)
        finally:
            self.committed = job.committed
        with output.progress("checking") as progress:
            now_us = room.clock.now_us()
            self.checksums = await job.check(self.source, self.plan, now_us, updated=self.update, progress=progress)

    @property
    def foreign(self) -> int:
        """The number of keys that belong to another tenant."""
        return self._standings()["foreign"]

    # --- Reports -----------------------------------------------------------------------------------------------

    def refuse(self, json: bool) -> None:
        """Print the problems and that nothing was imported. Raises Exit."""
        wrong = self.found.refused + self.foreign
        message = f"{self.file}: {wrong} of {self.source.count} rows are invalid; nothing was imported"
        if json:
            errors = [{"path": f.path, "message": f.message} for f in self._problems()]
            error = {"code": "invalid_input", "message": message, "errors": errors}
            output.print_json({"error": error, **self._view()})
        else:
            self._print_findings()
            output.print_note(f"strongroom: {message} (--skip-invalid imports the others)")
        raise typer.Exit(EXIT_FAILED)

    def report(self, json: bool) -> None:
        """Print the results. Raises Exit if the store, read back, differs from the file."""
        sums = self.checksums
        if json:
            output.print_json(self._view())
        else:
            self._print_findings()
            self._print_differences()
            output.print_fields(self._fields())
        if sums is not None and not sums.equal:
            output.print_note(f"strongroom: file and store differ in {len(sums.unequal)} keys, first {sums.unequal[0]}")
            raise typer.Exit(EXIT_FAILED)

    def _problems(self) -> list[Finding]:
        from ..keys.transfer import Finding

        message = "is in the store already, for the tenant {!r}: a key belongs to one tenant"
        foreign = [
            Finding(p.row.path, "", p.row.name, message.format(p.tenant), True)
            for p in (self.plan.foreign if self.plan else ())
        ]
        return [*self.found.problems, *foreign]

    def _standings(self) -> Counter[str]:
        return Counter({standing.value: count for standing, count in self.plan.counts.items()} if self.plan else {})

    def _view(self) -> dict[str, Any]:
        standings = self._standings()
        return {
            "file": str(self.file),
            "shape": self.found.shape,
            "tenant": self.tenant,
            "dry_run": self.dry_run,
            "rows": self.source.count,
            "refused": self.found.refused + self.foreign,
            "new": standings["new"],
            "unchanged": standings["unchanged"],
            "changed": standings["changed"],
            "rotated": standings["rotated"],
            "written": self.committed,
            "problems": [_view(finding) for finding in self._problems()],
            "notes": [_view(finding) for finding in self.found.notes],
            "differences": [
                {"path": p.row.path, "key_id": p.id, "fields": [asdict(d) for d in p.differences]}
                for p in (self.plan.changed if self.plan else ())
            ],
            "checksums": {**asdict(self.checksums), "equal": self.checksums.equal} if self.checksums else None,
        }

    def _print_findings(self) -> None:
        problems, notes = self._problems(), self.found.notes
        shown = [*problems[:MAX_SHOWN], *notes[:MAX_SHOWN]]
        rows = [(f.path, f.key, f.name, f.message if f.refused else f"note: {f.message}") for f in shown]
        if not rows:
            return
        output.print_table(("ROW", "KEY", "NAME", "WHAT"), rows)
        hidden = len(problems) + len(notes) + self.found.dropped - len(shown)
        if hidden:
            output.print_line(f"… and {hidden} more")
        output.print_line()

    def _print_differences(self) -> None:
        changed = self.plan.changed if self.plan else []
        rows = [
            (p.row.path, p.id, d.field, _plain(d.file), _plain(d.store))
            for p in changed[:MAX_SHOWN]
            for d in p.differences
        ]
        if not rows:
            return
        output.print_table(("ROW", "ID", "FIELD", "IN THE FILE", "IN THE STORE"), rows)
        if (more := self._standings()["changed"] - MAX_SHOWN) > 0:
            output.print_line(f"… and {more} more keys")
        output.print_line()

    def _fields(self) -> list[tuple[str, str]]:
        standings = self._standings()
        was = "would be " if self.dry_run else ""
        fields = [
            ("file", f"{self.file} ({self.found.shape})"),
            ("tenant", self.tenant),
            ("rows", str(self.source.count)),
            ("new", f"{standings['new']} ({was}imported)" if standings["new"] else "0"),
            ("unchanged", str(standings["unchanged"])),
        ]
        if standings["changed"]:
            what = f"{was}updated" if self.update else "not changed in the store; --update overwrites them"
            fields.append(("changed", f"{standings['changed']} ({what})"))
        if standings["rotated"]:
            fields.append(("rotated", f"{standings['rotated']} (have a newer secret; not changed)"))
        if self.found.refused or self.foreign:
            fields.append(("refused", str(self.found.refused + self.foreign)))
        sums = self.checksums
        if sums is not None:
            fields.append(("checksum of the file", f"{sums.file} ({sums.file_keys} keys)"))
            fields.append(("checksum of the store", f"{sums.store} ({sums.store_keys} keys)"))
            if sums.used_since:
                fields.append(("used since", f"{sums.used_since} (their usage is not compared)"))
        if self.dry_run:
            fields.append(("dry run", "nothing was written"))
        return fields


def _view(finding: Finding) -> dict[str, str]:
    return {"path": finding.path, "key": finding.key, "name": finding.name, "message": finding.message}


def _plain(value: Any) -> str:
    if isinstance(value, list):  # usage windows
        return f"{sum(tokens for _, tokens in value)} tokens"
    return output.moment(value) if isinstance(value, datetime) else "" if value is None else str(value)


# --- Export ---------------------------------------------------------------------------------------------------


def export_keys(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The file to write; only its owner may read it.")],
    shape: Annotated[
        Literal["plain", "hashed", "records"],
        typer.Option(help="plain: limits and usage windows; hashed: users and counts; records: everything."),
    ] = "plain",
    tenant: TenantOption = "default",
    all_tenants: Annotated[
        bool, typer.Option("--all-tenants", help="The keys of all tenants (with --shape records).")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file if it is there.")] = False,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Write a tenant's API keys to a file.

    `strongroom import` reads the file, and so do the services that use this shape. The store has no plaintext secrets:
    the plain shape has "sha256:<hex>" instead, which import accepts. Disabled keys are not exported to the plain and
    hashed shapes, which cannot mark them as disabled. The command reports other fields that the shape lacks. The shape
    records has one JSON object a line, a key or a quota, with all its fields and live counters, for another Strongroom
    store.

    \b
    Example:
      strongroom export apikeys.json --shape plain --tenant acme
      strongroom export all.jsonl --shape records --all-tenants
    """
    from ..keys.transfer import Exported, export_rows, file_of

    with _named(file):
        check_target(file, force)
    if shape == "records":
        _export_records(file, None if all_tenants else tenant, force, store, json)
        return
    if all_tenants:
        raise InvalidInput([Problem("all_tenants", f"the shape {shape} has no field for the tenant: use records")])
    found = Exported()

    async def work(room: Strongroom) -> None:
        await room.feed.close()  # nothing listens
        now_us = room.clock.now_us()
        with output.progress("reading") as progress:
            rows = export_rows(found, room.database, room.keys.hasher, shape, tenant, operator(), now_us, progress)
            with _named(file), new_file(file, force) as new:
                async for part in file_of(shape, rows):
                    new.write(part)

    in_store(store, work)
    view = {"file": str(file), "shape": shape, "tenant": tenant, "keys": found.count}
    if json:
        output.print_json({**view, "left_out": dict(found.left_out), "lost": dict(found.lost)})
        return
    output.print_line(f"wrote {found.count} keys of {tenant} to {file}")
    for what, count in found.left_out.items():
        output.print_note(f"left out {count} {'key' if count == 1 else 'keys'}: each {what}")
    for what, count in found.lost.items():
        output.print_note(f"{count} {'key has' if count == 1 else 'keys have'} {what}, which the shape cannot hold")


def _export_records(file: Path, tenant: str | None, force: bool, store: str | None, json: bool) -> None:
    from ..keys.transfer import ExportedRecords, export_records

    told = ExportedRecords()

    async def work(room: Strongroom) -> None:
        now_us = room.clock.now_us()
        lines = export_records(room.database, room.keys.hasher, tenant, operator(), told, now_us)
        with output.progress("reading") as progress, _named(file), new_file(file, force) as new:
            async for line in lines:
                new.write(line)
                progress(told.keys, told.keys)

    in_store(store, work)
    if json:
        view = {"file": str(file), "shape": "records", "tenant": tenant, "keys": told.keys, "quotas": told.quotas}
        output.print_json({**view, "left_out": {}, "lost": dict(told.lost)})
        return
    whose = "all tenants" if tenant is None else tenant
    output.print_line(f"wrote {told.keys} keys and {told.quotas} quotas of {whose} to {file}")
    for what, count in told.lost.items():
        output.print_note(f"{count} {'key has' if count == 1 else 'keys have'} {what}")


# --- Files ----------------------------------------------------------------------------------------------------


@contextmanager
def _named(file: Path) -> Iterator[None]:
    """Put the file's name into the error."""
    from ..keys.transfer import KeyFileError

    try:
        yield
    except KeyFileError as error:
        raise KeyFileError(f"{file}: {error.message}") from None
    except OSError as error:
        raise KeyFileError(f"{file}: {(error.strerror or str(error)).lower()}") from None
