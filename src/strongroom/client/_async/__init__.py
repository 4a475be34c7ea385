"""The client's classes, one module a noun. `_async` is written by hand; `_sync` is generated from it."""
