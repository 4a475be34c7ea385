"""The command line: `strongroom …`. One module for each noun; this module joins them and prints every error as one
sentence.

No module of the command line imports anything heavy at its top: `--help` and completion must answer at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from .. import __version__
from ..errors import ConfigError, InvalidInput, Problem, StrongroomError
from . import (
    audit,
    bench,
    doctor,
    estimate,
    keychanges,
    keyfile,
    leaks,
    migrate,
    output,
    quotas,
    schema,
    serve,
    tenants,
    webhooks,
    writes,
)
from .audit_upkeep import FLAGS as UPKEEP_FLAGS
from .keyoptions import FLAGS
from .session import (
    DEBUG_VARIABLE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_WRONG_CALL,
    Interrupted,
)

CLOSE_ENOUGH = 0.75
"""The least similarity, of at most 1, at which a known name is suggested for an unknown one."""

app = typer.Typer(
    name="strongroom",
    help="Strongroom: API keys with exact usage limits, tenant-isolated state and a journal of every change.",
    epilog="Exit status: 0 done, 1 the work failed, 2 the call is wrong. "
    "Settings come from the environment and from the file .env.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # Rich would double the duration of --help
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
app.command("serve")(serve.serve)
app.add_typer(keychanges.app, name="keys")  # the group also has the commands of keys.py
app.add_typer(quotas.app, name="quotas")
app.add_typer(leaks.app, name="leaks")
app.command("import")(keyfile.import_keys)
app.command("export")(keyfile.export_keys)
app.add_typer(audit.app, name="audit")
app.add_typer(tenants.app, name="tenants")
app.add_typer(writes.app, name="writes")
app.add_typer(schema.app, name="schema")
app.add_typer(webhooks.app, name="webhooks")
app.command("migrate")(migrate.migrate)
app.command("bench")(bench.bench)
app.command("doctor")(doctor.doctor)
app.command("estimate")(estimate.command)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"strongroom {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help=f"Show tracebacks (or set {DEBUG_VARIABLE}=1).")] = False,
) -> None:
    """The options of every command. `main` reads --debug itself, because it needs it even if parsing fails."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit status. An error is one sentence on standard error (with --json: one
    document on standard output); a traceback only with --debug."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in given
    output.make_every_text_printable()
    try:
        status = typer.main.get_command(app).main(given, prog_name="strongroom", standalone_mode=False)
        status = status if isinstance(status, int) else 0
        if status == EXIT_INTERRUPTED:
            raise Interrupted
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader closed the pipe: `strongroom keys list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except Exception as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # Typer exports no name for it; its message is the help
            sys.stderr.write(str(error).rstrip("\n") + "\n")
            return EXIT_WRONG_CALL
        if "--debug" in given or os.environ.get(DEBUG_VARIABLE, "") not in ("", "0"):
            import traceback

            traceback.print_exc()
        status, code, message, problems = _explained(_by_options(error, given) if not as_json else error)
        output.print_error(as_json, code, message, problems)
        return status


def _explained(error: Exception) -> tuple[int, str, str, list[dict[str, str]]]:
    """Exit status, error code, sentence, and each problem of a wrong call."""
    if isinstance(error, Interrupted):
        return EXIT_INTERRUPTED, "interrupted", error.message, []
    if isinstance(error, StrongroomError):
        problems = error.problems if isinstance(error, InvalidInput) else ()
        status = EXIT_WRONG_CALL if isinstance(error, InvalidInput | ConfigError) else EXIT_FAILED
        return status, error.code, error.message, [{"path": p.path, "message": p.message} for p in problems]
    if isinstance(error, typer.Abort):
        return EXIT_FAILED, "aborted", "nothing was done", []
    if isinstance(error, typer.TyperException):
        context = getattr(error, "ctx", None)
        hint = f" (see {context.command_path} --help)" if context is not None else ""
        message = (
            _of_option(error) or _of_value(error) or error.format_message().replace(": Value error, ", ": ", 1)
        )  # "Value error" is a Python class: not for people
        return error.exit_code, "invalid_input", message.rstrip(".") + hint, []
    name = type(error).__name__
    return EXIT_FAILED, "internal", f"{name}: {error} (an error in Strongroom: --debug shows where)", []


def _of_option(error: Exception) -> str | None:
    """The message for an unknown option; it suggests a known option only if the names are very alike."""
    name = getattr(error, "option_name", None)
    if type(error).__name__ != "NoSuchOption" or name is None:
        return None
    from difflib import get_close_matches

    context = getattr(error, "ctx", None)
    options = [one for parameter in context.command.params for one in parameter.opts] if context is not None else []
    meant = get_close_matches(name, [one for one in options if one.startswith("--")], n=1, cutoff=CLOSE_ENOUGH)
    return f"found {name}, which is not an option of this command" + (f"; did you mean {meant[0]}?" if meant else "")


def _of_value(error: Exception) -> str | None:
    """The message for a value that Pydantic refused, in Strongroom's words instead of Pydantic's."""
    from pydantic import ValidationError

    parameter = getattr(error, "param", None)
    if parameter is None or not isinstance(error.__cause__, ValidationError):
        return None
    from ..entities import problems_of

    name = _spelled(parameter) or parameter.name.upper()
    message = "; ".join(problem.message for problem in problems_of(error.__cause__))
    found, of_choices, choices = message.partition(" is not one of ")  # Typer's own words
    return f"{name}: found {found}, expected one of {choices}" if of_choices else f"{name}: {message}"


def _spelled(parameter: Any) -> str | None:
    """The option as a caller writes it, `--name`; None for an argument."""
    return next((option for option in parameter.opts if option.startswith("--")), None)


def _by_options(error: Exception, given: Sequence[str]) -> Exception:
    """The problems of a call, named by the caller's options: `--expires` instead of `expires_at`."""
    if not isinstance(error, InvalidInput):
        return error
    command: Any = typer.main.get_command(app)
    for argument in given:
        command = getattr(command, "commands", {}).get(argument, command)
    options = {parameter.name: _spelled(parameter) for parameter in command.params}
    problems = []
    for problem in error.problems:
        name, _, rest = problem.path.partition(".")
        if name not in options:
            name = (FLAGS | UPKEEP_FLAGS).get(name, name.removesuffix("s")).replace("-", "_")
        option = options.get(name) if not rest or rest.isdecimal() else None
        problems.append(Problem(option or problem.path, problem.message))
    return InvalidInput(problems) if problems != list(error.problems) else error


__all__ = ["app", "main"]
