"""What is planned: one training step of a model over devices, as numbers."""

import dataclasses
import math
from typing import Literal, get_args

from stack.config import AdapterConfig, Config, ConfigError, ModelConfig
from stack.config.instances import num_here
from stack.config.layout import check_divides, resolve
from stack.config.pipeline import compares_rows
from stack.hardware.chip import Hardware, Precision
from stack.kernels.linear_cross_entropy import chunk_columns, chunk_tokens
from stack.models.cost import Sizes
from stack.models.flops import Convention, train_flops_per_token
from stack.models.stack import Remat as StackRemat
from stack.objectives import build
from stack.planner.formula.shapes import Parameters, parameters
from stack.step.kernels import choose_attention, choose_matmul

Remat = Literal[
    "none", "full", "dots", "save_qkv_proj", "attention_core", "alternate_layers", "alternate_products"
]
"""What the backward pass computes again. The last three are other projects': `attention_core` is scores
and softmax alone (arXiv 2205.05198, section 5); `alternate_layers` every second layer as a whole;
`alternate_products` of every layer all but attention and every second matrix product, from the first."""
Schedule = Literal["1f1b", "interleaved", "gpipe", "zero_bubble"]
Axis = Literal["data", "fsdp", "stage", "context", "expert", "tensor"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """One optimizer step. Wider than what the trainer runs: see `why_modelled`."""

    model: ModelConfig
    """Shapes only."""
    length: int
    """Tokens per row."""
    masked: int | None = None
    """Places of a row whose words are scored; None: all."""
    batch: int
    """Rows per optimizer step over all devices."""
    micro_batch: int
    """Rows per micro-batch of one replica (one place on data x fsdp x expert)."""
    data: int = 1
    fsdp: int = 1
    stage: int = 1
    context: int = 1
    expert: int = 1
    """For a model without experts: replicas, like `data`."""
    tensor: int = 1
    zero: int = 3
    tables_once: bool = False
    """At stage 3, tables are gathered and their gradients scattered once a step."""
    second_shard: bool = False
    """At stage 3, parameters are split over `data` too, and a second shard of them is not."""
    gather_dtype: Literal["compute", "int8"] = "compute"
    scatter_dtype: Literal["reduce", "int8"] = "reduce"
    sequence_parallel: bool = False
    virtual_stages: int = 1
    """Parts of the model each pipeline stage holds (arXiv 2104.04473, section 2.2)."""
    schedule: Schedule = "1f1b"
    overlapped_tensor_parallel: bool = False
    """Tensor-parallel collectives are split and run beside the matmul that needs them."""
    remat: Remat = "none"
    precision: Precision = "bfloat16"
    """Of the layers' matrix products; attention and the head are never in float8."""
    float8_gathers: bool = False
    """At stage 3, the layers' weights are gathered in 8 bits."""
    fused_attention: bool = True
    """False: attention scores are all written to memory, as XLA's kernel does."""
    blocked_attention: bool = False
    """Of fused attention: it is of plain operations, which write the scores of a block at a time."""
    logits_bytes: int | None = None
    """Of the float32 logits that exist at once; None: as the objective takes them by itself."""
    optimizer: str = "adamw"
    adapter: AdapterConfig | None = None
    frozen: tuple[str, ...] = ()
    """Patterns of parameters that are not trained, those that an adapter leaves as they are besides."""
    ema: bool = False
    """A moving average of the weights is kept."""
    offload_optimizer: bool = False
    offload_activations: bool = False
    instances: int = 1
    """That train apart, each on its part of the batch; so many or more lie over `data`."""
    average_every: int = 1
    """Steps from one average of them to the next."""
    outer_momentum: bool = False
    """Whether an average is a step with momentum."""
    apart: bool = False
    """Whether they are this run's at all, or one of them is, and meets others outside of it."""
    reduce_bytes: int = 4
    """Of one element of a gradient while it is summed: 4 float32, 2 bfloat16."""
    compares_rows: bool = False
    """The loss of a row depends on the other rows of a batch."""

    @property
    def devices(self) -> int:
        """All of them."""
        return math.prod((self.data, self.fsdp, self.stage, self.context, self.expert, self.tensor))

    @property
    def replicas(self) -> int:
        """Places that see different rows."""
        return self.data * self.fsdp * self.expert

    @property
    def slices(self) -> int:
        """Parts of `data` that are programs of their own, each with as many instances."""
        return min(self.instances, self.data)

    @property
    def accumulation(self) -> int:
        """Micro-batches per step of each replica."""
        return self.batch // (self.replicas * self.micro_batch)

    @property
    def holds_tables(self) -> bool:
        """Whether every device holds the tables and their gradients whole over `fsdp` for all of a step."""
        return self.tables_once and self.zero == 3 and self.stage == 1 and self.accumulation > 1

    @property
    def split_data(self) -> int:
        """Ways of `data` that parameters at rest are split over."""
        return self.data if self.second_shard and self.zero == 3 else 1

    @property
    def parameters(self) -> Parameters:
        """Of the model and its adapters."""
        return parameters(self.model, self.adapter, self.frozen)

    def flops_per_token(self, convention: Convention) -> float:
        """Model FLOPs of the step per token; see `stack.models.flops`."""
        return train_flops_per_token(self.model, self.sizes, convention, self.parameters.untrained)

    @property
    def tokens(self) -> int:
        """Tokens of a step over all devices."""
        return self.batch * self.length

    @property
    def sizes(self) -> Sizes:
        """Of the axes of a batch, as an objective names them."""
        return {"length": self.length, "masked": self.length if self.masked is None else self.masked}

    @property
    def micro_tokens(self) -> int:
        """Tokens of one micro-batch on one device, split over `context`, whole over `tensor`."""
        return self.micro_batch * self.length // self.context

    @property
    def scored_tokens(self) -> int:
        """Those of them whose words are scored."""
        return self.micro_batch * self.sizes["masked"] // self.context

    @property
    def loss_chunk(self) -> int:
        """Tokens whose logits a device holds at once."""
        rows, length = self.micro_batch, self.sizes["masked"] // self.context
        if not length:
            return 0
        tokens = chunk_tokens(
            self.logits_bytes,
            embed_dim=self.model.embed_dim,
            vocab_size=self.model.padded_vocab_size,
            tensor=self.tensor,
        )
        return rows * chunk_columns(tokens, rows, length)

    def as_run(self) -> "Workload":
        """Itself, another project's pipeline under ZeRO 2 and 3 as under 1.

        A pipeline gathers its weights once and adds up the gradients of its micro-batches before it
        scatters them, as torch.distributed.pipelining does under FSDP: both again for each of many small
        micro-batches would take as long as the arithmetic. Stack's has ZeRO 1 and no other.
        """
        return self if self.stage == 1 else dataclasses.replace(self, zero=min(self.zero, 1))

    def why_modelled(self) -> str | None:
        """Why the trainer cannot run it, so that it is only modelled; None: it runs."""
        for name in ("context", "expert"):
            if getattr(self, name) > 1:
                return f"{name}={getattr(self, name)} is not built yet"
        if self.precision == "float16":
            return "float16 is not built: chips without bfloat16 cannot train it yet"
        if self.overlapped_tensor_parallel:
            return "overlapped tensor parallelism is not built yet"
        if self.remat not in get_args(StackRemat):
            return f"remat {self.remat} is another project's; save_qkv_proj is the nearest here"
        if self.instances > 1 and self.data % self.instances and self.instances % self.data:
            return f"data={self.data} and {self.instances} instances: neither divides the other"
        return self.why_no_pipeline()

    def why_no_pipeline(self) -> str | None:
        """Why its stages cannot be, as `stack.config.pipeline` has it; None: they can, or it has one."""
        stages, parts, layers = self.stage, self.virtual_stages, self.model.num_layers
        if stages == 1:
            return None
        absent = {
            "adapter": self.adapter is not None,
            "optimizer.frozen": bool(self.frozen),
            "float8": self.precision == "float8",
            "offload_activations": self.offload_activations,
            "a loss that compares rows": self.compares_rows,
        }
        for name, is_set in absent.items():
            if is_set:
                return f"{name} has no pipeline yet"
        if self.zero != 1:
            return f"zero {self.zero} has no pipeline, which adds up gradients before it scatters them"
        if stages > layers:
            return f"stage={stages}: there are {layers} layers, and each stage needs one"
        if parts > 1 and layers % (stages * parts):
            return f"stage={stages} of {parts} parts each do not divide {layers} layers"
        if self.schedule == "interleaved" and self.accumulation % stages:
            return f"interleaved, groups of {stages} micro-batches do not divide {self.accumulation}"
        return None


def from_config(config: Config, num_devices: int, chip: Hardware | None = None) -> Workload:
    """The step the trainer makes of a config.

    Args:
      config: what is trained; its mesh must fit.
      num_devices: how many devices it is laid over.
      chip: decides the attention kernel, and the arithmetic of a chip without bfloat16; None: one
        that has both.

    Raises:
      ConfigError: the mesh or the batch does not divide, or the planner has yet to choose them; or the chip
        cannot compute what is asked.
    """
    model, train, data = config.model, config.train, config.data
    if config.mesh.auto or train.remat == "auto":
        raise ConfigError(
            "mesh or train.remat is auto: there is no layout yet; `stack plan --search` finds one"
        )
    if model.shape == "encoder_decoder":
        raise ConfigError(
            "model.kind=encoder_decoder: the planner does not know two rows of two lengths yet;"
            " it trains without a plan"
        )
    sizes = resolve(config.mesh, num_devices)
    check_divides(config, sizes)
    platform, capability = ("gpu", 9.0) if chip is None else (chip.platform, chip.compute_capability)
    attention = choose_attention(config, platform=platform, compute_capability=capability)
    products = choose_matmul(config, platform=platform, compute_capability=capability)
    average, batch = config.average, train.batch_size // config.average.runs
    instances = num_here(config, sizes["data"])
    micro_batch = batch // (max(sizes["data"], instances) * sizes["fsdp"] * train.accumulation)
    return Workload(
        model=model if config.objective.scores_words else _without_words(model),
        length=data.sequence_length,
        masked=build(config).sizes.get("masked"),
        batch=batch,
        instances=instances,
        average_every=average.every,
        outer_momentum=average.outer == "nesterov",
        apart=average.apart,
        micro_batch=micro_batch,
        data=sizes["data"],
        fsdp=sizes["fsdp"],
        stage=sizes["stage"],
        context=sizes["context"],
        expert=sizes["expert"],
        tensor=sizes["tensor"],
        schedule=config.mesh.schedule,
        virtual_stages=config.mesh.virtual_stages,
        zero=config.mesh.zero,
        tables_once=config.mesh.tables_once,
        second_shard=config.mesh.second_shard,
        gather_dtype=config.mesh.gather_dtype,
        scatter_dtype=config.mesh.scatter_dtype,
        sequence_parallel=config.mesh.sequence_parallel,
        remat=train.remat,
        precision=_precision(model.dtype, chip) if products.fp8 is None else "float8",
        float8_gathers=products.fp8 is not None,
        fused_attention=not attention.stores_scores,
        blocked_attention=attention.kernel == "xla_chunked",
        logits_bytes=getattr(config.objective, "logits_bytes", None),
        optimizer=config.optimizer.kind,
        adapter=config.adapter,
        frozen=tuple(config.optimizer.frozen),
        ema=config.optimizer.ema_decay is not None,
        offload_optimizer=train.offload_optimizer,
        offload_activations=train.offload_activations,
        reduce_bytes=4 if train.grad_reduce_dtype == "float32" else 2,
        compares_rows=compares_rows(config),
    )


def _without_words(model: ModelConfig) -> ModelConfig:
    """The model of a task: what only scores words is not there, and its own head is of no size."""
    changed = {"tied_embeddings": True} | ({"head_transform": False} if model.shape == "encoder" else {})
    return model.model_copy(update=changed)


def _precision(dtype: Literal["bfloat16", "float32"], chip: Hardware | None) -> Precision:
    """What the products of a model are computed in on a chip."""
    if dtype == "float32":  # XLA multiplies float32 in TensorFloat-32 on NVIDIA chips that have it.
        return "tensorfloat32" if chip is not None and "tensorfloat32" in chip.peak_flops else "float32"
    if chip is not None and "bfloat16" not in chip.peak_flops and "float16" in chip.peak_flops:
        return "float16"
    return dtype
