"""What a model states of its cost is what its parameters and its traced program have."""

import math
from pathlib import Path

import jax
import jax.extend.core
import jax.numpy as jnp
import pytest
from flax import nnx

from stack.config import DecoderConfig, EncoderConfig, EncoderDecoderConfig, ParallelDecoderConfig, load
from stack.kernels.attention import Mask
from stack.models import model_class, model_cost
from stack.models.flops import forward_flops_per_token, matmul_parameters
from stack.models.stack import Execution
from stack.parallel.zero import is_variable

RECIPES = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
SMALL = {"num_layers": 3, "embed_dim": 64, "num_heads": 4, "vocab_size": 300, "max_length": 32}
GATED = {"num_kv_heads": 2, "mlp": "swiglu", "norm": "rmsnorm", "position": "rotary", "head_dim": 24}
MODELS = [
    DecoderConfig(**SMALL),
    DecoderConfig(**SMALL, **GATED, tied_embeddings=False),
    ParallelDecoderConfig(**SMALL),
]
TWO_STACKS = EncoderDecoderConfig(
    **SMALL, num_decoder_layers=2, mlp="geglu", position="relative", head_dim=24
)
MASKED = EncoderConfig(**SMALL)


def abstract(config):
    return nnx.eval_shape(lambda: model_class(config)(config, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize(
    "config", [*MODELS, TWO_STACKS, MASKED, *(load(recipe).model for recipe in RECIPES)], ids=repr
)
def test_every_matrix_is_in_a_product(config):
    variables = [v for v in jax.tree.leaves(abstract(config), is_leaf=is_variable) if v.role == "matrix"]
    head = config.padded_vocab_size * config.embed_dim
    assert matmul_parameters(config) == sum(math.prod(v.shape) for v in variables) + head


@pytest.mark.parametrize("config", MODELS, ids=lambda config: f"{config.kind}, {config.mlp}")
def test_flops_are_those_of_the_traced_products(config):
    """Counted in the jaxpr, where attention multiplies whole rows: the `full` convention."""
    rows, length = 2, 32
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)

    def forward(model, tokens):
        batch = {"tokens": tokens, "positions": tokens, "segments": tokens}
        output = model(batch, Execution())
        return jnp.einsum("ble,ve->blv", output.hidden, output.table)

    counted = count(jax.make_jaxpr(forward)(abstract(config), ids).jaxpr)
    assert counted == pytest.approx(rows * length * forward_flops_per_token(config, length, "full"))


@pytest.mark.parametrize(
    ("config", "sizes"),
    [(TWO_STACKS, {"length": 32, "target_length": 12}), (MASKED, {"length": 32, "masked": 5})],
    ids=lambda value: getattr(value, "kind", None),
)
def test_flops_of_two_rows_are_those_of_the_traced_products(config, sizes):
    """Rows that are written, or a few places whose words are scored, are shorter than those that are read."""
    rows = 2
    axes = {
        **dict.fromkeys(("tokens", "positions", "segments"), "length"),
        **dict.fromkeys(("target_tokens", "target_positions", "target_segments"), "target_length"),
        "masked": "masked",
    }
    batch = {
        name: jax.ShapeDtypeStruct((rows, sizes[axis]), jnp.int32)
        for name, axis in axes.items()
        if axis in sizes
    }

    def forward(model, batch):
        output = model(batch, Execution())
        return jnp.einsum("ble,ve->blv", output.hidden, output.table)

    counted = count(jax.make_jaxpr(forward)(abstract(config), batch).jaxpr)
    # The bias of positions is looked up by a product, once for each stack: 2 x buckets x heads x distances.
    looked_up = 2 * 32 * 4 * (63 + 23) if config is TWO_STACKS else 0
    stated = rows * 32 * forward_flops_per_token(config, sizes, "full")
    assert counted - looked_up == pytest.approx(stated)


def count(jaxpr) -> int:
    """FLOPs of the matrix products of a traced program, loops multiplied by their lengths."""
    total = 0
    for equation in jaxpr.eqns:
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)
        total += times * sum(map(count, jax.extend.core.jaxprs_in_params(equation.params)))
    return total


def test_attention_is_stated_as_it_is():
    config = DecoderConfig(**SMALL, **GATED, sliding_window=9)
    (layers,) = model_cost(config).stacks
    attention = layers.attention
    assert (attention.heads, attention.kv_heads, attention.head_dim, attention.window) == (4, 2, 24, 9)
    assert layers.number == 3
    positions = jnp.arange(5)[None]
    assert attention.kind == Mask(query_positions=positions, key_positions=positions).kind


def test_layers_with_a_window_are_stated_apart():
    config = DecoderConfig(**SMALL, **GATED, sliding_window=9, attention_pattern=["local", "global"])
    stacks = model_cost(config).stacks
    assert [(layers.number, layers.attention.window) for layers in stacks] == [(2, 9), (1, None)]
    assert stacks[0].products == stacks[1].products
    whole, local = DecoderConfig(**SMALL, **GATED), DecoderConfig(**SMALL, **GATED, sliding_window=9)
    mean = (2 * forward_flops_per_token(local, 32) + forward_flops_per_token(whole, 32)) / 3
    assert forward_flops_per_token(config, 32) == pytest.approx(mean)


@pytest.mark.parametrize("config", MODELS, ids=lambda config: f"{config.kind}, {config.mlp}")
def test_products_that_read_the_same_input_are_stated_one_by_one_too(config):
    products = model_cost(config).stacks[0].products
    assert all(sum(product.widths) == product.columns[1] for product in products)
    # Queries, keys, values, out, up and down, with a gate one more.
    assert sum(len(product.widths) for product in products) == (7 if config.gated else 6)


def test_a_parallel_block_moves_less_memory():
    one, two = (model_cost(config).stacks[0].elementwise[0][1] for config in (MODELS[2], MODELS[0]))
    assert (one, two) == (6 * 64, 10 * 64)
