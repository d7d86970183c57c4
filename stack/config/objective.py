"""What a model is trained for."""

from typing import Literal, Self, get_args

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from stack.config.explain import shown
from stack.config.multi_task import MultiTaskConfig
from stack.config.objective_section import ObjectiveSection
from stack.config.section import one_of
from stack.config.tasks import (
    AnswersConfig,
    ClassificationConfig,
    KeySentencesConfig,
    RerankingConfig,
    RetrievalConfig,
    TaggingConfig,
)

DECODERS = ("decoder",)
PAIRS = ("decoder", "encoder_decoder")


class WordsConfig(ObjectiveSection):
    """What all objectives over words share."""

    z_loss: NonNegativeFloat = 0.0
    """Weight of the squared log-normaliser (arXiv 2204.02311, 1e-4 there)."""
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the target that is spread evenly over all words (arXiv 1512.00567, section 7; 0.1 in
    translation, arXiv 1706.03762). The losses that are told are without it, as z-loss."""
    logits_bytes: PositiveInt | None = None
    """Bytes of float32 logits that exist at one time on a device; null: as many as the table's float32
    gradient has, which every chunk of tokens reads and writes, but at least 64 MiB."""


class CausalConfig(WordsConfig):
    """Prediction of the next token."""

    implementation = "stack.objectives.causal:Causal"
    has_baselines = True
    shapes = DECODERS
    every_token = True

    kind: Literal["causal"] = "causal"
    """Every token is predicted from those before it."""


class PrefixConfig(WordsConfig):
    """Prediction of the rest of a text."""

    implementation = "stack.objectives.prefix_lm:PrefixLm"
    shapes = PAIRS

    kind: Literal["prefix_lm"] = "prefix_lm"
    """A beginning of random length is read in both directions and the rest is predicted (arXiv 1910.10683,
    section 3.2.1)."""


class FillConfig(WordsConfig):
    """Prediction of the middle of a text."""

    implementation = "stack.objectives.fill_in_middle:FillInMiddle"
    shapes = DECODERS

    kind: Literal["fill_in_middle"] = "fill_in_middle"
    """Texts are cut in three, at tokens, and the middle is moved to the end (arXiv 2207.14255)."""
    rate: float = Field(default=0.5, ge=0.0, le=1.0)
    """Share of the texts that are rearranged; the others are read as they are."""
    suffix_first_rate: float = Field(default=0.5, ge=0.0, le=1.0)
    """Share of those whose suffix comes before the prefix (SPM)."""
    prefix_token: str = "<fim_prefix>"
    """Word of the tokenizer before the prefix."""
    suffix_token: str = "<fim_suffix>"
    """Word of the tokenizer before the suffix."""
    middle_token: str = "<fim_middle>"
    """Word of the tokenizer before the middle."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len({self.prefix_token, self.suffix_token, self.middle_token}) < 3:
            raise ValueError("prefix_token, suffix_token and middle_token must be three different words")
        return self


class RemovalConfig(WordsConfig):
    """Removal of pieces of a text that are then written by the model."""

    sentinel: str = "<extra_id_{}>"
    """Words of the tokenizer that stand for what was removed, `{}` being 0, 1, ... as they come."""
    target_length: PositiveInt | None = None
    """`encoder_decoder`: tokens per row of what is written; null: as many as the longest piece needs."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        around = self.sentinel.split("{}")
        if len(around) != 2 or any(brace in part for part in around for brace in "{}"):
            raise ValueError(
                f"sentinel={shown(self.sentinel)} must hold {{}} once, in the place of the number, and no"
                " other brace"
            )
        return self


class SpansConfig(RemovalConfig):
    """Span corruption, as T5 is pretrained."""

    implementation = "stack.objectives.span_corruption:SpanCorruption"
    shapes = PAIRS

    kind: Literal["span_corruption"] = "span_corruption"
    """Spans of tokens are removed, and written in order (T5, arXiv 1910.10683, section 3.1.4)."""
    rate: float = Field(default=0.15, gt=0.0, lt=1.0)
    """Share of the tokens that are removed."""
    mean_span: PositiveFloat = Field(default=3.0, ge=1.0)
    """Mean length of a span in tokens."""


class SentencesConfig(RemovalConfig):
    """Removal of whole sentences."""

    implementation = "stack.objectives.sentence_removal:SentenceRemoval"
    shapes = PAIRS

    kind: Literal["sentence_removal"] = "sentence_removal"
    """Whole sentences, told by punctuation and the ends of lines, are removed and written in order, as gap
    sentences are (PEGASUS, arXiv 1912.08777, section 3.1)."""
    rate: float = Field(default=0.3, gt=0.0, lt=1.0)
    """Largest share of the tokens that is removed."""
    shortest: PositiveInt = Field(default=4, ge=2)
    """Sentences of fewer tokens stay."""


class MaskedConfig(WordsConfig):
    """Hidden words."""

    shapes = ("encoder",)

    rate: float = Field(default=0.15, gt=0.0, lt=1.0)
    """Share of the tokens that are predicted."""
    mask_rate: float = Field(default=0.8, ge=0.0, le=1.0)
    """Share of these that the mask token stands for."""
    random_rate: float = Field(default=0.1, ge=0.0, le=1.0)
    """Share of these that a random word stands for; the others are seen as they are."""
    whole_words: bool = False
    """Hide all tokens of a word or none."""
    mask_token: str = "[MASK]"
    """Word of the tokenizer that hides another."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.mask_rate + self.random_rate > 1:
            raise ValueError(
                f"mask_rate={self.mask_rate} and random_rate={self.random_rate} are more than 1 together"
            )
        return self


class MaskedWordsConfig(MaskedConfig):
    """Prediction of masked words."""

    implementation = "stack.objectives.masked_words:MaskedWords"
    has_baselines = True

    kind: Literal["masked_words"] = "masked_words"
    """Words are hidden and predicted from those around them (BERT, arXiv 1810.04805, section 3.1)."""


class UniLmConfig(MaskedConfig):
    """Masked words under three masks of attention in one network."""

    implementation = "stack.objectives.unilm:UniLm"

    kind: Literal["unilm"] = "unilm"
    """Each text is read in both directions, from left to right, or as a source and what follows from it,
    drawn by weight (UniLM, arXiv 1905.03197). Types of segments tell them apart: model.num_types=4."""
    bidirectional_weight: NonNegativeFloat = 1.0
    """Texts read in both directions."""
    left_to_right_weight: NonNegativeFloat = 1.0
    """Texts of which every word sees those before it."""
    sequence_to_sequence_weight: NonNegativeFloat = 1.0
    """Texts whose first part sees itself and whose second sees, besides, its own words before."""

    @model_validator(mode="after")
    def _check_weights(self) -> Self:
        if not self.bidirectional_weight + self.left_to_right_weight + self.sequence_to_sequence_weight:
            raise ValueError("every weight is 0; give one of them a positive weight")
        return self


class RecordsConfig(WordsConfig):
    """Texts that answer others, in records of JSON (`data.sources`: `field: null`)."""

    reads_records = True
    shapes = DECODERS

    too_long: Literal["refuse", "leave_out", "cut"] = "refuse"
    """A record of more than data.sequence_length tokens: `refuse` names it and ends the run, `leave_out`
    trains on the others and tells their number, `cut` reads its beginning."""


class CompletionConfig(RecordsConfig):
    """Fine-tuning to write what follows a prompt."""

    implementation = "stack.objectives.completion:Completion"
    shapes = PAIRS

    kind: Literal["completion"] = "completion"
    """A prompt is read and what completes it is predicted (supervised fine-tuning)."""
    prompt: str = "prompt"
    """Field of a record, or path to it, with the text that is read."""
    completion: str = "completion"
    """Field of a record, or path to it, with the text that is predicted, and the end after it."""
    target_length: PositiveInt | None = None
    """`encoder_decoder`: tokens per row of what is written; null: as many as of what is read."""


class ChatConfig(RecordsConfig):
    """Fine-tuning to answer in a conversation."""

    implementation = "stack.objectives.chat:Chat"
    reads_template = True

    kind: Literal["chat"] = "chat"
    """Conversations are laid out by the tokenizer's chat template; what the assistant says is predicted."""
    messages: str = "messages"
    """Field of a record, or path to it, with the list of messages, each `role` and `content`."""


class PreferredConfig(RecordsConfig):
    """Direct preference optimization: of two answers, one is preferred (DPO, arXiv 2305.18290)."""

    has_reference = True

    prompt: str | None = "prompt"
    """Field of a record, or path to it, with what is read; null: what both answers begin with is that."""
    chosen: str = "chosen"
    """Field of a record, or path to it, with the answer that is preferred."""
    rejected: str = "rejected"
    """Field of a record, or path to it, with the other."""
    beta: PositiveFloat = 0.1
    """How much is lost by leaving the model that the run began with (equation 7 of DPO)."""
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=0.5)
    """Share of the preferences that are taken to be wrong (conservative DPO)."""
    length_normalised: bool = False
    """Divide the log-probability of an answer by its tokens (arXiv 2411.15124)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.z_loss:
            raise ValueError(f"z_loss={self.z_loss} is no part of preferences; set it to 0")
        return self


class PreferenceConfig(PreferredConfig):
    """Preferences among texts."""

    implementation = "stack.objectives.preference:Preference"

    kind: Literal["preference"] = "preference"
    """Of two texts that complete a prompt the preferred one is made likelier, against the other (DPO, arXiv
    2305.18290)."""


class ChatPreferenceConfig(PreferredConfig):
    """Preferences among what an assistant says."""

    implementation = "stack.objectives.preference:ChatPreference"
    reads_template = True

    kind: Literal["chat_preference"] = "chat_preference"
    """The same of conversations, laid out by the tokenizer's chat template: each field holds a text, or a
    list of messages, each `role` and `content`."""


type ObjectiveConfig = (
    CausalConfig
    | PrefixConfig
    | FillConfig
    | SpansConfig
    | SentencesConfig
    | MaskedWordsConfig
    | UniLmConfig
    | CompletionConfig
    | ChatConfig
    | PreferenceConfig
    | ChatPreferenceConfig
    | ClassificationConfig
    | TaggingConfig
    | AnswersConfig
    | KeySentencesConfig
    | RetrievalConfig
    | RerankingConfig
    | MultiTaskConfig
)
"""Any of the objectives: THE list, which alone names their classes."""

OBJECTIVES: tuple[type[ObjectiveSection], ...] = get_args(ObjectiveConfig.__value__)
"""Their classes."""

AnyObjective = one_of(ObjectiveConfig)
"""The same as pydantic reads it, by `kind`; without one it is causal."""
