"""`strongroom serve`: the HTTP server."""

from __future__ import annotations

from typing import Annotated

import typer

from . import output
from .session import JsonOption, StoreOption


def serve(
    host: Annotated[str | None, typer.Option(metavar="ADDRESS", help="Listen on (default 127.0.0.1).")] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65_535, help="Listen on (default 8080); 0 takes a free one.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes that serve (default 1).")] = None,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Run the HTTP server until it is told to stop.

    All settings can come from the environment: docs/configuration.md has the table. With --json, standard output has
    one document once the server has stopped.

    \b
    Example:
      strongroom serve --store sqlite:///data/strongroom.db --port 8080
    """
    from .. import config
    from ..server.run import serve as run_server

    status = run_server(config.load(store=store, host=host, port=port, workers=workers))
    if json:
        output.print_json({"exit_status": status})
    raise typer.Exit(status)
