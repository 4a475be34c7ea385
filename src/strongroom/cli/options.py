"""What commands of several nouns share: their options, whether to ask, and how what the options describe is read."""

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
"""A group of options: annotated types by the names that the values are given under."""

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
    """A decorator for a command whose parameter `name` is `read(**values of these options)`. In its help they stand
    where the parameter does."""

    def decorate(command: Command) -> Command:
        command.__annotations__.pop(name)  # its type need not be imported before the command runs
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

        del run.__wrapped__  # Typer is to see the options, not the command's parameter
        run.__annotations__ = {}
        run.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        return run

    return decorate


def _parameter(name: str, annotation: Any) -> inspect.Parameter:
    default = False if get_args(annotation)[0] is bool else None
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def is_interactive() -> bool:
    """Whether there is someone to ask."""
    return sys.stdin.isatty()


def must_be_confirmed(yes: bool, json: bool, why: str) -> None:
    """Raise InvalidInput where something needs a yes, which was not given, and nobody can be asked for it."""
    if not yes and (json or not is_interactive()):
        raise InvalidInput([Problem("yes", f"{why}: confirm it with --yes")])


def confirm(yes: bool, question: str) -> None:
    """Ask, where that was not answered before; ends the command if the answer is no."""
    if not yes:
        with stopped_by_ctrl_c():
            typer.confirm(question, abort=True, err=True)


@contextmanager
def stopped_by_ctrl_c() -> Iterator[None]:
    """While someone is asked, Ctrl-C raises KeyboardInterrupt at once. The handler of an event loop only asks its task
    to end, and that task waits for the answer."""
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
    except typer.Abort:  # Typer tells the end of the input from Ctrl-C no more
        if interrupted:
            raise KeyboardInterrupt from None
        raise
    finally:
        signal.signal(signal.SIGINT, before)


def duration_s(name: str, text: str) -> int:
    """What an option such as --overlap says. Raises InvalidInput."""
    problems: list[Problem] = []
    seconds = shortforms.one(name, text, shortforms.seconds, problems)
    if seconds is None:
        raise InvalidInput(problems)
    return seconds


def metadata(texts: Sequence[str], problems: list[Problem]) -> dict[str, Any]:
    """What several --metadata NAME=VALUE say; what is wrong with them goes to `problems`."""
    pairs = shortforms.by_name("metadata", texts, shortforms.pair, problems)
    return {name: shortforms.metadata_value(value) for name, value in pairs.items()}


def described(
    cls: type[M], fields: Mapping[str, Any], limits: Sequence[str] | None, problems: Sequence[Problem] = ()
) -> M:
    """What the options describe: `fields`, and `limits` in their short form where they are given at all. InvalidInput
    names everything that is wrong, `problems` that were found before included, at once."""
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
