"""Model FLOPs against published and derived figures."""

import pytest

from stack.config.model import DecoderConfig, EncoderConfig, EncoderDecoderConfig
from stack.models import model_cost
from stack.models.flops import (
    Convention,
    forward_flops_per_token,
    keys_per_token,
    matmul_parameters,
    recomputed_flops_per_token,
    train_flops_per_token,
)

TURING_NLG = DecoderConfig(
    vocab_size=50257, max_length=1024, num_layers=78, embed_dim=4256, num_heads=28
)  # vocabulary padded to 50,304
LLAMA_3_8B = DecoderConfig(
    vocab_size=128256,
    num_layers=32,
    embed_dim=4096,
    num_heads=32,
    num_kv_heads=8,
    mlp_dim=14336,
    mlp="swiglu",
    norm="rmsnorm",
    position="rotary",
    tied_embeddings=False,
)


def attention(model):
    """Of its layers."""
    return model_cost(model).stacks[0].attention


def test_turing_nlg_needs_5_615e16_flops_an_iteration_and_7_464e16_with_recomputation() -> None:
    tokens = 512 * 1024
    trained = tokens * train_flops_per_token(TURING_NLG, 1024, "full")
    recomputed = tokens * recomputed_flops_per_token(TURING_NLG, 1024, "full")
    assert f"{trained:.3e}" == "5.615e+16"
    assert f"{trained + recomputed:.3e}" == "7.464e+16"


@pytest.mark.parametrize(
    ("layers", "hidden", "heads", "batch"),
    [(24, 2304, 24, 512), (40, 6144, 48, 1024), (96, 12288, 96, 1536), (128, 25600, 160, 3072)],
)
def test_flops_are_the_formula_of_megatron(layers: int, hidden: int, heads: int, batch: int) -> None:
    """F = 96 B s l h^2 (1 + s/6h + V/16lh), arXiv 2104.04473, equation 3; full recomputation."""
    length, vocab = 2048, 51200
    model = DecoderConfig(
        vocab_size=vocab, max_length=length, num_layers=layers, embed_dim=hidden, num_heads=heads
    )
    published = (
        96
        * batch
        * length
        * layers
        * hidden**2
        * (1 + length / (6 * hidden) + vocab / (16 * layers * hidden))
    )
    per_token = train_flops_per_token(model, length, "full") + recomputed_flops_per_token(
        model, length, "full"
    )
    assert batch * length * per_token == pytest.approx(published, rel=1e-12)


def test_of_two_rows_each_stack_counts_its_own() -> None:
    """By hand: width 8, 2 heads of 5, MLP 16 with a gate, 128 words; 20 tokens read by 3 layers, 6 written
    by 2."""
    model = EncoderDecoderConfig(
        num_layers=3,
        num_decoder_layers=2,
        embed_dim=8,
        num_heads=2,
        head_dim=5,
        mlp_dim=16,
        mlp="geglu",
        vocab_size=100,
    )
    attention, mlp = 4 * 8 * 10, 3 * 8 * 16
    read = 3 * 20 * (2 * (attention + mlp) + 4 * 10 * 20)
    # Queries and the way back of the attention to what was read are of 6 tokens, keys and values of 20.
    written = 2 * (6 * 2 * (attention + mlp + 2 * 8 * 10) + 20 * 2 * (2 * 8 * 10))
    for convention, keys in (("full", 6), ("causal", 3)):
        scores = 2 * 6 * 4 * 10 * (keys + 20)
        total = read + written + scores + 6 * 2 * 128 * 8
        per_token = forward_flops_per_token(model, {"length": 20, "target_length": 6}, convention)
        assert per_token * 20 == pytest.approx(total)
        trained = train_flops_per_token(model, {"length": 20, "target_length": 6}, convention)
        assert trained == pytest.approx(3 * per_token)


def test_of_masked_words_only_those_are_scored() -> None:
    """By hand: a square layer and 128 words of width 8, of 3 places of 20."""
    model = EncoderConfig(num_layers=1, embed_dim=8, num_heads=2, vocab_size=100)
    sizes = {"length": 20, "masked": 3}
    head = 2 * (8 * 8 + 8 * 128)
    layers = recomputed_flops_per_token(model, sizes, "full")
    assert layers == 2 * 12 * 8 * 8 + 4 * 8 * 20
    assert forward_flops_per_token(model, sizes, "full") == pytest.approx(layers + head * 3 / 20)
    # Rows of which nothing is masked are scored whole.
    assert forward_flops_per_token(model, 20, "full") == layers + head


def test_a_row_that_the_model_runs_over_must_have_a_length() -> None:
    with pytest.raises(KeyError, match="target_length"):
        train_flops_per_token(EncoderDecoderConfig(), 512)


def test_matmul_parameters_are_the_published_parameters_without_tables_and_vectors() -> None:
    norms = (2 * 32 + 1) * 4096
    assert matmul_parameters(LLAMA_3_8B) == 8_030_261_248 - 128_256 * 4096 - norms
    # GPT-2 small of 50,257 words: 124,439,808 parameters, the head is the padded table.
    vectors = 12 * (4 * 768 + 3 * 768 + 768 + 3072 + 768) + 2 * 768
    positions = 1024 * 768
    padding = (50_304 - 50_257) * 768
    gpt2 = DecoderConfig(vocab_size=50257)
    assert matmul_parameters(gpt2) == 124_439_808 - vectors - positions + padding


@pytest.mark.parametrize("model", [TURING_NLG, LLAMA_3_8B], ids=["turing_nlg", "llama3"])
def test_training_is_6_flops_per_parameter_and_12_or_6_per_key_and_channel(model: DecoderConfig) -> None:
    length = 1000
    width = model.num_layers * model.num_heads * model.head_width
    dense = 6 * matmul_parameters(model)
    assert train_flops_per_token(model, length, "full") == dense + 12 * width * length
    assert train_flops_per_token(model, length, "causal") == dense + 6 * width * length
    assert train_flops_per_token(model, length) == 3 * forward_flops_per_token(model, length)


def test_grouped_keys_save_parameters_and_no_attention() -> None:
    grouped = LLAMA_3_8B
    whole = grouped.model_copy(update={"num_kv_heads": 32})
    saved = 2 * 32 * 4096 * (32 - 8) * 128
    assert matmul_parameters(whole) - matmul_parameters(grouped) == saved
    assert train_flops_per_token(whole, 64) - train_flops_per_token(grouped, 64) == 6 * saved


@pytest.mark.parametrize("convention", ["full", "causal"])
def test_a_window_as_long_as_the_row_is_no_window(convention: Convention) -> None:
    for window in (512, 600):
        windowed = LLAMA_3_8B.model_copy(update={"sliding_window": window})
        assert keys_per_token(attention(windowed), 512, convention) == keys_per_token(
            attention(LLAMA_3_8B), 512, convention
        )


def test_a_window_counts_the_keys_in_sight() -> None:
    windowed = LLAMA_3_8B.model_copy(update={"sliding_window": 64})
    assert keys_per_token(attention(windowed), 4096, "full") == 64
    counted = sum(min(position + 1, 64) for position in range(4096)) / 4096
    # Exactly half a key more, the token's own, which the convention leaves out without a window too.
    assert keys_per_token(attention(windowed), 4096, "causal") == pytest.approx(counted, abs=0.51)
