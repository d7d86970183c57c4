"""Published tables and formulas come out of the planner as they were printed."""

from decimal import ROUND_DOWN, ROUND_HALF_UP, Decimal
from pathlib import Path

import pytest

from stack import load
from stack.config import DecoderConfig
from stack.parallel import mesh as meshes
from stack.planner.formula.projects import layers_in_flight
from stack.planner.formula.published import (
    activation_bytes_per_layer,
    gpt_parameters,
    interleaving_factor,
    zero_bytes_per_parameter,
    zero_elements_sent,
)
from stack.planner.formula.shapes import parameters
from stack.planner.formula.workload import Workload
from stack.step import program as programs

CONFIGS = Path(__file__).parents[2] / "configs"

# ZeRO (arXiv 1910.02054), table 1: GB per device of the stages 1, 2, 3 by parameters and ways.
ZERO_TABLE_1 = {
    (7_500, 1): "120 120 120",
    (7_500, 4): "52.5 41.3 30",
    (7_500, 16): "35.6 21.6 7.5",
    (7_500, 64): "31.4 16.6 1.88",
    (7_500, 256): "30.4 15.4 0.47",
    (7_500, 1024): "30.1 15.1 0.12",
    (128_000, 1): "2048 2048 2048",
    (128_000, 4): "896 704 512",
    (128_000, 16): "608 368 128",
    (128_000, 64): "536 284 32",
    (128_000, 256): "518 263 8",
    (128_000, 1024): "513 257 2",
    (1_000_000, 1): "16000 16000 16000",
    (1_000_000, 4): "7000 5500 4000",
    (1_000_000, 16): "4750 2875 1000",
    (1_000_000, 64): "4187 2218 250",
    (1_000_000, 256): "4046 2054 62.5",
    (1_000_000, 1024): "4011 2013 15.6",
}
"""By millions of parameters and data-parallel degree. The 7.5B column is rounded, the others are cut."""


@pytest.mark.parametrize(
    ("millions", "ways", "stage", "printed"),
    [
        (millions, ways, stage, printed)
        for (millions, ways), row in ZERO_TABLE_1.items()
        for stage, printed in enumerate(row.split(), start=1)
    ],
)
def test_model_states_are_those_of_zero_table_1(millions: int, ways: int, stage: int, printed: str) -> None:
    gigabytes = Decimal(zero_bytes_per_parameter(stage, ways)) * millions / 1000
    rounding = ROUND_HALF_UP if millions == 7_500 else ROUND_DOWN
    assert gigabytes.quantize(Decimal(printed), rounding) == Decimal(printed)


def test_without_zero_every_device_holds_16_bytes_per_parameter() -> None:
    assert {zero_bytes_per_parameter(0, ways) for ways in (1, 8, 1024)} == {16}


def test_only_stage_3_sends_more_than_plain_data_parallelism() -> None:
    assert [zero_elements_sent(7.5e9, stage) / 7.5e9 for stage in range(4)] == [2, 2, 2, 3]


# GPT-3 (s 2048, h 12288, a 96) and Megatron-Turing NLG (s 2048, h 20480, a 128), t = 8.
@pytest.mark.parametrize(("hidden", "heads", "scores"), [(12288, 96, 80), (20480, 128, 64)])
def test_activations_of_a_layer_are_those_of_the_paper(hidden: int, heads: int, scores: int) -> None:
    """arXiv 2205.05198, table 2, where 5as/h is 80 and 64."""

    def per_sbh(**how) -> float:
        return activation_bytes_per_layer(2048, 1, hidden, heads, **how) / (2048 * hidden)

    assert per_sbh() == 34 + scores
    assert per_sbh(tensor=8) == 10 + 24 / 8 + scores / 8
    assert per_sbh(tensor=8, sequence_parallel=True) == 34 / 8 + scores / 8
    assert per_sbh(tensor=8, sequence_parallel=True, recompute="selective") == 34 / 8
    assert per_sbh(tensor=8, recompute="full") == 2


@pytest.mark.parametrize(("stages", "parts"), [(8, 1), (8, 3), (4, 20), (35, 3)])
def test_the_first_stage_of_an_interleaved_pipeline_holds_what_the_formula_says(
    stages: int, parts: int
) -> None:
    layers = stages * parts
    workload = Workload(
        model=DecoderConfig(num_layers=layers),
        length=1024,
        batch=4 * stages,
        micro_batch=1,
        stage=stages,
        virtual_stages=parts,
        schedule="interleaved" if parts > 1 else "1f1b",
    )
    factor = interleaving_factor(stages, parts) if parts > 1 else 1
    assert layers_in_flight(workload, rank=0) == pytest.approx(layers * factor)


# SC21 (arXiv 2104.04473), table 1: layers, width, billions of parameters.
@pytest.mark.parametrize(
    ("layers", "hidden", "heads", "billions"),
    [
        (30, 3072, 32, "3.6"),
        (48, 8192, 64, "39.1"),
        (60, 10240, 80, "76.1"),
        (80, 12288, 96, "145.6"),
        (105, 20480, 128, "529.6"),
    ],
)
def test_parameters_are_those_of_megatrons_table(layers: int, hidden: int, heads: int, billions: str) -> None:
    vocabulary, length = 51_200, 2048
    published = gpt_parameters(layers, hidden, vocabulary, length)
    assert f"{published / 1e9:.1f}" == billions
    model = DecoderConfig(
        vocab_size=vocabulary, max_length=length, num_layers=layers, embed_dim=hidden, num_heads=heads
    )
    final_norm = 2 * hidden
    assert sum(part.size for part in parameters(model)) - final_norm == pytest.approx(published, rel=1e-12)


def test_turing_nlg_has_17_177_045_760_parameters() -> None:
    config = load(CONFIGS / "turing_nlg_17b.yaml")
    program = programs.on_mesh(config, meshes.abstract(config.mesh, 256), "cpu")
    assert program.num_parameters == 17_177_045_760
    assert gpt_parameters(78, 4256, 50_304, 1024) + 2 * 4256 == pytest.approx(17_177_045_760, rel=1e-12)


def test_turing_nlg_needs_17_98_gb_of_model_state_at_zero_1_tensor_4_data_64() -> None:
    gigabytes = 17_177_045_760 / 4 * zero_bytes_per_parameter(1, 64) / 1e9
    assert f"{gigabytes:.2f}" == "17.98"
    assert f"{17_177_045_760 * zero_bytes_per_parameter(0, 1) / 1e9:.1f}" == "274.8"
