"""The exact step, compiled for devices that are not here, and what it says."""
