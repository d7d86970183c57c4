"""What a run needs and how fast it can be, known before it runs."""
