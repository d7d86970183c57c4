"""What was measured, as a person reads it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from stack.bench.case import Case, Machine, Row

_COLUMNS = (
    ("", 42),
    ("median", 9),
    ("spread", 6),
    ("tokens/s", 9),
    ("TFLOP/s", 9),
    ("of ceiling", 10),
    ("MFU full, causal", 16),
    ("planned", 9),
    ("memory (planned)", 20),
    ("error", 7),
)
"""Titles and widths; the first is aligned to the left."""


def head(machine: Machine, about: Mapping[str, Any]) -> Iterator[str]:
    """The machine, what runs on it, and what takes part.

    Args:
        machine: as a child sees it.
        about: `commit`, `load`, and `peers` by name: a version, or why it is absent.
    """
    size = f"{machine.memory_bytes / 2**30:.1f} GiB"
    yield f"device     {machine.device_kind}, {size}; {machine.client}"
    yield f"machine    {machine.processor}, {machine.cores} cores, load {about['load']:.1f} before"
    yield "versions   " + ", ".join(f"{name} {number}" for name, number in machine.versions.items())
    yield f"code       {about['commit']}"
    for peer, found in about["peers"].items():
        yield f"peer       {peer}: {found}"


def ceilings_line(ceilings: Mapping[str, float]) -> str:
    """What the device did at best in this run."""
    rates = [f"{name} {value / 1e12:.4g} TFLOP/s" for name, value in ceilings.items() if name != "copy"]
    copy = [f"copy {ceilings['copy'] / 1e9:.4g} GB/s"] if "copy" in ceilings else []
    return "ceilings   " + ", ".join([*rates, *copy] or ["none were measured"])


def heading() -> str:
    """The titles of the columns."""
    return _line([title for title, _ in _COLUMNS])


def lines(case: Case, rows: Sequence[Row]) -> Iterator[str]:
    """A case: its title, and a line for each contestant."""
    turns = "" if case.together or len({row.team for row in rows}) < 2 else "; one after the other"
    yield f"{case.suite}: {case.title}{turns}"
    yield from map(line, rows)


def line(row: Row) -> str:
    """One contestant."""
    if row.status != "measured":
        return f"  {row.by:<{_COLUMNS[0][1] - 2}}{row.status}: {row.reason}".rstrip()
    facts = row.facts
    notes = [facts[name] for name in ("note", "cut_short") if name in facts]
    notes += ["noisy"] if row.is_noisy else []
    return _line(
        [
            f"  {row.by}",
            time_text(row.seconds or 0.0),
            f"{row.spread:.0%}",
            f"{facts['tokens_per_second']:,.0f}" if "tokens_per_second" in facts else "",
            *_rates(facts),
            ", ".join(f"{facts[name]:.1%}" for name in ("mfu_full", "mfu_causal") if name in facts),
            time_text(facts["planned_seconds"]) if facts.get("planned_seconds") else "",
            _memory(facts),
            f"{facts['error']:.1e}" if "error" in facts else "",
            "; ".join(notes),
        ]
    )


def _rates(facts: Mapping[str, Any]) -> tuple[str, str]:
    """What was done in a second, and its share of the ceiling; of attention, what is not masked."""
    if "bytes_per_second" in facts:
        return f"{facts['bytes_per_second'] / 1e9:.0f} GB/s", f"{facts.get('of_copy', 0):.0%}"
    which = "causal" if "flops_per_second_causal" in facts else "full"
    rate, share = facts.get(f"flops_per_second_{which}"), facts.get(f"of_ceiling_{which}")
    return "" if rate is None else f"{rate / 1e12:.4g}", "" if share is None else f"{share:.0%}"


def _memory(facts: Mapping[str, Any]) -> str:
    """The peak where the device tells it, else what the compiler says of the program."""
    names = ("peak_bytes", "compiled_bytes", "temporary_bytes")
    size = next((facts[name] for name in names if facts.get(name)), None)
    planned = f" ({size_text(facts['planned_bytes'])})" if facts.get("planned_bytes") else ""
    return "" if size is None else f"{size_text(size)}{planned}"


def size_text(size: float) -> str:
    """Bytes with the unit that suits them."""
    for unit, bytes_ in (("GiB", 2**30), ("MiB", 2**20)):
        if size >= 0.1 * bytes_:
            return f"{size / bytes_:.3g} {unit}"
    return f"{size / 2**10:.3g} KiB"


def _line(cells: Iterable[str]) -> str:
    widths = [width for _, width in _COLUMNS]
    first, *others = cells
    told = others[len(widths) - 1 :]
    text = first.ljust(widths[0])
    for cell, width in zip(others, widths[1:], strict=False):
        text += " " + cell.rjust(width)
    return f"{text}  {'; '.join(told)}".rstrip()


def time_text(seconds: float) -> str:
    """With the unit that suits it."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.4g} {unit}"
    return f"{seconds * 1e6:.4g} µs"


def summary(rows: Sequence[Row]) -> Iterator[str]:
    """Stack's fastest against the fastest peer, problem by problem, and what went wrong."""
    for problem, contestants in _problems(rows).items():
        ours = [row for row in contestants if row.team == "stack"]
        theirs = [row for row in contestants if row.team != "stack"]
        if ours and theirs:
            stack, peer = (max(group, key=_speed) for group in (ours, theirs))
            ratio = _speed(stack) / _speed(peer)
            told = f"{problem}: {_setting(stack)} {ratio:.2f} x the speed of {_setting(peer)}"
            if stack.is_noisy or peer.is_noisy:
                fastest = ratio * _gain(stack) / _gain(peer)
                told += f"; noisy, of their fastest blocks {fastest:.2f} x"
            yield told
    failures = [row for row in rows if row.status in ("failed", "wrong")]
    for row in failures:
        yield f"{row.status}: {row.suite}: {row.title}, {row.by}: {row.reason}"


def _problems(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows that answer the same question: steps of any number of rows and any remat are one."""
    problems: dict[str, list[Row]] = {}
    for row in rows:
        if row.status == "measured" and row.suite != "ceilings":
            problems.setdefault(_problem(row), []).append(row)
    return problems


def _problem(row: Row) -> str:
    title = f"{row.suite}: {row.title}"
    if row.suite == "step":
        return ", ".join(title.split(", ")[:3])
    group = row.facts.get("group")
    return f"{title}, {group}" if group else title


def _speed(row: Row) -> float:
    return row.facts.get("tokens_per_second") or 1 / (row.seconds or 1.0)


def _gain(row: Row) -> float:
    """Of the fastest block over the median."""
    return (row.seconds or 1.0) / min(row.blocks)


def _setting(row: Row) -> str:
    facts = row.facts
    return f"{row.by} ({facts['rows']} rows, remat {facts['remat']})" if "remat" in facts else row.by
