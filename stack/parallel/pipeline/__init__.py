"""Pipelines: the layers of a model over the mesh axis `stage`, by a table of who does what and when."""
