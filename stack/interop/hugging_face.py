"""Weights of Hugging Face transformers, in and out: GPT-2, Llama, Mistral, Qwen, Gemma, BERT, RoBERTa and T5.

A state dict is a mapping from names, as transformers writes them, to arrays; it may read lazily (every
array is asked for by name and dropped after it is copied). Only numpy is needed here.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from stack.config import EncoderConfig, EncoderDecoderConfig, LanguageConfig
from stack.config.errors import StackError
from stack.interop.families import bert, t5
from stack.interop.hugging_face_config import config_from_hf
from stack.interop.leaf import Leaf, Naming, check_shape, layernorm, linear, table, vector

__all__ = ["Tensor", "Weights", "config_from_hf", "family_of", "params_from_hf", "params_to_hf", "tensors"]

# What float32 holds the meaning of; 8-bit floats and integers mean something only with a scale.
_FLOATS = ("float16", "bfloat16", "float32", "float64")
_TITLES = {
    "gpt2": "GPT-2",
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen 2",
    "qwen3": "Qwen 3",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3",
    **{family: about.title for family, about in bert.ENCODERS.items()},
}
# Constants that older checkpoints carry beside the weights: causal masks and rotary wavelengths.
_BUFFER = re.compile(r"\.(attn\.bias|attn\.masked_bias|rotary_emb\.inv_freq)$")


def params_from_hf(state: Mapping[str, Any], config: LanguageConfig) -> dict[str, Any]:
    """Stack's parameters, float32, from a transformers state dict of the model `config` describes.

    Kernels become `[inputs, outputs]`, heads get an axis of their own, layers are stacked on a leading
    axis and the vocabulary is padded with zero rows to `[padded_vocab_size, embed_dim]`. The map is
    linear, so it takes gradients too.

    Raises:
        StackError: as `Weights`.
    """
    weights = Weights(state, config)
    params: dict[str, Any] = {}
    for path in weights.shapes:
        layers = weights.layers(path)
        whole = np.stack([weights.read(path, layer) for layer in layers]) if layers else weights.read(path)
        *parents, last = path.split("/")
        node = params
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = whole
    return params


class Weights:
    """A state dict of transformers, read as Stack's parameters: one layer of one of them at a time."""

    def __init__(self, state: Mapping[str, Any], config: LanguageConfig) -> None:
        """Compares the names; what it reads it compares further.

        Raises:
            StackError: a name that is missing, unknown or there twice, or a config that transformers has no
                model for.
        """
        self._state = state
        self._config = config
        self._leaves = {leaf.path: leaf for leaf in _leaves(config)}
        self._sources, self.unread = _sources(state, config)
        expected = {name for leaf in self._leaves.values() for name in leaf.names(config)}
        _check_names("the checkpoint", names=set(self._sources), expected=expected)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The parameters, as `layers/mlp/up/kernel`, each with its shape: layers stacked, tables padded."""
        return {path: leaf.shape(self._config) for path, leaf in self._leaves.items()}

    def check(self) -> None:
        """Compares type and shape of every tensor, and reads none.

        Raises:
            StackError: as `read`.
        """
        for leaf in self._leaves.values():
            for name in leaf.names(self._config):
                leaf.slice_of(_tensor(self._state, self._sources[name]), name)

    def layers(self, path: str) -> range:
        """The layers of a parameter; none if it is of no layer."""
        return range(self._leaves[path].depth(self._config))

    def read(self, path: str, layer: int | None = None, index: tuple[slice, ...] = ()) -> np.ndarray:
        """A parameter, or what one layer has of it, float32; tables with their padding.

        Args:
            path: of the parameter.
            layer: its number; None: the parameter is of none.
            index: the part to read, of what would be read without it.

        Raises:
            StackError: a shape that does not fit, or a tensor that is not of 16 to 64-bit floats or not
                finite in float32.
        """
        leaf = self._leaves[path]
        name = leaf.names(self._config)[layer or 0]
        source = leaf.slice_of(_tensor(self._state, self._sources[name]), name)
        shape = leaf.shape(self._config)[1 if leaf.stacked else 0 :]
        places = [part.indices(size) for part, size in zip(index, shape, strict=False)]
        box = [(start, stop) for start, stop, _ in places] + [(0, size) for size in shape[len(places) :]]
        some = np.zeros([stop - start for start, stop in box], np.float32)
        (first, last), *rest = box
        last = max(first, min(last, len(source)))  # From there on it is padding.
        with np.errstate(over="ignore"):
            some[: last - first] = source[(slice(first, last), *(slice(*part) for part in rest))]
        _check_finite(name, some)
        return some


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
    """One tensor of transformers, and the parameters that fill it."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[tuple[Leaf, int | None], ...]
    """Each with the layer it is of; None: of none."""

    def make(self, read: Callable[[str, int | None], np.ndarray]) -> np.ndarray:
        """The tensor, float32.

        Args:
            read: gives a parameter by its path, or what one layer has of it.

        Raises:
            StackError: it is not finite in float32.
        """
        whole = np.empty(self.shape, np.float32)
        for leaf, layer in self.parts:
            source = read(leaf.path, layer)[: leaf.slice_shape[0]]
            with np.errstate(over="ignore"):
                leaf.part_of(whole)[...] = source.reshape(leaf.matrix)
            _check_finite(leaf.path, leaf.part_of(whole))
        return whole


def tensors(config: LanguageConfig) -> list[Tensor]:
    """What transformers saves for a model: tables and the last norm, then layer after layer.

    Raises:
        StackError: transformers has no model for the config.
    """
    parts: dict[str, list[tuple[Leaf, int | None]]] = {}
    leaves = sorted(_leaves(config), key=lambda leaf: leaf.stacked)
    for layer in (None, *range(max(leaf.depth(config) for leaf in leaves))):
        for leaf in leaves:
            if not leaf.stacked if layer is None else layer < leaf.depth(config):
                parts.setdefault(leaf.name.format(layer), []).append((leaf, layer))
    return [
        Tensor(name=name, shape=some[0][0].tensor_shape, parts=tuple(some)) for name, some in parts.items()
    ]


def params_to_hf(params: Mapping[str, Any], config: LanguageConfig) -> dict[str, np.ndarray]:
    """The state dict that transformers saves for Stack's parameters: the inverse of `params_from_hf`.

    Vocabulary padding is cut off; tied embeddings are written once, under the embedding's name.

    Raises:
        StackError: a parameter that is missing or unknown, a shape that does not fit, numbers that are no
            floats or not finite in float32, or a config that transformers has no model for.
    """
    leaves = _leaves(config)
    flat = dict(_flatten(params))
    _check_names("the parameter tree", names=set(flat), expected={leaf.path for leaf in leaves})
    for leaf in leaves:
        check_shape(leaf.path, shape=_tensor(flat, leaf.path).shape, expected=leaf.shape(config))

    def read(path: str, layer: int | None) -> np.ndarray:
        whole = np.asarray(flat[path])
        return whole if layer is None else whole[layer]

    return {tensor.name: tensor.make(read) for tensor in tensors(config)}


def _leaves(config: LanguageConfig) -> list[Leaf]:
    """Every leaf of the model."""
    family_of(config)
    if isinstance(config, EncoderConfig):
        return bert.leaves(config)
    if isinstance(config, EncoderDecoderConfig):
        return t5.leaves(config)
    embedding = _naming(config).embedding
    leaves = [table("embed", embedding, config.vocab_size, config, of_words=True)]
    if not config.tied_embeddings:
        leaves.append(table("head", "lm_head.weight", config.vocab_size, config, of_words=True))
    return leaves + (_gpt2_leaves(config) if config.position == "learned" else _llama_leaves(config))


def _gpt2_leaves(config: LanguageConfig) -> list[Leaf]:
    width, inner, heads = (config.embed_dim,), (config.mlp_width,), (config.num_heads, config.head_width)
    block = "transformer.h.{}."
    leaves = [table("position", "transformer.wpe.weight", config.max_length, config)]
    for part, path in enumerate(("query", "key", "value")):
        name = block + "attn.c_attn"
        leaves += linear(f"layers/attention/{path}", name, width, heads, bias=True, part=part, parts=3)
    leaves += linear("layers/attention/out", block + "attn.c_proj", heads, width, bias=True)
    leaves += linear("layers/mlp/up", block + "mlp.c_fc", width, inner, bias=True)
    leaves += linear("layers/mlp/down", block + "mlp.c_proj", inner, width, bias=True)
    for path, name in (
        ("layers/attention_norm", block + "ln_1"),
        ("layers/mlp_norm", block + "ln_2"),
        ("final_norm", "transformer.ln_f"),
    ):
        leaves += layernorm(path, name, config.embed_dim)
    return leaves


def _llama_leaves(config: LanguageConfig) -> list[Leaf]:
    width, inner, head = (config.embed_dim,), (config.mlp_width,), (config.head_width,)
    queries, keys = (config.num_heads, *head), (config.kv_heads, *head)
    leaves: list[Leaf] = []
    for path, name, inputs, outputs, bias in (
        ("attention/query", "self_attn.q_proj", width, queries, config.qkv_bias),
        ("attention/key", "self_attn.k_proj", width, keys, config.qkv_bias),
        ("attention/value", "self_attn.v_proj", width, keys, config.qkv_bias),
        ("attention/out", "self_attn.o_proj", queries, width, config.out_bias),
        ("mlp/gate", "mlp.gate_proj", width, inner, config.mlp_bias),
        ("mlp/up", "mlp.up_proj", width, inner, config.mlp_bias),
        ("mlp/down", "mlp.down_proj", inner, width, config.mlp_bias),
    ):
        full_name = f"model.layers.{{}}.{name}"
        leaves += linear(f"layers/{path}", full_name, inputs, outputs, bias=bias, transposed=True)
    norms = [("attention_norm", "input_layernorm", width)]
    if config.norm_placement == "both":
        norms += [
            ("attention_out_norm", "post_attention_layernorm", width),
            ("mlp_norm", "pre_feedforward_layernorm", width),
            ("mlp_out_norm", "post_feedforward_layernorm", width),
        ]
    else:
        norms.append(("mlp_norm", "post_attention_layernorm", width))
    if config.qk_norm:
        norms += [
            ("attention/query_norm", "self_attn.q_norm", head),
            ("attention/key_norm", "self_attn.k_norm", head),
        ]
    for path, name, shape in norms:
        leaves.append(vector(f"layers/{path}/scale", f"model.layers.{{}}.{name}.weight", shape))
    return [*leaves, vector("final_norm/scale", "model.norm.weight", width)]


def family_of(config: LanguageConfig) -> str:
    """The `model_type` of transformers' class that computes a model.

    Raises:
        StackError: none does.
    """
    if isinstance(config, EncoderDecoderConfig):
        t5.check(config)
        return "t5"
    family = _family(config)
    if isinstance(config, EncoderConfig):
        required = bert.required(config)
    else:
        required = {"kind": "decoder"} | _required(config, family)
    for field, value in required.items():
        if getattr(config, field) != value:
            theirs = f"transformers' {_TITLES[family]} has {field}={value}"
            raise StackError(
                f"model.{field}={getattr(config, field)}: {theirs}; this model has no counterpart there"
            )
    return family


def _required(config: LanguageConfig, family: str) -> dict[str, Any]:
    """What a model of a family has, where another value would have no key there."""
    required: dict[str, Any] = {"mlp_bias": False, "out_bias": config.qkv_bias, "local_rope_theta": None}
    if family.startswith("gemma"):
        required |= {"norm": "rmsnorm_zero_centered", "norm_placement": "both", "mlp": "geglu"}
        required |= {"scale_embedding": True, "attention_scale": _attention_scale(config)}
        if family == "gemma3_text":  # Its class has the key and does not read it.
            required |= {"attention_softcap": None, "local_rope_theta": config.local_rope_theta}
        return required
    required |= {"norm": "rmsnorm", "norm_placement": "pre", "mlp": "swiglu", "scale_embedding": False}
    required |= {"attention_scale": None, "attention_softcap": None, "logit_softcap": None}
    match family:
        case "gpt2":
            required |= {"norm": "layernorm", "mlp": config.mlp, "gated": False}
            required |= {"qkv_bias": True, "out_bias": True, "mlp_bias": True}
            required |= {"qk_norm": False, "sliding_window": None, "kv_heads": config.num_heads}
            required |= {"head_width": config.embed_dim // config.num_heads}
        case "llama":
            required |= {"mlp_bias": config.mlp_bias, "sliding_window": None}
        case "mistral":
            required = {"qkv_bias": False, "attention_pattern": ("local",)} | required
        case "qwen2":
            required |= {"out_bias": False}
    return required


def _attention_scale(config: LanguageConfig) -> float | None:
    """The nearest that is 1 / sqrt(a whole number)."""
    return config.attention_scale and query_pre_attn_scalar(config) ** -0.5


def query_pre_attn_scalar(config: LanguageConfig) -> int:
    """Of Gemma: scores are divided by its root."""
    return config.head_width if config.attention_scale is None else max(1, round(config.attention_scale**-2))


def _family(config: LanguageConfig) -> str:
    """The one that a model is nearest to."""
    if isinstance(config, EncoderConfig):
        return bert.family_of(config)
    if config.position == "learned":
        return "gpt2"
    if config.norm == "rmsnorm_zero_centered":
        return "gemma3_text" if config.qk_norm else "gemma2"
    if config.qk_norm:
        return "qwen3"
    if config.qkv_bias and not config.out_bias:
        return "qwen2"
    return "llama" if config.sliding_window is None else "mistral"


def _sources(state: Mapping[str, Any], config: LanguageConfig) -> tuple[dict[str, str], dict[str, str]]:
    """Full name of every weight -> its name in the checkpoint; name of what is not read -> what it is.

    Checkpoints saved from a model without a head (the first GPT-2 ones) leave out the leading
    `transformer.` or `model.`; older ones repeat a tied embedding as `lm_head.weight`.
    """
    naming = _naming(config)
    sources: dict[str, str] = {}
    unread: dict[str, str] = {}
    for name in state:
        if naming.constants.search(name):
            continue
        if reason := naming.reason(name):
            unread[name] = reason
            continue
        full_name = naming.full(name)
        if full_name in sources:
            raise StackError(
                f"the checkpoint holds one tensor twice, as {sources[full_name]} and as {name}; "
                "leave out the wrong one"
            )
        sources[full_name] = name
    for copy, main in naming.repeats.items():
        if copy not in sources:
            continue
        if main not in sources:
            sources[main] = sources.pop(copy)
            continue
        one, other = (_tensor(state, name) for name in (sources.pop(copy), sources[main]))
        # NaN is refused where the table is read, under its name.
        if not np.array_equal(one, other, equal_nan=True):
            remedy = naming.remedies.get(copy, "they are one tensor; leave out the wrong one")
            raise StackError(f"the checkpoint's {copy} differs from its {main}; {remedy}")
    return sources, unread


def _naming(config: LanguageConfig) -> Naming:
    """How the family of a model names its tensors."""
    if isinstance(config, EncoderConfig):
        return bert.ENCODERS[bert.family_of(config)].naming
    if isinstance(config, EncoderDecoderConfig):
        return t5.naming(config)
    embedding = "transformer.wte.weight" if config.position == "learned" else "model.embed_tokens.weight"
    repeats = {"lm_head.weight": embedding} if config.tied_embeddings else {}
    return Naming(
        embedding=embedding,
        heads=("lm_head.",),
        repeats=repeats,
        remedies=dict.fromkeys(repeats, "set model.tied_embeddings=false"),
        constants=_BUFFER,
    )


def _flatten(tree: Mapping[str, Any], path: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{path}{key}/")
        else:
            yield path + key, value


def _check_names(where: str, *, names: set[str], expected: set[str]) -> None:
    for wrong, problem in ((expected - names, "lacks"), (names - expected, "has the unknown")):
        if wrong:
            first, *others = sorted(wrong)
            more = f" and {len(others)} more" if others else ""
            raise StackError(f"{where} {problem} {first}{more}; it is not of the model the config describes")


def _tensor(tensors: Mapping[str, Any], name: str) -> np.ndarray:
    """The tensor of a name, as it is stored."""
    tensor = np.asarray(tensors[name])
    if tensor.dtype.name not in _FLOATS:
        raise StackError(
            f"{name} is of {tensor.dtype.name}, but weights are {', '.join(_FLOATS)}; "
            "convert the checkpoint, with its scales if it is quantized"
        )
    return tensor


def _check_finite(name: str, numbers: np.ndarray) -> None:
    if not np.isfinite(numbers).all():
        raise StackError(f"{name} holds NaN or infinity in float32; take a checkpoint from before it broke")
