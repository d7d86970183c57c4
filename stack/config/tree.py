"""The whole config: one frozen tree, the same names in YAML, on the command line and in Python."""

from typing import Any, Self

from pydantic import NonNegativeInt, model_validator

from stack.config.adapter import AdapterConfig
from stack.config.average import AverageConfig
from stack.config.condition import Condition, describe_changes
from stack.config.data import RECORDS, DataConfig
from stack.config.explain import kind_of, shown
from stack.config.kernels import KernelsConfig
from stack.config.mesh import MeshConfig
from stack.config.model import AnyModel, DecoderConfig, EncoderConfig
from stack.config.multi_task import MultiTaskConfig
from stack.config.objective import (
    OBJECTIVES,
    AnyObjective,
    CausalConfig,
    CompletionConfig,
    RemovalConfig,
    UniLmConfig,
)
from stack.config.optimizer import OptimizerConfig
from stack.config.runtime import RuntimeConfig
from stack.config.section import Section
from stack.config.stability import StabilityConfig
from stack.config.target import TargetConfig
from stack.config.tasks import AnswersConfig
from stack.config.tracking import TrackingConfig
from stack.config.train import CheckpointConfig, EvalConfig, SampleConfig, TrainConfig


class Config(Section):
    """Everything a run needs to know."""

    # Some fields have no effect beside certain values, and are not refused there:
    # - what depends on the machine, as one recipe serves many: mesh.zero and train.grad_reduce_dtype on
    #   one device, target.compile_target for a chip that the compiler knows;
    # - sample.top_k and top_p at temperature 0, which `stack sample --temperature 0` sets over any recipe;
    # - optimizer.decay_embeddings at weight_decay 0, the end of a sweep: that nothing decays grants it;
    # - the weight of a lone source, which is still its share and counts when another is added;
    # - checkpoint.keep_every at every 0: a run that goes on from its end saves more than once.
    conditions = (
        # What is to be computed again would be computed at once and kept, so the loop over layers stays.
        Condition(fields=("model.scan_unroll",), other="train.remat", values=("none", "auto")),
        # Products in 8 bits gather their weights by themselves, from shards over `fsdp` alone.
        Condition(fields=("mesh.second_shard",), other="kernels.matmul", values=("xla",)),
        Condition(
            fields=("eval.every", "eval.batch_size", "eval.batches", "eval.baselines"),
            other="data.heldout_fraction",
            unless=0,
        ),
    )

    large = frozenset({"seed"})

    name: str = "run"
    """Name of the run; its folder is output_dir/name."""
    output_dir: str = "runs"
    """Where run folders are made."""
    seed: NonNegativeInt = 0
    """The one seed of initialisation, data order and dropout."""
    init_from: str | None = None
    """Whose parameters a new run begins with: the folder of a run (its newest checkpoint), one checkpoint
    (`runs/gpt/checkpoints/100`), or a folder of Hugging Face safetensors; null: those of the seed. A run that
    goes on reads it no more."""
    model: AnyModel = DecoderConfig()
    """What is trained, by `kind`."""
    objective: AnyObjective = CausalConfig()
    """What for, by `kind`."""
    data: DataConfig = DataConfig()
    mesh: MeshConfig = MeshConfig()
    average: AverageConfig = AverageConfig()
    kernels: KernelsConfig = KernelsConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    adapter: AdapterConfig | None = None
    """What is trained in place of the weights of `init_from`; null: they are themselves."""
    train: TrainConfig = TrainConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    stability: StabilityConfig = StabilityConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    sample: SampleConfig = SampleConfig()
    tracking: TrackingConfig = TrackingConfig()
    target: TargetConfig | None = None
    """The machine it is planned for; see its fields."""

    @model_validator(mode="before")
    @classmethod
    def _move(cls, fields: Any) -> Any:
        """`model.attention` is where `kernels.attention` was, before other operations had a choice."""
        model = fields.get("model") if isinstance(fields, dict) else None
        if not isinstance(model, dict) or "attention" not in model:
            return fields
        kernels = {"attention": model["attention"]} | fields.get("kernels", {})
        model = {name: value for name, value in model.items() if name != "attention"}
        return fields | {"model": model, "kernels": kernels}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not _is_file_name(self.name):
            raise ValueError(
                f"name={shown(self.name)} must be the name of one folder; set output_dir to place it"
            )
        length, limit = self.data.sequence_length, self.model.max_length
        if length > limit:
            raise ValueError(f"data.sequence_length={length} exceeds model.max_length={limit}")
        model = self.model
        sizes = {
            "model.num_layers x embed_dim x its widest": model.num_layers
            * model.embed_dim
            * max(model.mlp_width, model.num_heads * model.head_width, model.padded_vocab_size),
            "model.num_heads x data.sequence_length x itself": model.num_heads * length**2,
        }
        for name, size in sizes.items():
            if size >= 2**59:  # Bytes of it are still counted in 64 bits.
                raise ValueError(f"{name} = {size:.3g} is more than any array may hold; lower one of them")
        self._check_objective()
        self._check_adapter()
        steps, shape = self.train.steps, self.optimizer.schedule
        warmup = shape.warmup(steps)
        if shape.kind != "constant" and shape.start_step + warmup >= steps:
            after = f" from optimizer.schedule.start_step={shape.start_step} on" if shape.start_step else ""
            raise ValueError(
                f"optimizer.schedule.warmup_steps={warmup}{after} leaves nothing of train.steps={steps}"
            )
        self._check_unfreezing()
        self._check_average()
        if self.train.profile_steps and self.train.profile_steps[1] > steps:
            raise ValueError(
                f"train.profile_steps={list(self.train.profile_steps)} goes beyond train.steps={steps}"
            )
        return self

    def _check_adapter(self) -> None:
        if self.adapter is None:
            return
        if self.init_from is None:
            raise ValueError(
                "adapter: it is trained beside weights that are there, and init_from names none; set"
                " init_from to a run or a folder of them, or remove adapter"
            )
        if self.kernels.matmul == "fp8":
            raise ValueError("kernels.matmul=fp8 knows no adapter; set it to xla, or remove adapter")

    def _check_unfreezing(self) -> None:
        every, steps, model = self.optimizer.unfreeze_every, self.train.steps, self.model
        number = max(model.num_layers, getattr(model, "decoder_layers", 0))
        if every is not None and every * number >= steps:
            raise ValueError(
                f"optimizer.unfreeze_every={every} trains what is below {number} layers from step"
                f" {every * number:,} on, and train.steps={steps} ends before; set it to"
                f" {max(1, (steps - 1) // number)} or less"
                + ("" if steps > number else f", and train.steps above {number}")
            )

    def _check_average(self) -> None:
        every, evaluates = self.average.every, self.eval.every if self.data.heldout_fraction else 0
        if not self.average.apart:
            return
        if self.mesh.auto and self.average.instances is None:
            raise ValueError("mesh: auto leaves open how many instances are averaged; set average.instances")
        for name, steps in (("train.steps", self.train.steps), ("eval.every", evaluates)):
            if steps % every:
                nearest = max(1, round(steps / every)) * every
                raise ValueError(
                    f"{name}={steps} comes between two averages, and only those are kept and evaluated; with"
                    f" average.every={every} set it to {nearest}"
                )
        average, stall = self.average, 60 * self.train.stall_minutes
        if average.folder is not None and average.wait_seconds >= stall:
            raise ValueError(
                f"average.wait_seconds={average.wait_seconds:g} is as long as a step may take at all; set it"
                f" below {stall:g}, or raise train.stall_minutes={self.train.stall_minutes:g}"
            )
        unread = {
            "adapter": self.adapter is not None,
            "optimizer.frozen": bool(self.optimizer.frozen),
            "optimizer.ema_decay": bool(self.optimizer.ema_decay),
            "train.offload_optimizer": self.train.offload_optimizer,
            "stability.recompute_every": bool(self.stability.recompute_every),
        }
        for name, is_set in unread.items():
            if is_set:
                raise ValueError(
                    f"{name} is not built for instances that are averaged; leave {name} out, or average"
                )

    def _check_records(self) -> None:
        objective = self.objective
        names = [task.name for task in objective.tasks] if isinstance(objective, MultiTaskConfig) else []
        for number, source in enumerate(self.data.sources):
            here = f"data.sources.{number}"
            if objective.reads_records and (source.kind not in RECORDS or source.field is not None):
                raise ValueError(
                    f"objective.kind={objective.kind} reads whole records: {here} must be of kind"
                    f" {' or '.join(RECORDS)}, with field=null"
                )
            if names and source.task not in names:
                raise ValueError(
                    f"{here}.task={source.task}: name one of objective.tasks: {', '.join(names)}"
                )
            if not names and source.task is not None:
                raise ValueError(
                    f"{here}.task={source.task} is not read with objective.kind={objective.kind}; remove it"
                )
            if objective.reads_records and (source.min_characters or source.max_characters):
                raise ValueError(
                    f"{here}: min_characters and max_characters count the letters of texts, and"
                    f" objective.kind={objective.kind} reads records; remove them"
                )
            if not objective.reads_records and source.field is None and source.kind != "arrayrecord":
                raise ValueError(
                    f"{here}.field=null is for objectives that read records, and"
                    f" objective.kind={objective.kind} reads texts; name the field that holds the text"
                )
        if absent := [name for name in names if name not in {source.task for source in self.data.sources}]:
            raise ValueError(
                f"objective.tasks: no source of data.sources is of task {shown(absent[0])}; add one"
            )

    def _check_duplicates(self) -> None:
        objective, how = self.objective, self.data.deduplicate
        in_parts = isinstance(objective, AnswersConfig) and objective.too_long == "windows"
        if how != "none" and (in_parts or isinstance(objective, MultiTaskConfig)):
            raise ValueError(
                f"data.deduplicate={how} is not read with objective.kind={objective.kind}, whose records are"
                " read in parts or for several tasks; remove it"
            )

    def _check_objective(self) -> None:
        model, objective = self.model, self.objective
        if model.shape not in objective.shapes:
            able = [kind_of(section) for section in OBJECTIVES if model.shape in section.shapes]
            raise ValueError(
                f"objective.kind={objective.kind} trains no model.kind={model.kind}; set objective.kind to"
                f" {' or '.join(able)}"
            )
        self._check_records()
        self._check_duplicates()
        tasks = objective.tasks if isinstance(objective, MultiTaskConfig) else ()
        each = [objective, *(named.objective for named in tasks)]
        if model.shape != "decoder" and any(getattr(task, "bidirectional", False) for task in each):
            raise ValueError(
                f"objective.bidirectional=true is not read with model.kind={model.kind}, whose tokens see"
                " their whole text anyway; remove it"
            )
        if objective.has_reference and self.init_from is None:
            raise ValueError(
                f"objective.kind={objective.kind} compares with the model that the run began with, and one"
                " of a seed prefers nothing; set init_from to one that was trained"
            )
        sample = self.sample.model_copy(update={"at_end": True})  # That no text is shown is granted.
        writes = model.shape != "encoder" and objective.scores_words
        if not writes and (change := describe_changes(sample)):
            that = (
                f"model.kind={model.kind}" if model.shape == "encoder" else f"objective.kind={objective.kind}"
            )
            raise ValueError(f"sample.{change} is not read with {that}, which writes no text; remove it")
        if self.eval.baselines and not objective.has_baselines:
            those = [kind_of(section) for section in OBJECTIVES if section.has_baselines]
            raise ValueError(
                f"eval.baselines=true: objective.kind={objective.kind} has none; remove it, or set"
                f" objective.kind to {' or '.join(those)}"
            )
        is_pair = isinstance(objective, RemovalConfig | CompletionConfig)
        length = objective.target_length if is_pair else None
        if length is not None and length > model.max_length:
            raise ValueError(f"objective.target_length={length} exceeds model.max_length={model.max_length}")
        if length is not None and model.shape != "encoder_decoder":
            raise ValueError(
                f"objective.target_length={length} is not read with model.kind={model.kind}, whose rows hold"
                " both; remove it"
            )
        if isinstance(objective, UniLmConfig) and isinstance(model, EncoderConfig) and model.num_types < 4:
            raise ValueError(
                f"objective.kind=unilm tells its kinds of attention by segment types; set model.num_types=4,"
                f" not {model.num_types}"
            )

    def settled(self) -> "Config":
        """The same with what a default takes from the length of the run written out.

        So that a run that goes on for longer keeps what it began with.
        """
        return self.replace(
            f"optimizer.schedule.warmup_steps={self.optimizer.schedule.warmup(self.train.steps)}"
        )

    def replace(self, *overrides: str) -> "Config":
        """A copy with overrides such as `"model.num_layers=4"`; the pairs are checked anew.

        Raises:
            ConfigError: an override names no field, or the config that comes out cannot be.
        """
        from stack.config.reading import replace  # it reads files into this very class

        return replace(self, *overrides)


def _is_file_name(name: str) -> bool:
    """Whether a file system takes it as that of one folder."""
    is_plain = name.isprintable() and "/" not in name and name not in ("", ".", "..")
    return is_plain and len(name.encode()) <= 200
