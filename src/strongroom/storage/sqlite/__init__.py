"""The store on SQLite; `store.open` is its door."""
