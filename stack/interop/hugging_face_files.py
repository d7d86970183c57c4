"""What lies beside the weights in a folder of transformers: config, tokenizer, how text is generated."""

import json
from pathlib import Path
from typing import Any

from stack.config import Config, DecoderConfig, EncoderDecoderConfig, LanguageConfig, RopeConfig
from stack.data.tokenizer import BYTE_MARKS, END_OF_DOCUMENT, FILE, Tokenizer, load_tokenizer
from stack.inference.text import end_tokens
from stack.interop import t5
from stack.interop.hugging_face import family_of
from stack.objectives import build as build_objective

_ARCHITECTURES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "t5": "T5ForConditionalGeneration",
}


def config_to_hf(config: LanguageConfig) -> dict[str, Any]:
    """The `config.json` of a model: the inverse of `config_from_hf`, but for what only training needs.

    Raises:
        StackError: transformers has no model for it.
    """
    family = family_of(config)
    shared = {
        "model_type": family,
        "architectures": [_ARCHITECTURES[family]],
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tied_embeddings,
    }
    if isinstance(config, EncoderDecoderConfig):
        return shared | t5.write(config)
    assert isinstance(config, DecoderConfig), "of these families"
    keys = _gpt2(config) if family == "gpt2" else _llama(config, family)
    return shared | {"initializer_range": config.init_std} | keys


def write_files(folder: Path, config: Config, tokenizer: Tokenizer, dtype: str) -> list[str]:
    """Writes config.json, generation_config.json, tokenizer.json and tokenizer_config.json.

    A tokenizer that neither begins nor ends a text by itself is told to do as the rows of training did: a
    text that is gone on with begins with the mark that begins a document, one that is read whole ends with
    its end.

    Returns:
        What a person should know.

    Raises:
        OSError: they cannot be written.
        StackError: the tokenizer lacks a token that ends a text.
    """
    marks = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos}
    model: dict[str, Any] = config_to_hf(config.model) | marks | {"dtype": dtype, "torch_dtype": dtype}
    ends = end_tokens(tokenizer, config)
    sample: dict[str, Any] = {"do_sample": config.sample.temperature > 0}
    if sample["do_sample"]:
        sample |= {"temperature": config.sample.temperature, "top_p": config.sample.top_p}
        sample["top_k"] = config.sample.top_k or 0
    starts = {name: model[name] for name in ("decoder_start_token_id", "pad_token_id") if name in model}
    generation = marks | starts | {"eos_token_id": ends if len(ends) > 1 else ends[0]} | sample
    _write_json(folder / "config.json", model)
    _write_json(folder / "generation_config.json", generation)
    if tokenizer.fingerprint == "bytes":
        _write_bytes_tokenizer(folder, config.model.vocab_size)
        tokenizer = load_tokenizer(str(folder / FILE))
    tokenizer.save(folder)
    if build_objective(config).continues:
        _mark_texts(folder / FILE, begin=tokenizer.bos)
    else:
        _mark_texts(folder / FILE, end=tokenizer.eos)
    names = json.loads((folder / "tokenizer_config.json").read_text())
    more = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.model.max_length}
    _write_json(folder / "tokenizer_config.json", names | more)
    return _notes(model["model_type"], json.loads((folder / FILE).read_text()))


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
        "activation_function": {"relu": "relu", "gelu": "gelu", "gelu_tanh": "gelu_new"}[config.mlp],
        "layer_norm_epsilon": config.norm_epsilon,
        "embd_pdrop": config.embedding_dropout,
        "attn_pdrop": config.attention_dropout,
        "resid_pdrop": config.residual_dropout,
    }


def _llama(config: DecoderConfig, family: str) -> dict[str, Any]:
    keys: dict[str, Any] = {
        "max_position_embeddings": config.max_length,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_epsilon,
        "attention_dropout": config.attention_dropout,
        "rope_theta": config.rope.theta,
        "rope_scaling": _rope_scaling(config.rope),
    }
    window = config.sliding_window
    if family == "mistral":
        return keys | {"sliding_window": window}
    if family != "qwen2":
        keys["attention_bias"] = config.qkv_bias
    if family == "llama":
        return keys | {"mlp_bias": config.mlp_bias}
    # Of all layers, from the first on.
    return keys | {"use_sliding_window": window is not None, "sliding_window": window, "max_window_layers": 0}


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


def _write_bytes_tokenizer(folder: Path, vocab_size: int) -> None:
    """Bytes as a tokenizer.json: a byte-level BPE of 256 letters and no merges (GPT-2, section 2.2).

    With as many special words as the model has rows for.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    # A letter of its own for every byte; those that print are their own.
    prints = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in prints]
    letters = {byte: chr(byte) for byte in prints}
    letters |= {byte: chr(256 + number) for number, byte in enumerate(others)}
    words = {letter: byte for byte, letter in letters.items()} | {END_OF_DOCUMENT: 256}
    model = tokenizers.Tokenizer(models.BPE(vocab=words, merges=[]))
    # The libraries' classes fill these properties although their types do not say so.
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # pyrefly: ignore
    model.decoder = decoders.ByteLevel()  # pyrefly: ignore
    model.add_special_tokens([END_OF_DOCUMENT, *BYTE_MARKS[: max(0, vocab_size - 257)]])
    model.save(str(folder / FILE))


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
