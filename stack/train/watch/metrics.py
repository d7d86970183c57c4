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
from collections import deque
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import xxhash

from stack.config.errors import StackError
from stack.config.paths import expand
from stack.storage import durable
from stack.train.watch.listeners import Listener

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from tensorboardX import SummaryWriter

FILE = "metrics.jsonl"
_KEPT = 10_000  # Records that a checkpoint keeps at most.
Kind = Literal["train", "heldout"]
TIMING = frozenset(
    ("time", "step_seconds", "tokens_per_second", "model_flops_per_second", "data_wait_seconds")
) | {"checkpoint_seconds", "goodput", "memory_bytes"}
"""What the records of two runs of the same steps may differ in."""


class MetricsLog(Listener):
    """Writes metrics.jsonl, and TensorBoard events on request, in the run folder; only process 0 does.

    A record is in the file before the next step, and on the disk before the next checkpoint, which keeps
    those since the last one and a digest of all. Where the disk takes no more they wait in memory for it to
    be freed, and the run goes on. A run that goes on from step n has exactly the records up to n: later ones
    are dropped, lost ones come from the checkpoint, and others than were written are told.
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
        self._recent: deque[dict[str, Any]] = deque(maxlen=_KEPT)
        self._digest = xxhash.xxh3_64()  # Of the records before the next checkpoint.
        self._file: FileIO | None = None
        self._unwritten = b""
        self._is_full = False
        self._events: SummaryWriter | None = None
        if tensorboard:
            _summary_writer()

    def on_start(self, info: dict[str, Any]) -> dict[str, Any] | None:
        """Opens the history to go on after `step` of `info`; tells `evaluations`, and the step of the last.

        Raises:
            StackError: the history cannot be read or written.
        """
        import jax

        step, self._steps = int(info["step"]), int(info["steps"])
        if jax.process_index() != 0:
            return None
        try:
            durable.make_folder(self.path.parent)
            kept = info.get("kept", {})
            recent = [{name: _decode(v) for name, v in one.items()} for one in kept.get("history", [])]
            records = self._mend(step, recent)
            self._digest = xxhash.xxh3_64()
            # An evaluation comes after its save, unless the save waited to know whether it is the best.
            is_before = kept.get("evaluated_before", False)
            for record in records:
                if record["step"] < step or record["kind"] == "train" or is_before:
                    self._digest.update(_encode(record).encode())
            if kept.get("history_digest", self._digest.hexdigest()) != self._digest.hexdigest():
                self.warn(f"{self.path}: records up to step {step:,} are not those that were written")
            for record in records:
                if record["step"] == step and record["kind"] != "train" and not is_before:
                    self._digest.update(_encode(record).encode())
            self._file = self.path.open("ab", buffering=0)
            durable.sync(self.path.parent)  # Its name, too.
            if self._tensorboard:
                # TensorBoard hides what earlier files hold from this step on.
                folder = str(self.path.parent / "tensorboard")
                self._events = _summary_writer()(folder, purge_step=step + 1)
        except OSError as error:
            raise _unwritable(self.path, error) from error
        evaluations = [record for record in records if record["kind"] == "heldout"]
        return {"evaluated": max((r["step"] for r in evaluations), default=-1), "evaluations": evaluations}

    def on_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Writes a record of kind `train`, if one is due or the step was not applied."""
        if step % self._every == 0 or step in (1, self._steps) or metrics.get("skipped"):
            self._write("train", step, metrics)

    def on_eval(self, step: int, metrics: dict[str, float]) -> None:
        """Writes a record of kind `heldout`."""
        self._write("heldout", step, metrics)

    def on_save(self, step: int) -> dict[str, Any]:
        """Has the records since the last checkpoint kept with this one."""
        kept = {"history": list(self._recent), "history_digest": self._digest.hexdigest()}
        is_before = any(one["kind"] == "heldout" and one["step"] == step for one in self._recent)
        return kept | {"evaluated_before": True} if is_before else kept

    def sync(self) -> None:
        """Waits until the records are on the disk."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def on_checkpoint(self, step: int) -> None:
        """Those up to it are kept."""
        self._recent = deque((one for one in self._recent if one["step"] > step), maxlen=_KEPT)

    def on_end(self, summary: dict[str, Any]) -> None:
        """Closes the files."""
        for file in (self._file, self._events):
            if file is not None:
                file.close()
        self._file = self._events = None

    def _mend(self, step: int, kept: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rewrites the history as one of steps up to this one, each record once, at once or not at all."""
        if not self.path.exists() and not kept:
            return []
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        read: dict[tuple[str, int], dict[str, Any]] = {}
        for number, line in enumerate(lines, start=1):
            try:
                record = _record(line)
            except ValueError:
                if number < len(lines) or line.endswith(b"\n"):  # Else a process was killed as it wrote.
                    self.warn(f"{self.path}, line {number} was damaged, and is left out")
                continue
            if record["step"] <= step:
                read.setdefault((record["kind"], record["step"]), record)
        for record in kept:
            if (record["kind"], record["step"]) not in read:
                self.warn(
                    f"{self.path}: the record of step {record['step']:,} was lost; the checkpoint had it"
                )
                read[record["kind"], record["step"]] = record
        records = sorted(read.values(), key=lambda record: (record["step"], record["kind"] != "train"))
        durable.write_text(self.path, "".join(map(_encode, records)))
        return records

    def _write(self, kind: Kind, step: int, metrics: dict[str, float]) -> None:
        if self._file is None:
            return
        record = {"kind": kind, "step": step, "time": round(time.time(), 3), **metrics}
        self._recent.append(_finite(record))
        line = _encode(record).encode()
        self._digest.update(line)
        self._unwritten += line
        try:
            while self._unwritten:  # A disk that fills up takes a part, and refuses the rest.
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
            self._is_full = False
        except OSError as error:
            if not self._is_full:
                self.warn(
                    f"{_unwritable(self.path, error)}; they are kept, and written when that is possible"
                )
            self._is_full = True
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
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise StackError(f"cannot read the metrics of a run in {path}: {error.strerror}") from error
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()  # A process that was killed, or is writing, left part of a record.
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(_record(line))
        except ValueError as error:
            raise StackError(f"{path}, line {number}: not a record of metrics; delete the line") from error
    return records


def _record(line: bytes) -> dict[str, Any]:
    """A line's; ValueError where it is none."""
    try:
        record = json.loads(line)
        is_one = type(record["step"]) is int and record["kind"] in ("train", "heldout")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError from error
    if not is_one or not line.endswith(b"\n"):
        raise ValueError
    return {name: _decode(value) for name, value in record.items()}


def _encode(record: dict[str, Any]) -> str:
    return json.dumps(_finite(record), allow_nan=False) + "\n"


def _finite(record: dict[str, Any]) -> dict[str, Any]:
    """With words for numbers that are not finite."""
    return {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in record.items()
    }


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
