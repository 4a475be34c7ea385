"""The command blocks of the documentation as one shell script a page, and the `strongroom` that they call.

Each call is a process of its own, forked from one that has imported everything: importing is most of what a command
takes, and a page has a dozen of them. This file run as a program is that process, which listens at a socket.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
COMMANDS = (
    "strongroom",
    "make",
    "curl",
    "export",
    "createdb",
    "psql",
    "pip",
    "python",
    "gitleaks",
    "jq",
    "firebase",
    "sqlite3",
)
_FENCED = re.compile(
    r"(?:^[ ]*<!-- not run: (?P<reason>[^\n]+?) -->\n+)?^(?P<indent>[ ]*)```(?P<kind>[a-z]*)\n(?P<text>.*?)^[ ]*```$",
    re.MULTILINE | re.DOTALL,
)
_STARTS_WITH_COMMAND = re.compile(rf"\s*(?:\$ )?(?:{'|'.join(COMMANDS)})\s")
_INDENTED = re.compile(r"(?:^|\n\n)((?: {4,}[^\n]*(?:\n|$))+)")


@dataclass(frozen=True)
class Block:
    """Commands of a page; `reason` says why they are not run."""

    text: str
    reason: str | None


def blocks(page: Path) -> list[Block]:
    """The command blocks of a page in their order: those fenced with ```sh."""
    found = []
    for match in _FENCED.finditer(page.read_text()):
        if match["kind"] == "sh":
            text = re.sub(rf"^{match['indent']}", "", match["text"], flags=re.MULTILINE)
            found.append(Block(text, match["reason"]))
    return found


def unmarked(page: Path) -> list[str]:
    """Commands that stand in a block which is not fenced with ```sh, so that nothing would run them."""
    text = page.read_text()
    others = [match["text"] for match in _FENCED.finditer(text) if match["kind"] != "sh"]
    others += _INDENTED.findall(_FENCED.sub("", text))
    return [other for other in others if _STARTS_WITH_COMMAND.match(other)]


PRELUDE = r"""
set -euo pipefail
server=
stop() {
    if [ -n "$server" ]; then kill "$server" 2>/dev/null || true; wait "$server" || true; server=; fi
}
trap stop EXIT
serve() {  # in the place of the server before, as on another machine
    stop
    strongroom serve "$@" >server.out 2>server.err &
    server=$!
    until command curl -sf "localhost:$STRONGROOM_PORT/readyz" >ready.out; do
        kill -0 "$server" || { cat server.err; exit 1; }
        sleep 0.05
    done
}
curl() { command curl --fail-with-body "$@"; }  # an answer that refuses is a failure
administrator() { sed -n 2p server.out; }
text_of_key() { grep -o '"key":"[^"]*"' "$1" | tail -n 1 | cut -d '"' -f 4; }
"""


def script(page: Path, before: str, replaced: Mapping[str, str]) -> str:
    """All of a page's commands as one script. What block n prints goes to the file out-n."""
    parts = [PRELUDE, before]
    number = 0
    for block in blocks(page):
        if block.reason is None:
            number += 1
            text = block.text
            for old, new in replaced.items():
                text = text.replace(old, new.replace("$N", f"out-{number - 1}"))
            text = re.sub(r"^(make|strongroom) serve\b", "serve", text, flags=re.MULTILINE)
            parts.append(f"echo '--- block {number}' >&2\n{{\n{text}}} >out-{number}\ncat out-{number}")
    return "\n".join(parts)


# --- The program ----------------------------------------------------------------------------------------------

CLIENT = """#!{python} -IS
import json, os, signal, socket, sys
there = socket.socket(socket.AF_UNIX)
there.connect({path!r})
call = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(there, [len(call).to_bytes(4, "big")], [0, 1, 2])
there.sendall(call)
pid = int(there.recv(20))
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: os.kill(pid, number))
status = there.recv(20)
sys.exit(int(status) if status else 1)
"""


def client(path: Path) -> str:
    """The program `strongroom` that has its work done by the process at the socket `path`."""
    return CLIENT.format(python=sys.executable, path=str(path))


def _work(there: socket.socket) -> None:
    """In the child: become the caller, run its command line, tell it the exit status."""
    from strongroom.cli import main

    length, descriptors, *_ = socket.recv_fds(there, 4, 3)
    call = b""
    while len(call) < int.from_bytes(length, "big"):
        call += there.recv(1 << 20)
    arguments, folder, environment = json.loads(call)
    there.sendall(f"{os.getpid():20}".encode())
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdin = os.fdopen(0)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    status = main(arguments)
    sys.stdout.flush()
    there.sendall(str(status).encode())


def _listen(path: str) -> None:
    import asyncpg

    import strongroom.migrate
    import strongroom.server.run
    import strongroom.storage.postgres.store
    import strongroom.storage.sqlite.store  # noqa: F401

    del asyncpg

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a child here: it tells its status itself
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        print("listening", flush=True)
        while True:
            there, _ = listener.accept()
            with there:
                if os.fork() == 0:
                    listener.close()
                    try:
                        _work(there)
                    finally:
                        os._exit(0)


if __name__ == "__main__":
    _listen(sys.argv[1])
