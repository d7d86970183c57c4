"""The schedule of a pipeline as a picture: who does what and when, as text or drawn."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from stack.config import Config, ConfigError, StackError
from stack.config.paths import expand
from stack.config.pipeline import check_pipeline
from stack.models import model_cost
from stack.parallel.pipeline.pipeline import Pipeline
from stack.parallel.pipeline.places import KINDS
from stack.parallel.pipeline.schedules import Kind
from stack.step.program import pipeline_of

_WIDTH = 100
"""Ticks of a line."""
_SUFFIXES = (".png", ".svg", ".pdf")
_MARKS: dict[Kind, str] = {
    "forward": "0123456789",
    "backward": "abcdefghij",
    "input_gradient": "abcdefghij",
    "weight_gradient": "ABCDEFGHIJ",
}
"""Of micro-batches, ten of which have marks of their own."""
_COLORS: dict[Kind, str] = {
    "forward": "#4c78a8",
    "backward": "#f58518",
    "input_gradient": "#f58518",
    "weight_gradient": "#54a24b",
}


def pipeline(config: Config) -> Pipeline:
    """The pipeline that a config asks for.

    Raises:
      ConfigError: it asks for none, or for one that cannot be.
    """
    stages = config.mesh.stage
    if config.mesh.auto or stages == 1:
        raise ConfigError("mesh.stage=1: one stage has no schedule; set mesh.stage, and mesh.zero=1")
    if stages < 1:
        raise ConfigError("mesh.stage=-1: how many stages? name a number to see their schedule")
    if config.train.remat == "auto":
        raise ConfigError("train.remat=auto: how long a backward pass takes depends on it; name one")
    check_pipeline(config, stages)
    return pipeline_of(config, [stack.number for stack in model_cost(config.model).stacks], stages)


def lines(plan: Pipeline) -> list[str]:
    """The table as text: a line for each stage, a mark for each tick."""
    kinds = [kind for kind in KINDS if kind and (plan.rows.kind == KINDS.index(kind)).any()]
    told = {
        "forward": "0-9 forward",
        "backward": "a-j backward",
        "input_gradient": "a-j gradient of what enters",
        "weight_gradient": "A-J of weights",
    }
    rows = _marks(plan)
    text = [str(plan), f"{plan.table.ticks} ticks; {', '.join(told[kind] for kind in kinds)}, . nothing", ""]
    for begin in range(0, plan.table.ticks, _WIDTH):
        part = [row[begin : begin + _WIDTH] for row in rows]
        text += [f"stage {stage:<3} {row}" for stage, row in enumerate(part)]
        text += [""] if begin + _WIDTH < plan.table.ticks else []
    held = f"held at most: {', '.join(map(str, plan.table.live))} micro-batches"
    late = f"; weight gradients put off: {', '.join(map(str, plan.table.put_off))}"
    return [*text, "", held + (late if any(plan.table.put_off) else "")]


def as_dict(plan: Pipeline) -> dict[str, Any]:
    """The table for JSON."""
    entries = [
        {
            "stage": stage,
            "tick": entry.tick,
            "ticks": plan.table.end(entry) - entry.tick,
            **entry.action._asdict(),
        }
        for stage, of_stage in enumerate(plan.table.stages)
        for entry in of_stage
    ]
    return {
        "schedule": plan.schedule,
        "layers": plan.layers.tolist(),
        "ticks": plan.table.ticks,
        "bubble": plan.table.bubble,
        "live": list(plan.table.live),
        "put_off": list(plan.table.put_off),
        "entries": entries,
    }


def plot(plan: Pipeline, path: str) -> Path:
    """Draws the table.

    Args:
      plan: whose.
      path: of a picture.

    Raises:
      StackError: its suffix is none of a picture's, Matplotlib is missing, or it cannot be written.
    """
    target = expand(path)
    if target.suffix.lower() not in _SUFFIXES:
        raise StackError(f"--out {path}: what should it be? end the name in {', '.join(_SUFFIXES)}")
    try:
        _draw(plan, target)
    except ModuleNotFoundError as error:
        raise StackError("a plot needs Matplotlib; install it with: pip install 'stack[notebook]'") from error
    except OSError as error:
        raise StackError(f"cannot write the plot to {path}: {error.strerror}; give another path") from error
    return target


def _marks(plan: Pipeline) -> list[str]:
    marks = np.full(plan.rows.kind.shape, ".")
    for kind, of_kind in _MARKS.items():
        mine = plan.rows.kind == KINDS.index(kind)
        marks[mine] = np.array(list(of_kind))[plan.rows.micro_batch[mine] % len(of_kind)]
    return ["".join(column) for column in marks.T]


def _bars(plan: Pipeline) -> Iterator[tuple[int, int, int, Kind, str]]:
    """Stage, tick, ticks, kind and what is written into it."""
    for stage, entries in enumerate(plan.table.stages):
        for entry in entries:
            kind, micro, _ = entry.action
            yield stage, entry.tick, plan.table.end(entry) - entry.tick, kind, str(micro)


def _draw(plan: Pipeline, path: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    width = min(40.0, max(6.0, plan.table.ticks * 0.22))
    figure = Figure(figsize=(width, 1.4 + 0.42 * plan.stages), layout="constrained")
    axes = figure.subplots()
    kinds: dict[Kind, None] = {}
    for stage, tick, ticks, kind, text in _bars(plan):
        kinds[kind] = None
        axes.barh(stage, ticks, left=tick, height=0.86, color=_COLORS[kind], edgecolor="white", linewidth=0.6)
        if width < 40:
            axes.text(tick + ticks / 2, stage, text, ha="center", va="center", fontsize=6, color="white")
    axes.set(xlim=(0, plan.table.ticks), ylim=(plan.stages - 0.5, -0.5), xlabel="ticks", ylabel="stage")
    axes.set_yticks(range(plan.stages))
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_title(str(plan), fontsize=9)
    handles = [Patch(color=_COLORS[kind], label=kind.replace("_", " ")) for kind in kinds]
    axes.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(0, -0.25), ncols=3, frameon=False, fontsize=7
    )
    figure.savefig(path, dpi=150)
