"""The command line: one thin command per verb; the work is done by the library."""

import argparse
import contextlib
import errno
import io
import itertools
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn, TextIO

from stack import environment
from stack.config.errors import ConfigError, StackError

EPILOG = """\
examples:
  stack train configs/quickstart.yaml                 train, evaluate, save, print a sample
  stack train configs/quickstart.yaml train.steps=50  change any field by its dotted name
  stack train runs/quickstart                         go on with a run
  stack sample runs/quickstart "def " --length 100    generate text
  stack show runs/quickstart                          where a run stands, its losses and speed
  stack plan configs/llama3_8b.yaml --hardware h100 --devices 1024
                                                      memory and speed before anything is rented
  stack config show configs/llama3_8b.yaml --sharding --devices 64

exit status: 0 done, 1 error while running, 2 bad command line or config, 130 interrupted
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after `stack`; None takes those of the process.

    Returns:
        The exit status: 0, 1 for a StackError, 2 for a ConfigError or a bad command line, 130 when
        interrupted.
    """
    sys.stdout = sys.stdout or io.StringIO()  # One that is closed.
    sys.stderr = sys.stderr or sys.stdout
    for screen in (sys.stdout, sys.stderr):
        if isinstance(screen, io.TextIOWrapper):  # What it cannot show is spelled out, not an error.
            screen.reconfigure(errors="backslashreplace")
    try:
        arguments = _parse(sys.argv[1:] if argv is None else argv)
        environment.prepare()
        arguments.run(arguments)
        sys.stdout.flush()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except StackError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # It is an OSError too.
        # Whoever reads our output has enough; nothing more may be flushed to it at exit.
        _point_at_nothing(sys.stdout)
    except OSError as error:
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EIO, errno.EBADF):
            raise
        _point_at_nothing(sys.stdout)  # Or exit would fail once more to write what is left.
        place = error.filename or "standard output"
        print(f"error: {place}: {error.strerror}; check its disk and permissions", file=sys.stderr)
        return 1
    return 0


def _point_at_nothing(screen: TextIO) -> None:
    with contextlib.suppress(io.UnsupportedOperation):  # It is no file.
        os.dup2(os.open(os.devnull, os.O_WRONLY), screen.fileno())


class _Parser(argparse.ArgumentParser):
    """Reports a bad command line as a ConfigError instead of leaving the process."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see `{self.prog} --help`")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments; overrides and prompts may stand before, between and after options."""
    parser, verbs = _parser()
    argv, tail = _split_tail(argv)
    told = f"see `stack {argv[0]} --help`" if argv and argv[0] in verbs else "see `stack --help`"
    if argv and not argv[0].startswith("-") and argv[0] not in verbs:
        raise ConfigError(_unknown_verb(argv[0], verbs))
    arguments, rest = parser.parse_known_args(argv)
    for word in rest:
        if word.startswith("-"):
            hint = f"; an override is written {word.lstrip('-')}" if "=" in word else ""
            raise ConfigError(f"unknown option {word}{hint}; {told}")
        if not hasattr(arguments, "rest"):
            raise ConfigError(f"{word!r} is one argument too many; {told}")
        arguments.rest = [*arguments.rest, word]
    if tail and not hasattr(arguments, "rest"):
        raise ConfigError(f"{tail[0]!r} is one argument too many; {told}")
    if tail:
        arguments.rest = [*arguments.rest, *tail]
    return arguments


def _split_tail(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments, and what stands after `--`, whatever it looks like."""
    words = list(argv)
    place = words.index("--") if "--" in words else len(words)
    return words[:place], words[place + 1 :]


def _unknown_verb(word: str, verbs: Sequence[str]) -> str:
    from stack.config.explain import nearest

    match = nearest(word, verbs)
    meant = f"did you mean `stack {match}`?" if match else f"it is one of {', '.join(verbs)}"
    return f"{word!r} is not a command; {meant}"


def _parser() -> tuple[_Parser, list[str]]:
    """The parser and its verbs."""
    parser = _Parser(
        prog="stack",
        description="Plan, train and trust large models in JAX.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the versions of stack and JAX")
    parser.set_defaults(run=lambda arguments: _version() if arguments.version else parser.print_help())
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND")

    train = _verb(verbs, "train", _train, "train a config, or go on with a run")
    train.add_argument("config", metavar="CONFIG_OR_RUN", help="a YAML file, or the folder of a run")
    _add_overrides(train)

    _add_plan(verbs)

    evaluate = _verb(verbs, "eval", _evaluate, "evaluate a run on its held-out text")
    evaluate.add_argument("config", metavar="RUN", help="the folder of a run")
    _add_overrides(evaluate)

    sample = _verb(verbs, "sample", _sample, "generate text with a run")
    sample.add_argument("config", metavar="RUN", help="the folder of a run")
    text = "what the text starts with; - reads it from standard input; after -- it may begin with a dash"
    sample.add_argument("rest", metavar="PROMPT", nargs="*", default=(), help=text)
    sample.add_argument(
        "--file",
        action="append",
        default=[],
        metavar="FILE",
        help="a prompt that is in a file; may be repeated",
    )
    for option, kind, text in (
        ("length", int, "tokens to generate at most"),
        ("temperature", float, "divides the logits; 0 takes the likeliest token"),
        ("top-k", int, "sample among this many likeliest tokens"),
        ("top-p", float, "sample among the likeliest tokens that hold this probability"),
    ):
        sample.add_argument(f"--{option}", type=kind, help=f"{text} (default: the run's)")
    sample.add_argument("--seed", type=int, help="another seed gives another text (default: the run's)")

    show_runs = _verb(verbs, "show", _show_runs, "look at runs: where they stand, and how they differ")
    show_runs.add_argument("runs", metavar="RUN", nargs="+", help="the folder of a run")
    show_runs.add_argument("--base", metavar="FILE_OR_RUN", help="compare their configs with this one's")
    show_runs.add_argument("--plot", metavar="FILE", help="draw their losses: .png, .svg, .pdf or .html")
    show_runs.add_argument("--json", action="store_true", help="print JSON")

    configs = _verb(verbs, "config", None, "show a config, or what a config may hold")
    config_verbs = configs.add_subparsers(metavar="COMMAND", required=True)
    show = _verb(config_verbs, "show", _show, "print a config with every field")
    show.add_argument("config", metavar="FILE_OR_RUN", help="a YAML file, or the folder of a run")
    _add_overrides(show)
    show.add_argument("--sharding", action="store_true", help="print how each parameter is laid out instead")
    show.add_argument(
        "--devices", type=int, metavar="N", help="devices to lay out over (default: those here)"
    )
    listed = _verb(config_verbs, "fields", _fields, "explain the fields of a config")
    listed.add_argument("pattern", metavar="PATTERN", nargs="?", default="", help="a part of their names")
    listed.add_argument("--markdown", action="store_true", help="print all of them as a page")
    _verb(config_verbs, "schema", _schema, "print the JSON schema of config files")

    data = _verb(verbs, "data", None, "prepare data")
    data_verbs = data.add_subparsers(metavar="COMMAND", required=True)
    tokenizer = _verb(data_verbs, "tokenizer", _tokenizer, "train a BPE tokenizer on a config's sources")
    tokenizer.add_argument("config", metavar="CONFIG", help="a YAML file")
    _add_overrides(tokenizer)
    tokenizer.add_argument("--vocab-size", type=int, required=True, metavar="N", help="words to learn")
    tokenizer.add_argument("--out", required=True, metavar="FILE", help="the tokenizer.json to write")

    doctor = _verb(verbs, "doctor", _doctor, "print what this machine has and what stack makes of it")
    doctor.add_argument("--numerics", action="store_true", help="print the numerics contract instead")
    doctor.add_argument(
        "--calibrate",
        metavar="FILE",
        nargs="?",
        const="",
        help="measure this machine for `stack plan`, and write it to FILE for --hardware",
    )
    doctor.add_argument("--measure", action="store_true", help="measure that contract on the devices here")
    return parser, list(verbs.choices)


def _add_plan(verbs: "argparse._SubParsersAction[_Parser]") -> None:
    plan = _verb(verbs, "plan", _plan, "tell memory, step time and the best layout before a run")
    plan.add_argument("config", metavar="CONFIG", nargs="?", help="a YAML file, or the folder of a run")
    _add_overrides(plan)
    plan.add_argument(
        "--hardware",
        metavar="CHIP",
        help="v100-32gb, a100-80gb, h100, h200, b200, gb200, mi300x, tpu-v5p, ... (a wrong name lists all),"
        " or a YAML file of one (default: target.hardware)",
    )
    plan.add_argument(
        "--devices",
        metavar="N",
        help="devices; each keeps its layout, data takes the rest (default: target.devices);"
        " 8..10240 gives the scaling curve",
    )
    plan.add_argument("--search", action="store_true", help="find the best layouts of the config's batch")
    plan.add_argument("--top", type=int, default=8, metavar="N", help="layouts to show (default: 8)")
    plan.add_argument("--out", metavar="FILE", help="--search: the config to write; a curve: its plot")
    plan.add_argument(
        "--compile", dest="compile_step", action="store_true", help="compile the exact step for the chip"
    )
    plan.add_argument("--price", type=float, metavar="P", help="of one chip and hour; adds the cost")
    plan.add_argument(
        "--validate",
        metavar="FILE.csv",
        nargs="?",
        const="",
        help="predict the published runs of a table (default: the one that comes with stack)",
    )
    plan.add_argument("--json", action="store_true", help="print JSON")


def _verb(
    verbs: "argparse._SubParsersAction[_Parser]",
    name: str,
    run: Callable[[argparse.Namespace], None] | None,
    text: str,
) -> _Parser:
    parser = verbs.add_parser(
        name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False
    )
    if run:
        parser.set_defaults(run=run)
    return parser


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    text = "fields to change, for example train.steps=100"
    parser.add_argument("rest", metavar="NAME=VALUE", nargs="*", default=(), help=text)


def _version() -> None:
    from importlib.metadata import version

    print(f"stack {version('stack')} (jax {version('jax')}, Python {sys.version.split()[0]})")


def _train(arguments: argparse.Namespace) -> None:
    from stack.config.reading import load

    config = load(arguments.config, arguments.rest)  # what is wrong is told before anything heavy is loaded
    if os.environ.get("JAX_PROCESS_ID", os.environ.get("SLURM_PROCID", "0")) == "0":
        print(f"start     {config.name}: loading JAX, then its data", flush=True)

    environment.import_jax()
    from stack.parallel.processes import together
    from stack.train.trainer import Trainer

    with together():
        Trainer(config).fit()


def _plan(arguments: argparse.Namespace) -> None:
    environment.import_jax()
    from stack.planner.command import run

    options = {
        name: value for name, value in vars(arguments).items() if name not in ("run", "version", "rest")
    }
    for line in run(**options, overrides=arguments.rest):
        print(line, flush=True)


def _evaluate(arguments: argparse.Namespace) -> None:
    environment.import_jax()
    from stack.parallel.processes import first, together
    from stack.train.trainer import Trainer

    with together():
        metrics = Trainer.from_run(arguments.config, arguments.rest).evaluate()
        if first():
            print("\n".join(f"{name} {value:.6g}" for name, value in metrics.items()))


def _sample(arguments: argparse.Namespace) -> None:
    environment.import_jax()
    from stack.parallel.processes import first, together
    from stack.train.trainer import Trainer

    fields = {
        "sample.length": arguments.length,
        "sample.temperature": arguments.temperature,
        "sample.top_k": arguments.top_k,
        "sample.top_p": arguments.top_p,
    }
    overrides = [f"{name}={value}" for name, value in fields.items() if value is not None]
    with together():
        prompts = [*map(_prompt, arguments.rest), *map(_prompt_file, arguments.file)]
        trainer = Trainer.from_run(arguments.config, overrides)
        prompts = prompts or [trainer.config.sample.prompt]
        if len(prompts) == 1:
            pieces = itertools.chain(prompts, trainer.stream(prompts[0], seed=arguments.seed), ["\n"])
        else:
            texts = trainer.generate(prompts, seed=arguments.seed)
            pieces = (f"{prompt}{text}\n" for prompt, text in zip(prompts, texts, strict=True))
        for piece in pieces:
            if first():
                print(piece, end="", flush=True)


def _prompt(word: str) -> str:
    """A prompt as it was typed; `-`: what stands on standard input."""
    from stack.config.section import is_text

    if word != "-":
        if is_text(word):
            return word
        try:  # Python reads arguments in the terminal's encoding; what that lacks is kept as it came.
            return os.fsencode(word).decode()
        except UnicodeError:
            told = "holds bytes that are not UTF-8; give it as UTF-8"
            raise StackError(f"prompt {word!a} {told}") from None
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise StackError(
            f"standard input: byte {error.start} is not UTF-8; give the prompt as UTF-8"
        ) from None


def _prompt_file(name: str) -> str:
    from stack.config.paths import expand

    try:
        return expand(name).read_text("utf-8")
    except UnicodeDecodeError as error:
        raise StackError(f"{name}: byte {error.start} is not UTF-8; give UTF-8") from None
    except OSError as error:
        raise StackError(f"{name}: cannot be read: {error.strerror}; check --file") from None


def _show_runs(arguments: argparse.Namespace) -> None:
    from stack.config.reading import load
    from stack.report import figure, show
    from stack.report.runs import read_run

    target = figure.check_plot(arguments.plot) if arguments.plot else None
    runs = [read_run(folder) for folder in arguments.runs]
    others = {arguments.base: load(arguments.base)} if arguments.base else {}
    if arguments.json:
        print(json.dumps([show.as_dict(run) for run in runs], indent=2))
    else:
        plain = not (sys.stdout.encoding or "").lower().startswith("utf")
        print("\n".join(show.lines(runs, others, plain=plain)))
    if target:
        figure.write_plot(runs, target, others)
        print(f"drew {target}", file=sys.stderr if arguments.json else sys.stdout)


def _show(arguments: argparse.Namespace) -> None:
    from stack.config.reading import dump, load

    config = load(arguments.config, arguments.rest)
    if not arguments.sharding:
        print(dump(config), end="")
        return
    environment.import_jax()
    from stack.planner.plan import for_devices
    from stack.step.describe import sharding_table

    if arguments.devices is None:
        print(sharding_table(config, len(environment.devices())))
    else:
        print(sharding_table(for_devices(config, arguments.devices)[0], arguments.devices))


def _fields(arguments: argparse.Namespace) -> None:
    from stack.config import fields

    if arguments.markdown:
        print(fields.page(), end="")
        return
    some = fields.fields(arguments.pattern)
    if not some:
        match = fields.suggest(arguments.pattern)
        raise ConfigError(
            f"no field has {arguments.pattern!r} in it" + (f"; did you mean {match}?" if match else "")
        )
    print("\n".join(fields.lines(some)))


def _schema(_: argparse.Namespace) -> None:
    from stack.config.reading import schema

    print(json.dumps(schema(), indent=2))


def _tokenizer(arguments: argparse.Namespace) -> None:
    from stack.config.reading import load
    from stack.data.tokenizer import train_bpe

    config = load(arguments.config, arguments.rest)
    tokenizer = train_bpe(config.data, arguments.vocab_size, arguments.out, seed=config.seed)
    print(f"{arguments.out}: {tokenizer.vocab_size} words")


def _doctor(arguments: argparse.Namespace) -> None:
    environment.import_jax()
    environment.devices()
    from stack import doctor

    if arguments.calibrate is not None:
        from stack.doctor.calibrate import run

        for line in run(arguments.calibrate or None):
            print(line, flush=True)
    elif arguments.measure:
        for line in doctor.measure():
            print(line, flush=True)
    else:
        print(doctor.numerics() if arguments.numerics else doctor.report())
