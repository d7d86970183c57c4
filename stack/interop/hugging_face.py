"""Weights of Hugging Face transformers, in and out: GPT-2, Llama 2 and 3, Mistral, Qwen 2, 2.5 and 3, T5.

A state dict is a mapping from names, as transformers writes them, to arrays; it may read lazily (every
array is asked for by name and dropped after it is copied). Only numpy is needed here.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from stack.config import EncoderDecoderConfig, LanguageConfig
from stack.config.errors import StackError
from stack.interop import t5
from stack.interop.hugging_face_config import config_from_hf

__all__ = ["Tensor", "Weights", "config_from_hf", "family_of", "params_from_hf", "params_to_hf", "tensors"]

# What float32 holds the meaning of; 8-bit floats and integers mean something only with a scale.
_FLOATS = ("float16", "bfloat16", "float32", "float64")
_TITLES = {"gpt2": "GPT-2", "llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen 2", "qwen3": "Qwen 3"}
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
    for path in weights.paths:
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
        self._sources = _sources(state, config)
        expected = {name for leaf in self._leaves.values() for name in leaf.names(config)}
        _check_names("the checkpoint", names=set(self._sources), expected=expected)

    @property
    def paths(self) -> list[str]:
        """The parameters, as `layers/mlp/up/kernel`."""
        return list(self._leaves)

    def layers(self, path: str) -> range:
        """The layers of a parameter; none if it is of no layer."""
        return range(self._leaves[path].depth(self._config))

    def read(self, path: str, layer: int | None = None) -> np.ndarray:
        """A parameter, or what one layer has of it, float32; tables with their padding.

        Raises:
            StackError: a shape that does not fit, or a tensor that is not of 16 to 64-bit floats or not
                finite in float32.
        """
        leaf = self._leaves[path]
        name = leaf.names(self._config)[layer or 0]
        shape = leaf.shape(self._config)
        whole = np.zeros(shape[1:] if leaf.stacked else shape, np.float32)
        with np.errstate(over="ignore"):
            whole[: leaf.slice_shape[0]] = leaf.read(_tensor(self._state, self._sources[name]), name)
        _check_finite(name, whole)
        return whole


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
    """One tensor of transformers, and the parameters that fill it."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[tuple["_Leaf", int | None], ...]
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
    parts: dict[str, list[tuple[_Leaf, int | None]]] = {}
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
        _check_shape(leaf.path, shape=_tensor(flat, leaf.path).shape, expected=leaf.shape(config))

    def read(path: str, layer: int | None) -> np.ndarray:
        whole = np.asarray(flat[path])
        return whole if layer is None else whole[layer]

    return {tensor.name: tensor.make(read) for tensor in tensors(config)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Leaf:
    """One leaf of Stack's tree and the tensors of transformers that hold its numbers."""

    path: str
    name: str
    """Of the tensor; {} stands for the layer."""
    slice_shape: tuple[int, ...]
    """What one tensor fills: one layer, or the rows of the real vocabulary."""
    matrix: tuple[int, ...]
    """The slice with heads folded into one axis: `[inputs, outputs]`, `[rows, embed]` or `[size]`."""
    transposed: bool = False
    """torch.nn.Linear keeps `[outputs, inputs]`; GPT-2's Conv1D does not."""
    part: int = 0
    parts: int = 1
    """GPT-2 keeps queries, keys and values side by side on the last axis of one tensor."""

    def names(self, config: LanguageConfig) -> list[str]:
        """The tensors, layer by layer."""
        return [self.name.format(layer) for layer in range(self.depth(config) or 1)]

    def shape(self, config: LanguageConfig) -> tuple[int, ...]:
        """Of the whole leaf: layers stacked, vocabulary padded."""
        if self.stacked:
            return (self.depth(config), *self.slice_shape)
        if self.path in ("embed/table", "head/table"):
            return (config.padded_vocab_size, config.embed_dim)
        return self.slice_shape

    @property
    def stacked(self) -> bool:
        """Whether layers are the leading axis."""
        return "layers" in self.path.split("/")

    def depth(self, config: LanguageConfig) -> int:
        """How many layers; 0 if it is of none."""
        if not self.stacked:
            return 0
        return config.decoder_layers if self.path.startswith("decoder/") else config.num_layers

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Of each tensor, as transformers keeps it."""
        shape = (*self.matrix[:-1], self.matrix[-1] * self.parts)
        return shape[::-1] if self.transposed else shape

    def part_of(self, tensor: np.ndarray) -> np.ndarray:
        """The view of a tensor that holds this leaf, in the shape of `matrix`."""
        tensor = tensor.T if self.transposed else tensor
        width = self.matrix[-1]
        return tensor[..., self.part * width : (self.part + 1) * width]

    def read(self, tensor: np.ndarray, name: str) -> np.ndarray:
        """One slice of the leaf."""
        _check_shape(name, shape=tensor.shape, expected=self.tensor_shape)
        return self.part_of(tensor).reshape(self.slice_shape)


def _leaves(config: LanguageConfig) -> list[_Leaf]:
    """Every leaf of the model."""
    family_of(config)
    embedding = _embedding_name(config)
    leaves = [_table("embed", embedding, config.vocab_size, config)]
    if not config.tied_embeddings:
        leaves.append(_table("head", "lm_head.weight", config.vocab_size, config))
    if isinstance(config, EncoderDecoderConfig):
        return leaves + _t5_leaves(config)
    return leaves + (_gpt2_leaves(config) if config.position == "learned" else _llama_leaves(config))


def _gpt2_leaves(config: LanguageConfig) -> list[_Leaf]:
    width, inner, heads = (config.embed_dim,), (config.mlp_width,), (config.num_heads, config.head_width)
    block = "transformer.h.{}."
    leaves = [_table("position", "transformer.wpe.weight", config.max_length, config)]
    for part, path in enumerate(("query", "key", "value")):
        name = block + "attn.c_attn"
        leaves += _linear(f"layers/attention/{path}", name, width, heads, bias=True, part=part, parts=3)
    leaves += _linear("layers/attention/out", block + "attn.c_proj", heads, width, bias=True)
    leaves += _linear("layers/mlp/up", block + "mlp.c_fc", width, inner, bias=True)
    leaves += _linear("layers/mlp/down", block + "mlp.c_proj", inner, width, bias=True)
    for path, name in (
        ("layers/attention_norm", block + "ln_1"),
        ("layers/mlp_norm", block + "ln_2"),
        ("final_norm", "transformer.ln_f"),
    ):
        leaves += [
            _vector(f"{path}/scale", f"{name}.weight", width),
            _vector(f"{path}/bias", f"{name}.bias", width),
        ]
    return leaves


def _llama_leaves(config: LanguageConfig) -> list[_Leaf]:
    width, inner, head = (config.embed_dim,), (config.mlp_width,), (config.head_width,)
    queries, keys = (config.num_heads, *head), (config.kv_heads, *head)
    leaves: list[_Leaf] = []
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
        leaves += _linear(f"layers/{path}", full_name, inputs, outputs, bias=bias, transposed=True)
    norms = [("attention_norm", "input_layernorm", width), ("mlp_norm", "post_attention_layernorm", width)]
    if config.qk_norm:
        norms += [
            ("attention/query_norm", "self_attn.q_norm", head),
            ("attention/key_norm", "self_attn.k_norm", head),
        ]
    for path, name, shape in norms:
        leaves.append(_vector(f"layers/{path}/scale", f"model.layers.{{}}.{name}.weight", shape))
    return [*leaves, _vector("final_norm/scale", "model.norm.weight", width)]


def _t5_leaves(config: EncoderDecoderConfig) -> list[_Leaf]:
    leaves = [_vector(path, name, (config.embed_dim,)) for path, name in t5.norms()]
    shape = (config.relative_buckets, config.num_heads)
    leaves += [_Leaf(path=path, name=name, slice_shape=shape, matrix=shape) for path, name in t5.tables()]
    for path, name, inputs, outputs in t5.linears(config):
        leaves += _linear(path, name, inputs, outputs, bias=False, transposed=True)
    return leaves


def _table(key: str, name: str, rows: int, config: LanguageConfig) -> _Leaf:
    shape = (rows, config.embed_dim)
    return _Leaf(path=f"{key}/table", name=name, slice_shape=shape, matrix=shape)


def _vector(path: str, name: str, shape: tuple[int, ...], **layout: Any) -> _Leaf:
    return _Leaf(path=path, name=name, slice_shape=shape, matrix=(math.prod(shape),), **layout)


def _linear(
    path: str,
    name: str,
    inputs: tuple[int, ...],
    outputs: tuple[int, ...],
    *,
    bias: bool,
    transposed: bool = False,
    **layout: Any,
) -> list[_Leaf]:
    kernel = _Leaf(
        path=f"{path}/kernel",
        name=f"{name}.weight",
        slice_shape=(*inputs, *outputs),
        matrix=(math.prod(inputs), math.prod(outputs)),
        transposed=transposed,
        **layout,
    )
    return [kernel, _vector(f"{path}/bias", f"{name}.bias", outputs, **layout)] if bias else [kernel]


def family_of(config: LanguageConfig) -> str:
    """The `model_type` of transformers' class that computes a model.

    Raises:
        StackError: none does.
    """
    if isinstance(config, EncoderDecoderConfig):
        t5.check(config)
        return "t5"
    family = _family(config)
    required: dict[str, Any] = {"kind": "decoder", "attention_softcap": None, "logit_softcap": None}
    required |= {"norm_placement": "pre", "attention_scale": None}
    if family == "gpt2":
        required |= {
            "norm": "layernorm",
            "gated": False,
            "qkv_bias": True,
            "out_bias": True,
            "mlp_bias": True,
        }
        required |= {"qk_norm": False, "sliding_window": None, "kv_heads": config.num_heads}
        required |= {"head_width": config.embed_dim // config.num_heads}
    else:
        required |= {"norm": "rmsnorm", "mlp": "swiglu"}
        if family == "qwen3":
            required |= {"out_bias": config.qkv_bias, "mlp_bias": False}
        elif family == "qwen2":
            required |= {"mlp_bias": False}
        elif family == "mistral":
            required |= {"qkv_bias": False, "out_bias": False, "mlp_bias": False}
        else:
            required |= {"out_bias": config.qkv_bias, "sliding_window": None}
    for field, value in required.items():
        if getattr(config, field) != value:
            theirs = f"transformers' {_TITLES[family]} has {field}={value}"
            raise StackError(
                f"model.{field}={getattr(config, field)}: {theirs}; this model has no counterpart there"
            )
    return family


def _family(config: LanguageConfig) -> str:
    """The one that a model is nearest to."""
    if config.position == "learned":
        return "gpt2"
    if config.qk_norm:
        return "qwen3"
    if config.qkv_bias and not config.out_bias:
        return "qwen2"
    return "llama" if config.sliding_window is None else "mistral"


def _sources(state: Mapping[str, Any], config: LanguageConfig) -> dict[str, str]:
    """Full name of every weight -> its name in the checkpoint.

    Checkpoints saved from a model without a head (the first GPT-2 ones) leave out the leading
    `transformer.` or `model.`; older ones repeat a tied embedding as `lm_head.weight`.
    """
    embedding = _embedding_name(config)
    prefix = embedding.split(".")[0] + "."
    is_t5 = isinstance(config, EncoderDecoderConfig)
    sources: dict[str, str] = {}
    for name in state:
        if is_t5:
            sources |= {} if name == t5.UNREAD else {name: name}
            continue
        if _BUFFER.search(name):
            continue
        full_name = name if name.startswith((prefix, "lm_head.")) else prefix + name
        if full_name in sources:
            raise StackError(
                f"the checkpoint holds one tensor twice, as {sources[full_name]} and as {name}; "
                "leave out the wrong one"
            )
        sources[full_name] = name
    copies = dict.fromkeys(t5.COPIES, "take a checkpoint of one embedding") if is_t5 else {}
    if config.tied_embeddings:
        where = "tie_word_embeddings=false in config.json" if is_t5 else "model.tied_embeddings=false"
        copies["lm_head.weight"] = f"set {where}"
    for copy, remedy in copies.items():
        if copy in sources and embedding in sources:
            again, table = _tensor(state, sources.pop(copy)), _tensor(state, sources[embedding])
            # NaN is refused where the table is read, under its name.
            if not np.array_equal(again, table, equal_nan=True):
                raise StackError(f"the checkpoint's {copy} differs from its {embedding}; {remedy}")
    return sources


def _embedding_name(config: LanguageConfig) -> str:
    if isinstance(config, EncoderDecoderConfig):
        return t5.EMBEDDING
    return "transformer.wte.weight" if config.position == "learned" else "model.embed_tokens.weight"


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


def _check_shape(name: str, *, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if shape != expected:
        raise StackError(
            f"{name} has shape {list(shape)}, the config asks for {list(expected)}; it is not of the model "
            "the config describes"
        )
