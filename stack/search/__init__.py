"""Search: passages of documents that answer a query, found by a run's vectors."""
