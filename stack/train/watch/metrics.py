"""The history of a run: one JSON record per line, TensorBoard beside it when asked, curves from it.

A record is {"kind": "train" or "heldout", "step": steps taken, "time": seconds since 1970, and the
metrics}. Strict JSON has no number that is not finite, so those are written as "nan", "inf", "-inf".
"""

import dataclasses
import json
import math
import os
import statistics
import time
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from stack.config.errors import StackError
from stack.config.paths import expand
from stack.train.watch.listeners import Listener

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from tensorboardX import SummaryWriter

FILE = "metrics.jsonl"
Kind = Literal["train", "heldout"]


class MetricsLog(Listener):
    """Writes metrics.jsonl, and TensorBoard events on request, in the run folder; only process 0 does.

    A record is in the file before the next step. A run that goes on from step n drops
    the records of later steps first: the history is one line of steps.
    """

    def __init__(self, folder: str | os.PathLike[str], *, every: int = 1, tensorboard: bool = False) -> None:
        """Touches nothing until the run starts.

        Args:
            folder: of the run.
            every: steps between records of training; the first and the last step are always there.
            tensorboard: write events beside them.

        Raises:
            StackError: TensorBoard is asked for and not installed.
        """
        self.path = Path(folder) / FILE
        self._every = every
        self._steps = 0
        self._tensorboard = tensorboard
        self._file: FileIO | None = None
        self._events: SummaryWriter | None = None
        if tensorboard:
            _summary_writer()

    def on_start(self, info: dict[str, Any]) -> None:
        """Opens the history to go on after `step` of `info`.

        Raises:
            StackError: the history cannot be read or written.
        """
        import jax

        if jax.process_index() != 0:
            return
        step, self._steps = int(info["step"]), int(info["steps"])
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _drop_after(self.path, step)
            self._file = self.path.open("ab", buffering=0)
            if self._tensorboard:
                # TensorBoard hides what earlier files hold from this step on.
                folder = str(self.path.parent / "tensorboard")
                self._events = _summary_writer()(folder, purge_step=step + 1)
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def on_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Writes a record of kind `train`, if one is due.

        Raises:
            StackError: it cannot be written.
        """
        if step % self._every == 0 or step in (1, self._steps):
            self._write("train", step, metrics)

    def on_eval(self, step: int, metrics: dict[str, float]) -> None:
        """Writes a record of kind `heldout`.

        Raises:
            StackError: it cannot be written.
        """
        self._write("heldout", step, metrics)

    def on_end(self, summary: dict[str, Any]) -> None:
        """Closes the files."""
        for file in (self._file, self._events):
            if file is not None:
                file.close()
        self._file = self._events = None

    def _write(self, kind: Kind, step: int, metrics: dict[str, float]) -> None:
        if self._file is None:
            return
        record = {"kind": kind, "step": step, "time": round(time.time(), 3), **metrics}
        try:
            line = memoryview(_encode(record).encode())
            while line:  # A disk that fills up takes a part, and refuses the rest.
                line = line[self._file.write(line) :]
        except OSError as error:
            raise _unwritable(self.path, error) from error
        if self._events is not None:
            for name, value in metrics.items():
                self._events.add_scalar(f"{kind}/{name}", value, step)


@dataclasses.dataclass(frozen=True, kw_only=True)
class History:
    """The records of a run, in order."""

    records: list[dict[str, Any]]
    """As `read_history` gives them."""

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Self:
        """Reads a run folder or its metrics.jsonl; see `read_history`."""
        return cls(records=read_history(path))

    def __str__(self) -> str:
        """Its last records as a table: step, loss, held-out loss, tokens per second."""
        return "\n".join("  ".join(f"{cell:>12}" for cell in row) for row in self._rows())

    def _repr_html_(self) -> str:
        """The same in a notebook."""
        rows = ("".join(f"<td>{cell}</td>" for cell in row) for row in self._rows())
        return "<table>" + "".join(f"<tr>{row}</tr>" for row in rows) + "</table>"

    def _rows(self, most: int = 10) -> list[tuple[str, ...]]:
        """Headings, and up to so many steps, evenly spread, the last among them."""
        train, heldout = (
            {r["step"]: r for r in self.records if r["kind"] == kind} for kind in ("train", "heldout")
        )
        steps = sorted(train.keys() | heldout.keys())
        chosen = steps[:: -max(1, -(-len(steps) // most))][::-1]
        rows: list[tuple[str, ...]] = [("step", "loss", "held-out", "tokens/s")]
        for step in sorted({*chosen, *heldout}):
            cells = (
                (train.get(step, {}).get("loss"), ".4f"),
                (heldout.get(step, {}).get("loss"), ".4f"),
                (train.get(step, {}).get("tokens_per_second"), ",.0f"),
            )
            shown = ("" if value is None else format(value, form) for value, form in cells)
            rows.append((f"{step:,}", *shown))
        return rows

    def curve(self, metric: str, kind: Kind = "train") -> tuple[list[int], list[float]]:
        """Steps and values of one metric."""
        points = [(r["step"], r[metric]) for r in self.records if r["kind"] == kind and metric in r]
        return [step for step, _ in points], [value for _, value in points]

    def plot(self, path: str | os.PathLike[str] | None = None) -> "Figure":
        """Loss over steps, in training and on held-out text.

        Args:
            path: picture to write, its kind by the suffix; None: none is written.

        Returns:
            The figure, which a notebook shows.

        Raises:
            StackError: Matplotlib is not installed, there is no loss, or the file cannot be written.
        """
        try:
            from matplotlib import pyplot
        except ModuleNotFoundError as error:
            raise StackError(
                "a plot needs Matplotlib; install it with: pip install 'stack[notebook]'"
            ) from error
        if not any("loss" in record for record in self.records):
            raise StackError(
                "the history holds no loss yet, there is nothing to plot; train for some steps first"
            )
        figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
        pyplot.close(figure)  # Off pyplot's list, or a notebook would show it twice.
        steps, losses = self.curve("loss")
        if steps:
            smoothed = smooth(losses)
            label = f"training, smoothed ({smoothed[-1]:.3f} at the end)"
            axes.plot(steps, losses, color="tab:blue", linewidth=0.8, alpha=0.35)
            axes.plot(steps, smoothed, color="tab:blue", label=label)
        steps, losses = self.curve("loss", "heldout")
        if steps:
            label = f"held-out ({losses[-1]:.3f} at the end)"
            axes.plot(steps, losses, color="tab:orange", marker="o", markersize=4, label=label)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("loss (nats per token)")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        if path is not None:
            try:
                figure.savefig(expand(path), dpi=150)
            except (OSError, ValueError) as error:  # ValueError: a suffix Matplotlib does not know.
                raise StackError(f"cannot write the plot to {os.fspath(path)}: {error}") from error
        return figure


def read_history(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads the records of a run, oldest first.

    Args:
        path: the run folder, or its metrics.jsonl; the run may still be writing.

    Raises:
        StackError: there is no such file, or a line of it is not a record.
    """
    path = expand(path)
    if path.is_dir():
        path /= FILE
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except OSError as error:
        raise StackError(f"cannot read the metrics of a run in {path}: {error.strerror}") from error
    if lines and not lines[-1].endswith("\n"):
        lines.pop()  # A process that was killed, or is writing, left part of a record.
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            int(record["step"]), str(record["kind"])
        except (ValueError, KeyError, TypeError) as error:
            raise StackError(f"{path}, line {number}: not a record of metrics; delete the line") from error
        records.append({name: _decode(value) for name, value in record.items()})
    return records


def _drop_after(path: Path, step: int) -> None:
    """Rewrites a history without the records after a step, at once or not at all."""
    if not path.exists():
        return
    earlier = [record for record in read_history(path) if record["step"] <= step]
    new = path.with_suffix(".new")
    with new.open("w", encoding="utf-8") as file:
        file.writelines(map(_encode, earlier))
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def _encode(record: dict[str, Any]) -> str:
    finite = {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in record.items()
    }
    return json.dumps(finite, allow_nan=False) + "\n"


def _decode(value: Any) -> Any:
    return float(value) if value in ("nan", "inf", "-inf") else value


def smooth(values: list[float]) -> list[float]:
    """Mean of what is finite in a window of a twentieth of the points around each, so without lag."""
    reach = len(values) // 40
    smoothed = []
    for index in range(len(values)):
        near = filter(math.isfinite, values[max(0, index - reach) : index + reach + 1])
        smoothed.append(statistics.fmean(window) if (window := list(near)) else math.nan)
    return smoothed


def _unwritable(path: Path, error: OSError) -> StackError:
    return StackError(f"cannot write the metrics to {path}: {error.strerror}; earlier records are intact")


def _summary_writer() -> "type[SummaryWriter]":
    try:
        from tensorboardX import SummaryWriter
    except ModuleNotFoundError as error:
        raise StackError(
            "train.tensorboard=true needs tensorboardX; install it with: pip install 'stack[tracking]', "
            "or set train.tensorboard=false"
        ) from error
    return SummaryWriter
