"""Layouts: all that can be, the best, and how they scale."""
