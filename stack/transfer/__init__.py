"""Runs made of models from elsewhere, and written for elsewhere."""
