"""Chips as data, their peaks, and how much of them a run uses."""
