"""The numerics contract: every layout, and every pair of layouts, gives the numbers of one device.

The list of layouts below is the only one: `stack doctor --numerics` prints the matrix made of it, the
tests prove each of its cells, and a test fails if a cell is left out.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from typing import Any, Literal

import jax
import numpy as np
from pydantic import TypeAdapter

from stack.config import Config, DataConfig, MeshConfig, StackError, TrainConfig, UniLmConfig
from stack.config.model import AnyModel
from stack.config.objective import AnyObjective
from stack.data.fields import Field
from stack.objectives.masked_words import most_hidden
from stack.objectives.words import PACKED
from stack.parallel import mesh as meshes
from stack.step import program as programs
from stack.step import state as states
from stack.step.step import loss_gradient

NUM_DEVICES = 8
LIMIT = 1e-5
"""Float32: for every parameter, max|difference| over max|gradient|. About 1e-6 is typical."""
STEP = 5
"""Of the batch; what is dropped depends on it."""
BFLOAT16_RATIO = 1.2
"""Bfloat16: error of a layout's gradient against float32, over the error of one device's, its mean over four
steps: of one step alone it may be a sixth less or more (`bert`: 0.0134 to 0.0162)."""
BFLOAT16_LIMIT = 0.03
"""Bfloat16: norm of any parameter's error against float32 over that of its gradient. 0.027 is the most."""
FLOAT8_SHARE = 0.01
"""Products in 8 bits: norm of a layout's difference from one device over that of the error of both. Numbers
that differ in their last bit may be rounded to different neighbours."""

PARTS: dict[str, frozenset[str]] = {
    "data": frozenset({"data"}),
    "fsdp zero 0": frozenset({"fsdp", "no stage"}),
    "fsdp zero 1": frozenset({"fsdp"}),
    "fsdp zero 2": frozenset({"fsdp", "no stage"}),
    "fsdp zero 3": frozenset({"fsdp", "no stage"}),
    "second shard": frozenset({"data", "fsdp", "no stage"}),
    "tensor": frozenset({"tensor"}),
    "tensor sequence parallel": frozenset({"tensor"}),
    "accumulation": frozenset({"accumulation"}),
    "stage gpipe": frozenset({"stage", "accumulation", "no stage"}),
    "stage 1f1b": frozenset({"stage", "accumulation", "no stage"}),
    "stage interleaved": frozenset({"stage", "accumulation", "no stage"}),
    "stage zero_bubble": frozenset({"stage", "accumulation", "no stage"}),
}
"""THE list: what a layout is made of, and of which kind; two parts of one kind exclude each other. A pipeline
has micro-batches, and ZeRO 1; a second shard is of `data` and `fsdp` together."""

Family = Literal["gpt", "llama", "palm", "gemma", "bert", "t5"]
"""Models that go through the matrix; the first through all of it, those made of its layers through the parts
and some pairs: `palm`, of parallel blocks; `gemma`, with windows of some layers and norms on both sides;
`bert`, an encoder of UniLM's masks with norms behind its sums; and `t5`, of two stacks."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One layout of the matrix: one part, or a pair."""

    parts: tuple[str, ...]
    mesh: MeshConfig = field(default_factory=MeshConfig)
    accumulation: int = 1

    @property
    def name(self) -> str:
        """The parts, joined."""
        return " + ".join(self.parts)

    @property
    def num_devices(self) -> int:
        """Devices the mesh takes."""
        return self.mesh.data * self.mesh.fsdp * self.mesh.stage * self.mesh.tensor


def cells() -> list[Cell]:
    """Every part alone and every pair of parts that do not exclude each other."""
    pairs = [pair for pair in combinations(PARTS, 2) if not PARTS[pair[0]] & PARTS[pair[1]]]
    return [_cell(parts) for parts in [*((part,) for part in PARTS), *pairs]]


def _cell(parts: tuple[str, ...]) -> Cell:
    kinds = frozenset().union(*(PARTS[part] for part in parts))
    tensor, stage = 4 if "tensor" in kinds else 1, 2 if "stage" in kinds else 1
    tensor = min(tensor, 2) if "second shard" in parts else tensor  # So that `fsdp` has two ways as well.
    data, fsdp = 1, 1
    if "data" in kinds:
        data = 2 if kinds & {"fsdp", "tensor", "stage"} else NUM_DEVICES
    if "fsdp" in kinds:
        fsdp = NUM_DEVICES // (data * stage * tensor)
    zero = next((int(part[-1]) for part in parts if part.startswith("fsdp")), 1 if stage > 1 else 3)
    fields: dict[str, Any] = {"data": data, "fsdp": fsdp, "stage": stage, "tensor": tensor, "zero": zero}
    if schedules := [part.removeprefix("stage ") for part in parts if part.startswith("stage")]:
        fields["schedule"] = schedules[0]
    fields["sequence_parallel"] = "tensor sequence parallel" in parts
    fields["second_shard"] = "second shard" in parts
    accumulation = 4 if stage > 1 else 2 if "accumulation" in kinds else 1
    return Cell(parts=parts, mesh=MeshConfig.model_validate(fields), accumulation=accumulation)


ONE_DEVICE = Cell(parts=("one device",), mesh=MeshConfig(fsdp=1))

_LENGTH, _TARGET_LENGTH = 16, 12
_BATCH = 16
_SHARED: dict[str, Any] = {
    "vocab_size": 101,
    "vocab_multiple": 8,
    "max_length": _LENGTH,
    "num_layers": 2,
    "embed_dim": 32,
    "num_heads": 8,
    "num_kv_heads": 4,
    "head_dim": 8,
    "mlp_dim": 64,
    "init_std": 0.2,
    "embedding_dropout": 0.1,
    "attention_dropout": 0.1,
    "residual_dropout": 0.1,
}
_FAMILIES: dict[Family, dict[str, Any]] = {
    # The soft cap gives the key bias a gradient: without it the softmax takes it out.
    "gpt": {"attention_softcap": 2.0, "logit_softcap": 10.0},
    "llama": {
        "norm": "rmsnorm",
        "mlp": "swiglu",
        "position": "rotary",
        "qk_norm": True,
        "qkv_bias": False,
        "out_bias": False,
        "mlp_bias": False,
        "tied_embeddings": False,
        "sliding_window": 7,
    },
    "palm": {
        "kind": "parallel_decoder",
        "num_kv_heads": 4,
        "norm": "rmsnorm",
        "mlp": "swiglu",
        "position": "rotary",
        "qkv_bias": False,
        "out_bias": False,
        "mlp_bias": False,
    },
    "bert": {
        "kind": "encoder",
        "norm_placement": "post",
        "mlp": "gelu",
        "attention_softcap": 2.0,
        "num_types": 4,
        "first_position": 2,
    },
    "gemma": {
        "num_layers": 3,
        "norm": "rmsnorm_zero_centered",
        "norm_placement": "both",
        "mlp": "geglu",
        "position": "rotary",
        "qkv_bias": False,
        "out_bias": False,
        "mlp_bias": False,
        "sliding_window": 5,
        "attention_pattern": ("local", "global"),
        "local_rope_theta": 100.0,
        "attention_softcap": 2.0,
        "logit_softcap": 10.0,
        "scale_embedding": True,
    },
    # Both stacks differ in depth, both rows in length, and distances reach the last bucket.
    "t5": {
        "kind": "encoder_decoder",
        "num_decoder_layers": 3,
        "norm": "rmsnorm",
        "mlp": "geglu",
        "position": "relative",
        "relative_buckets": 8,
        "relative_max_distance": 10,
        "attention_scale": 1.0,
        "init": "fan_in",
        "init_std": 1.0,
        "qkv_bias": False,
        "out_bias": False,
        "mlp_bias": False,
    },
}
_OBJECTIVES: dict[Family, dict[str, Any]] = {
    "bert": {"kind": "unilm"},
    "t5": {"kind": "span_corruption", "target_length": _TARGET_LENGTH},
}
"""Causal where none is named."""


def config_of(cell: Cell, family: Family, dtype: str) -> Config:
    """A tiny model with an odd vocabulary, dropout everywhere and packed rows, laid out as a cell says."""
    return Config(
        seed=3,
        model=TypeAdapter(AnyModel).validate_python(_SHARED | _FAMILIES[family] | {"dtype": dtype}),
        data=DataConfig(sequence_length=_LENGTH),
        mesh=cell.mesh,
        train=TrainConfig(batch_size=_BATCH, accumulation=cell.accumulation, remat="full"),
        # Several chunks, of 8 tokens.
        objective=TypeAdapter(AnyObjective).validate_python(
            {"z_loss": 1e-3, "logits_bytes": 8 * 4 * 104 // cell.mesh.tensor} | _OBJECTIVES.get(family, {})
        ),
    )


def example_batch(fields: Sequence[Field] = PACKED) -> dict[str, np.ndarray]:
    """Packed rows with uneven numbers of labels, one row with none.

    Args:
      fields: of an objective; the first of each text's tokens are its prefix, and some places are masked.
    """
    rng = np.random.default_rng(0)
    names = {field.name for field in fields}
    batch = _packed_row(rng, _LENGTH)
    if "masked" in names:
        some = most_hidden(_LENGTH, UniLmConfig().rate)
        places = np.sort(rng.permuted(np.tile(np.arange(_LENGTH), (_BATCH, 1)), axis=1)[:, :some], axis=1)
        batch |= {"masked": places, "labels": np.take_along_axis(batch["labels"], places, axis=1)}
    if "target_tokens" in names:
        # Some of the texts that are written have nothing that was read, and the other way round.
        target = _packed_row(rng, _TARGET_LENGTH)
        batch |= {f"target_{name}": target[name] for name in ("tokens", "segments", "positions")}
        batch["labels"] = target["labels"]
    return {field.name: batch[field.name].astype(np.int32) for field in fields}


def _packed_row(rng: np.random.Generator, length: int) -> dict[str, np.ndarray]:
    shape = (_BATCH, length)
    segments = np.sort(rng.integers(1, 4, shape), axis=1).astype(np.int32)
    starts = np.concatenate([np.ones((_BATCH, 1), bool), segments[:, 1:] != segments[:, :-1]], axis=1)
    first = np.maximum.accumulate(np.where(starts, np.arange(length), 0), axis=1)
    labels = rng.integers(0, _SHARED["vocab_size"], shape)
    labels[rng.random(shape) < 0.3] = -1
    labels[: _BATCH // 4, length // 3 :] = -1
    labels[3] = -1
    positions = np.arange(length) - first
    return {
        "tokens": rng.integers(0, _SHARED["vocab_size"], shape),
        "labels": labels,
        "segments": segments,
        "positions": positions,
        "example": np.arange(_BATCH),
        "prefix": positions < 3,
        "types": segments % 4,
    }


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """What a layout computed, on the host."""

    loss: float
    params: dict[str, np.ndarray]
    gradient: dict[str, np.ndarray]


def compute(
    cell: Cell,
    family: Family,
    dtype: str = "float32",
    devices: Sequence[jax.Device] | None = None,
    overrides: Sequence[str] = (),
    step: int = STEP,
    rows_of: Callable[[Sequence[Field]], dict[str, np.ndarray]] | None = None,
) -> Numbers:
    """Initial parameters, and loss and gradients of one batch at a step, laid out as a cell says.

    `rows_of` makes the batch of an objective's fields; by default `example_batch`.
    """
    devices = jax.devices()[: cell.num_devices] if devices is None else devices
    program = programs.build(config_of(cell, family, dtype).replace(*overrides), devices)
    layout = program.layout
    with meshes.use(program.mesh):
        initial = _initial(program)
        params = jax.tree.map(_place, initial, program.parameters)
        fields = program.objective.fields
        rows = (rows_of or example_batch)(fields)
        batch = {
            field.name: jax.make_array_from_callback(
                rows[field.name].shape, layout.sharding(*field.axes), rows[field.name].__getitem__
            )
            for field in fields
        }
        place = jax.device_put(np.int32(step), layout.sharding())
        gradient, sums = jax.jit(partial(loss_gradient, program))(params, place, batch)
        return Numbers(
            loss=float(sums["loss"]),
            params=_named(initial),
            gradient=_named(_on_host(program, gradient)),
        )


def errors(numbers: Numbers, reference: Numbers) -> dict[str, float]:
    """For every parameter, max|difference| of the gradients over max|gradient|; and the loss's."""
    worst = {
        name: float(np.abs(numbers.gradient[name] - gradient).max() / np.abs(gradient).max())
        for name, gradient in reference.gradient.items()
    }
    return worst | {"loss": abs(numbers.loss - reference.loss) / abs(reference.loss)}


def leaf_errors(gradient: dict[str, np.ndarray], reference: dict[str, np.ndarray]) -> dict[str, float]:
    """For every parameter, norm of the difference over the norm of the reference."""
    norm = np.linalg.norm
    return {name: float(norm(gradient[name] - leaf) / norm(leaf)) for name, leaf in reference.items()}


def distance(numbers: Numbers, reference: Numbers) -> float:
    """Norm of the difference of the whole gradients over the norm of the reference's."""

    def norm(tree: dict[str, np.ndarray]) -> float:
        return float(np.sqrt(sum(np.square(leaf.astype(np.float64)).sum() for leaf in tree.values())))

    difference = {name: numbers.gradient[name] - leaf for name, leaf in reference.gradient.items()}
    return norm(difference) / norm(reference.gradient)


_INITIAL: dict[Any, Any] = {}
"""Initial parameters by what they are made from: layouts that lie alike need not be compiled again."""


def _initial(program: programs.Program) -> dict[str, Any]:
    """Initial parameters as the program's mesh makes them, on the host."""
    specs = tuple(leaf.sharding.spec for leaf in jax.tree.leaves(program.parameters))
    made_from = program.config.model.model_copy(update={"dtype": "float32"}), program.mesh, specs
    if made_from not in _INITIAL:
        _INITIAL[made_from] = _on_host(program, states.init_params(program))
    return _INITIAL[made_from]


def _place(values: np.ndarray, like: jax.ShapeDtypeStruct) -> jax.Array:
    return jax.make_array_from_callback(values.shape, like.sharding, values.__getitem__)


def _on_host(program: programs.Program, tree: dict[str, Any]) -> dict[str, Any]:
    """The same with every leaf whole; gathered by every process of a run."""
    whole = partial(jax.tree.map, partial(jax.reshard, out_shardings=program.layout.sharding().spec))
    return jax.tree.map(np.asarray, jax.jit(whole)(tree))


def _named(tree: dict[str, Any]) -> dict[str, np.ndarray]:
    """Leaves by name."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def numerics() -> str:
    """The matrix, a line per cell: its mesh and micro-batches."""
    rows = [_row(cell) for cell in cells()]
    return "\n".join([_PROMISE, "", *_columns([("layout", "mesh", "micro-batches"), *rows])])


def measure() -> Iterator[str]:
    """The matrix with the errors of each cell on the devices here, a line at a time.

    Columns: the largest float32 error of any parameter's gradient, for both families of models; and
    the bfloat16 error over that of one device, the larger of both families.

    Raises:
      StackError: there are fewer than 8 devices.
    """
    if jax.device_count() < NUM_DEVICES:
        raise StackError(
            f"the contract needs {NUM_DEVICES} devices and there are {jax.device_count()}; on a CPU set "
            f"JAX_NUM_CPU_DEVICES={NUM_DEVICES}"
        )
    families: tuple[Family, ...] = ("gpt", "llama")
    exact = {family: compute(ONE_DEVICE, family) for family in families}
    rounded = {
        family: distance(compute(ONE_DEVICE, family, "bfloat16"), exact[family]) for family in families
    }
    names = [cell.name for cell in cells()]
    width = max(map(len, names))
    yield f"{'layout':<{width}}  gpt float32  llama float32  bfloat16 ratio"
    for cell in cells():
        worst = [max(errors(compute(cell, family), exact[family]).values()) for family in families]
        ratio = max(
            distance(compute(cell, family, "bfloat16"), exact[family]) / rounded[family]
            for family in families
        )
        yield f"{cell.name:<{width}}  {worst[0]:11.1e}  {worst[1]:13.1e}  {ratio:14.3f}"


_PROMISE = f"""\
Every layout gives the loss and gradients of one device: for every parameter max|difference| <= {LIMIT:g}
x max|gradient| in float32, and in bfloat16 an error at most {BFLOAT16_RATIO} x that of one device.
Proven by `pytest tests/numerics -m "full or not full"` on {NUM_DEVICES} virtual CPU devices."""


def _row(cell: Cell) -> tuple[str, ...]:
    sizes = {axis: getattr(cell.mesh, axis) for axis in ("data", "fsdp", "stage", "tensor")}
    mesh = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "one device"
    return cell.name, mesh, str(cell.accumulation)


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
