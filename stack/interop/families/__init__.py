"""Families of transformers' models that share no table with another, each in a file of its own."""
