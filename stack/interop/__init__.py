"""Weights and models of other libraries, in and out."""
