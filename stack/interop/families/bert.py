"""BERT (arXiv 1810.04805) and RoBERTa (arXiv 1907.11692) of transformers: config, tensors and names.

They differ in the names of the head and in where positions begin. What of the heads a checkpoint has its
config.json does not say, so its names do.
"""

import dataclasses
import re
from collections.abc import Collection, Mapping
from typing import Any

from stack.config import EncoderConfig
from stack.config.errors import StackError
from stack.data.tokenizer import Tokenizer
from stack.interop.activations import FROM_HF, TO_HF
from stack.interop.config_reader import ConfigReader
from stack.interop.leaf import Leaf, Naming, layernorm, linear, table, vector

_OLD = {".LayerNorm.gamma": ".LayerNorm.weight", ".LayerNorm.beta": ".LayerNorm.bias"}
_CONSTANTS = re.compile(r"embeddings\.(position_ids|token_type_ids)$")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoder:
    """What one of the two has for itself."""

    title: str
    architectures: tuple[str, str]
    """The class with a head over words, and the one without."""
    transform: str
    """Names of the head: the square layer, its norm, the bias of words."""
    norm: str
    bias: str
    naming: Naming
    words: Mapping[str, str]
    """What its tokenizers have special words for, and how they write them."""


ENCODERS = {
    "bert": Encoder(
        title="BERT",
        architectures=("BertForMaskedLM", "BertModel"),
        transform="cls.predictions.transform.dense",
        norm="cls.predictions.transform.LayerNorm",
        bias="cls.predictions.bias",
        naming=Naming(
            embedding="bert.embeddings.word_embeddings.weight",
            heads=("cls.",),
            repeats={
                "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
                "cls.predictions.decoder.bias": "cls.predictions.bias",
            },
            constants=_CONSTANTS,
            unread={"cls.seq_relationship.": "the head of next sentences"},
            old=_OLD,
        ),
        words={
            "cls_token": "[CLS]",
            "sep_token": "[SEP]",
            "pad_token": "[PAD]",
            "unk_token": "[UNK]",
            "mask_token": "[MASK]",
        },
    ),
    "roberta": Encoder(
        title="RoBERTa",
        architectures=("RobertaForMaskedLM", "RobertaModel"),
        transform="lm_head.dense",
        norm="lm_head.layer_norm",
        bias="lm_head.bias",
        naming=Naming(
            embedding="roberta.embeddings.word_embeddings.weight",
            heads=("lm_head.",),
            repeats={
                "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
                "lm_head.decoder.bias": "lm_head.bias",
            },
            constants=_CONSTANTS,
            old=_OLD,
        ),
        words={
            "cls_token": "<s>",
            "sep_token": "</s>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "mask_token": "<mask>",
        },
    ),
}
"""Both, by `model_type`."""

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "is_decoder": (False,),
    "is_causal": (False,),
    "position_embedding_type": ("absolute", None),
    "pooler_type": ("first_token_transform",),
    "tie_word_embeddings": (True,),
}
"""Keys that change numbers, and the values at which they do not."""
HARMLESS = frozenset(
    # Of a pooler, these are not read by transformers; so is what the original code called its reading.
    (
        *("pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers", "pooler_size_per_head"),
        "directionality",
    )
)
"""Keys that change no number."""


def architectures(family: str) -> tuple[Any, ...]:
    """What `architectures` may be: of the other classes of a family a head is missing here."""
    names = ("BertForPreTraining",) if family == "bert" else ()
    return (None, *([name] for name in (*ENCODERS[family].architectures, *names)))


def read_bert(keys: ConfigReader) -> EncoderConfig:
    """BERT's config, with a head over words and no pooler."""
    words = keys.word("hidden_act", tuple(FROM_HF), "gelu")
    return _read(keys, activation=FROM_HF[words], first_position=0)


def read_roberta(keys: ConfigReader) -> EncoderConfig:
    """RoBERTa's: positions begin after the number of the padding word, as in fairseq.

    Its head has `gelu` whatever the layers have.
    """
    keys.require("hidden_act", "gelu")
    return _read(keys, activation="gelu", first_position=keys.integer("pad_token_id", 1, least=0) + 1)


def _read(keys: ConfigReader, *, activation: Any, first_position: int) -> EncoderConfig:
    rows = keys.integer("max_position_embeddings", 512)
    if rows <= first_position:
        raise keys.error("max_position_embeddings", f"leaves none after pad_token_id + 1 = {first_position}")
    init_std = keys.number("initializer_range", 0.02)
    hidden_dropout = keys.number("hidden_dropout_prob", 0.1)
    return EncoderConfig(
        vocab_size=keys.integer("vocab_size", 50265 if first_position else 30522),
        max_length=rows - first_position,
        first_position=first_position,
        num_types=keys.integer("type_vocab_size", 2),
        num_layers=keys.integer("num_hidden_layers", 12),
        embed_dim=keys.integer("hidden_size", 768),
        num_heads=keys.integer("num_attention_heads", 12),
        mlp_dim=keys.integer("intermediate_size", 3072),
        mlp=activation,
        norm_placement="post",
        norm_epsilon=keys.number("layer_norm_eps", 1e-12),
        embedding_dropout=hidden_dropout,
        residual_dropout=hidden_dropout,
        attention_dropout=keys.number("attention_probs_dropout_prob", 0.1),
        init_std=init_std,
        position_init_std=init_std,
        scale_residual_init=False,
    )


def with_heads(config: EncoderConfig, names: Collection[str]) -> EncoderConfig:
    """The config with the heads that a checkpoint of these names has."""
    about = ENCODERS[family_of(config)]
    has_head = any(name.startswith(about.naming.heads) for name in names if not about.naming.reason(name))
    pooler = any(name.endswith("pooler.dense.weight") for name in names)
    return config.model_copy(update={"head_transform": has_head, "head_bias": has_head, "pooler": pooler})


def family_of(config: EncoderConfig) -> str:
    """The `model_type` that a model is nearest to."""
    return "roberta" if config.first_position else "bert"


def required(config: EncoderConfig) -> dict[str, Any]:
    """What a model has of which transformers' has nothing else."""
    fields: dict[str, Any] = {
        "norm": "layernorm",
        "norm_placement": "post",
        "position": "learned",
        "embedding_norm": True,
        **dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias", "tied_embeddings"), True),
        **dict.fromkeys(("gated", "qk_norm", "scale_embedding"), False),
        **dict.fromkeys(("sliding_window", "attention_scale", "attention_softcap", "logit_softcap")),
        "kv_heads": config.num_heads,
        "head_width": config.embed_dim // config.num_heads,
        "num_types": config.num_types or 1,
        "head_bias": config.head_transform,
    }
    return fields | ({"mlp": "gelu"} if config.first_position else {})


def leaves(config: EncoderConfig) -> list[Leaf]:
    """Every leaf of the model."""
    about = ENCODERS[family_of(config)]
    width, inner, heads = (config.embed_dim,), (config.mlp_width,), (config.num_heads, config.head_width)
    base = about.naming.prefix
    embeddings, layer = f"{base}embeddings.", f"{base}encoder.layer.{{}}."
    rows = config.first_position + config.max_length
    made = [
        table("embed", f"{embeddings}word_embeddings.weight", config.vocab_size, config, of_words=True),
        table("position", f"{embeddings}position_embeddings.weight", rows, config),
        table("types", f"{embeddings}token_type_embeddings.weight", config.num_types, config),
        *layernorm("embedding_norm", f"{embeddings}LayerNorm", config.embed_dim),
    ]
    for path, name, inputs, outputs in (
        ("attention/query", "attention.self.query", width, heads),
        ("attention/key", "attention.self.key", width, heads),
        ("attention/value", "attention.self.value", width, heads),
        ("attention/out", "attention.output.dense", heads, width),
        ("mlp/up", "intermediate.dense", width, inner),
        ("mlp/down", "output.dense", inner, width),
    ):
        made += linear(f"layers/{path}", layer + name, inputs, outputs, bias=True, transposed=True)
    made += layernorm("layers/attention_norm", f"{layer}attention.output.LayerNorm", config.embed_dim)
    made += layernorm("layers/mlp_norm", f"{layer}output.LayerNorm", config.embed_dim)
    if config.pooler:
        made += linear("pooler", f"{base}pooler.dense", width, width, bias=True, transposed=True)
    if config.head_transform:
        made += linear("head/transform", about.transform, width, width, bias=True, transposed=True)
        made += layernorm("head/norm", about.norm, config.embed_dim)
        made.append(vector("head/bias", about.bias, (config.vocab_size,), of_words=True))
    return made


def write(config: EncoderConfig) -> dict[str, Any]:
    """The keys of config.json beside those that all families have."""
    return {
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.mlp_width,
        "hidden_act": TO_HF[config.mlp],
        "hidden_dropout_prob": config.residual_dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
        "max_position_embeddings": config.first_position + config.max_length,
        "type_vocab_size": config.num_types,
        "layer_norm_eps": config.norm_epsilon,
        # Else it is 0 in BERT, and that row of the embedding gets no gradient where it is read.
        "pad_token_id": config.first_position - 1 if config.first_position else None,
    }


def architecture(config: EncoderConfig) -> str:
    """The class that has the model's head over words, or none."""
    return ENCODERS[family_of(config)].architectures[0 if config.head_transform else 1]


def check_padding(config: EncoderConfig, tokenizer: Tokenizer) -> None:
    """Refuses a tokenizer whose text has the word that RoBERTa takes for padding: positions pass over it.

    Raises:
        StackError: it has.
    """
    padding = config.first_position - 1
    spellings = tokenizer.spellings
    if 0 <= padding < len(spellings) and (text := spellings[padding]) is not None:
        raise StackError(
            f"model.first_position={config.first_position}: transformers' RoBERTa takes word {padding} for"
            f" padding, and of this tokenizer that is {text!r}; train with model.first_position=0"
        )


def named_words(config: EncoderConfig, tokenizer: Tokenizer, mask_token: str | None) -> dict[str, str]:
    """The words of a tokenizer that tokenizer_config.json names for transformers, by what they are for."""
    about = ENCODERS[family_of(config)]
    usual = {**about.words, "mask_token": mask_token or about.words["mask_token"]}
    return {name: word for name, word in usual.items() if tokenizer.token(word) is not None}


def objective(config: EncoderConfig, named: Mapping[str, str]) -> dict[str, str]:
    """What a model that comes in goes on with: masked words, as its tokenizer's config writes them."""
    usual = ENCODERS[family_of(config)].words["mask_token"]
    return {"kind": "masked_words", "mask_token": named.get("mask_token", usual)}
