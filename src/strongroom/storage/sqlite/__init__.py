"""The storage port on SQLite. `store.SqliteStore` is the entry."""
