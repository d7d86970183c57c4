"""Losses of runs as a picture, or as a page that needs nothing else."""

import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stack.config import Config, StackError
from stack.config.paths import expand
from stack.report.runs import Run
from stack.report.show import lines
from stack.train.watch.metrics import smooth

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf", ".html")


def check_plot(path: str) -> Path:
    """The path of a plot.

    Raises:
      StackError: its suffix is none of a picture's or a page's, or its folder is not there.
    """
    target = expand(path)
    if target.suffix.lower() not in SUFFIXES:
        raise StackError(f"--plot {path}: what should it be? end the name in {', '.join(SUFFIXES)}")
    if not target.parent.is_dir():
        raise StackError(f"--plot {path}: there is no folder {target.parent}; make it first")
    return target


def write_plot(runs: Sequence[Run], path: Path, others: Mapping[str, Config] | None = None) -> None:
    """Draws the losses of runs, smoothed in training and as evaluated.

    Args:
      runs: at least one with a loss.
      path: of `check_plot`.
      others: configs to compare theirs with, on a page.

    Raises:
      StackError: no run has a loss, Matplotlib is not installed, or the file cannot be written.
    """
    if not any(run.history.curve("loss")[0] for run in runs):
        raise StackError("no run has a loss yet, there is nothing to plot; train for some steps first")
    try:
        if path.suffix.lower() == ".html":
            path.write_text(_page(runs, others), encoding="utf-8")
        else:
            _draw(runs).savefig(path, dpi=150)
    except ModuleNotFoundError as error:
        raise StackError("a plot needs Matplotlib; install it with: pip install 'stack[notebook]'") from error
    except OSError as error:
        raise StackError(f"cannot write the plot to {path}: {error.strerror}; give another path") from error


def _draw(runs: Sequence[Run], *, color: str | None = None) -> "Figure":
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    names = [run.config.name for run in runs]
    with rc_context({"svg.fonttype": "none"}):
        figure = Figure(figsize=(8, 4.2), layout="constrained")
        axes = figure.subplots()
        for number, run in enumerate(runs):
            name = run.config.name if names.count(run.config.name) == 1 else str(run.folder)
            steps, losses = run.history.curve("loss")
            tint = f"C{number}"
            axes.plot(steps, smooth(losses), color=tint, linewidth=1.4, label=name)
            axes.plot(
                *run.history.curve("loss", "heldout"), color=tint, marker="o", markersize=4, linestyle=":"
            )
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("loss (nats per token)")
        axes.set_title("training, smoothed; dotted: held-out", fontsize=10, loc="left")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        if color is not None:
            _recolor(axes, color)
    return figure


def _recolor(axes: "Axes", color: str) -> None:
    """Text and axes in one color, such as the page's own."""
    axes.tick_params(colors=color)
    legend = axes.get_legend()
    for text in (axes.xaxis.label, axes.yaxis.label, *(legend.get_texts() if legend else ())):
        text.set_color(color)
    axes.set_title(axes.get_title(loc="left"), fontsize=10, loc="left", color=color)
    for spine in axes.spines.values():
        spine.set_color(color)


_INK = "#123457"
"""Stands for the page's text color in the picture: no line is drawn in it."""


def _page(runs: Sequence[Run], others: Mapping[str, Config] | None) -> str:
    picture = io.StringIO()
    figure = _draw(runs, color=_INK)
    figure.patch.set_alpha(0.0)
    figure.axes[0].patch.set_alpha(0.0)
    figure.savefig(picture, format="svg")
    drawn = picture.getvalue()
    svg = drawn[drawn.index("<svg") :].replace(_INK, "currentColor")
    title = html.escape(", ".join(run.config.name for run in runs))
    text = html.escape("\n".join(lines(runs, others)))
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width">\n'
        "<style>:root{color-scheme:light dark}body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;"
        "max-width:70em;padding:0 1em}svg{width:100%;height:auto;max-width:52em}pre{overflow-x:auto;"
        "font:13px/1.5 ui-monospace,monospace}</style>\n"
        f"<h1>{title}</h1>\n{svg}\n<pre>{text}</pre>\n</html>\n"
    )
