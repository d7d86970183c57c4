"""Conversations as text, laid out by a tokenizer's chat template.

A template is written in Jinja, as transformers takes it: it is given `messages`, `bos_token`, `eos_token` and
`add_generation_prompt`, and may call `raise_exception`. It runs in Jinja's sandbox.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.sandbox

from stack.config.errors import ConfigError, StackError
from stack.config.section import is_text
from stack.data.records import value_at
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
                "objective.kind: conversations are laid out by the tokenizer's template, and it has no chat"
                " template; put a chat_template.jinja beside its tokenizer.json, or set objective.kind to"
                " completion or preference"
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
        return self.parts(self._messages(record, place), place)

    def parts(self, messages: Sequence[Message], place: str) -> list[tuple[str, bool]]:
        """The same of messages that are checked."""
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
        except Exception as error:  # A template may do anything.
            raise StackError(
                f"{place}: the chat template fails: {str(error) or type(error).__name__}; mend the"
                f" {'prompt' if ask and len(messages) == 1 else 'line'} or the template"
            ) from error

    def _messages(self, record: dict[str, Any], place: str) -> list[Message]:
        messages = value_at(record, self.field, lambda: place, setting="objective.messages")
        return self.check(messages, place, field=self.field, setting="objective.messages")

    def check(self, messages: Any, place: str, *, field: str, setting: str) -> list[Message]:
        """What a field holds, that are messages.

        Raises:
          StackError: it is no list of them, or one holds what it must not.
        """
        if not isinstance(messages, list) or not messages:
            what = "an empty list" if messages == [] else f"a {type(messages).__name__}"
            raise StackError(
                f"{place}: {field!r} holds {what}, not a list of messages; mend or remove the line, or"
                f" set {setting} to another field"
            )
        for number, message in enumerate(messages):
            self._check(message, f"{place}: message {number}")
        return messages

    def _check(self, message: Any, place: str) -> None:
        keys = ("role", "content")
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in keys):
            raise StackError(
                f"{place}: a message is an object with texts in `role` and `content`; mend the line"
            )
        for text in _texts(message):
            if not is_text(text):
                raise StackError(f"{place}: it holds half of a surrogate pair; mend the line")
            if forged := next((word for word in self.special if word in text), None):
                raise StackError(
                    f"{place}: it holds {forged!r}, a special word that the template alone writes; remove it"
                )


def _texts(value: Any) -> Iterator[str]:
    """All texts in a value of JSON, the names of fields too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, inside in value.items():
            yield name
            yield from _texts(inside)
    elif isinstance(value, list):
        for inside in value:
            yield from _texts(inside)


@lru_cache
def _compiled(source: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, ensure_ascii=False, **options: json.dumps(
        value, ensure_ascii=ensure_ascii, **options
    )
    # No `strftime_now`: the text of a conversation is the same every day.
    return environment.from_string(source, globals={"raise_exception": _raise})


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
