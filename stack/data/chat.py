"""Conversations as text, laid out by a tokenizer's chat template.

A template is written in Jinja, as transformers takes it: it is given `messages`, `bos_token`, `eos_token` and
`add_generation_prompt`, and may call `raise_exception`. It runs in Jinja's sandbox.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.sandbox

from stack.config.errors import ConfigError, StackError
from stack.data.tokenizer import Tokenizer

type Message = Mapping[str, Any]
"""`role` and `content`, and whatever else a template reads."""

ASSISTANT = "assistant"
"""The role of who is trained."""


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """What lays conversations out, and finds in them what the assistant says."""

    source: str
    """Of the template, in Jinja."""
    bos: str
    eos: str
    special: frozenset[str]
    """Words that no message may hold: the template alone writes them."""
    field: str
    """Of a record, or path to it, with its messages."""

    @classmethod
    def of(cls, tokenizer: Tokenizer, field: str) -> "ChatTemplate":
        """The tokenizer's own.

        Raises:
          ConfigError: it has none, or one that is no Jinja.
        """
        if tokenizer.chat_template is None:
            raise ConfigError(
                "objective.kind=chat: the tokenizer has no chat template; put a chat_template.jinja beside"
                " its tokenizer.json, or set objective.kind=completion"
            )
        words, spellings = tokenizer.words(), tokenizer.spellings
        special = {word for number, word in words.items() if spellings[number] is None}
        template = cls(
            source=tokenizer.chat_template,
            bos=words[tokenizer.bos],
            eos=words[tokenizer.eos],
            special=frozenset(special),
            field=field,
        )
        try:
            _compiled(template.source)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(
                f"the tokenizer's chat template: line {error.lineno}: {error.message}; mend it"
            ) from error
        return template

    @property
    def key(self) -> str:
        """All of it."""
        return json.dumps(["chat 1", self.source, self.bos, self.eos, sorted(self.special), self.field])

    def __call__(self, record: dict[str, Any], place: str) -> list[tuple[str, bool]]:
        """The text of a conversation in parts, each with whether the assistant says it.

        What it says begins where the template ends that is asked for its turn after the messages before.

        Raises:
          StackError: no messages, none of the assistant's, a message without role or text, special words in
            one, or a template that fails or lays out the same messages in another way when others follow.
        """
        messages = self._messages(record, place)
        parts, done = [], ""
        for number, message in enumerate(messages):
            if message["role"] != ASSISTANT:
                continue
            before = self.render(messages[:number], place, ask=True)
            after = self.render(messages[: number + 1], place)
            if not (before.startswith(done) and after.startswith(before)):
                raise StackError(
                    f"{place}: the chat template lays out what is before message {number} in another way once"
                    " that follows, so what the assistant says cannot be told; simplify the template, or give"
                    " each answer a conversation of its own"
                )
            parts += [(before.removeprefix(done), False), (after.removeprefix(before), True)]
            done = after
        whole = self.render(messages, place)
        if not parts or not whole.startswith(done):
            what = "no message of role assistant" if not parts else "a template that changes what came before"
            raise StackError(f"{place}: {what}; mend the line or the template")
        rest = whole.removeprefix(done)
        return [*parts, (rest, False)] if rest else parts

    def ask(self, prompt: str, place: str) -> str:
        """What a user says, and the beginning of the assistant's turn.

        Raises:
          StackError: see `__call__`.
        """
        message = {"role": "user", "content": prompt}
        self._check(message, place)
        return self.render([message], place, ask=True)

    def render(self, messages: Sequence[Message], place: str, *, ask: bool = False) -> str:
        """The text of messages; `ask`: with the beginning of the assistant's turn.

        Raises:
          StackError: the template fails.
        """
        try:
            return _compiled(self.source).render(
                messages=messages, bos_token=self.bos, eos_token=self.eos, add_generation_prompt=ask
            )
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise StackError(
                f"{place}: the chat template fails: {error}; mend the line or the template"
            ) from error

    def _messages(self, record: dict[str, Any], place: str) -> list[Message]:
        messages = record
        for key in self.field.split("."):
            messages = messages.get(key) if isinstance(messages, dict) else None
        if not isinstance(messages, list) or not messages:
            raise StackError(
                f"{place}: no list of messages in field {self.field!r}; fields present: {', '.join(record)};"
                " set objective.messages to one of them"
            )
        for number, message in enumerate(messages):
            self._check(message, f"{place}: message {number}")
        return messages

    def _check(self, message: Any, place: str) -> None:
        if not isinstance(message, dict) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise StackError(
                f"{place}: a message is an object with texts in `role` and `content`; mend the line"
            )
        for key, text in message.items():
            if isinstance(text, str) and (
                forged := next((word for word in self.special if word in text), None)
            ):
                raise StackError(
                    f"{place}: its {key} holds {forged!r}, a special word that the template alone writes;"
                    " remove it"
                )


@lru_cache
def _compiled(source: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    # No `strftime_now`: the text of a conversation is the same every day.
    return environment.from_string(source, globals={"raise_exception": _raise})


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
