"""A typed client of Strongroom's HTTP interface: `Client` for threads, `AsyncClient` for asyncio.

The same code as `strongroom.client`, put here when the distribution is built.
"""

from importlib.metadata import version

__version__ = version("strongroom-client")

from . import client as _client
from .client import *  # noqa: F403

__all__ = _client.__all__
