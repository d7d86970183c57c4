"""Labelled data for every kind of task, made from packages, and classical methods for it."""
