"""Single flight: of several callers that want the same read, one reads and the others wait for it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from typing import Any, Generic, TypeVar

T = TypeVar("T")
_AGAIN: Any = object()


class SingleFlight(Generic[T]):
    """The reads that are under way. A caller joins a read only if nothing was changed since the read began (`mark` is
    the same): it never gets an answer that is older than a change which it could know of."""

    __slots__ = ("_under_way",)

    def __init__(self) -> None:
        self._under_way: dict[Hashable, tuple[int, asyncio.Future[T]]] = {}

    async def get(self, name: Hashable, mark: int, read: Callable[[], Awaitable[T]]) -> T:
        """The result of `read`, called here or already under way. Raises what the read raises."""
        while (there := self._under_way.get(name)) is not None and there[0] == mark:
            found = await asyncio.shield(there[1])
            if found is not _AGAIN:
                return found
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        mine = self._under_way[name] = mark, future
        try:
            found = await read()
        except Exception as error:
            future.set_exception(error)
            future.exception()  # nobody may have joined
            raise
        except BaseException:  # this caller was cancelled, the others were not
            future.set_result(_AGAIN)
            raise
        else:
            future.set_result(found)
            return found
        finally:
            if self._under_way.get(name) is mine:
                del self._under_way[name]


__all__ = ["SingleFlight"]
