"""The trainer: the same object on the command line, in a notebook and in tests.

It only turns the crank: asks for the batch, calls the step, hands metrics late to whoever listens,
asks for checkpoints. Features are in the step, in the data or in a listener.
"""

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import cached_property, partial
from typing import Any, Literal, Self

import jax
import numpy as np
from jax.experimental import multihost_utils

from stack import environment
from stack.config import Config, StackError
from stack.config.arguments import check_type
from stack.config.paths import expand
from stack.data.dataset import Data, Dataset, open_data
from stack.data.entry import DamagedEntryError
from stack.data.loader import Batch, prefetch, save_batch, timed
from stack.data.tokenizer import Tokenizer
from stack.evaluation.evaluate import evaluate
from stack.hardware.defaults import variable_settings
from stack.inference.text import generate_texts, stream_text
from stack.objectives.labels import with_labels
from stack.parallel import mesh as meshes
from stack.parallel.host_memory import keep_freed_memory
from stack.parallel.messages import from_first
from stack.planner.guard import guard_memory
from stack.planner.search import auto
from stack.step import program as programs
from stack.step import state as states
from stack.step.guard import all_finite
from stack.step.options import compiler_options, compiler_settings
from stack.step.step import eval_step
from stack.step.steps import steps_of
from stack.step.tiles import tile_settings, with_tuned
from stack.train import opening, starting
from stack.train.best import Best
from stack.train.checkpoint.checkpoints import Checkpoints
from stack.train.conclusion import conclude, endings_of
from stack.train.heartbeat import Heartbeat
from stack.train.ledger import Ledger
from stack.train.lock import only_writer
from stack.train.recompute import Recompute
from stack.train.reference import with_reference
from stack.train.rows import batches_of
from stack.train.same import check_same
from stack.train.stop import Stop
from stack.train.stragglers import Stragglers
from stack.train.watch.announce import introduce
from stack.train.watch.audit import Audit
from stack.train.watch.bad_steps import BadStepsError
from stack.train.watch.domains import Domains
from stack.train.watch.late import LateReader
from stack.train.watch.listeners import Listener, Listeners
from stack.train.watch.metrics import History
from stack.train.watch.standard import show_progress, standard_listeners
from stack.train.watch.trace import Trace

_ROLLED_BACK = 10  # Times that a run may leave bad steps out before it is given up.


class Trainer:
    """A run: its config, its folder, and the state it has reached."""

    def __init__(
        self,
        config: Config,
        *,
        listeners: Sequence[Listener] = (),
        devices: Sequence[jax.Device] | None = None,
        accept: Sequence[str] = (),
    ) -> None:
        """Fills in what the config leaves to the planner, and checks that it fits; allocates nothing yet.

        Args:
          config: what to run.
          listeners: told of metrics, evaluations and checkpoints, beside the run's own log.
          devices: by default all.
          accept: fields in which the run may differ from what it began as; it is told and recorded.

        Raises:
          ConfigError: the config does not fit the devices.
        """
        check_type("Trainer", "config", config, Config, 'Trainer(load("configs/quickstart.yaml"))')
        devices = list(environment.devices() if devices is None else devices)
        config = with_labels(config).settled()
        resolved = auto.is_auto(config)
        self.config = config = auto.resolve(config, devices)
        self.folder = expand(config.output_dir) / config.name
        self.program = with_tuned(programs.build(config, devices), logging.getLogger("stack").warning)
        self.mesh = states.concrete(self.program)
        self.state: states.State | None = None
        settings = (*variable_settings(), *compiler_settings(self.program), *tile_settings(self.program))
        self._compiler_options = compiler_options(settings)
        self.steps = steps_of(self.program, self._compiler_options)
        self._recompute = Recompute(self.program, self._compiler_options)
        self._heartbeat = Heartbeat(config.train)
        self._stragglers = Stragglers(list(self.mesh.devices.flat))
        self.ledger = Ledger(config, self.folder, accept, settings)
        self.best = Best(config.eval)
        standard = standard_listeners(self.program, devices, self.folder, self.best, resolved=resolved)
        self._audit = Audit(self.folder) if config.train.audit else None
        self._given = [*standard, Domains(self), *([self._audit] if self._audit else []), *listeners]
        self._listeners = Listeners(self._given)

    @classmethod
    def from_run(
        cls,
        folder: str | os.PathLike[str],
        overrides: Sequence[str] = (),
        *,
        step: int | Literal["best"] | None = None,
        **options: Any,
    ) -> Self:
        """The trainer of a run folder, with the parameters of its newest checkpoint, or that of `step`.

        `step="best"` is the best one by `eval.metric`.

        With `adapter`, a run that has one or an exported one, it is that beside the run's weights: all but
        these is the adapter's, its config and objective too.

        Raises:
          StackError: the folder holds no run, or no such checkpoint, or the adapter is of another base.
        """
        return opening.open_run(cls, os.fspath(folder), overrides, step=step, **options)

    @cached_property
    def data(self) -> Data:
        """Tokenized and packed text; prepared on first use."""
        config, examples, first = self.config, self.program.objective.examples, jax.process_index() == 0
        return open_data(config, tokenizer=self.tokenizer, examples=examples, show_progress=first)

    @cached_property
    def compared(self) -> Data:
        """The same, with what the objective asks of the model that the run began with, if it does."""
        return with_reference(self.program, self.data, self.tokenizer, self.ledger, self._trained)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The run's own, once it has a checkpoint; before that the one the config names.

        Raises:
          StackError: there is none, or its vocabulary is larger than the model's.
        """
        return self.ledger.tokenizer()

    @property
    def history(self) -> History:
        """What the run has logged so far."""
        return History.read(self.folder)

    def fit(self, *, progress: bool = True) -> History:
        """Trains to `train.steps`, from the newest checkpoint in the run folder if there is one.

        Args:
          progress: show it, in a terminal, a notebook or a log.

        Raises:
          StackError: it cannot fit; the run folder cannot be written, holds a run of another model or over
            other data, or holds one although `checkpoint.resume` is false; or what is shown at the end
            cannot be.
        """
        self._listeners = show_progress(self._given) if progress else Listeners(self._given)
        if self.mesh.devices.flat[0].platform == "cpu":
            keep_freed_memory()
        starting.check(self.program, self.ledger.store, lambda: self.tokenizer)
        stop = Stop(self.config.train.stop_after_minutes)
        self.steps.hear(stop.is_asked)
        with (
            guard_memory(self.config, list(self.mesh.devices.flat)),
            meshes.use(self.mesh),
            only_writer(self.folder),
            stop.hearing(),
            self._heartbeat.watching(),
        ):
            self.ledger.check_resume()
            while self._rolls_back(stop):
                pass
            if jax.process_count() > 1:  # The first may still be writing the history that all read.
                multihost_utils.sync_global_devices("the end of the run")
        return self.history

    def _rolls_back(self, stop: Stop) -> bool:
        """Trains from where the run stands; whether it met bad steps and is to go back and leave them out."""
        try:
            self._fit(stop)
        except BadStepsError as error:
            if self.config.stability.then == "stop":
                raise
            if self.ledger.leave_out(error.first, error.last) > _ROLLED_BACK:
                raise StackError(f"rolled back {_ROLLED_BACK} times, and once more: {error}") from error
            self._listeners.on_warning(f"steps {error.first:,} to {error.last:,} are left out: going back")
            return True
        except DamagedEntryError as error:
            if jax.process_count() > 1:  # The others cannot know; started again all find it made anew.
                raise
            self._listeners.on_warning(str(error))
            for name in ("data", "compared"):
                self.__dict__.pop(name, None)
            return True
        return False

    def _fit(self, stop: Stop) -> None:
        """From the newest checkpoint to the end."""
        with (
            Checkpoints(self.ledger.store, self.config.checkpoint) as checkpoints,
            self._concluding() as summary,
        ):
            for ending in endings_of(self):
                ending.check(self)
            notes = self._begin(checkpoints)
            first = self.ledger.position.step
            about = introduce(self.program, self.data, self.folder, self.ledger)
            told = self._listeners.on_start(about | {"kept": self.ledger.kept})
            self._warn((*notes, *self.data.notes))
            # Its checkpoint may be newer than its evaluation: they are saved first.
            evaluated = from_first(told.get("evaluated", -1))
            if (
                0 < first < self.config.train.steps
                and evaluated != first
                and _due(first, self.config.eval.every)
            ):
                self._listeners.on_eval(first, self.evaluate())
            self.best.check_before(partial(self.evaluate, batches=1))
            with stop.training(), self._heartbeat.training(first):
                reached = self._train(checkpoints, stop)
            tell = self._listeners.on_eval if evaluated < reached else None
            summary.update(conclude(self, checkpoints, reached=reached, tell=tell))
            if failure := self._hear(checkpoints, wait=True):
                raise StackError(failure)

    def evaluate(self, heldout: Dataset | None = None, *, batches: int | None = None) -> dict[str, float]:
        """What the objective tells of the held-out set, or of some of it or so many batches, each label once.

        Raises:
          StackError: nothing is held out.
        """
        self.ledger.check_data(self.data.fingerprint)
        with meshes.use(self.mesh):
            heldout = heldout or self.compared.heldout
            return evaluate(self.program, self._eval_step, self.trained, heldout, batches=batches)

    def generate(self, prompts: str | Sequence[str], *, seed: int | None = None) -> list[str]:
        """Continues each prompt, or the one, as `config.sample` says; see `generate_texts`."""
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        return generate_texts(self.program, self.trained, self.words, texts, seed=seed)

    def stream(self, prompt: str, *, seed: int | None = None) -> Iterator[str]:
        """The same text of one prompt in pieces, as they come."""
        return stream_text(self.program, self.trained, self.words, prompt, seed=seed)

    @property
    def train_step(self) -> Any:
        """The jitted step (state, batch) -> (state, metrics); the state's buffers are donated."""
        return self.steps.step

    @property
    def batch(self) -> Callable[[int], Batch]:
        """The function from a step to its batch, laid out over the mesh."""
        return self._batches()

    def _batches(self, audit: Callable[[int, np.ndarray], None] | None = None) -> Callable[[int], Batch]:
        return batches_of(self.program, self.compared.train, self.ledger.position, audit)

    @cached_property
    def _eval_step(self) -> Any:
        return jax.jit(partial(eval_step, self.program), compiler_options=self._compiler_options)

    def _begin(self, checkpoints: Checkpoints) -> list[str]:
        """Brings the state to where the run stands; returns what a person should know of that."""
        notes: list[str] = []
        whole = states.abstract(self.program)
        check_same(self.config, self.data.fingerprint, self.ledger.settings)
        self.ledger.check_own_tokenizer(self.tokenizer)
        self.state = self.ledger.restore(
            checkpoints, whole, data=lambda: self.data.fingerprint, warn=notes.append
        )
        if self.state is None:
            self.state, self.ledger.origin = starting.begin(self.program, self.tokenizer, warn=notes.append)
            self.ledger.begins = True
        else:
            self.state = states.completed(self.program, self.state)
        self.state = self.ledger.begin(self.steps, self.state, self.data.fingerprint)
        _ = self.compared
        if jax.process_index() == 0:  # Last: what could not go on leaves the folder as it was.
            self.ledger.write(self.data.fingerprint, self.tokenizer)
        return notes

    def _train(self, checkpoints: Checkpoints, stop: Stop) -> int:
        """To the last step; returns it."""
        config, best = self.config, self.best
        late, reached = LateReader(self._told, self.steps.read), self.ledger.position.step
        steps = range(reached, reached if best.ended else config.train.steps)
        audit = self._audit.note if self._audit else None
        with (
            Trace(self.folder / "profile", config.train.profile_steps) as trace,
            closing(prefetch(self._batches(audit), steps)) as batches,
        ):
            saving = 0.0
            for step, (batch, waited) in zip(steps, timed(batches), strict=True):
                trace.before(step, self.state)
                if _due(step + 1, config.stability.recompute_every):
                    self._recompute.check(step + 1, self._trained(), batch)
                self.state, metrics = self.steps.advance(step, self._trained(), batch)
                self._heartbeat.beat(step + 1, waited)
                late.push(step + 1, metrics | {"data_wait_seconds": waited, "checkpoint_seconds": saving})
                saving = 0.0
                reached, last = step + 1, step + 1 == config.train.steps
                stops = stop.reached(step + 1) and not last
                evaluates = not stops and (last or _due(step + 1, config.eval.every))
                is_best = False
                if evaluates and best.is_asked_for:  # First, as the best is saved.
                    late.flush()
                    self._listeners.on_eval(step + 1, self.evaluate())
                    is_best, last = best.step == step + 1, last or best.ended is not None
                if last or stops or is_best or _due(step + 1, config.checkpoint.every):
                    late.flush()
                    begin = time.perf_counter()
                    self._warn(self._stragglers.look())
                    self._save(step + 1, checkpoints)
                    saving = time.perf_counter() - begin
                failure = self._hear(checkpoints, wait=stops)
                if stops:
                    raise StackError(failure) if failure else stop.error(step + 1, str(self.folder))
                if last:
                    break
                if evaluates and not best.is_asked_for:
                    late.flush()
                    self._listeners.on_eval(step + 1, self.evaluate())
            late.flush()
            jax.block_until_ready(self.state)  # A trace may end here.
        return reached

    def _told(self, step: int, metrics: dict[str, float]) -> None:
        if metrics["skipped"] and self.config.stability.save_batches:
            save_batch(self.folder / "skipped" / f"step-{step}", self.batch(step - 1))
        self._listeners.on_metrics(step, metrics)

    def _save(self, step: int, checkpoints: Checkpoints) -> None:
        record = self.ledger.record(step, self.data.fingerprint, self._listeners.on_save(step)).as_dict()
        state, sync = self._trained(), self._listeners.sync
        self.steps.settle()
        is_finite = all_finite(state["params"])
        best = self.best.among
        checkpoints.save(step, state, record, is_finite=is_finite, before_commit=sync, best=best)

    def _hear(self, checkpoints: Checkpoints, *, wait: bool = False) -> str | None:
        """Tells of the saves that have ended; why the last one failed, if it did, told before or not."""
        if wait:
            checkpoints.wait()
        self._warn((*self._heartbeat.notes(), *self.steps.notes()))
        for saved in checkpoints.poll():
            if saved.error is None:
                self._listeners.on_checkpoint(saved.step)
            else:
                self._listeners.on_warning(f"{saved.error}; it is tried again with the next one")
        return checkpoints.failure

    def _warn(self, notes: Iterable[str]) -> None:
        for note in notes:
            self._listeners.on_warning(note)

    def _trained(self) -> states.State:
        if self.state is None:
            raise StackError("this trainer has no parameters yet; call fit(), or open a run with from_run()")
        return self.state

    @property
    def trained(self) -> dict[str, Any]:
        """The parameters as they stand, that lie as `program.parameters`."""
        return states.join(self._trained())

    @property
    def words(self) -> Tokenizer:
        """The tokenizer; refused if it is not that of the run."""
        self.ledger.check_tokenizer(self.tokenizer)
        return self.tokenizer

    @contextmanager
    def _concluding(self) -> Iterator[dict[str, Any]]:
        """A summary that listeners hear at the end, whatever the end."""
        summary: dict[str, Any] = {}
        try:
            yield summary
        except BaseException as error:
            summary["error"] = f"{type(error).__name__}: {error}"
            raise
        finally:
            self._listeners.on_end(summary)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
