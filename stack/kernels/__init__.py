"""One folder per operation: its reference, its implementations, and how one is chosen."""
