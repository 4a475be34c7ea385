"""Every backend runs the whole storage suite: see strongroom.testing.storage."""

from __future__ import annotations

import importlib
import pkgutil

import strongroom.testing.storage
from strongroom.testing.storage import SUITE

globals().update({suite.__name__: suite for suite in SUITE})


def test_the_suite_leaves_out_no_class_of_its_modules() -> None:
    package = strongroom.testing.storage
    modules = [importlib.import_module(f"{package.__name__}.{m.name}") for m in pkgutil.iter_modules(package.__path__)]
    written = {
        name
        for module in modules
        for name, value in vars(module).items()
        if name.startswith("Test") and isinstance(value, type) and value.__module__ == module.__name__
    }
    assert written == {suite.__name__ for suite in SUITE}
