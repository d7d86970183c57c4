"""Metrics of tasks, by libraries that are well known."""
