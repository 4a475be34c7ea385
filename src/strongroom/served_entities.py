"""The entities that the server and the command line know: one list for both."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from .entities import Entity
from .errors import ConfigError
from .state.model import ENTITIES


def served_entities(modules: Sequence[str]) -> tuple[type[Entity], ...]:
    """What the server and the command line know beside Strongroom's own entities: the shared state's, and those of
    `modules`. There is one list for both, so that what one of them makes fits what the other expects. Raises
    ConfigError."""
    return tuple(dict.fromkeys((*ENTITIES, *load_entities(modules))))


def load_entities(modules: Sequence[str]) -> tuple[type[Entity], ...]:
    """The Entity classes that these modules declare. The current folder is looked in first. Raises ConfigError."""
    found: dict[type[Entity], None] = {}
    for name in modules:
        if "" not in sys.path and os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        try:
            module = importlib.import_module(name)
        except Exception as error:
            raise ConfigError(
                f"STRONGROOM_ENTITIES: {name!r} cannot be imported: {type(error).__name__}: {error}"
            ) from error
        own = [
            value
            for value in vars(module).values()
            if isinstance(value, type) and issubclass(value, Entity) and "__collection__" in vars(value)
        ]
        if not own:
            raise ConfigError(f"STRONGROOM_ENTITIES: {name!r} declares no Entity class with a collection")
        found.update(dict.fromkeys(own))
    return tuple(found)


__all__ = ["load_entities", "served_entities"]
