"""`strongroom serve`: the HTTP server."""

from __future__ import annotations

import sys
from contextlib import nullcontext, redirect_stdout
from typing import Annotated

import typer

from ..errors import ConfigError
from . import output
from .session import JsonOption, StoreOption


def serve(
    host: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="The address to listen on (default 127.0.0.1).")
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65_535, help="The port to listen on (default 8080); 0 takes a free one.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Worker processes (default 1).")] = None,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Run the HTTP server until it is stopped.

    All settings can come from the environment: docs/configuration.md has the table. With --json, standard output has
    one document once the server has stopped.

    \b
    Example:
      strongroom serve --store sqlite:///data/strongroom.db --port 8080
    """
    from .. import config

    try:
        from ..server.run import serve as run_server
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "strongroom":
            raise
        raise ConfigError(f"the server needs {error.name}: pip install 'strongroom[server]'") from None
    settings = config.load(store=store, host=host, port=port, workers=workers)
    # With --json what the server says for people, the first administrator's key too, goes to standard error.
    with redirect_stdout(sys.stderr) if json else nullcontext():
        status = run_server(settings)
    if json and status == 0:
        output.print_json({"stopped": True})
    elif json:
        output.print_error(True, "failed", "the server could not run: the reason is on standard error")
    raise typer.Exit(status)
