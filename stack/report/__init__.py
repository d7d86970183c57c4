"""A look at runs, without their devices: text, a figure, a page."""
