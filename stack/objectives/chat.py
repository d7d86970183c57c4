"""Supervised fine-tuning on conversations: what the assistant says is predicted."""

from collections.abc import Sequence
from typing import ClassVar

from stack.config import ChatConfig
from stack.data.chat import ChatTemplate
from stack.data.tokenizer import Tokenizer
from stack.objectives.records import Reader, Records


class Chat(Records):
    """Mean cross-entropy of what the assistant says, with the words that end it.

    A conversation is laid out by the tokenizer's chat template.
    """

    marks: ClassVar[bool] = True
    between = "\n"

    def reader(self, tokenizer: Tokenizer) -> Reader:
        """By the tokenizer's template."""
        assert isinstance(self.records, ChatConfig)
        return ChatTemplate.of(tokenizer, self.records.messages)

    def ask(self, tokenizer: Tokenizer, prompts: Sequence[str]) -> list[str]:
        """Each prompt as what a user says, up to where the assistant begins."""
        assert isinstance(self.records, ChatConfig)
        template = ChatTemplate.of(tokenizer, self.records.messages)
        return [template.ask(prompt, f"prompt {number}") for number, prompt in enumerate(prompts)]
