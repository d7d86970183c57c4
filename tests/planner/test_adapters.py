"""Plans of adapters and of frozen parameters: what is not trained has no gradient and no moments."""

from typing import Any

import jax
import pytest
from flax.traverse_util import flatten_dict

from stack import plan
from stack.config import Config
from stack.hardware import chip as chips
from stack.models.flops import train_flops_per_token
from stack.planner.formula.memory import memory, optimizer_numbers
from stack.planner.formula.shapes import num_parameters
from stack.planner.formula.time import step_time
from stack.planner.formula.workload import from_config
from stack.step import program as programs

MODEL = {
    "vocab_size": 4000,
    "num_layers": 4,
    "embed_dim": 256,
    "num_heads": 4,
    "mlp_dim": 512,
    "max_length": 512,
    "tied_embeddings": False,
}
LORA = {"targets": [{"modules": ["layers.*"], "rank": 8}], "base_dtype": "bfloat16"}
ENDS = {"train": ["final_norm.*", "embed.*"], "base_dtype": "float32"}
TRUNK = ["embed.*", "position.*", "layers.*", "final_norm.*"]


def config(mesh=None, **sections):
    tree: dict[str, Any] = {
        "model": MODEL,
        "data": {"sequence_length": 512},
        "train": {"batch_size": 8},
        "mesh": mesh or {"fsdp": 1},
        "init_from": "nowhere",
    }
    for name, values in sections.items():
        tree[name] = tree.get(name, {}) | values if isinstance(values, dict) else values
    return Config.model_validate(tree)


CASES = {
    "lora": {"adapter": LORA},
    "dora and ends": {"adapter": LORA | ENDS | {"kind": "dora"}},
    "attention alone": {"adapter": LORA | {"targets": [{"modules": ["layers.attention.*"], "rank": 4}]}},
    "lora, frozen by name": {"adapter": LORA, "optimizer": {"frozen": ["layers.*.lora_a"]}},
    "frozen trunk": {"optimizer": {"frozen": TRUNK}},
    "frozen table": {"optimizer": {"frozen": ["embed.*"]}},
}


@pytest.mark.parametrize("case", CASES)
def test_a_plan_holds_and_trains_what_the_program_does(case):
    made = config(**CASES[case])
    work, program = from_config(made, 1), programs.build(made, jax.devices()[:1])
    leaves: dict[Any, Any] = flatten_dict(program.parameters)
    assert num_parameters(made.model, work.adapter, work.frozen) == program.num_parameters
    assert sum(part.size for part in work.parameters if part.trained) == program.num_trained
    held = sum(part.size * part.itemsize for part in work.parameters)
    assert held == sum(leaf.size * leaf.dtype.itemsize for leaf in leaves.values())
    assert optimizer_numbers(work) == 2 * program.num_trained


def test_a_pattern_for_the_head_of_a_task_is_none_of_the_planners():
    adapter = CASES["lora"]["adapter"] | {"train": ["task*"]}
    objective = {"kind": "classification", "labels": ["a", "b"]}
    data = {"sources": [{"kind": "jsonl", "path": "nowhere.jsonl", "field": None}]}
    work = from_config(config(adapter=adapter, objective=objective, data=data), 1)
    assert all(part.trained == ("rank" in dict(part.axes)) for part in work.parameters)


@pytest.mark.parametrize("case", CASES)
def test_flops_are_those_of_its_products(case):
    """2 a parameter and token forward, 2 for activations where a gradient goes, 2 for weights that train."""
    made = config(**CASES[case])
    work, program = from_config(made, 1), programs.build(made, jax.devices()[:1])
    leaves: dict[Any, Any] = flatten_dict(program.parameters)
    roles: dict[Any, Any] = flatten_dict(program.roles)
    products = [path for path in leaves if roles[path] == "matrix" or path[0] == "head"]
    above = ("head", "final_norm")
    reaches = any(path[0] not in above and path not in program.frozen for path in leaves)
    counted = sum(2 * leaves[path].size * (1 + reaches + (path not in program.frozen)) for path in products)
    scores = 2 * 2 * MODEL["num_layers"] * MODEL["embed_dim"] * work.length / 2 * (3 if reaches else 1)
    assert work.flops_per_token("causal") == pytest.approx(counted + scores)


def test_all_trained_is_as_before():
    work = from_config(config(), 1)
    assert work.flops_per_token("full") == train_flops_per_token(work.model, work.sizes, "full")


def test_an_adapter_takes_less_of_everything():
    full, lora = plan(config(), hardware="h200", devices=1), plan(config(**CASES["lora"]), hardware="h200")
    for part in ("parameters", "logits", "optimizer"):
        assert getattr(lora.memory, part) < getattr(full.memory, part), part
    assert lora.memory.optimizer < 0.1 * full.memory.optimizer
    assert lora.time.optimizer < 0.1 * full.time.optimizer
    assert lora.flops_per_step < full.flops_per_step


def test_what_no_gradient_reaches_has_no_backward_pass():
    head, full = (from_config(config(**sections), 1) for sections in (CASES["frozen trunk"], {}))
    assert memory(head).activations < 0.2 * memory(full).activations
    chip = chips.load("h200")
    assert step_time(head, chip).attention == pytest.approx(step_time(full, chip).attention / 3.5)


def test_only_what_is_trained_is_summed_over_devices():
    ways = {"fsdp": 8, "zero": 3}
    lora, full = (
        plan(config(mesh=ways, **sections), hardware="h200", devices=8) for sections in (CASES["lora"], {})
    )
    there = {name: made.time.communication["fsdp"].bytes for name, made in (("lora", lora), ("full", full))}
    assert there["lora"] < 0.6 * there["full"], "two gathers of 16 bits, and no scatter of 32"
