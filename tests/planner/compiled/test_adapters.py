"""The formula beside the compiler, where only adapters are trained."""

from typing import Any

import pytest

from stack.config import Config
from stack.hardware import chip as chips
from stack.planner.compiled.report import compile_plan
from stack.planner.formula.memory import memory
from stack.planner.formula.workload import from_config

pytestmark = pytest.mark.full

MODEL = {
    "vocab_size": 16000,
    "num_layers": 6,
    "embed_dim": 512,
    "num_heads": 4,
    "mlp_dim": 1792,
    "mlp": "swiglu",
    "norm": "rmsnorm",
    "position": "rotary",
    "qkv_bias": False,
    "out_bias": False,
    "mlp_bias": False,
    "max_length": 1024,
    "tied_embeddings": False,
}
LORA = {"targets": [{"modules": ["layers.*"], "rank": 16}], "base_dtype": "bfloat16"}
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "one device": (1, {"adapter": LORA, "train": {"batch_size": 4}}),
    "stage 3": (4, {"adapter": LORA, "mesh": {"fsdp": 4}, "train": {"batch_size": 16}}),
    "head alone": (
        1,
        {
            "optimizer": {"frozen": ["embed.*", "layers.*", "final_norm.*"]},
            "train": {"batch_size": 4},
        },
    ),
}
LIMIT = 0.16
"""The most that the formula may be off."""


@pytest.mark.parametrize("case", CASES)
def test_memory_by_formula_is_near_the_compiled(case):
    devices, sections = CASES[case]
    tree: dict[str, Any] = {"model": MODEL, "data": {"sequence_length": 1024}, "init_from": "nowhere"}
    config = Config.model_validate(tree | sections)
    compiled = compile_plan(config, hardware="h200", devices=devices, schedule=False)
    planned = memory(from_config(config, devices, chips.load("h200")))
    assert (planned.total - planned.reserve) / compiled.memory.total == pytest.approx(1, abs=LIMIT)
    assert not compiled.findings
