"""Memory as other projects lay it out, and what they compute again."""

import dataclasses
from typing import Any

import pytest

from stack.config import DecoderConfig
from stack.hardware.chip import load
from stack.models import model_cost
from stack.planner.formula.projects import activations_per_token, alternate_products, published_memory
from stack.planner.formula.result import Memory
from stack.planner.formula.shapes import parameters
from stack.planner.formula.time import step_time
from stack.planner.formula.workload import Workload

H100 = load("h100")
GPT = DecoderConfig(vocab_size=50304, num_layers=24, embed_dim=1024, num_heads=16)
LLAMA = DecoderConfig(
    vocab_size=128256,
    max_length=8192,
    num_layers=32,
    embed_dim=4096,
    num_heads=32,
    num_kv_heads=8,
    mlp_dim=14336,
    mlp="swiglu",
    norm="rmsnorm",
    position="rotary",
    qkv_bias=False,
    out_bias=False,
    mlp_bias=False,
    tied_embeddings=False,
)


def work(**changes: Any) -> Workload:
    sizes: dict[str, Any] = {"model": GPT, "length": 1024, "batch": 512, "micro_batch": 4, "fsdp": 8}
    return Workload(**(sizes | changes))


def published(**changes: Any) -> Memory:
    return published_memory(work(**changes))


def test_the_usual_layout_is_16_bytes_of_state_per_parameter_without_zero() -> None:
    memory = published(zero=0, fsdp=1)
    state = memory.parameters + memory.gradients + memory.optimizer
    final_norm = 2 * 1024
    assert state == pytest.approx(18 * (sum(part.size for part in parameters(GPT)) - final_norm), rel=1e-5)


def test_the_usual_layout_splits_the_optimizer_at_stage_1_and_gradients_at_stage_2() -> None:
    assert published(zero=1).optimizer == published(zero=0).optimizer / 8
    assert published(zero=2).gradients < published(zero=1).gradients
    assert published(zero=3).parameters < published(zero=2).parameters


def test_stage_3_gathers_two_layers_and_all_that_is_in_none() -> None:
    layers = sum(part.size for part in parameters(LLAMA).layers)
    tables = 2 * 128256 * 4096
    gathered = published(model=LLAMA, zero=3).collectives
    assert gathered == pytest.approx(2 * 6 * layers / 32 + 2 * tables)


def test_the_usual_layout_keeps_five_bytes_per_score_unless_fused_or_computed_again() -> None:
    def activations(remat: str, fused: bool) -> float:
        return published(remat=remat, fused_attention=fused).activations

    scores = 4 * 24 * 16 * 1024**2
    assert activations("none", False) - activations("none", True) == 5 * scores
    assert activations("attention_core", False) == activations("none", True)


def test_a_pipeline_of_the_usual_layout_holds_every_layer_once() -> None:
    whole = published(zero=0, fsdp=1, model=LLAMA).parameters
    parts = [published(zero=0, fsdp=1, model=LLAMA, stage=stages).parameters for stages in (2, 4, 8)]
    shares = [part * stages / whole for stages, part in zip((2, 4, 8), parts, strict=True)]
    assert all(1 < share < 1.7 for share in shares), shares


# What is computed again


def test_every_second_product_of_llama_is_that_of_torchtitan() -> None:
    """Its products in order are wq, wk, wv, wo, w1, w3, w2; wk, wo and w3 are computed again."""
    (layers,) = model_cost(LLAMA).stacks
    assert [width for _, width in alternate_products(layers)] == [4096, 1024, 14336, 4096]


def test_alternate_products_keep_the_input_the_attention_and_their_results() -> None:
    token_bytes = activations_per_token(work(model=LLAMA), "alternate_products")
    assert token_bytes == 2 * (4096 + 4096 + 4096 + 1024 + 14336 + 4096)
    four = activations_per_token(work(model=LLAMA, tensor=4, sequence_parallel=True), "alternate_products")
    assert four == token_bytes / 4


def test_alternate_layers_keep_half_of_two_layers_and_work_on_a_whole_one() -> None:
    none, full, half = (published(remat=remat) for remat in ("none", "full", "alternate_layers"))
    assert half.activations == (none.activations + full.activations) / 2
    assert half.temporaries == full.temporaries


def test_what_is_computed_again_costs_its_time() -> None:
    def parts(remat: Any) -> Any:
        return step_time(work(model=LLAMA, length=8192, remat=remat, micro_batch=1, zero=0, fsdp=1), H100)

    none, full, core = parts("none"), parts("full"), parts("attention_core")
    layers, products = parts("alternate_layers"), parts("alternate_products")
    assert layers.matmul - none.matmul == pytest.approx((full.matmul - none.matmul) / 2)
    assert layers.attention - none.attention == pytest.approx((full.attention - none.attention) / 2)
    assert (core.matmul, core.attention) == (none.matmul, full.attention)
    assert products.attention == none.attention
    # wk, wo and w3 of all seven; their widths cost alike but for the efficiency of narrow ones.
    again = (1024 + 4096 + 14336) / (2 * 4096 + 2 * 1024 + 3 * 14336)
    assert products.matmul - none.matmul == pytest.approx(again * (full.matmul - none.matmul))


@pytest.mark.parametrize("remat", ["attention_core", "alternate_layers", "alternate_products"])
def test_the_trainer_does_not_run_what_is_another_projects(remat: Any) -> None:
    assert "another project's" in str(work(remat=remat).why_modelled())
    assert dataclasses.replace(work(remat=remat), remat="dots").why_modelled() is None
