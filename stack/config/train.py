"""How long, how often, and what is kept."""

from typing import Any, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from stack.config.condition import Condition
from stack.config.section import Section


class TrainConfig(Section):
    """The training loop."""

    conditions = (
        Condition(fields=("offload_activations",), other="remat", values=("full", "save_qkv_proj")),
    )

    steps: PositiveInt = 1000
    """Optimizer steps of the whole run."""
    batch_size: PositiveInt = 8
    """Sequences per optimizer step, over all devices and micro-batches."""
    accumulation: PositiveInt = 1
    """Micro-batches per step, summed inside one jitted step; divides activation memory."""
    remat: Literal["none", "full", "dots", "save_qkv_proj", "auto"] = "none"
    """What the backward pass computes again: nothing; each layer from its input; all but matmul
    outputs; all but the queries, keys and values (63% of a layer's forward pass in Llama); `auto`: the
    planner takes the fastest that fits when the run starts."""
    offload_optimizer: bool = False
    """Keep the optimizer's moments in host memory; they come to the device only for the update."""
    offload_activations: bool = False
    """Keep each layer's saved input in host memory between its forward and backward pass; needs
    remat full or save_qkv_proj."""
    grad_reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """What gradients are summed in over devices and micro-batches. A bfloat16 sum over 625 ranks
    can be off by 7%."""
    stop_after_minutes: float | None = Field(default=None, gt=0.0)
    """Minutes after the start of the process when it saves, stops and exits with status 75, as after SIGTERM
    or SIGUSR1: to be started again. A little less than the job may take; null: no limit."""
    silent_seconds: float = Field(default=30.0, gt=0.0)
    """Of several processes: seconds without a word after which one is taken for dead, and named, and the
    others end."""
    stall_minutes: float = Field(default=30.0, gt=0.0)
    """Of several processes: minutes without a step after which the one that the others wait for is named and
    dumps the stacks of its threads, and all end. More than compiling, an evaluation and a save take."""
    log_every: PositiveInt = 10
    """Steps between lines of metrics.jsonl."""
    tensorboard: bool = False
    """Write TensorBoard events too (extra `tracking`)."""
    audit: bool = False
    """Write the numbers of the rows that every step reads to examples-P.jsonl of each process P."""
    profile_steps: tuple[NonNegativeInt, NonNegativeInt] | None = Field(default=None, strict=False)
    """[a, b]: write a trace of steps a to b, b excluded, under the run folder."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"batch_size={self.batch_size} is not a multiple of accumulation={self.accumulation}"
            )
        if self.profile_steps and self.profile_steps[0] >= self.profile_steps[1]:
            raise ValueError(f"profile_steps={list(self.profile_steps)}: the first must be below the second")
        return self


BETTER = {
    **dict.fromkeys(("loss", "perplexity", "nats_per_byte", "calibration_error"), "min"),
    **dict.fromkeys(("accuracy", "f1", "macro_f1", "micro_f1", "entity_f1", "exact_match", "mcc"), "max"),
    **dict.fromkeys(("auroc", "mrr", "ndcg_at_10", "precision_at_k", "bleu", "chrf"), "max"),
}
"""Which way some metrics of evaluations are better; of others a config says it."""


def _better(metric: str) -> str | None:
    """Of a metric, or of one of several tasks, whose name stands before it."""
    return next((way for name, way in BETTER.items() if metric == name or metric.endswith(f"_{name}")), None)


class EvalConfig(Section):
    """Held-out evaluation: the whole held-out set, each token once, unless `batches` says less."""

    every: NonNegativeInt = 0
    """Steps between evaluations; 0: only at the end. Nothing is evaluated where no data is held out."""
    batch_size: PositiveInt | None = None
    """Sequences per evaluation step over all devices; null: train.batch_size."""
    batches: PositiveInt | None = None
    """Evaluation steps at most, spread over the held-out set and the same each time; null: all of it."""
    baselines: bool = False
    """Print beside it, as a yardstick, what simple counts of the training text reach on the same text: of a
    causal objective an interpolated trigram model of bytes, of masked words tables of words and of pairs."""
    metric: str | None = None
    """What an evaluation tells, as `loss` or `accuracy`, that picks the best checkpoint, which is kept, and
    evaluated and sampled at the end; null: the last one is."""
    mode: Literal["min", "max"] | None = None
    """Whether less of the metric is better, or more; null: as is known of loss, accuracy and their like."""
    patience: PositiveInt | None = None
    """Evaluations in a row without a gain in the metric after which the run ends; null: it goes on to
    train.steps."""
    min_gain: NonNegativeFloat = 0.0
    """By how much more than this an evaluation betters the last gain to be one, in units of the metric."""

    @property
    def sign(self) -> int:
        """-1 where less of the metric is better, else 1."""
        return 1 if (self.mode or _better(self.metric or "")) == "max" else -1

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, other, is_read in (
            ("metric", "every=0", self.every > 0),
            ("mode", "metric=null", self.metric is not None),
            ("patience", "metric=null", self.metric is not None),
            ("min_gain", "patience=null", self.patience is not None),
        ):
            if getattr(self, name) != type(self).model_fields[name].default and not is_read:
                told = f"{name}={getattr(self, name)} is not read with {other}; remove it, or set"
                raise ValueError(f"{told} {other.partition('=')[0]}")
        if self.metric is not None and self.mode is None and _better(self.metric) is None:
            raise ValueError(
                f"metric={self.metric}: it is not known whether more of it is better; set mode=max, or min"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _rename(cls, fields: Any) -> Any:
        """`trigram` is what `baselines` was called when there was one."""
        if isinstance(fields, dict) and "trigram" in fields:
            named = {name: value for name, value in fields.items() if name != "trigram"}
            return named | {"baselines": fields["trigram"]}
        return fields


class CheckpointConfig(Section):
    """What is saved and kept."""

    every: NonNegativeInt = 500
    """Steps between checkpoints; one is always saved at the end. 0: only at the end."""
    keep_last: PositiveInt = 2
    """Newest checkpoints kept."""
    keep_every: PositiveInt | None = None
    """Checkpoints whose step is a multiple of this are kept for good."""
    resume: bool = True
    """Go on from the newest checkpoint in the run folder; false refuses a folder that holds one."""
    folder: str | None = None
    """Where they are kept, in a folder of the run's name: a folder that all processes share, or a place in an
    object store, gs://... or s3://...; null: in the run folder."""
    host_memory_gb: float = Field(default=32.0, gt=0.0)
    """Gigabytes (10^9 bytes) of copies that a process holds in host memory while it saves or restores, beside
    four files of 64 MiB on their way. A save of more than this waits until a part of it is written; an array
    whose share on a device is larger is read by itself."""


class SampleConfig(Section):
    """How text is generated, at the end of a run and by `stack sample`."""

    at_end: bool = True
    """Whether a text is generated, and printed, at the end of a run."""
    prompt: str = ""
    """What the text printed at the end of a run starts with; empty: the start of a document."""
    length: PositiveInt = 200
    """Tokens to generate at most; generation ends at the end of a document. Text that fills the context
    goes on from its last half."""
    temperature: float = Field(default=0.8, ge=0.0)
    """Divides the logits; 0 takes the likeliest token."""
    top_k: PositiveInt | None = None
    """Sample among this many likeliest tokens; null: all."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Sample among the likeliest tokens that together hold this probability (arXiv 1904.09751)."""
    end_tokens: tuple[str, ...] = Field(default=(), strict=False)
    """Tokens, as the tokenizer writes them, that end a text besides the end of a document."""
