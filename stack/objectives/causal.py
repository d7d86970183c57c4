"""Next-token prediction (GPT, arXiv 2005.14165): every token is predicted from those before it."""

from stack.objectives.words import Words


class Causal(Words):
    """Mean cross-entropy of the next token."""

    endings = ("held_out", "trigram", "sample")
