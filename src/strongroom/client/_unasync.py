"""Generates the synchronous client (`_sync/`) from the asynchronous one (`_async/`), token by token.

`python src/strongroom/client/_unasync.py` writes it, even while the package cannot be imported; `--check` only
compares. Strings and docstrings are copied unchanged, so they must be true for both clients.
"""

from __future__ import annotations

import io
import subprocess
import sys
import tokenize
from collections.abc import Iterator, Mapping
from pathlib import Path

HERE = Path(__file__).parent
SOURCE, TARGET = HERE / "_async", HERE / "_sync"
HEADER = "# Generated from {source} by `python src/strongroom/client/_unasync.py`: edit that file instead.\n"
TIDIED = (["check", "--quiet", "--select", "I,UP028", "--fix-only", "--unsafe-fixes"], ["format", "--quiet"])
"""Calls of ruff on the generated code: shorter names change the order of imports and the line breaks."""
DROPPED = frozenset({"async", "await"})
NAMES = {
    "__aenter__": "__enter__",
    "__aexit__": "__exit__",
    "__aiter__": "__iter__",
    "__anext__": "__next__",
    "_aio": "_sio",
    "aclose": "close",
    "aiter_bytes": "iter_bytes",
    "anext": "next",
    "aread": "read",
    "asynccontextmanager": "contextmanager",
}
"""Names with another form without asyncio. Also, `AsyncThing` becomes `Thing`."""


class NotTranslated(Exception):
    """The generated code still contains asyncio."""


def translate(source: str, name: str = "<text>") -> str:
    """The synchronous form of an asynchronous module. Raises NotTranslated."""
    out: list[str] = []
    line, column = 1, 0
    lines = source.splitlines(keepends=True)
    swallow = False
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        between = _between(lines, (line, column), token.start)
        out.append(between.lstrip(" ") if swallow else between)
        swallow = token.type == tokenize.NAME and token.string in DROPPED
        if not swallow:
            out.append(_translated(token, name))
        line, column = token.end
    return "".join(out)


def _between(lines: list[str], start: tuple[int, int], end: tuple[int, int]) -> str:
    """The text between two tokens: spaces, and the backslash of a continued line."""
    if start[0] == end[0]:
        return lines[start[0] - 1][start[1] : end[1]] if start[0] <= len(lines) else ""
    first = lines[start[0] - 1][start[1] :]
    return first + "".join(lines[start[0] : end[0] - 1]) + (lines[end[0] - 1][: end[1]] if end[0] <= len(lines) else "")


def _translated(token: tokenize.TokenInfo, name: str) -> str:
    text = token.string
    if token.type != tokenize.NAME:
        return text
    if text in NAMES:
        return NAMES[text]
    if text.startswith("Async") and text[5:6].isupper():
        return text[5:]
    if text in ("asyncio", "Awaitable", "Coroutine") or text.startswith("Async"):
        raise NotTranslated(f"{name}:{token.start[0]}: {text} has no synchronous form: keep it in _aio.py")
    return text


def generated() -> Mapping[Path, str]:
    """Every file of the synchronous client, with its text."""
    return {TARGET / source.name: _file(source) for source in sorted(SOURCE.glob("*.py"))}


def _file(source: Path) -> str:
    text = HEADER.format(source=f"_async/{source.name}") + translate(source.read_text(), source.name)
    for arguments in (
        ["check", "--quiet", "--select", "I,UP028", "--fix-only", "--unsafe-fixes"],
        ["format", "--quiet"],
    ):
        command = [sys.executable, "-m", "ruff", *arguments, "--stdin-filename", str(TARGET / source.name), "-"]
        text = subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout  # noqa: S603
    return text


def stale() -> Iterator[Path]:
    """The files of the synchronous client that differ from the generated ones."""
    wanted = generated()
    for path in sorted({*wanted, *TARGET.glob("*.py")}):
        if not path.exists() or path.read_text() != wanted.get(path):
            yield path


def main() -> int:
    if "--check" in sys.argv[1:]:
        found = [path.name for path in stale()]
        sys.stderr.write("".join(f"_sync/{name} differs from the generated code\n" for name in found))
        return 1 if found else 0
    TARGET.mkdir(exist_ok=True)
    wanted = generated()
    for path in TARGET.glob("*.py"):
        if path not in wanted:
            path.unlink()
    for path, text in wanted.items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
