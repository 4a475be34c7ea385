"""Shared by commands of several nouns: options, confirmation, and reading option values."""

from __future__ import annotations

import functools
import inspect
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args

import typer

from ..errors import InvalidInput, Problem
from . import shortforms

if TYPE_CHECKING:
    from pydantic import BaseModel

M = TypeVar("M", bound="BaseModel")
Command = Callable[..., None]
Options = Mapping[str, Any]
"""A group of options: the annotated type of each, by name."""

PageOption = Annotated[int, typer.Option("--limit", help="At most this many (1 to 1000).")]
CursorOption = Annotated[str | None, typer.Option(help="The `next_cursor` of the last page.")]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
LimitsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--limit",
        metavar="RESOURCE=AMOUNT/WINDOW",
        help="A limit, for example tokens=100000/5h; may be given again.",
    ),
]


def with_options(options: Options, name: str, read: Callable[..., Any]) -> Callable[[Command], Command]:
    """A decorator for a command whose parameter `name` is `read(**values of these options)`. The help lists the options
    at the parameter's place."""

    def decorate(command: Command) -> Command:
        command.__annotations__.pop(name)  # Typer would import the type for every --help
        own = inspect.signature(command, eval_str=True)
        parameters: list[inspect.Parameter] = []
        for parameter in own.parameters.values():
            if parameter.name == name:
                parameters += [_parameter(option, type) for option, type in options.items()]
            else:
                parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

        @functools.wraps(command)
        def run(**given: Any) -> None:
            values = {option: given.pop(option) for option in options}
            command(**given, **{name: read(**values)})

        del run.__wrapped__  # else Typer would read the command's own parameter instead of the options
        run.__annotations__ = {}
        run.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        return run

    return decorate


def _parameter(name: str, annotation: Any) -> inspect.Parameter:
    default = False if get_args(annotation)[0] is bool else None
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def is_interactive() -> bool:
    """Whether a person at a terminal can be asked."""
    return sys.stdin.isatty()


def must_be_confirmed(yes: bool, json: bool, why: str) -> None:
    """Raise InvalidInput if --yes is missing and there is no terminal to ask on."""
    if not yes and (json or not is_interactive()):
        raise InvalidInput([Problem("yes", f"{why}: confirm it with --yes")])


def confirm(yes: bool, question: str) -> None:
    """Ask, unless --yes was given. Ends the command if the answer is no."""
    if not yes:
        with stopped_by_ctrl_c():
            typer.confirm(question, abort=True, err=True)


@contextmanager
def stopped_by_ctrl_c() -> Iterator[None]:
    """While a prompt waits, Ctrl-C raises KeyboardInterrupt at once. The event loop's own handler only cancels the
    task, which would still wait for the answer."""
    before = signal.getsignal(signal.SIGINT)
    if before in (signal.SIG_IGN, None):
        yield
        return
    interrupted = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, stop)
    try:
        yield
    except typer.Abort:  # Typer raises Abort for both Ctrl-C and the end of the input
        if interrupted:
            raise KeyboardInterrupt from None
        raise
    finally:
        signal.signal(signal.SIGINT, before)


def duration_s(name: str, text: str) -> int:
    """A duration option such as --overlap in seconds. Raises InvalidInput."""
    problems: list[Problem] = []
    seconds = shortforms.one(name, text, shortforms.seconds, problems)
    if seconds is None:
        raise InvalidInput(problems)
    return seconds


def metadata(texts: Sequence[str], problems: list[Problem]) -> dict[str, Any]:
    """The values of several --metadata NAME=VALUE. Errors are added to `problems`."""
    pairs = shortforms.by_name("metadata", texts, shortforms.pair, problems)
    return {name: shortforms.metadata_value(value) for name, value in pairs.items()}


def described(
    cls: type[M], fields: Mapping[str, Any], limits: Sequence[str] | None, problems: Sequence[Problem] = ()
) -> M:
    """A model from `fields` and, if given, `limits` in their short form. Raises InvalidInput with every problem,
    including the earlier `problems`."""
    from ..entities import parse

    found = list(problems)
    positions: list[int] = []
    if limits is not None:
        read = shortforms.each("limits", limits, shortforms.limit, found)
        positions = list(read)
        fields = {**fields, "limits": list(read.values())}
    try:
        made = parse(cls, fields)
    except InvalidInput as error:
        raise InvalidInput([*found, *(shortforms.as_given(one, positions) for one in error.problems)]) from None
    if found:
        raise InvalidInput(found)
    return made
