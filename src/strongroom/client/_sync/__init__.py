# Generated from _async/__init__.py by `python src/strongroom/client/_unasync.py`: edit that file instead.
"""The client's classes, one module a noun. `_async` is written by hand; `_sync` is generated from it."""
