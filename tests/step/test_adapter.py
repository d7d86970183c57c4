"""Adapters on every layout: the numbers of one device, the base as it was, and what cannot be is refused."""

from functools import cache, partial
from typing import Any

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import PartitionSpec as P

from stack.config import ConfigError
from stack.doctor.numerics import LIMIT, ONE_DEVICE, STEP, Cell, Family, cells, config_of, example_batch
from stack.parallel import mesh as meshes
from stack.step import program as programs
from stack.step import state as states
from stack.step.program import Program
from stack.step.step import loss_gradient, train_step

CELLS = {cell.name: cell for cell in cells()}
EVERYDAY = ("dora", "gpt", "fsdp zero 3 + tensor sequence parallel")
WIDE = (
    *(f"fsdp zero {stage}" for stage in range(4)),
    *("data", "tensor", "tensor sequence parallel", "accumulation"),
)
BOTH = ("fsdp zero 3 + tensor sequence parallel", "fsdp zero 1 + accumulation")
CASES = [
    EVERYDAY,
    *((kind, "gpt", name) for kind in ("lora", "dora") for name in WIDE),
    *(
        (kind, family, name)
        for kind, family in (("lora", "t5"), ("dora", "t5"), ("dora", "bert"), ("lora", "palm"))
        for name in BOTH
    ),
    ("dora", "gpt", "tensor + accumulation"),
    ("dora", "gpt", "data + fsdp zero 3"),
    ("lora", "t5", "tensor"),
]


type Values = dict[str, np.ndarray]


def adapter(kind: str, modules: str = '"*"', rank: int = 4, more: str = "") -> list[str]:
    return [
        "init_from=elsewhere",
        f"adapter={{kind: {kind}, targets: [{{modules: [{modules}], rank: {rank}}}]{more}}}",
    ]


def program(cell: Cell, family: Family, *overrides: str, dtype: str = "float32") -> Program:
    config = config_of(cell, family, dtype).replace(*overrides)
    return programs.build(config, jax.devices()[: cell.num_devices])


def on_host(array: jax.Array) -> np.ndarray:
    return np.asarray(array if array.sharding.is_fully_replicated else jax.reshard(array, P()))


def named(tree: Any) -> dict[str, np.ndarray]:
    flat: dict[Any, Any] = flatten_dict(tree)
    return {".".join(path): on_host(leaf) for path, leaf in flat.items()}


def used(initial: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """As after some training: with a B that is not zero."""
    rng = np.random.default_rng(0)
    changed = {}
    for name in sorted(initial):
        leaf = initial[name]
        if name.endswith("lora_b"):
            leaf = 0.1 * rng.normal(size=leaf.shape)
        if name.endswith("dora_magnitude"):
            leaf = leaf * (1 + 0.1 * rng.normal(size=leaf.shape))
        changed[name] = leaf.astype(initial[name].dtype)
    return changed


def place(program: Program, values: dict[str, np.ndarray]) -> dict[str, Any]:
    likes: dict[Any, Any] = flatten_dict(program.parameters)
    return unflatten_dict(
        {
            path: jax.make_array_from_callback(like.shape, like.sharding, values[".".join(path)].__getitem__)
            for path, like in likes.items()
        }
    )


def batch(program: Program) -> dict[str, Any]:
    rows, layout = example_batch(program.objective.fields), program.layout
    return {
        field.name: jax.device_put(rows[field.name], layout.sharding(*field.axes))
        for field in program.objective.fields
    }


@cache
def compute(
    kind: str, family: Family, cell: str
) -> tuple[dict[str, np.ndarray], float, dict[str, np.ndarray]]:
    """Initial parameters; loss and gradients of a used adapter."""
    made = program(CELLS.get(cell, ONE_DEVICE), family, *adapter(kind))
    with meshes.use(made.mesh):
        initial = named(states.init_params(made))
        trained, frozen = made.split(place(made, used(initial)))
        step = jax.device_put(np.int32(STEP), made.layout.sharding())
        gradient, sums = jax.jit(partial(loss_gradient, made))(trained, step, batch(made), frozen)
        return initial, float(sums["loss"]), named(gradient)


@pytest.mark.parametrize(
    ("kind", "family", "cell"),
    [
        pytest.param(*case, id=" ".join(case), marks=[] if case == EVERYDAY else [pytest.mark.full])
        for case in CASES
    ],
)
def test_loss_and_gradients_equal_one_device(kind, family, cell) -> None:
    initial, loss, gradient = compute(kind, family, cell)
    first, expected, gradients = compute(kind, family, "one device")
    for name, leaf in first.items():
        np.testing.assert_array_equal(initial[name], leaf, err_msg=name)
    assert loss == pytest.approx(expected, rel=LIMIT)
    assert gradient.keys() == gradients.keys()
    assert {name.rpartition(".")[2] for name in gradients} == {"lora_a", "lora_b"} | (
        {"dora_magnitude"} if kind == "dora" else set()
    )
    for name, leaf in gradients.items():
        assert np.abs(leaf).max() > 0, name
        limit = LIMIT * float(np.abs(leaf).max())
        np.testing.assert_allclose(gradient[name], leaf, rtol=0, atol=limit, err_msg=name)


@pytest.mark.parametrize(
    ("kind", "cell"),
    [
        ("lora", "one device"),
        pytest.param("dora", "fsdp zero 3 + tensor sequence parallel", marks=pytest.mark.full),
    ],
)
def test_a_base_in_bfloat16_changes_no_bit_of_a_model_in_bfloat16_and_takes_half(kind, cell) -> None:
    after = []
    for base in ("float32", "bfloat16"):
        more = adapter(kind, "layers.mlp.*", more=f", base_dtype: {base}, train: [final_norm.*]")
        made = program(CELLS.get(cell, ONE_DEVICE), "gpt", *more, "train.remat=none", dtype="bfloat16")
        with meshes.use(made.mesh):
            state = states.init(made)
            kept = named(state["frozen"])
            moments = sum(leaf.size for leaf in jax.tree.leaves(state["opt_state"]) if leaf.ndim)
            assert moments == 2 * made.num_trained
            step = jax.jit(partial(train_step, made))
            for _ in range(2):
                state, _ = step(state, batch(made))
            for name, leaf in named(state["frozen"]).items():
                np.testing.assert_array_equal(leaf, kept[name], err_msg=name)
            after.append((named(state["params"]), {name: leaf.dtype.name for name, leaf in kept.items()}))
    (wide, _), (narrow, dtypes) = after
    assert wide.keys() == narrow.keys()
    assert {"final_norm.scale", "layers.mlp.up.lora_b"} <= wide.keys()
    for name, leaf in wide.items():
        np.testing.assert_array_equal(narrow[name], leaf, err_msg=name)
    assert dtypes["embed.table"] == dtypes["layers.mlp.up.kernel"] == "bfloat16"
    assert dtypes["layers.mlp.up.bias"] == "float32"


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            adapter("lora", "layers.attn.*"),
            r"^adapter\.targets\.0\.modules: 'layers\.attn\.\*' is the name of",
        ),
        (
            adapter("lora", "embed"),
            r"^adapter\.targets\.0\.modules: 'embed' is the name of none of lay",
        ),
        (
            adapter("lora", "layers.mlp.up", rank=65),
            r"^adapter\.targets\.0\.rank=65 is more than layers\.mlp\.up can have, which is \d+ x \d+; set",
        ),
        (
            [*adapter("lora"), "adapter.targets.1={modules: [layers.mlp.up]}"],
            r"^adapter\.targets\.1\.modules: layers\.mlp\.up is in adapter\.targets\.0 too; leave one out",
        ),
        (adapter("lora", more=", train: [norm]"), r"^adapter\.train: 'norm' is the name of none of"),
        (["init_from=x", "adapter={}"], r"adapter: targets is empty; name some matrices"),
        (["init_from=x", "adapter={targets: [{}]}"], r"adapter\.targets\.0: modules is empty"),
        (
            adapter("lora")[1:],
            r"adapter: it is trained beside weights that are there, and init_from",
        ),
        ([*adapter("lora"), "kernels.matmul=fp8"], r"kernels\.matmul=fp8 knows no adapter"),
        ([*adapter("lora"), 'optimizer.frozen=["*"]'], r"^optimizer\.frozen leaves nothing to train"),
    ],
)
def test_what_cannot_be_is_told(overrides, told) -> None:
    with pytest.raises(ConfigError, match=told):
        program(ONE_DEVICE, "gpt", *overrides)


def test_targets_have_ranks_of_their_own() -> None:
    more = "adapter.targets.1={modules: [layers.mlp.*], rank: 2, alpha: 1}"
    made = program(ONE_DEVICE, "gpt", *adapter("lora", "layers.attention.*"), more)
    leaves: dict[Any, Any] = flatten_dict(made.parameters)
    assert {path[-2]: leaf.shape[-1] for path, leaf in leaves.items() if path[-1] == "lora_a"} == {
        **dict.fromkeys(("query", "key", "value", "out"), 4),
        **dict.fromkeys(("up", "down"), 2),
    }
    assert made.adapters["layers.mlp.up"].scale == 0.5
    assert made.adapters["layers.attention.key"].scale == 4
