"""The trainer: the same object on the command line, in a notebook and in tests.

It only turns the crank: asks for the batch, calls the step, hands metrics late to whoever listens,
asks for checkpoints. Features are in the step, in the data or in a listener.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import jax
from jax.experimental import multihost_utils

from stack.config import Config, StackError, dump, load
from stack.data.atomic import replace_text
from stack.data.dataset import Data, check_fingerprint, open_data
from stack.data.loader import Batch, heldout_batches, prefetch, training_batches
from stack.evaluation.trigram import trigram_nats_per_byte
from stack.hardware.chip import mfu
from stack.inference.generate import generate
from stack.parallel.host_memory import keep_freed_memory
from stack.planner.search import auto
from stack.step import program as programs
from stack.step import state as states
from stack.step.step import compiler_options, eval_step, train_step
from stack.train.checkpoint import Checkpoints
from stack.train.watch.late import LateReader
from stack.train.watch.listeners import Listener
from stack.train.watch.metrics import History, MetricsLog
from stack.train.watch.planned import Comparison, predict
from stack.train.watch.planned import line as plan_line
from stack.train.watch.speed import Speedometer
from stack.train.watch.trace import Trace


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
        devices = jax.devices() if devices is None else list(devices)
        self.chosen = auto.is_auto(config)
        self.config = config = auto.resolve(config, devices)
        self.folder = Path(config.output_dir) / config.name
        self.program = programs.build(config, devices)
        self.planned = predict(config, devices)
        self.mesh = states.concrete(self.program)
        self.state: states.State | None = None
        log = MetricsLog(self.folder, every=config.train.log_every, tensorboard=config.train.tensorboard)
        self._listeners = (log, *listeners)

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
                raise StackError(
                    f"{trainer.folder} holds no checkpoint yet; train it first: stack train {folder}"
                )
            parts = {name: states.abstract(trainer.program)[name] for name in ("params", "step")}
            trainer.state = checkpoints.restore(step, parts)
        return trainer

    @cached_property
    def data(self) -> Data:
        """Tokenized and packed text; prepared on first use."""
        return open_data(self.config, show_progress=jax.process_index() == 0)

    @property
    def history(self) -> History:
        """What the run has logged so far."""
        return History.read(self.folder)

    def fit(self) -> History:
        """Trains to `train.steps`, from the newest checkpoint in the run folder if there is one.

        Raises:
          StackError: the run folder cannot be written, holds a run over other data, or holds one
            although `checkpoint.resume` is false.
        """
        if self.mesh.devices.flat[0].platform == "cpu":
            keep_freed_memory()
        with (
            jax.set_mesh(self.mesh),
            Checkpoints(self.folder / "checkpoints", self.config.checkpoint) as checkpoints,
            self._told() as summary,
        ):
            first = self._begin(checkpoints)
            self._tell("on_start", self._introduction(first))
            self._train(first, checkpoints)
            summary.update(self._finish(first))
        if jax.process_count() > 1:  # The first may still be writing the history that all read.
            multihost_utils.sync_global_devices("the end of the run")
        return self.history

    def evaluate(self) -> dict[str, float]:
        """The whole held-out set, each token once.

        Returns:
          loss (nats per token), perplexity, accuracy, nats_per_byte, tokens.

        Raises:
          StackError: nothing is held out.
        """
        state, heldout, layout = self._trained(), self.data.heldout, self.program.layout
        if not heldout.num_rows:
            raise StackError("no text is held out to evaluate on; set data.heldout_fraction above 0")
        size = self.config.eval.batch_size or self.config.train.batch_size
        with jax.set_mesh(self.mesh):
            make, number = heldout_batches(
                heldout, batch_size=size, sharding=layout.sharding("batch", "length")
            )
            batches = prefetch(make, range(number))
            parts = [self._eval_step(state["params"], batch) for batch in batches]
            sums = {name: math.fsum(float(part[name]) for part in jax.device_get(parts)) for name in parts[0]}
        loss = sums["nll"] / sums["tokens"]
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "accuracy": sums["correct"] / sums["tokens"],
            "nats_per_byte": sums["nll"] / heldout.num_bytes,
            "tokens": sums["tokens"],
        }

    def generate(self, prompts: str | Sequence[str], *, seed: int | None = None) -> list[str]:
        """Continues each prompt as `config.sample` says.

        Args:
          prompts: texts; an empty one starts a document.
          seed: another seed gives another text; None: the run's.

        Returns:
          The continuations, without the prompts.

        Raises:
          StackError: a prompt longer than the context.
        """
        state, tokenizer, sample = self._trained(), self.data.tokenizer, self.config.sample
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        tokens = generate(
            self.program,
            state["params"],
            [[tokenizer.bos, *ids] for ids in tokenizer.encode_batch(texts)],
            length=sample.length,
            temperature=sample.temperature,
            top_k=sample.top_k,
            top_p=sample.top_p,
            seed=self.config.seed if seed is None else seed,
            eos=tokenizer.eos,
        )
        return [tokenizer.decode(ids) for ids in tokens]

    @cached_property
    def train_step(self) -> Any:
        """The jitted step (state, batch) -> (state, metrics); the state's buffers are donated."""
        platform = self.mesh.devices.flat[0].platform
        step = partial(train_step, self.program)
        return jax.jit(step, donate_argnums=0, compiler_options=compiler_options(platform))

    @cached_property
    def batch(self) -> Callable[[int], Batch]:
        """The function from a step to its batch, laid out over the mesh."""
        return training_batches(
            self.data.train,
            batch_size=self.config.train.batch_size,
            seed=self.config.seed,
            shuffle=self.config.data.shuffle,
            sharding=self.program.layout.sharding("batch", "length"),
        )

    @cached_property
    def _eval_step(self) -> Any:
        return jax.jit(partial(eval_step, self.program))

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
        check_fingerprint(checkpoints.extra(step)["data"], self.data.fingerprint, str(self.folder))
        self.state = checkpoints.restore(step, states.abstract(self.program))
        self._record_data()  # Last: what could not go on leaves the run's record as it was.
        return step

    def _record_data(self) -> None:
        fingerprint = self.data.fingerprint
        if jax.process_index() == 0:
            replace_text(self.folder / "config.yaml", dump(self.config))
            (self.folder / "data.json").write_text(json.dumps(fingerprint, indent=2) + "\n")

    def _train(self, first: int, checkpoints: Checkpoints) -> None:
        config = self.config
        speed = Speedometer(config, self.mesh)
        comparison = Comparison(self.planned, self.program.attention, config)
        figures = self.planned.figures if self.planned else {}

        def tell(step: int, metrics: dict[str, float]) -> None:
            metrics = metrics | speed.read(metrics) | figures
            self._tell("on_metrics", step, metrics)
            if warning := comparison.read(metrics):
                self._tell("on_warning", warning)

        late = LateReader(tell)
        steps = range(first, config.train.steps)
        with (
            Trace(self.folder / "profile", config.train.profile_steps) as trace,
            closing(prefetch(self.batch, steps)) as batches,
        ):
            for step, batch in zip(steps, speed.waiting(batches), strict=True):
                trace.before(step, self.state)
                self.state, metrics = self.train_step(self.state, batch)
                late.push(step + 1, metrics)
                if _due(step + 1, config.eval.every) and step + 1 < config.train.steps:
                    late.flush()
                    self._tell("on_eval", step + 1, self.evaluate())
                    speed.restart()
                if _due(step + 1, config.checkpoint.every) or step + 1 == config.train.steps:
                    self._save(step + 1, checkpoints)
            late.flush()
            jax.block_until_ready(self.state)  # A trace may end here.

    def _save(self, step: int, checkpoints: Checkpoints) -> None:
        extra = {
            "config": self.config.model_dump(mode="json"),
            "data": self.data.fingerprint,
            "versions": {
                name: version(name) for name in ("stack", "jax", "flax", "optax", "orbax-checkpoint")
            },
        }
        checkpoints.save(step, self.state, extra)
        self._tell("on_checkpoint", step)

    def _finish(self, first: int) -> dict[str, Any]:
        """The last evaluation and a sample."""
        config = self.config
        summary: dict[str, Any] = {"folder": str(self.folder)}
        if self.data.heldout.num_rows:
            metrics = self.evaluate()
            if first < config.train.steps:  # Else it was told when the run got here.
                self._tell("on_eval", config.train.steps, metrics)
            summary |= metrics
            if config.eval.trigram:
                texts = (self.data.train.texts(), self.data.heldout.texts())
                summary["trigram_nats_per_byte"] = trigram_nats_per_byte(*texts)
        prompt = config.sample.prompt
        return summary | {"prompt": prompt, "sample": self.generate(prompt)[0]}

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
            "planned": plan_line(config, self.mesh.size, self.planned, chosen=self.chosen),
            "batch_tokens": config.train.batch_size * config.data.sequence_length,
            "peak": mfu(
                config.model, length=1, tokens_per_second_per_device=0.0, device_kind=device.device_kind
            ).peak,
            **(self.planned.figures if self.planned else {}),
        }

    def _trained(self) -> states.State:
        if self.state is None:
            raise StackError("this trainer has no parameters yet; call fit(), or open a run with from_run()")
        return self.state

    @contextmanager
    def _told(self) -> Iterator[dict[str, Any]]:
        """A summary that listeners hear at the end, whatever the end."""
        summary: dict[str, Any] = {}
        try:
            yield summary
        except BaseException as error:
            summary["error"] = f"{type(error).__name__}: {error}"
            raise
        finally:
            self._tell("on_end", summary)

    def _tell(self, event: str, *arguments: Any) -> None:
        for listener in self._listeners:
            getattr(listener, event)(*arguments)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
