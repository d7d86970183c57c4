"""Cached generation of two stacks is the model itself, run once per token, on any mesh and in any batch."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stack.config import Config, EncoderDecoderConfig, StackError, parse
from stack.data.tokenizer import ByteTokenizer
from stack.inference.generate import generate, stream
from stack.inference.text import decode_new, encode_prompts
from stack.kernels.linear_cross_entropy import logits
from stack.models.stack import Execution
from stack.objectives import build as build_objective
from stack.parallel import mesh as meshes
from stack.step import state as states
from stack.step.program import build

CONTEXT, NEW = 40, 12
PROMPTS = [[7, 3, 50], [31, 8, 8, 14, 60, 2, 27, 41, 19], [5 * i % 61 for i in range(1, 24)]]
MODEL = EncoderDecoderConfig(
    vocab_size=61,
    vocab_multiple=16,
    max_length=CONTEXT,
    num_layers=2,
    num_decoder_layers=3,
    embed_dim=32,
    num_heads=4,
    head_dim=12,
    mlp_dim=48,
    mlp="geglu",
    norm="rmsnorm",
    position="relative",
    relative_buckets=8,
    relative_max_distance=10,
    start_token=5,
    tied_embeddings=False,
    qkv_bias=False,
    init_std=0.3,
    dtype="float32",
)


def program_of(model=MODEL, mesh=None):
    split = {"data": 2, "fsdp": 2, "tensor": 2, **mesh} if mesh is not None else {}
    config = Config.model_validate(
        {
            "model": model,
            "mesh": split,
            "objective": {"kind": "span_corruption", "target_length": 16},
            "data": {"sequence_length": 32},
            "train": {"batch_size": 8},
        }
    )
    return build(config, jax.devices()[: 8 if mesh is not None else 1])


@cache
def one_device():
    program = program_of()
    with meshes.use(program.mesh):
        return program, states.init_params(program)


@cache
def without_a_cache():
    """The likeliest words, each from the whole model anew."""
    program, params = one_device()
    model = program.merge(params)

    @jax.jit
    def next_word(read, read_segments, written, last):
        places = jnp.arange(read.shape[1])[None], jnp.arange(written.shape[1])[None]
        batch = {"tokens": read, "segments": read_segments, "positions": places[0]}
        batch |= {"target_tokens": written, "target_segments": jnp.ones_like(written)}
        output = model(batch | {"target_positions": places[1]}, Execution())
        return logits(output.hidden[:, last][:, None], output.table, vocab_size=MODEL.vocab_size)[
            0, 0
        ].argmax()

    texts = []
    for prompt in PROMPTS:
        read = np.array([prompt + [0] * (24 - len(prompt))], np.int32)
        written = np.full((1, NEW + 1), MODEL.start_token, np.int32)
        for place in range(NEW):
            written[0, place + 1] = next_word(
                read, (np.arange(24) < len(prompt))[None].astype(np.int32), written, place
            )
        texts.append(written[0, 1:].tolist())
    return texts


def test_the_cache_changes_no_word_and_no_prompt_another():
    program, params = one_device()
    together = generate(program, params, PROMPTS, length=NEW)
    assert together == without_a_cache()
    assert len({tuple(text) for text in together}) == len(PROMPTS), "what is read makes a difference"
    assert generate(program, params, PROMPTS[:1], length=NEW) == together[:1]


@pytest.mark.full
@pytest.mark.parametrize("mesh", [{"zero": 3, "sequence_parallel": True}, {"zero": 1}], ids=str)
def test_a_mesh_writes_the_same(mesh):
    program = program_of(mesh=mesh)
    with meshes.use(program.mesh):
        params = jax.device_put(
            jax.tree.map(np.asarray, one_device()[1]),
            jax.tree.map(lambda leaf: leaf.sharding, program.parameters),
        )
    assert generate(program, params, PROMPTS, length=NEW) == without_a_cache()


def test_an_end_ends_a_text_and_pieces_are_the_whole():
    program, params = one_device()
    whole = without_a_cache()
    end = whole[1][4]
    expected = [text[: text.index(end)] if end in text else text for text in whole]
    assert generate(program, params, PROMPTS, length=NEW, eos=end) == expected
    pieces = list(stream(program, params, PROMPTS, length=NEW, chunk=5))
    assert [[token for more in pieces for token in more[row]] for row in range(len(PROMPTS))] == whole


def test_a_prompt_may_fill_the_context_but_not_overflow_it():
    program, params = one_device()
    assert len(generate(program, params, [[3] * CONTEXT], length=2)[0]) == 2
    with pytest.raises(
        StackError, match=r"prompt 0 has 41 tokens, but the context is model\.max_length=40; shorten"
    ):
        generate(program, params, [[3] * (CONTEXT + 1)], length=2)


def objective(kind, model="encoder_decoder"):
    return build_objective(parse(f"model: {{kind: {model}, vocab_size: 361}}\nobjective: {{kind: {kind}}}"))


def test_a_prompt_is_what_the_objective_reads():
    tokenizer, text = ByteTokenizer(), "a<extra_id_0>b"
    zero = tokenizer.token("<extra_id_0>")
    (spans,) = encode_prompts(tokenizer, [text], objective("span_corruption"))
    assert spans == [ord("a"), zero, ord("b"), tokenizer.eos]
    (plain,) = encode_prompts(tokenizer, [text], objective("prefix_lm"))
    assert plain == [tokenizer.bos, *text.encode()]
    (middle,) = encode_prompts(tokenizer, ["<fim_prefix>a"], objective("fill_in_middle", "decoder"))
    assert middle == [tokenizer.bos, tokenizer.token("<fim_prefix>"), ord("a")]


def test_what_was_removed_is_shown_after_the_word_that_stood_for_it():
    tokenizer = ByteTokenizer()
    (new,) = (ids.tolist() for ids in tokenizer.encode_batch(["<extra_id_0>x<extra_id_1>é"], marks=True))
    assert len(new) == 5
    assert decode_new(tokenizer, [1, 2], new, objective("span_corruption")) == "<extra_id_0>x<extra_id_1>é"
    assert decode_new(tokenizer, [1, 2], new, objective("prefix_lm")) == "xé"
