"""Memory and time of a step by formula."""
