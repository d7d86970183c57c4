"""Where a run stands: in its steps, in its data, and in what it was when its checkpoints were made."""

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from stack.config import Config, StackError, dump
from stack.config.document import framed
from stack.config.paths import expand
from stack.config.reading import RUN_CONFIG
from stack.data.dataset import digest
from stack.data.position import Position
from stack.data.tokenizer import FILE, Tokenizer, check_vocabulary, load_tokenizer
from stack.hardware.defaults import Setting
from stack.step.plain import Steps
from stack.step.state import MAY_BE_NEW, State, without_training
from stack.storage import durable
from stack.train import record as records
from stack.train.best import find_best
from stack.train.checkpoint.agreement import text_of_first
from stack.train.checkpoint.checkpoints import Checkpoints
from stack.train.checkpoint.manifest import DamagedError, place, saved_steps
from stack.train.record import Record
from stack.train.weights import origin

TOKENIZER = "tokenizer"
"""The folder, within a run's, of the tokenizer it was trained with."""

SETTINGS = "settings.json"
"""The file, within a run's folder, of what was set of the compiler and the libraries, by whom and why."""


class Ledger:
    """Reads it from the newest sound checkpoint, and writes it into the next."""

    def __init__(
        self, config: Config, folder: Path, accept: Sequence[str] = (), settings: Sequence[Setting] = ()
    ) -> None:
        """At the beginning of a run.

        Args:
          config: of now.
          folder: of the run.
          accept: fields in which it may differ from what the run was.
          settings: of the compiler and the libraries, now.
        """
        self.settings = tuple(settings)
        self.store = place(config, folder)
        self.position = Position()
        self.origin: Mapping[str, Any] = {}
        self.begins = False
        """Whether the state is that of `starting.begin`, or comes from it by training."""
        """Of its first parameters; see `Record.origin`."""
        self._config = config
        self._folder = folder
        self._accept = tuple(accept)
        self._record: Record | None = None
        self._left_out: list[tuple[int, int]] = []

    @property
    def kept(self) -> Mapping[str, Any]:
        """What listeners had kept."""
        return {} if self._record is None else self._record.listeners

    def check_resume(self) -> None:
        """Refuses a folder that holds a run, if that is not to be gone on with.

        Raises:
          StackError: it does.
        """
        if not self._config.checkpoint.resume and (step := Checkpoints(self.store).latest()) is not None:
            raise StackError(
                f"{self._folder} holds a run at step {step} and checkpoint.resume is false; "
                "give this run another name, or delete the folder"
            )

    def restore(
        self,
        checkpoints: Checkpoints,
        abstract: State,
        *,
        data: Callable[[], Mapping[str, str]] | None,
        warn: Callable[[str], None],
        below: int | None = None,
        of: int | Literal["best"] | None = None,
    ) -> State | None:
        """The state of the newest sound checkpoint, if it is of this run; None if there is no checkpoint.

        Args:
          checkpoints: of the run.
          abstract: the parts of the state that are wanted.
          data: what it would go on with; None: it is read, not gone on with.
          warn: told what a person should know.
          below: only checkpoints of steps before this one; None: of all.
          of: only the checkpoint of this step, or the best by `eval.metric`.

        Raises:
          StackError: it is of another run, none is sound, or there is none of that step.
        """
        damaged: list[str] = []
        for note in checkpoints.notes:
            warn(note)
        for step in self._steps(checkpoints, of):
            if below is not None and step >= below:
                continue
            try:
                record = Record(**checkpoints.extra(step))
                accepted = self._compare(record, data() if data else None, reading=data is None)
                if data is not None:
                    self._check_length(step)
                    records.check_state(record, self._config, place=str(self._folder))
                state = checkpoints.restore(step, self._parts(checkpoints, step, abstract))
            except DamagedError as error:
                damaged.append(str(error))
                continue
            for text in damaged:
                warn(f"{text}; step {step:,} is the newest one that is sound, and is taken")
            notes = [records.version_note(record), records.settings_note(record, self.settings)]
            if data is not None:
                notes += [*records.lines(accepted), records.schedule_note(record, self._config, step)]
            for note in filter(None, notes):
                warn(note)
            entries = [one | {"step": step} for one in accepted]
            self._record = replace(record, accepted=[*record.accepted, *entries])
            self.position = self._without(record.position(step))
            self.origin = record.origin
            return state
        if damaged:
            raise StackError(
                f"{'; '.join(damaged)}; none is left that is sound: restore the files, or delete "
                f"{self.store.name} to begin anew"
            )
        self.position = self._without(Position())
        return None

    def begin(self, steps: Steps, state: State, data: Mapping[str, str]) -> State:
        """The state to go on with: the one that was restored, unless its steps know of a later one.

        Args:
          steps: of the run.
          state: restored, or made.
          data: `Data.fingerprint` of now.
        """
        content = {f"content.{name}": digest for name, digest in data.items()}
        content |= {"content.init_from": str(self.origin.get("digest"))}
        state, step = steps.begin(state, self.position.step, content)
        self.position = self.position.at(step, self._config.train.batch_size)
        return state

    def parameters(self, checkpoints: Checkpoints, step: int, abstract: State) -> State:
        """The parts of a state that hold parameters, of one checkpoint of this run.

        Args:
          checkpoints: of the run.
          step: of it.
          abstract: the whole state.

        Raises:
          DamagedError: it is not as it was written.
        """
        return checkpoints.restore(step, self._parts(checkpoints, step, without_training(abstract)))

    def tokenizer(self) -> Tokenizer:
        """The run's own, once it has a checkpoint; before that the one the config names.

        Raises:
          StackError: there is none, or its vocabulary is larger than the model's.
        """
        own = self._folder / TOKENIZER / FILE
        kept = own.is_file() and bool(saved_steps(self.store))
        tokenizer = load_tokenizer(str(own) if kept else self._config.data.tokenizer)
        check_vocabulary(tokenizer, self._config.model.vocab_size)
        return tokenizer

    def check_own_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Refuses a config that names another tokenizer than the run's own; its file may be gone.

        Args:
          tokenizer: the run's own, or the one named if it has none yet.

        Raises:
          StackError: it does.
        """
        named = self._config.data.tokenizer
        is_here = named == "bytes" or expand(named).is_file()
        if not is_here:
            return
        now = load_tokenizer(named)
        same = not self._config.objective.reads_template or now.chat_template == tokenizer.chat_template
        if now.fingerprint != tokenizer.fingerprint or not same:
            what = "chat template" if now.fingerprint == tokenizer.fingerprint else "tokenizer"
            raise StackError(
                f"{self._folder}: the run began with another {what} than data.tokenizer={named} is now;"
                " restore it, or start a new run under another name"
            )

    def check_data(self, data: Mapping[str, str]) -> None:
        """Refuses to evaluate a run on other data than it was made for.

        Raises:
          StackError: it is.
        """
        if self._record is not None:
            self._compare(self._record, data, reading=True)

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """The same of a tokenizer alone, before a run is sampled.

        Raises:
          StackError: it is not the one that the run began with.
        """
        self.check_data({"tokenizer": digest(tokenizer.fingerprint)})

    def write(self, data: Mapping[str, str], tokenizer: Tokenizer) -> None:
        """Writes what the folder says of the run beside its checkpoints.

        Raises:
          StackError: it cannot be written.
        """
        try:
            durable.make_folder(self._folder)
            durable.write_text(self._folder / RUN_CONFIG, framed(dump(self._config)))
            tokenizer.save(self._folder / TOKENIZER)
            durable.write_text(self._folder / "data.json", json.dumps(dict(data), indent=2) + "\n")
            settings = [asdict(one) for one in self.settings]
            durable.write_text(self._folder / SETTINGS, json.dumps(settings, indent=2) + "\n")
            if self.origin:
                durable.write_text(self._folder / origin.FILE, json.dumps(dict(self.origin), indent=2) + "\n")
        except OSError as error:
            raise StackError(
                f"{self._folder} cannot be written: {error.strerror}; set output_dir to a folder that can"
            ) from error

    def record(self, step: int, data: Mapping[str, str], kept: Mapping[str, Any]) -> Record:
        """What goes into the checkpoint of a step."""
        position = self.position.at(step, self._config.train.batch_size)
        return Record(
            config=self._config.model_dump(mode="json"),
            data=data,
            rows=position.rows,
            skipped=position.skipped,
            accepted=() if self._record is None else self._record.accepted,
            listeners=kept,
            origin=self.origin,
            settings=[asdict(one) for one in self.settings],
        )

    def leave_out(self, first: int, last: int) -> int:
        """Has the run go on, from where it is restored, without the rows of steps `first` to `last`.

        Returns:
          How often that was done.
        """
        batch = self._config.train.batch_size
        rows = np.array([self.position.first(first - 1, batch), self.position.first(last, batch) - 1])
        low, high = (int(place) for place in self.position.places(rows))
        self._left_out.append((low, high + 1))
        return len(self._left_out)

    def _steps(self, checkpoints: Checkpoints, of: int | Literal["best"] | None) -> list[int]:
        """Those that may be restored, the first that is sound."""
        steps = checkpoints.newest_first()
        if of is None or not steps:
            return steps
        if of != "best":
            return [of]
        kept: Mapping[str, Any] = {}
        for step in steps:
            with contextlib.suppress(DamagedError):  # What it knew the history knows, too.
                kept = checkpoints.extra(step)["listeners"]
                break
        find = partial(find_best, self._folder, kept, self._config.eval, steps)
        return [int(text_of_first(lambda: str(find())))]

    def _without(self, position: Position) -> Position:
        for first, last in self._left_out:
            position = position.leave_out(first, last)
        return position

    def _parts(self, checkpoints: Checkpoints, step: int, abstract: State) -> State:
        """Those that are wanted and can be had: a guard against spikes may be of another size, or new."""

        def has(name: str) -> bool:
            return name not in MAY_BE_NEW or checkpoints.holds(step, {name: abstract[name]})

        return {name: part for name, part in abstract.items() if has(name)}

    def _compare(
        self, record: Record, data: Mapping[str, str] | None, *, reading: bool
    ) -> list[dict[str, Any]]:
        place = str(self._folder)
        return records.compare(record, self._config, data, place=place, accept=self._accept, reading=reading)

    def _check_length(self, step: int) -> None:
        if step > self._config.train.steps:
            raise StackError(
                f"{self._folder} has taken {step:,} steps, more than train.steps={self._config.train.steps};"
                f" set train.steps above {step:,} to go on, or give a new run another name: name=..."
            )
