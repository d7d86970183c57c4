"""Memory by formula is what the model's own shapes and the compiled step say."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from stack import load
from stack.config import Config, DecoderConfig
from stack.parallel import mesh as meshes
from stack.parallel.mesh import without_cache
from stack.planner.compiled.compile import compile_step, devices
from stack.planner.formula.memory import memory
from stack.planner.formula.projects import layers_in_flight
from stack.planner.formula.residuals import trace_residuals
from stack.planner.formula.shapes import num_parameters, parameters
from stack.planner.formula.workload import Workload, from_config
from stack.step import program as programs
from stack.step import state as states

CONFIGS = Path(__file__).parents[3] / "configs"
RECIPES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
LLAMA = load(CONFIGS / "llama3_8b.yaml").model
FLOAT8 = "kernels.matmul=fp8"
BLOCKS = "kernels.attention=xla_chunked"
GPT = DecoderConfig(vocab_size=50304, num_layers=24, embed_dim=1024, num_heads=16)


def recipe(name: str, *changes: str) -> Config:
    return load(CONFIGS / f"{name}.yaml", list(changes))


def shard_elements(leaf: jax.ShapeDtypeStruct) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape))


def work(**changes: Any) -> Workload:
    sizes: dict[str, Any] = {
        "model": GPT,
        "length": 1024,
        "batch": 512,
        "micro_batch": 4,
        "fsdp": 8,
        "logits_bytes": 1024 * 4 * GPT.padded_vocab_size,
    }
    return Workload(**(sizes | changes))


def program_bytes(**changes: Any) -> float:
    return memory(work(**changes)).program


# Parameters, by shape


@pytest.mark.parametrize("name", RECIPES)
def test_parameters_by_shape_are_those_of_the_model(name: str) -> None:
    one = (
        *("mesh.data=1", "mesh.fsdp=1", "mesh.stage=1", "mesh.tensor=1", "mesh.sequence_parallel=false"),
        *("mesh.schedule=1f1b", "mesh.virtual_stages=1"),
    )
    config = recipe(name, *one)
    program = programs.on_mesh(config, meshes.abstract(config.mesh, 1), "cpu")
    sizes = sorted(part.size for part in parameters(config.model))
    assert sizes == sorted(leaf.size for leaf in jax.tree.leaves(program.parameters))


NARROW = ("model.embed_dim=66", "model.num_heads=6", "model.head_dim=16", "model.mlp_dim=256")
"""A width that nothing divides: MLP and words are split over `fsdp` in its place, where `tensor` is 1."""


@pytest.mark.parametrize("zero", [0, 1, 3])
@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *(("gpt2_124m", changes) for changes in ((), NARROW)),
        *((name, ()) for name in ("llama3_8b", "qwen3_0_6b", "turing_nlg_small")),
    ],
)
def test_shards_by_shape_are_those_of_the_program(
    name: str, changes: tuple[str, ...], tensor: int, zero: int
) -> None:
    mesh = ("mesh.data=2", "mesh.fsdp=4", f"mesh.tensor={tensor}", f"mesh.zero={zero}")
    config = recipe(name, *changes, *mesh, "mesh.sequence_parallel=false")
    program = programs.on_mesh(config, meshes.abstract(config.mesh, 8 * tensor), "cpu")
    fsdp = 4 if zero else 1
    shards = sorted(part.shard(fsdp=fsdp, tensor=tensor) for part in parameters(config.model))
    assert shards == sorted(map(shard_elements, jax.tree.leaves(program.parameters)))


@pytest.mark.parametrize(("name", "changes"), [("gpt2_124m", NARROW), ("llama3_8b", ())])
def test_shards_beside_a_second_shard_are_those_of_the_program(name: str, changes: tuple[str, ...]) -> None:
    mesh = ("mesh.data=2", "mesh.fsdp=4", "mesh.tensor=2", "mesh.zero=3", "mesh.second_shard=true")
    config = recipe(name, *changes, *mesh)
    program = programs.on_mesh(config, meshes.abstract(config.mesh, 16), "cpu")
    shards = sorted(part.shard(fsdp=4, data=2, tensor=2) for part in parameters(config.model))
    assert shards == sorted(map(shard_elements, jax.tree.leaves(program.parameters)))


def test_a_second_shard_halves_what_is_at_rest_over_two_nodes_and_adds_a_copy() -> None:
    whole, second = (memory(work(data=2, second_shard=wanted)) for wanted in (False, True))
    vectors = sum(part.size for part in parameters(GPT) if not part.is_matrix)
    matrices = sum(part.shard(fsdp=8) for part in parameters(GPT) if part.is_matrix)
    assert whole.parameters == 4 * (matrices + vectors)
    assert second.parameters == 4 * (matrices / 2 + vectors) + 2 * matrices
    assert second.optimizer == 2 * 4 * (matrices / 2 + vectors)
    assert second.gradients == whole.gradients, "sums over micro-batches lie as the second shard does"


@pytest.mark.parametrize("kind", [None, "parallel_decoder"])
def test_parameters_are_of_the_layers_or_of_an_end(kind: str | None) -> None:
    config = recipe("gpt2_124m", *([f"model.kind={kind}"] if kind else []))
    parts = parameters(config.model)
    assert {part.copies for part in parts.layers} == {12}
    assert all(part.copies == 1 for part in (*parts.embedding, *parts.head))
    assert sorted(part.axes[0] for part in parts.embedding) == [("length", 1024), ("vocab", 50304)]
    assert parts.words.axes == (("vocab", 50304), ("embed", 768))
    assert [part.role for part in parts.head] == ["vector"] * 2, "the final norm"
    assert len(parameters(LLAMA).head) == 2, "the final norm and the output table"


def test_a_model_is_built_once_whatever_its_depth_and_length(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters(GPT)
    monkeypatch.setattr(nnx, "eval_shape", None)
    deeper = GPT.model_copy(update={"num_layers": 25, "max_length": 2048})
    assert num_parameters(deeper) - num_parameters(GPT) == 12 * 1024**2 + 13 * 1024 + 1024 * 1024


def test_a_size_that_does_not_divide_stays_whole_over_fsdp() -> None:
    (word_table,) = parameters(LLAMA).embedding
    assert word_table.shard(fsdp=16) == word_table.size / 16
    assert word_table.shard(fsdp=5) == word_table.size


@pytest.mark.parametrize("kind", ["adamw", "sgd", "lion", "adafactor", "muon"])
def test_moments_are_those_of_the_optimizers_state(kind: str) -> None:
    ema = "0.999" if kind == "lion" else "null"
    options = (f"optimizer.kind={kind}", f"optimizer.ema_decay={ema}")
    config = recipe("gpt2_124m", "mesh.fsdp=8", "mesh.zero=3", *options)
    program = programs.on_mesh(config, meshes.abstract(config.mesh, 8), "cpu")
    state = states.abstract(program)
    state = jax.tree.leaves((state["opt_state"], state.get("ema")))
    bytes_of_state = sum(4 * shard_elements(leaf) for leaf in state)
    planned = memory(from_config(config, 8))
    # Counters, and Adafactor's rows and columns.
    assert planned.optimizer == pytest.approx(bytes_of_state, abs=0.01 * planned.parameters)


# What is saved for the backward pass, by trace


@pytest.mark.parametrize("name", ["gpt2_124m", "llama3_8b", "turing_nlg_17b"])
def test_full_remat_keeps_the_input_of_each_layer(name: str) -> None:
    model = recipe(name).model
    options: Any = {"length": 256, "remat": "full", "fused_attention": False}
    layer_input = 256 * model.embed_dim * 2
    assert trace_residuals(model, tensor=1, sequence_parallel=False, **options).per_layer(1) == layer_input
    assert trace_residuals(model, tensor=4, sequence_parallel=False, **options).per_layer(4) == layer_input
    assert trace_residuals(model, tensor=4, sequence_parallel=True, **options).per_layer(4) == layer_input / 4


def test_llama_keeps_queries_keys_and_values_besides() -> None:
    residuals = trace_residuals(
        LLAMA,
        length=64,
        remat="save_qkv_proj",
        tensor=2,
        sequence_parallel=False,
        fused_attention=True,
    )
    assert residuals.whole == 64 * 4096 * 2
    assert residuals.split == 64 * (32 + 2 * 8) * 128 * 2


def test_more_is_kept_the_less_is_computed_again() -> None:
    def per_layer(remat: str) -> float:
        return memory(work(remat=remat)).activations

    assert per_layer("full") < per_layer("save_qkv_proj") < per_layer("dots") < per_layer("none")


def test_only_an_unfused_kernel_keeps_the_scores() -> None:
    fused, unfused = (memory(work(fused_attention=choice)).activations for choice in (True, False))
    scores = 4 * 24 * 16 * 1024**2
    assert unfused - fused > 4 * scores
    # In blocks each score's maximum and sum are kept, and no mask.
    assert memory(work(blocked_attention=True)).activations == pytest.approx(fused, rel=0.01)


def test_a_soft_cap_is_planned_without_stored_scores() -> None:
    found = memory(from_config(recipe("gemma2_2b"), 8))
    stored = memory(from_config(recipe("gemma2_2b", "kernels.attention=xla"), 8))
    assert found.temporaries < stored.temporaries - 8 * 8192**2 * 4


# The whole step


def test_categories_add_up() -> None:
    step = memory(work(zero=2, tensor=2, micro_batch=8))
    fields = dataclasses.asdict(step)
    assert step.total == pytest.approx(sum(fields.values()) - step.host)
    assert step.program == step.total - step.reserve
    assert all(value >= 0 for value in fields.values())


@pytest.mark.parametrize("remat", ["none", "full", "dots", "save_qkv_proj"])
@pytest.mark.parametrize("micro_batch", [4, 64])
def test_each_stage_of_zero_holds_less_state_than_the_one_below(remat: str, micro_batch: int) -> None:
    def state(zero: int) -> float:
        step = memory(work(zero=zero, remat=remat, micro_batch=micro_batch, model=LLAMA))
        return step.program - step.activations - step.logits - step.temporaries

    assert state(3) < state(2) <= state(1) < state(0)


@settings(deadline=None)
@given(
    zero=st.integers(0, 3),
    remat=st.sampled_from(["none", "full", "dots"]),
    fsdp=st.sampled_from([1, 2, 8]),
    micro_batch=st.sampled_from([1, 2, 4]),
)
def test_more_devices_hold_no_more_each_and_more_rows_no_less(
    zero: int, remat: str, fsdp: int, micro_batch: int
) -> None:
    base = {"zero": zero, "remat": remat, "fsdp": fsdp, "micro_batch": micro_batch}
    now = program_bytes(**base)
    assert program_bytes(**base | {"fsdp": 2 * fsdp}) <= now
    assert program_bytes(**base | {"micro_batch": 2 * micro_batch}) >= now
    assert program_bytes(**base | {"tensor": 2}) < now
    assert program_bytes(
        **base | {"tensor": 2, "sequence_parallel": True, "micro_batch": 1}
    ) <= program_bytes(**base | {"tensor": 2, "micro_batch": 1})


def test_context_parallelism_splits_what_is_saved() -> None:
    one, four = memory(work()).activations, memory(work(context=4)).activations
    assert four == pytest.approx(one / 4)


def test_offloaded_moments_lie_in_the_host() -> None:
    here, away = memory(work(zero=3)), memory(work(zero=3, offload_optimizer=True))
    assert away.host == here.optimizer > 0
    assert away.optimizer == 0
    assert here.program - away.program == pytest.approx(here.optimizer)


def test_offloaded_activations_leave_two_layers_on_the_device() -> None:
    here = memory(work(remat="full", micro_batch=32))
    away = memory(work(remat="full", micro_batch=32, offload_activations=True))
    one_layer = 32 * 1024 * 1024 * 2
    assert away.host == 24 * one_layer
    assert here.activations - away.activations == 22 * one_layer


def test_a_pipelines_first_stage_holds_as_many_micro_batches_as_there_are_stages() -> None:
    pipeline = work(stage=4, fsdp=2)
    assert [layers_in_flight(pipeline, rank) for rank in range(4)] == [24, 18, 12, 6]
    assert layers_in_flight(work(stage=4, batch=2 * 4 * 8), 0) == 2 * 6
    assert layers_in_flight(work(stage=4, schedule="gpipe", batch=16 * 4 * 8), 0) == 16 * 6
    assert memory(pipeline).parameters < memory(work(fsdp=2)).parameters


# The compiled step, for 8 H200 that are not here


@pytest.fixture
def no_cache() -> Iterator[None]:
    with without_cache():
        yield


@pytest.mark.full
@pytest.mark.usefixtures("no_cache")
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gpt2_355m", ("mesh.zero=3", "train.remat=none", "train.batch_size=128")),
        ("gpt2_774m", ("mesh.zero=1", "train.remat=dots", "train.batch_size=128")),
        ("qwen3_0_6b", ("mesh.zero=3", "train.remat=save_qkv_proj", "mesh.tensor=4", "mesh.fsdp=2")),
        # Half as much again where the compiler unrolls the loop over two micro-batches.
        ("qwen3_0_6b", ("mesh.zero=3", "train.remat=none", "train.batch_size=128", "train.accumulation=2")),
        ("llama3_8b", ("mesh.zero=2", "train.remat=full", "mesh.tensor=2", "mesh.fsdp=4")),
        ("llama3_8b", ("mesh.zero=3", "train.remat=dots", "mesh.data=2", "mesh.fsdp=4")),
        ("gpt2_355m", ("mesh.zero=3", "train.remat=none", "train.batch_size=128", BLOCKS)),
        (
            "qwen3_0_6b",
            ("mesh.zero=3", "train.remat=save_qkv_proj", "mesh.tensor=4", "mesh.fsdp=2", BLOCKS),
        ),
        ("gpt2_355m", ("mesh.zero=3", "train.remat=none", "train.batch_size=128", FLOAT8)),
        ("llama3_8b", ("mesh.zero=3", "train.remat=dots", "mesh.data=2", "mesh.fsdp=4", FLOAT8)),
    ],
)
def test_the_compiled_step_holds_what_the_formula_says(name: str, changes: tuple[str, ...]) -> None:
    config = recipe(name, *changes)
    plan = compile_step(config, devices("h200", 8)).memory_analysis()
    assert plan is not None
    state = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
    # The block of temporaries is allocated whole when the step starts.
    assert memory(from_config(config, 8)).program == pytest.approx(state + plan.temp_size_in_bytes, rel=0.05)
