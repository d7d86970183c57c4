"""Models: composed of layers, only maths."""
