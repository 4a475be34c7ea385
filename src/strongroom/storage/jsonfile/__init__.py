"""The store in one JSON file, or in memory; `store.open` is the entry."""
