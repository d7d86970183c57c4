"""The training step: one pure function of state and batch, and everything static about it."""
