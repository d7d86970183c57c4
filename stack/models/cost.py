"""What a model computes, of which FLOPs and planned time are both read."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from stack.config import BlockConfig, EncoderDecoderConfig, LanguageConfig
from stack.kernels.attention import Kind

Axis = tuple[str, int]
"""A logical axis and its size; the table of axes tells whether `tensor` splits it."""

Sizes = Mapping[str, int]
"""Of the axes of a batch but its rows, as an objective names them: `length`, and `target_length` or
`masked`."""


@dataclass(frozen=True, kw_only=True)
class Product:
    """A matrix product of tokens with a weight [inner, columns]."""

    inner: Axis
    columns: Axis
    name: str = ""
    """By which a remat policy saves its result; empty: none does."""
    parts: tuple[int, ...] = ()
    """Columns of the products it stands for, which read the same input, in the order they are computed;
    empty: it is one."""
    tokens: str = "length"
    """The axis of the batch whose tokens it is of."""

    @property
    def size(self) -> int:
        """Multiplications per token: the parameters of the weight."""
        return self.inner[1] * self.columns[1]

    @property
    def widths(self) -> tuple[int, ...]:
        """Columns of each product by itself."""
        return self.parts or (self.columns[1],)


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Scores of every token with the keys it sees, and their product with the values."""

    heads: int
    kv_heads: int
    head_dim: int
    kind: Kind = "causal"
    window: int | None = None
    """Tokens seen; None: all."""
    queries: str = "length"
    """The axis of the batch whose tokens ask."""
    keys: str = "length"
    """The axis of the batch whose tokens they see."""


@dataclass(frozen=True, kw_only=True)
class Layers:
    """A stack of layers that cost the same."""

    number: int
    products: tuple[Product, ...]
    """Of one layer; those that read the same input count as one."""
    attention: Attention
    elementwise: tuple[Axis, ...]
    """Arrays read or written per token by norms, sums and activations, with the axis along which they are
    split: (axis, elements)."""
    cross: Attention | None = None
    """To another text, besides."""

    @property
    def attentions(self) -> tuple[Attention, ...]:
        """Of one layer."""
        return (self.attention,) if self.cross is None else (self.attention, self.cross)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """A forward pass."""

    stacks: tuple[Layers, ...]
    head: tuple[Product, ...]
    """Outside the layers, in the objective: the scores of words."""


def block_cost(config: BlockConfig, *, sums: int = 2, kind: Kind = "causal") -> Layers:
    """The layers of `stack.models.block`, or of blocks with another number of residual sums.

    Args:
      config: the blocks.
      sums: of the residual stream; with one, attention and MLP stand side by side and are added together.
      kind: of the mask.
    """
    embed, gates = config.embed_dim, 2 if config.gated else 1
    queries, keys = config.num_heads * config.head_width, config.kv_heads * config.head_width
    # A norm reads and writes; so does a residual sum, which besides reads each of the two that it adds.
    norms = 2 * sums if config.norm_placement == "both" else sums
    streams = 2 * norms + 2 * sums + 2
    elementwise = [("embed", streams * embed), ("mlp", (gates + 1) * config.mlp_width)]
    if config.position == "rotary":
        elementwise.append(("heads", 2 * (queries + keys)))
    return Layers(
        number=config.num_layers,
        products=(
            Product(
                inner=("embed", embed),
                columns=("heads", queries + 2 * keys),
                name="qkv_proj",
                parts=(queries, keys, keys),
            ),
            Product(inner=("heads", queries), columns=("embed", embed)),
            Product(
                inner=("embed", embed),
                columns=("mlp", gates * config.mlp_width),
                parts=(config.mlp_width,) * gates,
            ),
            Product(inner=("mlp", config.mlp_width), columns=("embed", embed)),
        ),
        attention=Attention(
            heads=config.num_heads,
            kv_heads=config.kv_heads,
            head_dim=config.head_width,
            kind=kind,
            window=config.window,
        ),
        elementwise=tuple(elementwise),
    )


def decoder_cost(config: LanguageConfig, *, sums: int = 2, kind: Kind = "causal") -> Cost:
    """A model of words of such blocks, those with a window apart from those without.

    The head counts with its padded rows, also where it is the embedding.
    """
    words = ("vocab", config.padded_vocab_size)
    head = Product(inner=("embed", config.embed_dim), columns=words, tokens="masked")
    layers, local = block_cost(config, sums=sums, kind=kind), sum(config.local_layers)
    stacks = tuple(
        replace(layers, number=number, attention=replace(layers.attention, window=window))
        for number, window in ((local, config.window), (config.num_layers - local, None))
        if number
    )
    return Cost(stacks=stacks, head=(head,))


def encoder_decoder_cost(config: EncoderDecoderConfig) -> Cost:
    """Blocks that read, and blocks that write and see what was read; the head scores what is written.

    Of the decoder, attention to what was read has queries of tokens that are written, keys of those read.
    """
    encoder, head = block_cost(config, kind="full"), decoder_cost(config).head
    qkv, out, *mlp = (replace(product, tokens=_WRITTEN) for product in encoder.products)
    queries, keys, values = qkv.parts
    cross = (
        replace(qkv, columns=("heads", queries), parts=()),
        replace(qkv, columns=("heads", keys + values), parts=(keys, values), tokens="length"),
        out,
    )
    attention = replace(encoder.attention, kind="causal", queries=_WRITTEN, keys=_WRITTEN)
    decoder = Layers(
        number=config.decoder_layers,
        products=(qkv, out, *cross, *mlp),
        attention=attention,
        elementwise=block_cost(config, sums=3).elementwise,
        cross=replace(encoder.attention, window=None, queries=_WRITTEN),
    )
    return Cost(stacks=(encoder, decoder), head=tuple(replace(product, tokens=_WRITTEN) for product in head))


_WRITTEN = "target_length"
