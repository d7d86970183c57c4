"""The training step and the crank that turns it."""
