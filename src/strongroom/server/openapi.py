"""`/openapi.json`, complete, and `/docs`, a page of our own that needs nothing from another host."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

PROBLEMS: dict[int | str, dict[str, Any]] = {}


def version() -> str:
    from .. import __version__

    return __version__


def serve(api: FastAPI) -> None:
    """Add the two routes."""
