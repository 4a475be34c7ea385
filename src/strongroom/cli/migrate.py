"""`strongroom migrate`: moves everything from one store to another: plan, copy, switch-over, rollback."""

from __future__ import annotations

import os
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

import typer

from ..errors import ConfigError, InvalidInput, Problem
from . import output
from .options import is_interactive, stopped_by_ctrl_c
from .session import (
    EXIT_FAILED,
    Absent,
    Interrupted,
    JsonOption,
    as_owner,
    registry,
    run,
    standing,
    store_file,
)

if TYPE_CHECKING:
    from ..entities import Collection
    from ..migrate import Options, Plan, Progress, Report, TreesReport
    from ..storage.port import Store

T = TypeVar("T")
SAME_KEY = (
    "its journal continues the source's log: set STRONGROOM_JOURNAL_SIGNING_KEY there to the source's key (an embedded "
    "store's is in the file beside it), so that auditors need no new one"
)
MAX_SHOWN = 40
"""Parts that the output for people lists; --json lists all."""


def migrate(
    source: Annotated[str, typer.Option("--from", metavar="URL", help="The store to move from.")],
    target: Annotated[str, typer.Option("--to", metavar="URL", help="The store to move to.")],
    plan: Annotated[
        bool, typer.Option("--plan", help="Show what would be copied and what prevents it; write nothing.")
    ] = False,
    live: Annotated[
        bool, typer.Option("--live", help="The source is in use: follow its journal until the switch-over.")
    ] = False,
    switch: Annotated[
        bool, typer.Option("--switch", help="Switch over without asking, once the target is up to date.")
    ] = False,
    abort: Annotated[bool, typer.Option("--abort", help="Undo an incomplete switch-over.")] = False,
    rollback: Annotated[
        bool, typer.Option("--rollback", help="Remove the migrated data and restore the backup.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the target's data, after a backup of it.")
    ] = False,
    backup: Annotated[
        Path | None,
        typer.Option("--backup", metavar="FILE", help="The backup of the target (default: a new file here)."),
    ] = None,
    no_journal: Annotated[bool, typer.Option("--no-journal", help="Do not copy the source's journal.")] = False,
    ignore: Annotated[
        list[str] | None,
        typer.Option("--ignore", metavar="NAME", help="A collection that is not copied; may be given again."),
    ] = None,
    batch: Annotated[int, typer.Option("--batch", help="Operations in a batch, 3 to 500.")] = 500,
    json: JsonOption = False,
) -> None:
    """Move all data from one store to another.

    Documents keep their id, their times and every value; the target assigns new versions. After an interruption the
    same command continues. The source is only read; with --live, its writes are turned off for the switch-over. Both
    stores are compared by count and checksum, for each collection and tenant, and by the root of each of the journal's
    trees: exit status 1 if they differ.
    STRONGROOM_ENTITIES names your own entities. This command ignores --store. For PostgreSQL, --to is the URL of the
    schema's owner; the nodes later use the application role.

    \b
    Example:
      strongroom migrate --from sqlite:///data/strongroom.db --to postgresql://strongroom_owner@db/strongroom --plan
      strongroom migrate --from sqlite:///data/strongroom.db --to postgresql://strongroom_owner@db/strongroom --live
    """
    from ..migrate import Options

    _check_call(source, target, {"--plan": plan, "--abort": abort, "--rollback": rollback})
    options = Options(
        source=shown(source), target=shown(target), live=live, switch=switch, overwrite=overwrite, backup=backup,
        journal=not no_journal, ignore=tuple(ignore or ()), batch=batch,
    )  # fmt: skip
    job = _Job(source, target, options, json)
    if plan:
        job.plan()
    elif abort:
        job.abort()
    elif rollback:
        job.roll_back()
    else:
        job.migrate()


# --- The stores' names ----------------------------------------------------------------------------------------


def shown(url: str) -> str:
    """A store's URL for messages and the stored state: without a password, and a file with its full path."""
    from ..storage.url import shown_url

    return shown_url(url)


def _check_call(source: str, target: str, modes: dict[str, bool]) -> None:
    """Raise InvalidInput with every problem of the stores' URLs and the options."""
    from ..storage import store_for

    problems = []
    for option, url in (("--from", source), ("--to", target)):
        try:
            store_for(url)
        except ConfigError as error:
            problems.append(Problem(option, error.message))
            continue
        if url.endswith("://:memory:"):
            problems.append(Problem(option, "a store in memory does not outlive the command: name a file or a server"))
    if (file := store_file(source)) is not None and not os.path.exists(file):
        problems.append(Problem("--from", f"there is no file {file}"))
    if shown(source) == shown(target) or (file is not None and file == store_file(target)):
        problems.append(Problem("--to", "names the same store as --from"))
    given = [name for name, is_given in modes.items() if is_given]
    if len(given) > 1:
        problems.append(Problem(given[1], f"cannot be given with {given[0]}"))
    if problems:
        raise InvalidInput(problems)


def what_next(target: str) -> str:
    """The next step once the target has everything. Its URL has no password."""
    parts = urlsplit(target)
    if not parts.scheme.startswith("postgres"):
        return f"everything is in {target}: set STRONGROOM_STORE to it wherever it is used"
    place = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
    return (
        f"everything is in {place}: set STRONGROOM_STORE wherever it is used to its URL as the application's role "
        "(strongroom_app, unless `schema roles` was given another name), not the owner's"
    )


# --- The work -------------------------------------------------------------------------------------------------


class _Job:
    """One call: the URLs of the stores, the options, and the output."""

    def __init__(self, source: str, target: str, options: Options, json: bool) -> None:
        self.urls = source, target
        self.options = options
        self.json = json

    def _run(self, work: Callable[[Store, Store, tuple[Collection, ...]], Awaitable[T]], absent: Absent = "made") -> T:
        """Open both stores, do the work, close them. `absent`: what to do if the file of the target does not exist."""
        from ..config import load
        from ..storage import open_store

        # Each store with the settings of its engine, as a server would open it.
        settings = [load(store=url, store_is=of) for of, url in zip(("SOURCE", "TARGET"), self.urls, strict=False)]
        collections = registry(settings[0].entities).collections

        async def opened() -> T:
            async with AsyncExitStack() as stack:
                stores = []
                for url in (settings[0].store_url, target):
                    stores.append(await open_store(url))
                    stack.push_async_callback(stores[-1].close)
                return await work(stores[0], stores[1], collections)

        try:
            with as_owner(), standing(None, settings[1].store_url, absent) as target:
                return run(opened)
        except Interrupted:
            raise Interrupted("stopped: the same command continues, --rollback undoes it") from None

    def plan(self) -> None:
        from .. import migrate as library

        with phases() as progress:
            found = self._run(lambda s, t, c: library.plan(s, t, c, self.options, progress), "imagined")
        output.print_json(_plan_view(found)) if self.json else _print_plan(found)
        if found.problems:
            raise typer.Exit(EXIT_FAILED)

    def migrate(self) -> None:
        report = self._migrate(self.options)
        if report.phase == "following" and report.equal and not self.json and _asks(self.options.target):
            from dataclasses import replace

            report = self._migrate(replace(self.options, switch=True))
        self._print(report)

    def _migrate(self, options: Options) -> Report:
        from .. import migrate as library

        with phases() as progress:
            return self._run(lambda s, t, c: library.migrate(s, t, c, options, progress))

    def abort(self) -> None:
        from .. import migrate as library

        self._print(self._run(lambda s, t, c: library.abort(s, t, c, self.options)))

    def roll_back(self) -> None:
        from .. import migrate as library

        with phases() as progress:
            report = self._run(lambda s, t, c: library.roll_back(s, t, c, self.options, progress))
        self._print(report)

    def _print(self, report: Report) -> None:
        if self.json:
            output.print_json(_view(report))
        else:
            _print_report(report)
            if report.is_done and report.equal:
                output.print_note(what_next(report.target))
                if report.trees is not None and report.trees.carried and report.trees.trees:
                    output.print_note(SAME_KEY)
        if not report.equal:
            raise typer.Exit(EXIT_FAILED)


def _asks(target: str) -> bool:
    """Ask for the switch-over on a terminal; without a terminal the answer is no."""
    if not is_interactive():
        return False
    with stopped_by_ctrl_c():
        return typer.confirm(f"{target} is up to date. Switch over now? Writes are refused until it is done.", err=True)


# --- Reports -------------------------------------------------------------------------------------------------


@contextmanager
def phases() -> Iterator[Progress]:
    """Progress on standard error if it is a terminal: one line for each phase, with its rate."""
    if not sys.stderr.isatty():
        yield lambda what, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars
    from rich.progress import Task as Bar
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Bar) -> Text:
            return Text(f"{task.speed:,.0f}/s" if task.speed else "")

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def tell(what: str, done: int, total: int | None) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield tell


def _print_plan(plan: Plan) -> None:
    for change in plan.schema:
        output.print_line(f"in the target: {change}")
    rows = [(p.collection, p.tenant or "", str(p.documents)) for p in plan.parts[:MAX_SHOWN]]
    output.print_table(("COLLECTION", "TENANT", "DOCUMENTS"), rows)
    if len(plan.parts) > MAX_SHOWN:
        output.print_line(f"… and {len(plan.parts) - MAX_SHOWN} more (--json has them all)")
    output.print_fields(
        [
            ("documents", str(plan.documents)),
            ("journal records", str(plan.records)),
            ("estimated", f"{plan.estimated_s:.0f} s"),
        ]
    )
    for note in plan.notes:
        output.print_line(f"note: {note}")
    for problem in plan.problems:
        output.print_note(f"obstacle: {problem.path}: {problem.message}")


def _plan_view(plan: Plan) -> dict[str, Any]:
    return {
        "schema": [str(change) for change in plan.schema],
        "parts": [{"collection": p.collection, "tenant": p.tenant, "documents": p.documents} for p in plan.parts],
        "documents": plan.documents,
        "records": plan.records,
        "estimated_s": plan.estimated_s,
        "notes": list(plan.notes),
        "problems": [{"path": p.path, "message": p.message} for p in plan.problems],
    }


def _print_report(report: Report) -> None:
    rows = [
        (p.collection, p.tenant or "", str(p.documents), str(p.target_documents), p.checksum[:16], _verdict(p.equal))
        for p in sorted(report.parts, key=lambda part: part.equal)[:MAX_SHOWN]
    ]
    if rows:
        output.print_table(("COLLECTION", "TENANT", "SOURCE", "TARGET", "CHECKSUM", ""), rows)
    if len(report.parts) > MAX_SHOWN:
        output.print_line(f"… and {len(report.parts) - MAX_SHOWN} more (--json has them all)")
    for part in report.parts:
        for difference in part.differences:
            output.print_note(f"strongroom: {difference}")
    if report.target_records not in (None, report.records):
        output.print_note("strongroom: the journal's records differ between source and target")
    if report.trees is not None:
        for tree in report.trees.differences:
            output.print_note(f"strongroom: {tree}")
    fields = [("from", report.source), ("to", report.target), ("stands at", report.phase)]
    fields.append(("journal records", str(report.records)))
    if report.trees is not None:
        fields.append(("equal roots", _roots(report.trees)))
    if report.followed:
        fields.append(("followed", f"{report.followed} records written meanwhile"))
    if report.late:
        fields.append(
            ("late", f"{report.late} changes came after all processes should have stopped writing; they were copied")
        )
    if report.pause_s is not None:
        fields.append(("writes were off for", f"{report.pause_s:.1f} s"))
    if report.backup:
        fields.append(("backup of the target", report.backup))
    fields.append(("took", f"{report.seconds:.1f} s"))
    output.print_fields(fields)
    for note in report.notes:
        output.print_line(f"note: {note}")


def _roots(trees: TreesReport) -> str:
    """How many of the journal's trees have the same root in both stores."""
    equal = trees.trees - trees.unequal
    if trees.unequal:
        return f"{equal} of {trees.trees} trees"
    if not trees.carried:
        return f"{equal} trees (but the target had a journal of its own, and begins a log of its own)"
    return f"{equal} trees"


def _verdict(equal: bool) -> str:
    return "equal" if equal else "DIFFERENT"


def _view(report: Report) -> dict[str, Any]:
    from dataclasses import asdict

    parts = [{**asdict(part), "equal": part.equal} for part in report.parts]
    return {**asdict(report), "parts": parts, "documents": report.documents, "equal": report.equal}
