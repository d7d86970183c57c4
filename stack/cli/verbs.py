"""What commands of the command line are made of."""

import argparse
from collections.abc import Callable
from typing import NoReturn

from stack.config.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """Reports a bad command line as a ConfigError instead of leaving the process."""

    def error(self, message: str) -> NoReturn:
        """Raises it."""
        raise ConfigError(f"{message}; see `{self.prog} --help`")


def verb(
    verbs: "argparse._SubParsersAction[Parser]",
    name: str,
    run: Callable[[argparse.Namespace], None] | None,
    text: str,
) -> Parser:
    """Adds a command, and what runs it."""
    parser = verbs.add_parser(
        name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False
    )
    if run:
        parser.set_defaults(run=run)
    return parser


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Fields of a config."""
    text = "fields to change, for example train.steps=100"
    parser.add_argument("rest", metavar="NAME=VALUE", nargs="*", default=(), help=text)


def add_adapter(parser: argparse.ArgumentParser) -> None:
    """What is used beside a run's weights."""
    text = "a run with an adapter of this one, or an exported adapter, to use beside its weights"
    parser.add_argument("--adapter", metavar="FOLDER", help=text)


def add_accept(parser: argparse.ArgumentParser) -> None:
    """Fields in which a run may differ."""
    text = "go on although this field is not what the run began with; may be repeated"
    parser.add_argument("--accept", action="append", default=[], metavar="FIELD", help=text)


def add_best(parser: argparse.ArgumentParser) -> None:
    """Which checkpoint."""
    text = "of its best checkpoint by eval.metric (default: of the newest)"
    parser.add_argument("--best", action="store_true", help=text)
