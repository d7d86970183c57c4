"""Bytes that stay: what is called written has reached the disk, here or in an object store."""
