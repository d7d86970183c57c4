"""The weights that a new run begins with: where they are, how they fit, and how they come onto the mesh."""
