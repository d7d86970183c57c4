"""Runs that are broken on purpose, and compared with one that was not."""
