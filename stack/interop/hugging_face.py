"""Weights of Hugging Face transformers, in and out: GPT-2, Llama, Mistral, Qwen and Gemma.

A state dict is a mapping from names, as transformers writes them, to arrays; it may read lazily (every
array is asked for by name and dropped after it is copied). Only numpy is needed here.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from stack.config import DecoderConfig
from stack.config.errors import StackError
from stack.interop.hugging_face_config import config_from_hf

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
}
# Constants that older checkpoints carry beside the weights: causal masks and rotary wavelengths.
_BUFFER = re.compile(r"\.(attn\.bias|attn\.masked_bias|rotary_emb\.inv_freq)$")


def params_from_hf(state: Mapping[str, Any], config: DecoderConfig) -> dict[str, Any]:
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

    def __init__(self, state: Mapping[str, Any], config: DecoderConfig) -> None:
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
        return range(self._config.num_layers if self._leaves[path].stacked else 0)

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


def tensors(config: DecoderConfig) -> list[Tensor]:
    """What transformers saves for a model: tables and the last norm, then layer after layer.

    Raises:
        StackError: transformers has no model for the config.
    """
    parts: dict[str, list[tuple[_Leaf, int | None]]] = {}
    leaves = sorted(_leaves(config), key=lambda leaf: leaf.stacked)
    for layer in (None, *range(config.num_layers)):
        for leaf in leaves:
            if leaf.stacked == (layer is not None):
                parts.setdefault(leaf.name.format(layer), []).append((leaf, layer))
    return [
        Tensor(name=name, shape=some[0][0].tensor_shape, parts=tuple(some)) for name, some in parts.items()
    ]


def params_to_hf(params: Mapping[str, Any], config: DecoderConfig) -> dict[str, np.ndarray]:
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

    def names(self, config: DecoderConfig) -> list[str]:
        """The tensors, layer by layer."""
        return [self.name.format(layer) for layer in range(config.num_layers if self.stacked else 1)]

    def shape(self, config: DecoderConfig) -> tuple[int, ...]:
        """Of the whole leaf: layers stacked, vocabulary padded."""
        if self.stacked:
            return (config.num_layers, *self.slice_shape)
        if self.path in ("embed/table", "head/table"):
            return (config.padded_vocab_size, config.embed_dim)
        return self.slice_shape

    @property
    def stacked(self) -> bool:
        """Whether layers are the leading axis."""
        return self.path.startswith("layers/")

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

    def slice_of(self, tensor: np.ndarray, name: str) -> np.ndarray:
        """One slice of the leaf: a view of the tensor."""
        _check_shape(name, shape=tensor.shape, expected=self.tensor_shape)
        return self.part_of(tensor).reshape(self.slice_shape)


def _leaves(config: DecoderConfig) -> list[_Leaf]:
    """Every leaf of the model."""
    family_of(config)
    embedding = _embedding_name(config)
    leaves = [_table("embed", embedding, config.vocab_size, config)]
    if not config.tied_embeddings:
        leaves.append(_table("head", "lm_head.weight", config.vocab_size, config))
    return leaves + (_gpt2_leaves(config) if config.position == "learned" else _llama_leaves(config))


def _gpt2_leaves(config: DecoderConfig) -> list[_Leaf]:
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


def _llama_leaves(config: DecoderConfig) -> list[_Leaf]:
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
        leaves.append(_vector(f"layers/{path}/scale", f"model.layers.{{}}.{name}.weight", shape))
    return [*leaves, _vector("final_norm/scale", "model.norm.weight", width)]


def _table(key: str, name: str, rows: int, config: DecoderConfig) -> _Leaf:
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


def family_of(config: DecoderConfig) -> str:
    """The `model_type` of transformers' class that computes a model.

    Raises:
        StackError: none does.
    """
    family = _family(config)
    required = {"kind": "decoder"} | _required(config, family)
    for field, value in required.items():
        if getattr(config, field) != value:
            theirs = f"transformers' {_TITLES[family]} has {field}={value}"
            raise StackError(
                f"model.{field}={getattr(config, field)}: {theirs}; this model has no counterpart there"
            )
    return family


def _required(config: DecoderConfig, family: str) -> dict[str, Any]:
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


def _attention_scale(config: DecoderConfig) -> float | None:
    """The nearest that is 1 / sqrt(a whole number)."""
    return config.attention_scale and query_pre_attn_scalar(config) ** -0.5


def query_pre_attn_scalar(config: DecoderConfig) -> int:
    """Of Gemma: scores are divided by its root."""
    return config.head_width if config.attention_scale is None else max(1, round(config.attention_scale**-2))


def _family(config: DecoderConfig) -> str:
    """The one that a model is nearest to."""
    if config.position == "learned":
        return "gpt2"
    if config.norm == "rmsnorm_zero_centered":
        return "gemma3_text" if config.qk_norm else "gemma2"
    if config.qk_norm:
        return "qwen3"
    if config.qkv_bias and not config.out_bias:
        return "qwen2"
    return "llama" if config.sliding_window is None else "mistral"


def _sources(state: Mapping[str, Any], config: DecoderConfig) -> dict[str, str]:
    """Full name of every weight -> its name in the checkpoint.

    Checkpoints saved from a model without a head (the first GPT-2 ones) leave out the leading
    `transformer.` or `model.`; older ones repeat a tied embedding as `lm_head.weight`.
    """
    embedding = _embedding_name(config)
    prefix = embedding.split(".")[0] + "."
    sources: dict[str, str] = {}
    for name in state:
        if _BUFFER.search(name):
            continue
        full_name = name if name.startswith((prefix, "lm_head.")) else prefix + name
        if full_name in sources:
            raise StackError(
                f"the checkpoint holds one tensor twice, as {sources[full_name]} and as {name}; "
                "leave out the wrong one"
            )
        sources[full_name] = name
    if config.tied_embeddings and "lm_head.weight" in sources and embedding in sources:
        head, table = _tensor(state, sources.pop("lm_head.weight")), _tensor(state, sources[embedding])
        # NaN is refused where the table is read, under its name.
        if not np.array_equal(head, table, equal_nan=True):
            raise StackError(
                f"the checkpoint's lm_head.weight differs from its {embedding}; "
                "set model.tied_embeddings=false"
            )
    return sources


def _embedding_name(config: DecoderConfig) -> str:
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
