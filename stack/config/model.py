"""What the model is. Nothing here depends on how many devices run it."""

from typing import ClassVar, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from stack.config.condition import Condition
from stack.config.section import Section, one_of


class RopeConfig(Section):
    """Rotary position embedding (arXiv 2104.09864) and its extension to longer contexts."""

    conditions = (
        Condition(fields=("factor",), other="scaling", values=("linear", "llama3", "yarn")),
        Condition(fields=("original_length",), other="scaling", values=("llama3", "yarn")),
        Condition(
            fields=("low_frequency_factor", "high_frequency_factor"), other="scaling", values=("llama3",)
        ),
        Condition(
            fields=("fast_turns", "slow_turns", "whole_channels", "attention_factor"),
            other="scaling",
            values=("yarn",),
        ),
    )

    theta: PositiveFloat = 10_000.0
    """Base of the wavelengths, in positions; 10,000 is the paper's, Llama 3 uses 500,000."""
    scaling: Literal["none", "linear", "llama3", "yarn"] = "none"
    """Stretching of the wavelengths: `linear` divides positions by `factor` (arXiv 2306.15595), `llama3`
    only stretches the long wavelengths (Llama 3.1), `yarn` too, with larger scores (arXiv 2309.00071)."""
    factor: PositiveFloat = 1.0
    """`linear`, `llama3`, `yarn`: how many times longer the context is than the one first trained for."""
    low_frequency_factor: PositiveFloat = 1.0
    """`llama3`: wavelengths above original_length / this are stretched in full."""
    high_frequency_factor: PositiveFloat = 4.0
    """`llama3`: wavelengths below original_length / this stay as they are."""
    original_length: PositiveInt = 8192
    """`llama3`, `yarn`: the context, in tokens, the wavelengths were first trained for."""
    fast_turns: PositiveFloat = 32.0
    """`yarn`: wavelengths with more turns than this in original_length stay as they are (beta_fast)."""
    slow_turns: PositiveFloat = 1.0
    """`yarn`: wavelengths with fewer turns than this in original_length are stretched in full (beta_slow)."""
    whole_channels: bool = True
    """`yarn`: the two bounds are rounded outwards to whole channels, as in its authors' code (truncate)."""
    attention_factor: PositiveFloat | None = None
    """`yarn`: what rotated queries and keys are multiplied by; null: 0.1 x ln(factor) + 1."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.scaling == "llama3" and self.low_frequency_factor >= self.high_frequency_factor:
            raise ValueError(
                f"low_frequency_factor={self.low_frequency_factor} must be below"
                f" high_frequency_factor={self.high_frequency_factor}"
            )
        if self.scaling == "yarn" and self.slow_turns >= self.fast_turns:
            raise ValueError(f"slow_turns={self.slow_turns} must be below fast_turns={self.fast_turns}")
        if self.scaling == "yarn" and self.theta <= 1:
            raise ValueError(f"theta={self.theta} must be above 1 for scaling=yarn")
        return self


class BlockConfig(Section):
    """A stack of transformer blocks, of whatever model."""

    conditions = (
        Condition(fields=("rope", "local_rope_theta"), other="position", values=("rotary",)),
        Condition(fields=("attention_pattern", "local_rope_theta"), other="sliding_window"),
    )

    max_length: PositiveInt = 1024
    """Longest sequence in tokens: rows of a learned position table, limit of generation."""
    num_layers: PositiveInt = 12
    """Transformer blocks; 12, 768 and 12 are GPT-2 small."""
    embed_dim: PositiveInt = 768
    """Width of the residual stream."""
    num_heads: PositiveInt = 12
    """Query heads."""
    num_kv_heads: PositiveInt | None = None
    """Key and value heads (grouped-query attention, arXiv 2305.13245); null: as many as queries."""
    head_dim: PositiveInt | None = None
    """Width of a head; null: embed_dim / num_heads."""
    mlp_dim: PositiveInt | None = None
    """Width inside the MLP; null: 4 x embed_dim."""
    norm: Literal["layernorm", "rmsnorm", "rmsnorm_zero_centered"] = "layernorm"
    """Normalisation of attention, of the MLP and at the end; `rmsnorm` has no bias, `rmsnorm_zero_centered`
    multiplies by 1 + scale, from scale 0 on (Gemma)."""
    norm_placement: Literal["pre", "post", "both"] = "pre"
    """Where a block normalises: `pre`, what attention and MLP read (GPT-2, Llama); `post`, the residual
    stream after each is added (BERT, arXiv 1810.04805); `both`, what they read and what they give (Gemma 2,
    arXiv 2408.00118). With `post` there is no norm at the end."""
    norm_epsilon: PositiveFloat = 1e-5
    """Added to the variance; 1e-5 in GPT-2 and Llama 3, 1e-6 in Qwen."""
    mlp: Literal["relu", "gelu", "gelu_tanh", "swiglu", "geglu"] = "gelu_tanh"
    """Activation; the -glu kinds have a gate beside it (arXiv 2002.05202). GPT-2 uses gelu_tanh, BERT gelu,
    T5 v1.0 relu and v1.1 geglu."""
    position: Literal["learned", "rotary", "relative"] = "learned"
    """How position enters: a learned table added to the embedding, rotated queries and keys, or, in an
    encoder-decoder, a number added to each score, learned by distance (arXiv 1910.10683, section 2.1)."""
    rope: RopeConfig = RopeConfig()
    """Read when position is `rotary`."""
    local_rope_theta: PositiveFloat | None = None
    """Base of the layers with a window, whose wavelengths are not stretched (Gemma 3, arXiv 2503.19786);
    null: they rotate as the others."""
    qkv_bias: bool = True
    """Biases on queries, keys and values: GPT-2 and Qwen 2 have them, Llama and Qwen 3 not."""
    out_bias: bool = True
    """Bias on the attention's output projection."""
    mlp_bias: bool = True
    """Biases inside the MLP."""
    qk_norm: bool = False
    """RMSNorm of every query and key head before the rotation (Qwen 3, arXiv 2302.05442)."""
    sliding_window: PositiveInt | None = None
    """Each token sees this many tokens, itself included (arXiv 2310.06825), and as many after it where it
    sees those; null: all."""
    attention_pattern: tuple[Literal["local", "global"], ...] = Field(
        default=("local",), min_length=1, strict=False
    )
    """Which layers have the window, from the first on; it repeats, and may end anywhere. [local, global] is
    Gemma 2, five local and one global Gemma 3."""
    attention_scale: PositiveFloat | None = None
    """What scores are multiplied by; null: 1 / sqrt(head width). T5 has 1."""
    attention_softcap: PositiveFloat | None = None
    """Scores become c x tanh(score / c) (Gemma 2, arXiv 2408.00118); null: as they are."""
    attention_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of attention weights dropped in training."""
    residual_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of each block's two outputs dropped in training."""
    init: Literal["normal", "fan_in"] = "normal"
    """Initial matrices: `normal`, all of deviation init_std; `fan_in`, of init_std / sqrt(inputs), queries
    such that their scores are as large whatever attention_scale is, as in T5 with init_std 1."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of initial weights; 0.02 in GPT-2, Megatron, Llama and Qwen."""
    scale_residual_init: bool = True
    """Divide the deviation of the two projections that write to the residual stream by
    sqrt(2 x num_layers) (GPT-2, section 2.3); Llama and Qwen do not."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """What matmuls and activations are computed in; parameters are always float32."""
    scan_unroll: PositiveInt = 1
    """Layers per iteration of the scan over layers; 1 compiles one layer whatever the depth.
    num_layers unrolls it whole: faster for tiny models on a CPU, slower to compile. Only with remat none."""

    @property
    def kv_heads(self) -> int:
        """Key and value heads, resolved."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_width(self) -> int:
        """Width of one head, resolved."""
        return self.head_dim or self.embed_dim // self.num_heads

    @property
    def mlp_width(self) -> int:
        """Width inside the MLP, resolved."""
        return self.mlp_dim or 4 * self.embed_dim

    @property
    def window(self) -> int | None:
        """Tokens seen where a layer has the window; None: no layer has one."""
        return self.sliding_window if any(self.local_layers) else None

    @property
    def local_layers(self) -> tuple[bool, ...]:
        """Whether each layer has the window."""
        pattern = self.attention_pattern if self.sliding_window else ("global",)
        return tuple(pattern[layer % len(pattern)] == "local" for layer in range(self.num_layers))

    @property
    def gated(self) -> bool:
        """Whether the MLP has a gate."""
        return self.mlp in ("swiglu", "geglu")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.head_dim is None and self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim={self.embed_dim} is not a multiple of num_heads={self.num_heads}; set head_dim"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.kv_heads}")
        if self.position == "rotary" and self.head_width % 2:
            raise ValueError(f"rotary positions need an even head width, not {self.head_width}; set head_dim")
        if "local" not in self.attention_pattern:
            raise ValueError("attention_pattern has no local layer; set sliding_window=null instead")
        return self


class LanguageConfig(BlockConfig):
    """What a model of words adds to its blocks."""

    conditions = (
        *BlockConfig.conditions,
        Condition(fields=("position_init_std",), other="position", values=("learned",)),
    )

    shape: ClassVar[Literal["decoder", "encoder", "encoder_decoder"]] = "decoder"
    """What it reads and gives, which decides the objectives it can be trained for."""

    vocab_size: PositiveInt = 257
    """Words of the tokenizer; 257 is every byte and one end of document."""
    vocab_multiple: PositiveInt = 128
    """The embedding has vocab_size rounded up to a multiple of this, so that any tensor degree up
    to 128 divides it; a property of the model, so a checkpoint fits every mesh. The added rows are
    zero, masked and never trained or exported."""
    tied_embeddings: bool = True
    """The output projection is the embedding table (arXiv 1608.05859)."""
    scale_embedding: bool = False
    """Multiply embedded words by sqrt(embed_dim), in the compute dtype (arXiv 1706.03762, section 3.4;
    Gemma)."""
    logit_softcap: PositiveFloat | None = None
    """Logits become c x tanh(logit / c) (Gemma 2, arXiv 2408.00118); null: as they are."""
    embedding_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the embedding dropped in training; 0, as data is rarely seen twice."""
    position_init_std: NonNegativeFloat = 0.01
    """Standard deviation of initial `learned` positions; 0.01 in GPT-2's code, 0.02 in Megatron."""

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding table."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def decoder_layers(self) -> int:
        """Blocks that write, and keep keys and values in generation."""
        return self.num_layers


class OneStackConfig(LanguageConfig):
    """A model of one stack of blocks."""

    position: Literal["learned", "rotary"] = "learned"
    """How position enters: a learned table added to the embedding, or rotated queries and keys."""


class DecoderConfig(OneStackConfig):
    """A decoder of the GPT-2 / Turing-NLG family or of the Llama / Qwen / Gemma family."""

    implementation: ClassVar[str] = "stack.models.decoder:Decoder"
    """The class that computes it, as `module:class`: config imports no model."""

    kind: Literal["decoder"] = "decoder"
    """Attention, then the MLP, each from its own norm."""


class ParallelDecoderConfig(OneStackConfig):
    """A decoder whose attention and MLP stand side by side."""

    implementation: ClassVar[str] = "stack.models.parallel_decoder:ParallelDecoder"

    kind: Literal["parallel_decoder"] = "parallel_decoder"
    """Attention and MLP from one norm, added together (GPT-J; PaLM, arXiv 2204.02311, section 2)."""
    norm_placement: Literal["pre"] = "pre"
    """The one norm comes first."""


class EncoderConfig(OneStackConfig):
    """An encoder of the BERT, RoBERTa and Turing NLU family."""

    implementation: ClassVar[str] = "stack.models.encoder:Encoder"
    shape = "encoder"

    conditions = (
        *LanguageConfig.conditions,
        Condition(fields=("first_position",), other="position", values=("learned",)),
    )

    kind: Literal["encoder"] = "encoder"
    """Words seen from both sides (BERT, arXiv 1810.04805)."""
    num_types: NonNegativeInt = 0
    """Rows of a table of segment types, added to the embedding: 2 in BERT, 1 in RoBERTa, 4 for UniLM's kinds
    of attention; 0: none."""
    embedding_norm: bool = True
    """Norm of the sum of embeddings."""
    head_transform: bool = True
    """A square layer, the activation and a norm between the last hidden state and the scores of words."""
    head_bias: bool = True
    """A bias for every word's score."""
    pooler: bool = False
    """A square layer and tanh over the first token, for tasks over whole texts; no objective over words
    trains it."""
    first_position: NonNegativeInt = 0
    """Row of the `learned` positions that the first token has; the rows before are unused, 2 in RoBERTa."""


class EncoderDecoderConfig(LanguageConfig):
    """An encoder and a decoder of the T5 family."""

    implementation: ClassVar[str] = "stack.models.encoder_decoder:EncoderDecoder"
    shape = "encoder_decoder"

    conditions = (
        *LanguageConfig.conditions,
        Condition(
            fields=("relative_buckets", "relative_max_distance"), other="position", values=("relative",)
        ),
        Condition(fields=("scale_output",), other="tied_embeddings", values=(True,)),
    )

    attention_pattern: tuple[Literal["local"], ...] = Field(default=("local",), min_length=1, strict=False)
    """All layers have the window, where there is one."""
    scale_embedding: Literal[False] = False
    """The embedding enters as it is."""
    kind: Literal["encoder_decoder"] = "encoder_decoder"
    """One text is read in both directions, another is written from it (T5, arXiv 1910.10683)."""
    num_decoder_layers: PositiveInt | None = None
    """Blocks of the decoder; null: num_layers, which are those of the encoder."""
    relative_buckets: PositiveInt = Field(default=32, ge=4)
    """Ranges of distance that `relative` positions tell apart; those of an encoder half to either side."""
    relative_max_distance: PositiveInt = 128
    """Distance, in tokens, from which on all are in the last bucket."""
    start_token: NonNegativeInt = 0
    """Word that what is written begins after: the padding token of T5, 0."""
    scale_output: bool = True
    """Divide the last hidden state by sqrt(embed_dim) before it meets the embedding table, as T5 v1.0."""

    @property
    def decoder_layers(self) -> int:
        """Blocks of the decoder, resolved."""
        return self.num_decoder_layers or self.num_layers

    @model_validator(mode="after")
    def _check_decoder(self) -> Self:
        if self.start_token >= self.vocab_size:
            raise ValueError(f"start_token={self.start_token} is no word of vocab_size={self.vocab_size}")
        if self.position == "relative" and self.relative_max_distance <= self.relative_buckets // 2:
            raise ValueError(
                f"relative_max_distance={self.relative_max_distance} must be above half of"
                f" relative_buckets={self.relative_buckets}: the first half has a bucket for each distance"
            )
        return self


type ModelConfig = DecoderConfig | ParallelDecoderConfig | EncoderConfig | EncoderDecoderConfig
"""Any of the models: THE list, which alone names their classes."""

AnyModel = one_of(ModelConfig)
"""The same as pydantic reads it, by `kind`; without one it is a decoder."""
