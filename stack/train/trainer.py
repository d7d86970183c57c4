"""The trainer: the same object on the command line, in a notebook and in tests.

It only turns the crank: asks for the batch, calls the step, hands metrics late to whoever listens,
asks for checkpoints. Features are in the step, in the data or in a listener.
"""

import json
import os
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import cached_property, partial
from typing import Any, Self

import jax
from jax.experimental import multihost_utils

from stack import environment
from stack.config import Config, StackError, dump, load
from stack.config.arguments import check_type
from stack.config.paths import expand
from stack.data.atomic import replace_text
from stack.data.dataset import Data, check_fingerprint, open_data
from stack.data.loader import Batch, prefetch, training_batches
from stack.data.tokenizer import FILE, Tokenizer, check_vocabulary, load_tokenizer
from stack.evaluation.evaluate import evaluate
from stack.inference.text import generate_texts, stream_text
from stack.parallel import mesh as meshes
from stack.parallel.host_memory import keep_freed_memory
from stack.planner.guard import guard_memory
from stack.planner.search import auto
from stack.step import program as programs
from stack.step import state as states
from stack.step.step import compiler_options, eval_step, train_step
from stack.train.checkpoint import Checkpoints
from stack.train.identity import check_model
from stack.train.lock import only_writer
from stack.train.watch.endings import ENDINGS, Ending
from stack.train.watch.late import LateReader
from stack.train.watch.listeners import Listener, Listeners
from stack.train.watch.metrics import History
from stack.train.watch.standard import show_progress, standard_listeners
from stack.train.watch.trace import Trace
from stack.versions import RECORDED, installed_version

TOKENIZER = "tokenizer"
"""The folder, within a run's, of the tokenizer it was trained with."""


class Trainer:
    """A run: its config, its folder, and the state it has reached."""

    def __init__(
        self,
        config: Config,
        *,
        listeners: Sequence[Listener] = (),
        devices: Sequence[jax.Device] | None = None,
    ) -> None:
        """Fills in what the config leaves to the planner, and checks that it fits; allocates nothing yet.

        Args:
          config: what to run.
          listeners: told of metrics, evaluations and checkpoints, beside the run's own log.
          devices: by default all.

        Raises:
          ConfigError: the config does not fit the devices.
        """
        check_type("Trainer", "config", config, Config, 'Trainer(load("configs/quickstart.yaml"))')
        devices = list(environment.devices() if devices is None else devices)
        config = config.settled()
        resolved = auto.is_auto(config)
        self.config = config = auto.resolve(config, devices)
        self.folder = expand(config.output_dir) / config.name
        self.program = programs.build(config, devices)
        self.mesh = states.concrete(self.program)
        self.state: states.State | None = None
        standard = standard_listeners(self.program, devices, self.folder, resolved=resolved)
        self._given = [*standard, *listeners]
        self._listeners = Listeners(self._given)

    @classmethod
    def from_run(cls, folder: str | os.PathLike[str], overrides: Sequence[str] = (), **options: Any) -> Self:
        """The trainer of a run folder, with the parameters of its newest checkpoint.

        Raises:
          StackError: the folder holds no run, or no checkpoint.
        """
        trainer = cls(load(os.fspath(folder), overrides), **options)
        with Checkpoints(trainer.folder / "checkpoints") as checkpoints:
            step = checkpoints.latest()
            if step is None:
                command = shlex.join(["stack", "train", os.fspath(folder), *overrides])
                raise StackError(f"{trainer.folder} holds no checkpoint yet; train it first: {command}")
            whole = states.abstract(trainer.program)
            parts = {name: part for name, part in whole.items() if name != "opt_state"}
            trainer.state = checkpoints.restore(step, parts)
        return trainer

    @cached_property
    def data(self) -> Data:
        """Tokenized and packed text; prepared on first use."""
        return open_data(self.config, tokenizer=self.tokenizer, show_progress=jax.process_index() == 0)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The run's own, once it has a checkpoint; before that the one the config names.

        Raises:
          StackError: there is none, or its vocabulary is larger than the model's.
        """
        own = self.folder / TOKENIZER
        kept = (own / FILE).is_file() and Checkpoints(self.folder / "checkpoints").latest() is not None
        tokenizer = load_tokenizer(str(own / FILE) if kept else self.config.data.tokenizer)
        check_vocabulary(tokenizer, self.config.model.vocab_size)
        return tokenizer

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
        with (
            guard_memory(self.config, list(self.mesh.devices.flat)),
            meshes.use(self.mesh),
            only_writer(self.folder),
            Checkpoints(self.folder / "checkpoints", self.config.checkpoint) as checkpoints,
            self._concluding() as summary,
        ):
            for ending in self._endings:
                ending.check(self)
            first = self._begin(checkpoints)
            self._listeners.on_start(self._introduction(first))
            for note in self.data.notes:
                self._listeners.on_warning(note)
            self._train(first, checkpoints)
            summary.update(self._finish(first))
        if jax.process_count() > 1:  # The first may still be writing the history that all read.
            multihost_utils.sync_global_devices("the end of the run")
        return self.history

    def evaluate(self) -> dict[str, float]:
        """What the objective tells of the whole held-out set, each of its labels once.

        Raises:
          StackError: nothing is held out.
        """
        params = states.join(self._trained())
        with meshes.use(self.mesh):
            return evaluate(self.program, self._eval_step, params, self.data.heldout)

    def generate(self, prompts: str | Sequence[str], *, seed: int | None = None) -> list[str]:
        """Continues each prompt, or the one, as `config.sample` says; see `generate_texts`."""
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        return generate_texts(self.program, states.join(self._trained()), self.tokenizer, texts, seed=seed)

    def stream(self, prompt: str, *, seed: int | None = None) -> Iterator[str]:
        """The same text of one prompt in pieces, as they come."""
        return stream_text(self.program, states.join(self._trained()), self.tokenizer, prompt, seed=seed)

    @cached_property
    def train_step(self) -> Any:
        """The jitted step (state, batch) -> (state, metrics); the state's buffers are donated."""
        step = partial(train_step, self.program)
        return jax.jit(step, donate_argnums=0, compiler_options=self._compiler_options)

    @cached_property
    def batch(self) -> Callable[[int], Batch]:
        """The function from a step to its batch, laid out over the mesh."""
        return training_batches(
            self.data.train,
            fields=self.program.objective.fields,
            batch_size=self.config.train.batch_size,
            seed=self.config.seed,
            shuffle=self.config.data.shuffle,
            layout=self.program.layout,
        )

    @cached_property
    def _eval_step(self) -> Any:
        return jax.jit(partial(eval_step, self.program), compiler_options=self._compiler_options)

    @property
    def _compiler_options(self) -> dict[str, Any]:
        return compiler_options(self.mesh.devices.flat[0].platform)

    @property
    def _endings(self) -> list[Ending]:
        return [ENDINGS[name] for name in self.program.objective.endings]

    def _begin(self, checkpoints: Checkpoints) -> int:
        """Brings the state to where the run stands; returns the number of steps taken."""
        step = checkpoints.latest()
        if step is None:
            self._record_data()
            self.state = states.init(self.program)
            return 0
        if not self.config.checkpoint.resume:
            raise StackError(
                f"{self.folder} holds a run at step {step} and checkpoint.resume is false; "
                "give this run another name, or delete the folder"
            )
        check_model(self.config, checkpoints.extra(step)["config"], self.folder)
        if step > self.config.train.steps:
            raise StackError(
                f"{self.folder} has taken {step:,} steps, more than train.steps={self.config.train.steps};"
                f" set train.steps above {step:,} to go on, or give a new run another name: name=..."
            )
        self._check_tokenizer()
        check_fingerprint(checkpoints.extra(step)["data"], self.data.fingerprint, str(self.folder))
        self.state = checkpoints.restore(step, states.abstract(self.program))
        self._record_data()  # Last: what could not go on leaves the run's record as it was.
        return step

    def _check_tokenizer(self) -> None:
        """Refuses a config that names another tokenizer than the run's own; its file may be gone."""
        named = self.config.data.tokenizer
        is_here = named == "bytes" or expand(named).is_file()
        if is_here and load_tokenizer(named).fingerprint != self.tokenizer.fingerprint:
            raise StackError(
                f"{self.folder}: the run began with another tokenizer than data.tokenizer={named} is now;"
                " restore it, or start a new run under another name"
            )

    def _record_data(self) -> None:
        fingerprint = self.data.fingerprint
        if jax.process_index() != 0:
            return
        try:
            replace_text(self.folder / "config.yaml", dump(self.config))
            self.tokenizer.save(self.folder / TOKENIZER)
            replace_text(self.folder / "data.json", json.dumps(fingerprint, indent=2) + "\n")
        except OSError as error:
            raise StackError(
                f"{self.folder} cannot be written: {error.strerror}; set output_dir to a folder that can"
            ) from error

    def _train(self, first: int, checkpoints: Checkpoints) -> None:
        config = self.config
        late = LateReader(self._listeners.on_metrics)
        steps = range(first, config.train.steps)
        with (
            Trace(self.folder / "profile", config.train.profile_steps) as trace,
            closing(prefetch(self.batch, steps)) as batches,
        ):
            for step, (batch, waited) in zip(steps, _timed(batches), strict=True):
                trace.before(step, self.state)
                self.state, metrics = self.train_step(self.state, batch)
                late.push(step + 1, metrics | {"data_wait_seconds": waited})
                last = step + 1 == config.train.steps
                if last or _due(step + 1, config.checkpoint.every):
                    late.flush()
                    self._save(step + 1, checkpoints)
                if not last and _due(step + 1, config.eval.every):
                    late.flush()
                    self._listeners.on_eval(step + 1, self.evaluate())
            late.flush()
            jax.block_until_ready(self.state)  # A trace may end here.

    def _save(self, step: int, checkpoints: Checkpoints) -> None:
        extra = {
            "config": self.config.model_dump(mode="json"),
            "data": self.data.fingerprint,
            "versions": {name: installed_version(name) for name in RECORDED},
        }
        checkpoints.save(step, self.state, extra)
        self._listeners.on_checkpoint(step)

    def _finish(self, first: int) -> dict[str, Any]:
        """The last evaluation, and what the objective shows."""
        summary: dict[str, Any] = {"folder": str(self.folder)}
        if self.data.heldout.num_rows:
            metrics = self.evaluate()
            if first < self.config.train.steps:  # Else it was told when the run got here.
                self._listeners.on_eval(self.config.train.steps, metrics)
            summary |= metrics
        rows = []
        for ending in self._endings:
            more = ending.show(self, summary)
            rows += more.pop("rows", [])
            summary |= more
        return summary | {"rows": rows}

    def _introduction(self, first: int) -> dict[str, Any]:
        config, layout, data = self.config, self.program.layout, self.data
        device = self.mesh.devices.flat[0]
        sizes = {axis: size for axis, size in self.mesh.shape.items() if size > 1}
        return {
            "name": config.name,
            "folder": str(self.folder),
            "step": first,
            "steps": config.train.steps,
            "parameters": self.program.num_parameters,
            "devices": f"{self.mesh.size} x {device.device_kind}",
            "mesh": " x ".join(f"{axis} {size}" for axis, size in sizes.items()) or "one device",
            "zero": layout.zero,
            "attention": str(self.program.attention),
            "train_tokens": data.train.num_tokens,
            "heldout_tokens": data.heldout.num_tokens,
            "batch_tokens": config.train.batch_size * config.data.sequence_length,
        }

    def _trained(self) -> states.State:
        if self.state is None:
            raise StackError("this trainer has no parameters yet; call fit(), or open a run with from_run()")
        return self.state

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


def _timed[T](batches: Iterator[T]) -> Iterator[tuple[T, float]]:
    """Each batch with the seconds it was waited for."""
    while True:
        start = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            return
        yield batch, time.perf_counter() - start


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
