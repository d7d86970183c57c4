"""Other frameworks, each at its best, on the same cases."""
