"""Meshes, the table of axes, and when weights are gathered."""
