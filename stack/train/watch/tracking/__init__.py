"""Weights & Biases and MLflow: they follow the history of a run, each from a process of its own."""
