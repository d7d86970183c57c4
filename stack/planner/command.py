"""`stack plan`: what its options ask for, in lines of text or as JSON."""

import dataclasses
import json as jsons
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from stack.config import Config, ConfigError, StackError, load
from stack.planner.plan import find_chip

_COLUMNS = 120


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """The same in print and for JSON."""

    lines: Sequence[str]
    json: Any
    refusal: str | None = None
    """Why the answer is no."""


def run(
    *,
    config: str | None,
    overrides: Sequence[str],
    hardware: str | None,
    devices: str | None,
    search: bool,
    top: int,
    out: str | None,
    compile_step: bool,
    schedule: bool,
    price: float | None,
    validate: str | None,
    json: bool,
) -> Iterator[str]:
    """One `stack plan`; the arguments are its options.

    Raises:
      ConfigError: two that exclude each other, one that is missing, or a value that cannot be.
      StackError: after the last line, what was planned does not fit.
    """
    questions = {
        "--search": search,
        "--compile": compile_step,
        "--schedule": schedule,
        "--validate": validate is not None,
        "--devices A..B": devices is not None and ".." in devices,
    }
    options = [name for name, is_given in questions.items() if is_given]
    if len(options) > 1:
        raise ConfigError(f"{' and '.join(options)} are different questions; ask one at a time")
    if out and not (search or schedule or questions["--devices A..B"]):
        raise ConfigError(
            "--out is written by --search (a config), --devices A..B and --schedule (a plot); add one"
        )
    if price is not None and price <= 0:
        raise ConfigError(f"--price {price:g} must be above 0")
    if validate is not None:
        answer = _validate(validate)
    else:
        if config is None:
            raise ConfigError("which config? for example `stack plan configs/llama3_8b.yaml`")
        tree = load(config, overrides)
        if questions["--devices A..B"]:
            answer = _scaling(tree, hardware, str(devices), out)
        elif schedule:
            answer = _schedule(tree, out)
        elif search:
            answer = _search(tree, hardware, _count(devices), top, out, base=None if overrides else config)
        else:
            answer = _plan(tree, hardware, _count(devices), price, compile_step)
    if json:
        yield _as_json(answer.json)
    else:
        yield from (part for line in answer.lines for part in _fold(line))
    if answer.refusal:
        raise StackError(answer.refusal)


def _plan(
    config: Config, hardware: str | None, devices: int | None, price: float | None, compile_too: bool
) -> Answer:
    from stack.planner import report
    from stack.planner.plan import add_compiled, plan

    result = plan(config, hardware=hardware, devices=devices, price_per_hour=price)
    if compile_too:
        try:
            result = add_compiled(result)
        except ConfigError:
            raise
        except StackError as error:
            note = f"not compiled, so the memory is the formula's: {error}"
            result = dataclasses.replace(result, notes=(*result.notes, note))
    refusal = None if result.fits else f"{result.config.name} does not fit: {result.binds}"
    return Answer(lines=report.lines(result), json=report.as_dict(result), refusal=refusal)


def _search(
    config: Config, hardware: str | None, devices: int | None, top: int, out: str | None, base: str | None
) -> Answer:
    from stack.planner.search import search

    if top < 1:
        raise ConfigError(f"--top {top} must be at least 1")
    result = search.search(
        config, hardware=find_chip(config, hardware), devices=_of(config, devices), top=top
    )
    text = search.lines(result)
    if out:
        search.write(result, out, base=base)
        text = [*text, "", f"wrote the first to {out}"]
    refusal = None if result.best else f"no layout of {config.name} fits; use more devices"
    return Answer(lines=text, json=search.as_dict(result), refusal=refusal)


def _scaling(config: Config, hardware: str | None, devices: str, out: str | None) -> Answer:
    from stack.planner.search import scaling

    curves = scaling.scaling(config, hardware=find_chip(config, hardware), devices=scaling.counts(devices))
    text = scaling.lines(curves)
    drawn = f"drew {scaling.plot(curves, out)}" if out else "--out curve.png (or .html) draws both curves"
    text = [*text, "", drawn]
    return Answer(lines=text, json=scaling.as_dict(curves))


def _schedule(config: Config, out: str | None) -> Answer:
    from stack.planner import schedule

    plan = schedule.pipeline(config)
    drawn = f"drew {schedule.plot(plan, out)}" if out else "--out schedule.png draws it"
    return Answer(lines=[*schedule.lines(plan), "", drawn], json=schedule.as_dict(plan))


def _validate(path: str) -> Answer:
    from stack.planner import validate

    result = validate.validate(path) if path else validate.validate()
    return Answer(lines=validate.lines(result), json=validate.as_dict(result))


def _fold(line: str) -> list[str]:
    """A line in parts of at most 120 columns, the later ones indented."""
    if len(line) <= _COLUMNS:
        return [line]
    how = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.wrap(line, _COLUMNS, subsequent_indent=" " * 12, **how)


def _of(config: Config, devices: int | None) -> int:
    count = devices or (config.target.devices if config.target else None)
    if not count:
        raise ConfigError("how many devices? give --devices, or set target")
    return count


def _count(text: str | None) -> int | None:
    if text is None:
        return None
    if not (text.isdecimal() and int(text) > 0):
        raise ConfigError(f"--devices {text}: expected a number above 0, or a range such as 8..1024")
    return int(text)


def _as_json(value: Any) -> str:
    return jsons.dumps(value, indent=2, default=str)
