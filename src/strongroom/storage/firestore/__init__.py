"""The store on Firestore; `store.open` is its door."""
