"""Cached generation is the model itself, run once per token, on any mesh and in any batch."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stack.config import Config, DecoderConfig, StackError
from stack.inference.generate import generate, pad, stream
from stack.kernels.linear_cross_entropy import logits
from stack.models.stack import Execution
from stack.step.program import build

CONTEXT = 48
PROMPTS = [[7, 3, 50], [31, 8, 8, 14, 60, 2, 27, 41, 19], [5 * i % 61 for i in range(1, 18)]]

SHARED = {
    "vocab_size": 61,
    "vocab_multiple": 16,
    "max_length": CONTEXT,
    "num_layers": 3,
    "embed_dim": 32,
    "num_heads": 4,
    "mlp_dim": 48,
    "tied_embeddings": False,
    "dtype": "float32",
}
FAMILIES = {
    "gpt": DecoderConfig(**SHARED),
    "llama": DecoderConfig(
        **SHARED,
        norm="rmsnorm",
        mlp="swiglu",
        position="rotary",
        num_kv_heads=2,
        head_dim=12,
        qk_norm=True,
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
        sliding_window=6,
        attention_pattern=["local", "global"],
        local_rope_theta=100.0,
        attention_softcap=3.0,
        logit_softcap=5.0,
    ),
}
MESHES = {"zero 3": {"zero": 3, "sequence_parallel": True}, "zero 1": {"zero": 1}}


def program_of(model, mesh=None):
    """On one device, or on data 2 x fsdp 2 x tensor 2."""
    split = {"data": 2, "fsdp": 2, "tensor": 2, **mesh} if mesh is not None else {}
    config = Config.model_validate(
        {"model": model, "mesh": split, "data": {"sequence_length": 32}, "train": {"batch_size": 8}}
    )
    return build(config, jax.devices()[: 8 if mesh is not None else 1])


def parameters(program):
    """Large enough that attention and scores are far from uniform; no bias zero, no scale one."""

    def draw(path, leaf):
        random = np.random.default_rng(sum(map(ord, jax.tree_util.keystr(path))))
        name = path[-1].key
        if name in ("scale", "bias"):
            array = random.normal(name == "scale", 0.2, leaf.shape)
        else:
            array = random.normal(0, 0.3, leaf.shape)
        return jax.device_put(array.astype(np.float32), leaf.sharding)

    return jax.tree_util.tree_map_with_path(draw, program.parameters)


@functools.cache
def one_device(family):
    program = program_of(FAMILIES[family])
    return program, parameters(program)


@pytest.fixture(params=[pytest.param("gpt", marks=pytest.mark.full), "llama"])
def family(request):
    return request.param


@functools.cache
def scorer(family):
    """Scores after every token of a text of any length, without a cache: [CONTEXT, vocab]."""
    program, params = one_device(family)
    model = program.config.model

    @jax.jit
    def scores(params, tokens):
        positions = jnp.arange(CONTEXT)[None]
        batch = {"tokens": tokens[None], "positions": positions, "segments": jnp.ones_like(positions)}
        output = program.merge(params)(batch, Execution())
        return logits(output.hidden, output.table, vocab_size=model.vocab_size, softcap=model.logit_softcap)[
            0
        ]

    return lambda text: np.asarray(scores(params, np.resize(np.int32(text), CONTEXT)))


def greedy_without_cache(family, prompt, length):
    """The whole context computed again for every token; a full one begins anew with its last half."""
    text, seen = list(prompt), list(prompt)
    for _ in range(length):
        if len(seen) == CONTEXT:
            seen = seen[CONTEXT // 2 :]
        token = int(scorer(family)(seen)[len(seen) - 1].argmax())
        text.append(token)
        seen.append(token)
    return text[len(prompt) :]


def test_cached_text_is_the_one_computed_without_a_cache(family):
    program, params = one_device(family)
    texts = generate(program, params, PROMPTS, length=20)
    assert texts == [greedy_without_cache(family, prompt, 20) for prompt in PROMPTS]
    assert all(len(set(text)) > 5 for text in texts), "a text of one word proves little"


def test_a_prompt_is_continued_alike_alone_and_among_others(family):
    program, params = one_device(family)
    together = generate(program, params, PROMPTS, length=20)
    assert together == [generate(program, params, [prompt], length=20)[0] for prompt in PROMPTS]


@pytest.mark.parametrize("layout", MESHES)
def test_eight_devices_write_the_same_text_as_one(family, layout):
    program = program_of(FAMILIES[family], MESHES[layout])
    options = {"length": 12, "temperature": 1.0, "top_k": 30, "top_p": 0.95, "seed": 3}
    texts = generate(program, parameters(program), PROMPTS, **options)
    assert texts == generate(*one_device(family), PROMPTS, **options)


def test_bfloat16_stays_close_to_the_best_word():
    config = FAMILIES["llama"].model_copy(update={"dtype": "bfloat16"})
    program = program_of(config)
    texts = generate(program, parameters(program), PROMPTS, length=12)
    for prompt, text in zip(PROMPTS, texts, strict=True):
        scores = scorer("llama")([*prompt, *text])[len(prompt) - 1 : len(prompt) + 11]
        regret = scores.max(-1) - scores[np.arange(12), text]
        assert regret.max() < 0.3, "bfloat16 rounds scores that reach 5 by far less"


def test_text_ends_before_the_end_token():
    program, params = one_device("gpt")
    texts = generate(program, params, PROMPTS, length=20)
    end = next(token for token in texts[1][4:] if token not in texts[0])
    cut = [text[: text.index(end)] if end in text else text for text in texts]
    assert generate(program, params, PROMPTS, length=20, eos=end) == cut
    assert len(cut[1]) < 20 == len(cut[0])


def test_text_goes_on_beyond_the_context_from_its_last_half(family):
    program, params = one_device(family)
    prompts = [PROMPTS[0], (PROMPTS[2] * 3)[: CONTEXT - 5]]
    texts = generate(program, params, prompts, length=110)
    assert [len(text) for text in texts] == [110, 110]
    assert texts == [greedy_without_cache(family, prompt, 110) for prompt in prompts]


def test_beyond_the_context_too_a_drawn_text_does_not_depend_on_the_other_prompts():
    draw = functools.partial(generate, *one_device("gpt"), length=110, temperature=1.0, eos=[3, 7])
    long = (PROMPTS[2] * 3)[: CONTEXT - 5]
    texts = draw([PROMPTS[0], long])
    assert texts[0] == draw([PROMPTS[0]])[0] == draw([PROMPTS[0], [11]])[0]
    assert texts[1] == draw([[11], long])[1]


def test_the_last_place_of_the_context_can_be_filled():
    program, params = one_device("gpt")
    prompt = (PROMPTS[2] * 3)[: CONTEXT - 1]
    assert generate(program, params, [prompt], length=4) == [greedy_without_cache("gpt", prompt, 4)]


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_text_streams_as_it_is_generated_whole(chunk):
    program, params = one_device("gpt")
    options = {"length": 70, "temperature": 1.0, "seed": 5}
    end = generate(program, params, PROMPTS, **options)[1][60]
    whole = generate(program, params, PROMPTS, **options, eos=end)
    pieces = list(stream(program, params, PROMPTS, **options, eos=end, chunk=chunk))
    assert [list(itertools.chain(*column)) for column in zip(*pieces, strict=True)] == whole
    assert len({len(text) for text in whole}) > 1, "rows that end at one place prove little"
    assert max(len(tokens) for piece in pieces for tokens in piece) <= chunk


def test_any_of_several_tokens_ends_a_text():
    program, params = one_device("gpt")
    whole = generate(program, params, PROMPTS, length=20)
    ends = [whole[0][5], whole[1][9]]
    cut = [text[: min(map(text.index, set(ends) & set(text)), default=20)] for text in whole]
    assert generate(program, params, PROMPTS, length=20, eos=ends) == cut
    assert len(cut[0]) <= 5


def test_no_prompts_no_texts():
    assert generate(*one_device("gpt"), [], length=4) == []


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([1] * CONTEXT, r"prompt 1 has 48 tokens, but the context is model\.max_length=48"),
        ([1] * 90, r"prompt 1 has 90 tokens, but the context is model\.max_length=48"),
        ([], "prompt 1 is empty"),
        ([3, 61], "prompt 1 holds token 61, but the model's are 0 to 60"),
        ([-1], "prompt 1 holds token -1, but the model's are 0 to 60"),
    ],
)
def test_a_prompt_that_cannot_be_continued_is_refused(prompt, message):
    with pytest.raises(StackError, match=message):
        generate(*one_device("gpt"), [[1, 2], prompt], length=4)


@pytest.mark.parametrize("length", [0, -3])
def test_no_new_tokens_are_refused(length):
    with pytest.raises(StackError, match=f"length={length} asks for no new token; ask for at least 1"):
        generate(*one_device("gpt"), PROMPTS, length=length)


def test_few_prompt_lengths_are_compiled():
    widths = {pad([[1] * length], 200)[0].shape[1] for length in range(1, 201)}
    assert widths == {16, 32, 64, 128, 200}


def test_padding_stands_before_the_prompt():
    tokens, padding = pad([[7, 8, 9], [4]], 1024)
    assert tokens.tolist() == [[0] * 13 + [7, 8, 9], [0] * 15 + [4]]
    assert padding.tolist() == [13, 15]


SHARP = {
    "top 1": {"top_k": 1},
    "a tiny nucleus": {"top_p": 1e-6},
    "cold": {"temperature": 1e-4},
    "frozen": {"temperature": 1e-40},
    "as cold as a float32 can be": {"temperature": 1.2e-38},
}


@pytest.mark.parametrize("options", SHARP.values(), ids=SHARP)
def test_options_that_leave_one_word_are_greedy(options):
    program, params = one_device("gpt")
    greedy = generate(program, params, PROMPTS, length=8)
    assert generate(program, params, PROMPTS, **{"length": 8, "temperature": 5.0} | options) == greedy


@pytest.mark.parametrize("options", [{}, {"top_k": 4}, {"top_p": 0.6}], ids=str)
def test_words_are_drawn_as_often_as_their_probability(options):
    program, params = one_device("llama")
    rows, temperature = 4000, 0.7
    texts = generate(program, params, [PROMPTS[1]] * rows, length=1, temperature=temperature, **options)
    share = np.bincount(np.ravel(texts), minlength=61) / rows

    scores = scorer("llama")(PROMPTS[1])[len(PROMPTS[1]) - 1, :61].astype(np.float64) / temperature
    expected = np.exp(scores - scores.max())
    expected /= expected.sum()
    order = expected.argsort()[::-1]
    before = np.cumsum(expected[order]) - expected[order]
    kept = (np.arange(61) < options.get("top_k", 61)) & (before < options.get("top_p", 1.0))
    expected[order[~kept]] = 0.0
    expected /= expected.sum()

    assert (share[expected == 0] == 0).all()
    deviation = np.sqrt(expected * (1 - expected) / rows)
    assert (np.abs(share - expected) <= 5 * deviation + 1e-9).all()


def test_a_seed_gives_one_text_and_another_seed_another():
    draw = functools.partial(generate, *one_device("gpt"), PROMPTS, length=12, temperature=1.0)
    assert draw(seed=1) == draw(seed=1)
    assert draw(seed=1) != draw(seed=2)


def test_every_token_is_drawn_anew():
    """Where all words are as good as equal, one draw used again would be one word again and again."""
    for text in generate(*one_device("gpt"), PROMPTS, length=12, temperature=1000.0):
        assert len(set(text)) > 6


def test_a_drawn_text_does_not_depend_on_the_other_prompts():
    draw = functools.partial(generate, *one_device("gpt"), length=12, temperature=1.0)
    first, second, third = PROMPTS[0], PROMPTS[1], [11, 12]
    assert draw([first, second])[0] == draw([first, third])[0] == draw([first])[0]
    assert draw([first, third])[1] == draw([second, third])[1]


def test_a_prompt_given_twice_is_continued_in_two_ways():
    one, other = generate(*one_device("gpt"), [PROMPTS[0]] * 2, length=12, temperature=1.0)
    assert one != other
