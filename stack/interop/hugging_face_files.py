"""What lies beside the weights in a folder of transformers: config, tokenizer, how text is generated."""

import json
from pathlib import Path
from typing import Any

from stack.config import (
    Config,
    DecoderConfig,
    EncoderConfig,
    EncoderDecoderConfig,
    LanguageConfig,
    MaskedConfig,
    RopeConfig,
)
from stack.data.tokenizer import BYTE_MARKS, FILE, Tokenizer, load_tokenizer
from stack.data.words import bytes_as_bpe
from stack.inference.text import end_tokens
from stack.interop.activations import TO_HF
from stack.interop.families import bert, t5
from stack.interop.hugging_face import family_of, query_pre_attn_scalar
from stack.objectives import build as build_objective

_ARCHITECTURES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "t5": "T5ForConditionalGeneration",
}


def config_to_hf(config: LanguageConfig) -> dict[str, Any]:
    """The `config.json` of a model: the inverse of `config_from_hf`, but for what only training needs.

    Raises:
        StackError: transformers has no model for it.
    """
    family = family_of(config)
    architecture = bert.architecture(config) if isinstance(config, EncoderConfig) else _ARCHITECTURES[family]
    shared: dict[str, Any] = {
        "model_type": family,
        "architectures": [architecture],
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tied_embeddings,
    }
    if isinstance(config, EncoderDecoderConfig):
        return shared | t5.write(config)
    shared["initializer_range"] = config.init_std
    if isinstance(config, EncoderConfig):
        return shared | bert.write(config)
    assert isinstance(config, DecoderConfig), "of these families"
    if family == "gpt2":
        return shared | _gpt2(config)
    return shared | (_gemma(config, family) if family.startswith("gemma") else _llama(config, family))


def write_files(folder: Path, config: Config, tokenizer: Tokenizer, dtype: str) -> list[str]:
    """Writes config.json, generation_config.json of what writes text, tokenizer.json and its config.

    A tokenizer that neither begins nor ends a text by itself is told to do as the rows of training did: a
    text that is gone on with begins with the mark that begins a document, one that is read whole ends with
    its end.

    Returns:
        What a person should know.

    Raises:
        OSError: they cannot be written.
        StackError: the tokenizer lacks a token that ends a text, or has one that the model's class takes for
            padding.
    """
    marks = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos}
    model: dict[str, Any] = config_to_hf(config.model) | marks | {"dtype": dtype, "torch_dtype": dtype}
    _write_json(folder / "config.json", model)
    if isinstance(config.model, EncoderConfig):
        bert.check_padding(config.model, tokenizer)
    else:
        names = ("decoder_start_token_id", "pad_token_id")
        starts = {name: model[name] for name in names if model.get(name) is not None}
        _write_json(folder / "generation_config.json", marks | starts | _generation(config, tokenizer))
    if tokenizer.fingerprint == "bytes":
        own = bytes_as_bpe()
        # The special words that the model has rows for.
        own.add_special_tokens(list(BYTE_MARKS[: max(0, config.model.vocab_size - tokenizer.vocab_size)]))
        own.save(str(folder / FILE))
        tokenizer = load_tokenizer(str(folder / FILE))
    tokenizer.save(folder)
    if build_objective(config).continues:
        _mark_texts(folder / FILE, begin=tokenizer.bos)
    else:
        _mark_texts(folder / FILE, end=tokenizer.eos)
    names = json.loads((folder / "tokenizer_config.json").read_text())
    if isinstance(config.model, EncoderConfig):
        masks = isinstance(config.objective, MaskedConfig)
        names |= bert.named_words(config.model, tokenizer, config.objective.mask_token if masks else None)
    more = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.model.max_length}
    _write_json(folder / "tokenizer_config.json", names | more)
    return _notes(model["model_type"], json.loads((folder / FILE).read_text()))


def _generation(config: Config, tokenizer: Tokenizer) -> dict[str, Any]:
    """How text is generated."""
    ends = end_tokens(tokenizer, config)
    sample: dict[str, Any] = {"do_sample": config.sample.temperature > 0}
    if sample["do_sample"]:
        sample |= {"temperature": config.sample.temperature, "top_p": config.sample.top_p}
        sample["top_k"] = config.sample.top_k or 0
    return {"eos_token_id": ends if len(ends) > 1 else ends[0]} | sample


def _notes(family: str, tokenizer: dict[str, Any]) -> list[str]:
    """What transformers 5 makes of a tokenizer that is not its family's."""
    pieces = (tokenizer.get("pre_tokenizer") or {}).get("pretokenizers", [{}])
    if family == "qwen2" and pieces[0].get("type") != "Split":
        told = "AutoTokenizer cuts text as Qwen's own tokenizer does, whatever tokenizer.json says of a qwen2"
        return [f"{told}; load this one with PreTrainedTokenizerFast.from_pretrained"]
    return []


def _gpt2(config: DecoderConfig) -> dict[str, Any]:
    return {
        "n_positions": config.max_length,
        "n_embd": config.embed_dim,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.mlp_dim,
        "activation_function": TO_HF[config.mlp],
        "layer_norm_epsilon": config.norm_epsilon,
        "embd_pdrop": config.embedding_dropout,
        "attn_pdrop": config.attention_dropout,
        "resid_pdrop": config.residual_dropout,
    }


def _rotary(config: DecoderConfig) -> dict[str, Any]:
    """What all but GPT-2 share."""
    return {
        "max_position_embeddings": config.max_length,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "rms_norm_eps": config.norm_epsilon,
        "attention_dropout": config.attention_dropout,
        "rope_theta": config.rope.theta,
        "rope_scaling": _rope_scaling(config.rope),
    }


def _llama(config: DecoderConfig, family: str) -> dict[str, Any]:
    keys = _rotary(config) | {"hidden_act": "silu"}
    window = config.window
    if family == "mistral":
        return keys | {"sliding_window": window}
    if family != "qwen2":
        keys["attention_bias"] = config.qkv_bias
    if family == "llama":
        return keys | {"mlp_bias": config.mlp_bias}
    if window is None:
        return keys | {"use_sliding_window": False, "sliding_window": None, "max_window_layers": 0}
    keys |= {"use_sliding_window": True, "sliding_window": window, "layer_types": _layer_types(config)}
    # Of which layer on, for versions that do not know `layer_types`.
    return keys | {"max_window_layers": config.local_layers.index(True)}


def _gemma(config: DecoderConfig, family: str) -> dict[str, Any]:
    keys = _rotary(config) | {
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": config.qkv_bias,
        "query_pre_attn_scalar": query_pre_attn_scalar(config),
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logit_softcap,
        # A number there must be, also where no layer has a window.
        "sliding_window": config.window or config.max_length,
        "layer_types": _layer_types(config),
        # Else it is 0, and that row of the embedding gets no gradient where it is read.
        "pad_token_id": None,
    }
    if family == "gemma2":
        return keys
    # Before `layer_types` every n-th layer saw all.
    every = [*config.local_layers, False].index(False) + 1
    if list(config.local_layers) == [(layer + 1) % every > 0 for layer in range(config.num_layers)]:
        keys["sliding_window_pattern"] = every
    if config.local_rope_theta or config.rope.scaling == "none":
        return keys | {"rope_local_base_freq": config.local_rope_theta or config.rope.theta}
    # Of both kinds, which only versions 5 have a place for.
    rope = {"rope_theta": keys.pop("rope_theta")} | keys.pop("rope_scaling")
    return keys | {"rope_parameters": {"full_attention": rope, "sliding_attention": rope}}


def _layer_types(config: DecoderConfig) -> list[str]:
    return ["sliding_attention" if local else "full_attention" for local in config.local_layers]


def _rope_scaling(rope: RopeConfig) -> dict[str, Any] | None:
    if rope.scaling == "none":
        return None
    options: dict[str, Any] = {"rope_type": rope.scaling, "factor": rope.factor}
    if rope.scaling == "llama3":
        options |= {
            "low_freq_factor": rope.low_frequency_factor,
            "high_freq_factor": rope.high_frequency_factor,
            "original_max_position_embeddings": rope.original_length,
        }
    if rope.scaling == "yarn":
        options |= {
            "beta_fast": rope.fast_turns,
            "beta_slow": rope.slow_turns,
            "original_max_position_embeddings": rope.original_length,
        }
        # What versions 4 do not know, where they need not.
        options |= {} if rope.whole_channels else {"truncate": False}
        options |= {} if rope.attention_factor is None else {"attention_factor": rope.attention_factor}
    return options


def _mark_texts(path: Path, *, begin: int | None = None, end: int | None = None) -> None:
    """A text begins, or ends, with a token, where the tokenizer does not say otherwise."""
    import tokenizers
    from tokenizers import processors

    model = tokenizers.Tokenizer.from_file(str(path))
    if model.post_processor is None:
        names = {number: model.id_to_token(number) for number in (begin, end) if number is not None}
        single = [names[begin], "$A"] if begin is not None else ["$A", *names.values()]
        words = [(name, number) for number, name in names.items()]
        model.post_processor = processors.TemplateProcessing(  # pyrefly: ignore
            single=single, special_tokens=words
        )
        model.save(str(path))


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
