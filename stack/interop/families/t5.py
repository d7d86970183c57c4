"""T5 of Hugging Face transformers, v1.0, v1.1 and flan, and mT5: its config both ways, its tensors by name.

transformers 5 says tie_word_embeddings=true of every T5 it saves, and tells v1.1 by scale_decoder_outputs;
before, v1.1 was told by tie_word_embeddings=false, as its authors publish it and as it is written here.
"""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from stack.config import EncoderDecoderConfig
from stack.config.errors import StackError
from stack.interop.config_reader import ConfigReader
from stack.interop.leaf import Leaf, Naming, linear, table, vector

_MLPS = {
    "relu": "relu",
    "gated-gelu": "geglu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gated-silu": "swiglu",
}
"""`feed_forward_proj` -> `mlp`."""

ALIASES = {
    "d_model": "hidden_size",
    "num_heads": "num_attention_heads",
    "num_layers": "num_hidden_layers",
    "d_kv": "head_dim",
}
"""Key -> its other name."""
ARCHITECTURES = (None, ["T5ForConditionalGeneration"], ["T5WithLMHeadModel"], ["MT5ForConditionalGeneration"])


def read(keys: ConfigReader) -> EncoderDecoderConfig:
    """The model of a config of T5."""
    return _read(keys, _T5, tied=keys.boolean("tie_word_embeddings", True))


def read_multilingual(keys: ConfigReader) -> EncoderDecoderConfig:
    """The model of a config of mT5: a T5 v1.1; versions of transformers disagree on one with a tied head."""
    keys.require("tie_word_embeddings", False)
    return _read(keys, _MT5, tied=False)


class _Defaults(NamedTuple):
    """What transformers takes for keys that are absent."""

    vocab_size: int
    mlp_dim: int
    layers: int
    heads: int
    mlp: str


_T5 = _Defaults(32128, 2048, 6, 8, "relu")
_MT5 = _Defaults(250112, 1024, 8, 6, "gated-gelu")


def _read(keys: ConfigReader, defaults: _Defaults, *, tied: bool) -> EncoderDecoderConfig:
    kind = keys.word("feed_forward_proj", tuple(_MLPS), defaults.mlp)
    # Both are made of it.
    keys.require("is_gated_act", kind.startswith("gated-"))
    keys.require("dense_act_fn", "gelu_new" if kind == "gated-gelu" else kind.removeprefix("gated-"))
    # What meets the embedding is scaled, what meets a head of its own is not.
    if keys.boolean("scale_decoder_outputs", tied) != tied:
        raise keys.error(
            "scale_decoder_outputs",
            f"is of a T5 whose head is {'its own' if tied else 'the embedding'}, as transformers 5 saves one;"
            f" set tie_word_embeddings={'false' if tied else 'true'}",
        )
    dropout = keys.number("dropout_rate", 0.1)
    return EncoderDecoderConfig(
        vocab_size=keys.integer("vocab_size", defaults.vocab_size),
        # T5 has no longest text; this is what it was trained on.
        max_length=keys.integer("n_positions", 512),
        num_layers=keys.integer("num_layers", defaults.layers),
        num_decoder_layers=keys.optional_integer("num_decoder_layers"),
        embed_dim=keys.integer("d_model", 512),
        num_heads=keys.integer("num_heads", defaults.heads),
        head_dim=keys.integer("d_kv", 64),
        mlp_dim=keys.integer("d_ff", defaults.mlp_dim),
        norm="rmsnorm",
        norm_epsilon=keys.number("layer_norm_epsilon", 1e-6),
        mlp=_MLPS[kind],
        position="relative",
        relative_buckets=keys.integer("relative_attention_num_buckets", 32),
        relative_max_distance=keys.integer("relative_attention_max_distance", 128),
        start_token=keys.integer("decoder_start_token_id", 0, least=0),
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
        attention_scale=1.0,
        tied_embeddings=tied,
        embedding_dropout=dropout,
        attention_dropout=dropout,
        residual_dropout=dropout,
        init="fan_in",
        init_std=keys.number("initializer_factor", 1.0),
        scale_residual_init=False,
    )


def write(config: EncoderDecoderConfig) -> dict[str, Any]:
    """The keys of a model that `check` passes; the inverse of `read`."""
    kinds = {mlp: kind for kind, mlp in _MLPS.items()}
    return {
        "n_positions": config.max_length,
        "num_layers": config.num_layers,
        "num_decoder_layers": config.decoder_layers,
        "d_model": config.embed_dim,
        "num_heads": config.num_heads,
        "d_kv": config.head_width,
        "d_ff": config.mlp_width,
        "layer_norm_epsilon": config.norm_epsilon,
        "feed_forward_proj": kinds[config.mlp],
        "relative_attention_num_buckets": config.relative_buckets,
        "relative_attention_max_distance": config.relative_max_distance,
        "decoder_start_token_id": config.start_token,
        # What is written begins after it, and transformers fills rows up with it.
        "pad_token_id": config.start_token,
        "is_encoder_decoder": True,
        "dropout_rate": config.residual_dropout,
        "initializer_factor": config.init_std if config.init == "fan_in" else 1.0,
    }


def check(config: EncoderDecoderConfig) -> None:
    """Refuses a model that transformers' T5 does not compute.

    Raises:
        StackError: with the field and its value there.
    """
    required: dict[str, Any] = {
        "position": "relative",
        "norm": "rmsnorm",
        "norm_placement": "pre",
        "attention_scale": 1.0,
        "scale_output": True,
        **dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias", "qk_norm"), False),
        **dict.fromkeys(("sliding_window", "attention_softcap", "logit_softcap")),
        "kv_heads": config.num_heads,
    }
    for field, value in required.items():
        if getattr(config, field) != value:
            theirs = f"transformers' T5 has {field}={value}"
            raise StackError(
                f"model.{field}={getattr(config, field)}: {theirs}; this model has no counterpart there"
            )


def leaves(config: EncoderDecoderConfig) -> list[Leaf]:
    """Every leaf of the model."""
    made = [table("embed", EMBEDDING, config.vocab_size, config, of_words=True)]
    if not config.tied_embeddings:
        made.append(table("head", "lm_head.weight", config.vocab_size, config, of_words=True))
    made += [vector(path, name, (config.embed_dim,)) for path, name in _norms()]
    shape = (config.relative_buckets, config.num_heads)
    made += [Leaf(path=path, name=name, slice_shape=shape, matrix=shape) for path, name in _tables()]
    for path, name, inputs, outputs in _linears(config):
        made += linear(path, name, inputs, outputs, bias=False, transposed=True)
    return made


def naming(config: EncoderDecoderConfig) -> Naming:
    """How its checkpoints name their tensors."""
    remedies = dict.fromkeys(_COPIES, "take a checkpoint of one embedding")
    if config.tied_embeddings:
        remedies["lm_head.weight"] = "set tie_word_embeddings=false in config.json"
    return Naming(
        embedding=EMBEDDING,
        heads=("lm_head.", "encoder.", "decoder."),
        repeats=dict.fromkeys(remedies, EMBEDDING),
        remedies=remedies,
        constants=_UNREAD,
    )


def _linears(
    config: EncoderDecoderConfig,
) -> Iterator[tuple[str, str, tuple[int, ...], tuple[int, ...]]]:
    """Every matrix: its path, its tensor, the shapes of its inputs and outputs."""
    width, inner, heads = (config.embed_dim,), (config.mlp_width,), (config.num_heads, config.head_width)
    ups = {"gate": "wi_0", "up": "wi_1"} if config.gated else {"up": "wi"}
    for side, attentions in _ATTENTIONS.items():
        for number, (ours, theirs) in enumerate(attentions):
            path, name = f"{side}/layers/{ours}", f"{side}.block.{{}}.layer.{number}.{theirs}"
            for one, other in (("query", "q"), ("key", "k"), ("value", "v")):
                yield f"{path}/{one}", f"{name}.{other}", width, heads
            yield f"{path}/out", f"{name}.o", heads, width
        path, name = f"{side}/layers/mlp", f"{side}.block.{{}}.layer.{len(attentions)}.DenseReluDense"
        for one, other in ups.items():
            yield f"{path}/{one}", f"{name}.{other}", width, inner
        yield f"{path}/down", f"{name}.wo", inner, width


def _norms() -> Iterator[tuple[str, str]]:
    """Every scale of a norm: its path and its tensor."""
    for side, attentions in _ATTENTIONS.items():
        for number, ours in enumerate([*(ours for ours, _ in attentions), "mlp"]):
            yield f"{side}/layers/{ours}_norm/scale", f"{side}.block.{{}}.layer.{number}.layer_norm.weight"
        yield f"{side}/final_norm/scale", f"{side}.final_layer_norm.weight"


def _tables() -> Iterator[tuple[str, str]]:
    """The relative biases, [buckets, heads]: transformers keeps a stack's in its first block."""
    for side in _ATTENTIONS:
        name = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        yield f"{side}/relative/table", name


_SELF = ("attention", "SelfAttention")
_ATTENTIONS = {"encoder": (_SELF,), "decoder": (_SELF, ("cross", "EncDecAttention"))}
"""The attentions of a block, in order: our name, and theirs."""

EMBEDDING = "shared.weight"
_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
"""Of the embedding, which some checkpoints repeat."""
_UNREAD = re.compile(r"^decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight$")
"""In the first checkpoints of T5, and read by no version."""
