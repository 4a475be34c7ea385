# Generated from _async/__init__.py by `python src/strongroom/client/_unasync.py`: change that, not this.
"""The client's nouns. `_async` is written by hand, `_sync` is generated from it."""
