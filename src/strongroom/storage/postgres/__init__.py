"""The store on PostgreSQL; `store.open` is its door."""
