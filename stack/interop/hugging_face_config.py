"""Configs of Hugging Face transformers: GPT-2, Llama, Mistral, Qwen, Gemma, BERT, RoBERTa and T5.

One rule holds for every key of a `config.json`: it is read, or it is known not to change what the model
computes, or it is refused by name. A key means what it means to transformers 5.24; two keys that
contradict each other are refused, as its versions do not agree on which one wins.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from stack.config import DecoderConfig, EncoderConfig, EncoderDecoderConfig, RopeConfig
from stack.config.errors import ConfigError, StackError
from stack.interop.activations import FROM_HF
from stack.interop.config_reader import ConfigReader
from stack.interop.families import bert, t5

_HARMLESS = frozenset(
    (
        # Where the config comes from, and what it is stored and computed in: Stack has settings of its own.
        *("_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "transformers.js_config"),
        *("torch_dtype", "dtype", "use_bfloat16", "torchscript", "unsloth_fixed", "unsloth_version"),
        # Tokens, which belong to the tokenizer. transformers gives the row of Llama's and Qwen's padding
        # token no gradient where it is read; Stack packs text and reads no padding.
        *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id"),
        *("tokenizer_class", "prefix"),
        # What a call returns, remembers or recomputes.
        *("use_cache", "output_attentions", "output_hidden_states", "return_dict", "output_past"),
        *("gradient_checkpointing", "chunk_size_feed_forward", "is_decoder"),
        *("_attn_implementation_autoset", "_flash_attn_2_enabled"),
        # Heads of other tasks: `architectures` is that of a language model.
        *("num_labels", "_num_labels", "id2label", "label2id", "problem_type", "finetuning_task"),
        *("task_specific_params", "classifier_dropout", "tf_legacy_loss"),
        # Generation, of which Stack takes the settings with each call.
        *("max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups"),
        *("diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty"),
        *("length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids"),
        *("num_return_sequences", "output_scores", "return_dict_in_generate", "remove_invalid_values"),
        *("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty"),
        *("suppress_tokens", "begin_suppress_tokens"),
    )
)
"""Keys that change no number of a causal language model, at any value."""

_LOCAL, _GLOBAL = "sliding_attention", "full_attention"
_KINDS = {_LOCAL: "local", _GLOBAL: "global"}
_TYPE = {"rope_type": "type"}

_ATTENTION = (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "is_causal": (True,),
    "quantization_config": (None,),
    "compression_config": (None,),
    "auto_map": (None, {}),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({}, None),
    "attn_implementation": _ATTENTION,
    "_attn_implementation": _ATTENTION,
}
"""Keys that change numbers, and the values at which they do not."""


def config_from_hf(
    hf_config: Mapping[str, Any], names: Collection[str] | None = None
) -> DecoderConfig | EncoderConfig | EncoderDecoderConfig:
    """The model that a transformers `config.json` describes.

    Absent keys have transformers' defaults, dropout included. How the model is computed (`dtype`,
    `attention`, `scan_unroll`, `vocab_multiple`) is left at Stack's defaults.

    Args:
        hf_config: what it holds.
        names: of the checkpoint's tensors, by which it is told what heads an encoder has; None: one over
            words, and no pooler.

    Raises:
        StackError: an architecture or an option that Stack does not have, a key that it does not know, a
            value of the wrong type, or two keys that contradict each other.
    """
    name = ConfigReader(hf_config).word("model_type", tuple(_FAMILIES))
    family = _FAMILIES[name]
    keys = ConfigReader(hf_config, aliases=family.aliases)
    keys.allow({"model_type"} | _HARMLESS | family.harmless)
    for key, values in {**_NEUTRAL, **family.neutral}.items():
        keys.require(key, *values)
    try:
        config = family.read(keys)
    except ConfigError as error:
        raise StackError(f"Hugging Face config: {error}") from None
    keys.refuse_the_rest()
    if isinstance(config, EncoderConfig) and names is not None:
        return bert.with_heads(config, names)
    return config


def _gpt2(keys: ConfigReader) -> DecoderConfig:
    max_length = keys.integer("n_positions", 1024)
    # The size of the causal mask in transformers before 4; read nowhere since.
    keys.require("n_ctx", max_length)
    init_std = keys.number("initializer_range", 0.02)
    return DecoderConfig(
        vocab_size=keys.integer("vocab_size", 50257),
        max_length=max_length,
        num_layers=keys.integer("n_layer", 12),
        embed_dim=keys.integer("n_embd", 768),
        num_heads=keys.integer("n_head", 12),
        mlp_dim=keys.optional_integer("n_inner"),
        norm="layernorm",
        norm_epsilon=keys.number("layer_norm_epsilon", 1e-5),
        mlp=FROM_HF[keys.word("activation_function", tuple(FROM_HF), "gelu_new")],
        position="learned",
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        tied_embeddings=keys.boolean("tie_word_embeddings", True),
        embedding_dropout=keys.number("embd_pdrop", 0.1),
        attention_dropout=keys.number("attn_pdrop", 0.1),
        residual_dropout=keys.number("resid_pdrop", 0.1),
        init_std=init_std,
        position_init_std=init_std,
        scale_residual_init=True,
    )


def _llama(keys: ConfigReader) -> DecoderConfig:
    attention_bias = keys.boolean("attention_bias", False)
    return DecoderConfig(
        **_swiglu(keys, max_length=2048),
        num_kv_heads=keys.optional_integer("num_key_value_heads"),
        head_dim=keys.optional_integer("head_dim"),
        qkv_bias=attention_bias,
        out_bias=attention_bias,
        mlp_bias=keys.boolean("mlp_bias", False),
    )


def _mistral(keys: ConfigReader) -> DecoderConfig:
    return DecoderConfig(
        **_swiglu(keys, max_length=131072),
        num_kv_heads=keys.optional_integer("num_key_value_heads", 8),
        head_dim=keys.optional_integer("head_dim"),
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
        sliding_window=keys.optional_integer("sliding_window", 4096),
    )


def _qwen2(keys: ConfigReader) -> DecoderConfig:
    return DecoderConfig(
        **_swiglu(keys, max_length=32768),
        num_kv_heads=keys.optional_integer("num_key_value_heads", 32),
        head_dim=keys.optional_integer("head_dim"),
        qkv_bias=True,
        out_bias=False,
        mlp_bias=False,
        **_qwen_windows(keys),
    )


def _qwen3(keys: ConfigReader) -> DecoderConfig:
    attention_bias = keys.boolean("attention_bias", False)
    return DecoderConfig(
        **_swiglu(keys, max_length=32768),
        num_kv_heads=keys.optional_integer("num_key_value_heads", 32),
        head_dim=keys.integer("head_dim", 128),
        qkv_bias=attention_bias,
        out_bias=attention_bias,
        mlp_bias=False,
        qk_norm=True,
        **_qwen_windows(keys),
    )


def _gemma2(keys: ConfigReader) -> DecoderConfig:
    shared = _gemma(keys, max_length=8192, logit_softcap=30.0)
    return DecoderConfig(
        **shared,
        rope=_rope(keys, shared["max_length"]),
        attention_softcap=keys.optional_number("attn_logit_softcapping", 50.0),
        **_windows(
            keys,
            window=keys.optional_integer("sliding_window", 4096),
            kinds=[_GLOBAL if layer % 2 else _LOCAL for layer in range(shared["num_layers"])],
        ),
    )


def _gemma3(keys: ConfigReader) -> DecoderConfig:
    shared = _gemma(keys, max_length=131072, logit_softcap=None)
    every = keys.integer("sliding_window_pattern", 6)
    kinds = [_LOCAL if (layer + 1) % every else _GLOBAL for layer in range(shared["num_layers"])]
    if keys.has("sliding_window_pattern") and keys.words("layer_types", tuple(_KINDS)) not in (None, kinds):
        raise keys.error(
            "sliding_window_pattern", "and layer_types contradict each other; keep the right one"
        )
    windows = _windows(keys, window=keys.optional_integer("sliding_window", 4096), kinds=kinds)
    rope, local = _gemma3_ropes(keys, shared["max_length"])
    return DecoderConfig(
        **shared,
        qk_norm=True,
        rope=rope,
        local_rope_theta=local.theta if windows and local != rope else None,
        **windows,
    )


def _gemma(keys: ConfigReader, *, max_length: int, logit_softcap: float | None) -> dict[str, Any]:
    """What both Gemmas share, with the family's defaults of the context and the cap."""
    attention_bias = keys.boolean("attention_bias", False)
    keys.word("hidden_activation", ("gelu_pytorch_tanh",), "gelu_pytorch_tanh")
    head_dim, divisor = keys.integer("head_dim", 256), keys.integer("query_pre_attn_scalar", 256)
    return _rotary(keys, max_length=max_length, tied=True) | {
        "num_kv_heads": keys.integer("num_key_value_heads", 4),
        "head_dim": head_dim,
        "norm": "rmsnorm_zero_centered",
        "norm_placement": "both",
        "mlp": "geglu",
        "qkv_bias": attention_bias,
        "out_bias": attention_bias,
        "mlp_bias": False,
        "attention_scale": None if divisor == head_dim else divisor**-0.5,
        "logit_softcap": keys.optional_number("final_logit_softcapping", logit_softcap),
        "scale_embedding": True,
    }


def _swiglu(keys: ConfigReader, *, max_length: int) -> dict[str, Any]:
    """What Llama, Mistral and Qwen share, with the family's default of the context."""
    # ACT2FN has SiLU under both names.
    keys.word("hidden_act", ("silu", "swish"), "silu")
    shared = _rotary(keys, max_length=max_length, tied=False)
    return shared | {"norm": "rmsnorm", "mlp": "swiglu", "rope": _rope(keys, shared["max_length"])}


def _rotary(keys: ConfigReader, *, max_length: int, tied: bool) -> dict[str, Any]:
    """What all but GPT-2 share, with the family's defaults of the context and of tied embeddings."""
    return {
        "vocab_size": keys.integer("vocab_size"),
        "max_length": keys.integer("max_position_embeddings", max_length),
        "num_layers": keys.integer("num_hidden_layers"),
        "embed_dim": keys.integer("hidden_size"),
        "num_heads": keys.integer("num_attention_heads"),
        "mlp_dim": keys.integer("intermediate_size"),
        "norm_epsilon": keys.number("rms_norm_eps", 1e-6),
        "position": "rotary",
        "tied_embeddings": keys.boolean("tie_word_embeddings", tied),
        "attention_dropout": keys.number("attention_dropout", 0.0),
        "init_std": keys.number("initializer_range", 0.02),
        "scale_residual_init": False,
    }


def _rope(keys: ConfigReader, max_length: int) -> RopeConfig:
    """The rotation of `rope_parameters` (transformers 5) or of `rope_theta` with `rope_scaling` (before).

    transformers 4 reads the second alone, and 5 the second first, so where both are there they must agree.
    """
    sections = [keys.section(key, aliases=_TYPE) for key in ("rope_parameters", "rope_scaling")]
    return _one_rope(sections, keys, max_length)


def _gemma3_ropes(keys: ConfigReader, max_length: int) -> tuple[RopeConfig, RopeConfig]:
    """Of the layers that see all and of those with a window.

    In `rope_parameters` each has its group (transformers 5); before, `rope_scaling` was of the former.
    """
    both = keys.section("rope_parameters")
    groups = {kind: both.section(kind, aliases=_TYPE) if both else None for kind in _KINDS}
    if both:
        both.refuse_the_rest()
    whole = [groups[_GLOBAL], keys.section("rope_scaling", aliases=_TYPE)]
    rope = _one_rope(whole, keys, max_length, theta=1_000_000.0)
    local = _one_rope([groups[_LOCAL]], keys, max_length, beside="rope_local_base_freq")
    if local.scaling != "none" and local != rope:
        raise keys.error(
            "rope_parameters", "stretches sliding_attention by itself, which Stack does not have"
        )
    return rope, local


def _one_rope(
    sections: Sequence[ConfigReader | None],
    keys: ConfigReader,
    max_length: int,
    *,
    theta: float = 10_000.0,
    beside: str = "rope_theta",
) -> RopeConfig:
    """The rotation that every group of options describes, with the base's default and name beside them."""
    keys.require("partial_rotary_factor", 1.0, None)
    groups = [options for options in sections if options] or [ConfigReader({})]
    ropes = [_rope_of(options, keys, max_length, theta, beside) for options in groups]
    if ropes[0] != ropes[-1]:
        raise keys.error("rope_scaling", "and rope_parameters describe two rotations; keep the right one")
    return ropes[0]


def _rope_of(
    options: ConfigReader, keys: ConfigReader, max_length: int, theta: float, beside: str
) -> RopeConfig:
    """The rotation that one group of options describes, with what stands beside them."""
    options.require("partial_rotary_factor", 1.0)
    theta = _inside_or_beside(ConfigReader.number, options, keys, "rope_theta", theta, beside=beside)
    match options.word("rope_type", ("default", "linear", "llama3", "yarn"), "default"):
        case "llama3":
            rope = RopeConfig(
                theta=theta,
                scaling="llama3",
                factor=options.number("factor"),
                low_frequency_factor=options.number("low_freq_factor"),
                high_frequency_factor=options.number("high_freq_factor"),
                original_length=_inside_or_beside(
                    ConfigReader.integer, options, keys, "original_max_position_embeddings"
                ),
            )
        case "yarn":
            rope = RopeConfig(
                theta=theta,
                scaling="yarn",
                factor=options.number("factor"),
                original_length=_inside_or_beside(
                    ConfigReader.integer, options, keys, "original_max_position_embeddings", max_length
                ),
                fast_turns=options.optional_number("beta_fast") or 32.0,
                slow_turns=options.optional_number("beta_slow") or 1.0,
                whole_channels=options.boolean("truncate", True),
                attention_factor=options.optional_number("attention_factor"),
            )
        case "linear":
            rope = RopeConfig(theta=theta, scaling="linear", factor=options.number("factor"))
        case _:
            rope = RopeConfig(theta=theta)
    # Beside the options only `llama3` and `yarn` read it.
    keys.allow(["original_max_position_embeddings"])
    options.refuse_the_rest()
    return rope


def _inside_or_beside[Number](
    read: Callable[..., Number],
    options: ConfigReader,
    keys: ConfigReader,
    key: str,
    *default: Number,
    beside: str | None = None,
) -> Number:
    """A number that transformers looks for in the options, then beside them; both must agree."""
    places = (options, key), (keys, beside or key)
    values = {read(reader, name) for reader, name in places if reader.has(name)}
    if len(values) > 1:
        raise options.error(key, f"and {beside or key} beside it name one thing; keep the right one")
    return values.pop() if values else read(options, key, *default)


def _qwen_windows(keys: ConfigReader) -> dict[str, Any]:
    """Qwen's window, of the layers from one on where `layer_types` does not say."""
    num_layers = keys.integer("num_hidden_layers")
    first = min(keys.integer("max_window_layers", 28, least=0), num_layers)
    window = keys.optional_integer("sliding_window", 4096)
    if not keys.boolean("use_sliding_window", False):
        window = None
    first = num_layers if window is None else first
    return _windows(keys, window=window, kinds=[_GLOBAL] * first + [_LOCAL] * (num_layers - first))


def _windows(keys: ConfigReader, *, window: int | None, kinds: list[str]) -> dict[str, Any]:
    """The window and the layers that have it, as `layer_types` says, or else `kinds`."""
    num_layers = len(kinds)
    given = keys.words("layer_types", tuple(_KINDS))
    if given is not None and len(given) != num_layers:
        raise keys.error("layer_types", f"has {len(given)} entries, but num_hidden_layers is {num_layers}")
    pattern = [_KINDS[kind] for kind in (kinds if given is None else given)]
    if "local" not in pattern:
        return {}
    if window is None:
        raise keys.error(
            "sliding_window" if given is None else "layer_types",
            "needs a window, but sliding_window is null or use_sliding_window false; keep the right one",
        )
    return {"sliding_window": window, "attention_pattern": _shortest(pattern)}


def _shortest(pattern: list[str]) -> list[str]:
    """What repeats, where it may end anywhere."""
    lengths = range(1, len(pattern) + 1)
    length = next(n for n in lengths if all(kind == pattern[i % n] for i, kind in enumerate(pattern)))
    return pattern[:length]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Family:
    """How the keys of one `model_type` are read."""

    read: Callable[[ConfigReader], DecoderConfig | EncoderConfig | EncoderDecoderConfig]
    """Makes the model, asking for every key it depends on."""
    neutral: Mapping[str, tuple[Any, ...]]
    """As `_NEUTRAL`."""
    harmless: frozenset[str] = frozenset()
    """As `_HARMLESS`."""
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Key -> its other name: transformers' `attribute_map`, turned round."""


# How transformers keeps keys and values, and what it makes of `sliding_window_pattern`.
_CACHE = frozenset(["cache_implementation", "_sliding_window_pattern"])

_FAMILIES = {
    "gpt2": _Family(
        read=_gpt2,
        neutral={
            "architectures": (None, ["GPT2LMHeadModel"], ["GPT2Model"]),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "n_special": (0,),
        },
        harmless=frozenset(
            (
                # The head of GPT2DoubleHeadsModel.
                *("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels"),
                *("summary_first_dropout", "summary_last_dropout", "predict_special_tokens"),
                # The order of two multiplications, for half precision.
                "reorder_and_upcast_attn",
            )
        ),
        aliases={
            "n_embd": "hidden_size",
            "n_positions": "max_position_embeddings",
            "n_head": "num_attention_heads",
            "n_layer": "num_hidden_layers",
        },
    ),
    "llama": _Family(
        read=_llama,
        neutral={
            "architectures": (None, ["LlamaForCausalLM"], ["LlamaModel"]),
            "sliding_window": (None,),
            "rope_interleaved": (False,),
            "is_llama_config": (True,),
        },
        # Old versions split matrix products into this many parts; the sums are the same.
        harmless=frozenset(["pretraining_tp"]),
    ),
    "mistral": _Family(
        read=_mistral, neutral={"architectures": (None, ["MistralForCausalLM"], ["MistralModel"])}
    ),
    "qwen2": _Family(
        read=_qwen2,
        neutral={
            "architectures": (None, ["Qwen2ForCausalLM"], ["Qwen2Model"]),
            "use_mrope": (False,),
        },
    ),
    "qwen3": _Family(read=_qwen3, neutral={"architectures": (None, ["Qwen3ForCausalLM"], ["Qwen3Model"])}),
    "gemma2": _Family(
        read=_gemma2,
        neutral={
            "architectures": (None, ["Gemma2ForCausalLM"], ["Gemma2Model"]),
            "use_bidirectional_attention": (None, False),
            # Read nowhere; `hidden_activation` is.
            "hidden_act": ("gelu_pytorch_tanh",),
        },
        harmless=_CACHE,
    ),
    "gemma3_text": _Family(
        read=_gemma3,
        neutral={
            "architectures": (None, ["Gemma3ForCausalLM"], ["Gemma3TextModel"]),
            "use_bidirectional_attention": (None, False),
            # transformers has the key and caps nothing.
            "attn_logit_softcapping": (None,),
        },
        harmless=_CACHE,
    ),
    **{
        name: _Family(
            read=read,
            neutral={**bert.NEUTRAL, "architectures": bert.architectures(name)},
            harmless=bert.HARMLESS,
        )
        for name, read in (("bert", bert.read_bert), ("roberta", bert.read_roberta))
    },
    "t5": _Family(
        read=t5.read,
        neutral={"architectures": t5.ARCHITECTURES, "is_encoder_decoder": (True,)},
        aliases=t5.ALIASES,
    ),
    "mt5": _Family(
        read=t5.read_multilingual,
        neutral={"architectures": t5.ARCHITECTURES, "is_encoder_decoder": (True,)},
        aliases=t5.ALIASES,
    ),
}
