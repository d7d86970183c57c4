"""Runs as text: one in full, several as a table, and how their configs differ."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from stack.config import Config
from stack.report.runs import Run, config_differences
from stack.train.weights.origin import describe

WIDTH = 120
"""Columns of a table at most."""
_SPARKS = "▁▂▃▄▅▆▇█"
_PLAIN_SPARKS = "_.-~=+*#"


def lines(
    runs: Sequence[Run], others: Mapping[str, Config] | None = None, *, plain: bool = False
) -> list[str]:
    """What `stack show` prints.

    Args:
      runs: at least one.
      others: configs to compare theirs with, by name.
      plain: draw with ASCII.
    """
    text = _one(runs[0], plain=plain) if len(runs) == 1 else _table([_HEADINGS, *map(_row, runs)])
    configs = {_name(run, runs): run.config for run in runs} | dict(others or {})
    if len(configs) > 1:
        rows = config_differences(configs)
        table = _table([("field", *configs), *((name, *values) for name, values in rows)])
        text += ["", *(table if rows else ["their configs are equal but for name and folder"])]
    return text


def as_dict(run: Run) -> dict[str, Any]:
    """A run for JSON; seconds, bytes, nats; `null` for what is not known."""
    heldout, best = run.heldout, run.best
    return {
        "name": run.config.name,
        "folder": str(run.folder),
        "state": run.state,
        "step": run.step,
        "steps": run.config.train.steps,
        "loss": run.loss,
        "heldout_loss": heldout and heldout[1],
        "heldout_step": heldout and heldout[0],
        "best_heldout_loss": best and best[1],
        "best_heldout_step": best and best[0],
        "tokens_per_second": run.median("tokens_per_second"),
        "mfu_causal": run.median("mfu_causal"),
        "init_from": dict(run.origin) or None,
        "checkpoints": list(run.checkpoints),
        "checkpoint_bytes": run.checkpoint_bytes,
    }


def sparkline(values: Sequence[float], width: int = 60, *, plain: bool = False) -> str:
    """Values in one line of text, low ones low; those that are not finite leave a gap."""
    letters = _PLAIN_SPARKS if plain else _SPARKS
    size = max(1, math.ceil(len(values) / width))
    means = []
    for start in range(0, len(values), size):
        some = [value for value in values[start : start + size] if math.isfinite(value)]
        means.append(sum(some) / len(some) if some else math.nan)
    finite = [mean for mean in means if math.isfinite(mean)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
    steps = (len(letters) - 1) / ((high - low) or 1.0)
    return "".join(letters[round((mean - low) * steps)] if math.isfinite(mean) else " " for mean in means)


def _one(run: Run, *, plain: bool) -> list[str]:
    steps, losses = run.history.curve("loss")
    tokens = run.step * run.config.train.batch_size * run.config.data.sequence_length
    rows = [
        ("run", run.config.name),
        ("folder", str(run.folder)),
        ("state", run.state),
        ("tokens", f"{tokens:,} seen, padding too"),
    ]
    if run.origin:
        rows.append(("weights", f"{describe(run.origin)} at first"))
    if run.loss is not None:
        rows.append(("loss", f"{run.loss:.4f} in training, from {losses[0]:.4f} at step {steps[0]:,}"))
        rows.append(("", sparkline(losses, plain=plain)))
    if run.heldout and run.best:
        (step, loss), (best_step, best) = run.heldout, run.best
        told = "the best" if step == best_step else f"the best {best:.4f} at step {best_step:,}"
        rows.append(("held-out", f"{loss:.4f} at step {step:,}, {told}"))
    if (speed := run.median("tokens_per_second")) is not None:
        mfu = run.median("mfu_causal")
        share = "" if mfu is None else f", MFU {mfu:.1%} causal"
        rows.append(("speed", f"{speed:,.0f} tokens/s{share}, the median of its steps"))
    if run.checkpoints:
        steps_text = ", ".join(f"{step:,}" for step in run.checkpoints)
        rows.append(("saved", f"steps {steps_text}; {run.checkpoint_bytes / 1e6:,.1f} MB"))
    return [f"{label:<10}{value}" for label, value in rows]


_HEADINGS = ("run", "state", "loss", "held-out", "best", "tokens/s")


def _row(run: Run) -> tuple[str, ...]:
    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    return (
        str(run.folder),
        run.state.partition(";")[0],
        number(run.loss, ".4f"),
        number(run.heldout and run.heldout[1], ".4f"),
        number(run.best and run.best[1], ".4f"),
        number(run.median("tokens_per_second"), ",.0f"),
    )


def _name(run: Run, runs: Sequence[Run]) -> str:
    """Its own name, or its folder where another has the same name."""
    alike = [other for other in runs if other.config.name == run.config.name]
    return run.config.name if len(alike) == 1 else str(run.folder)


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of at most `WIDTH` together; the widest are cut until they fit."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    while sum(widths) + 2 * (len(widths) - 1) > WIDTH and max(widths) > 8:
        widest = widths.index(max(widths))
        widths[widest] -= 1
    return ["  ".join(map(_fit, row, widths)).rstrip() for row in rows]


def _fit(cell: str, width: int) -> str:
    return cell.ljust(width) if len(cell) <= width else "..." + cell[3 - width :]
