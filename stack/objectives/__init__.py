"""Objectives: from hidden states and labels to a loss."""
