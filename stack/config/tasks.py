"""Tasks: a head of its own on a trunk, trained on labelled records."""

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from stack.config.explain import shown
from stack.config.objective_section import ObjectiveSection
from stack.config.section import one_of

MOST_MULTI = 56
"""Labels of a task in which a record has several."""


class TaskConfig(ObjectiveSection):
    """What all tasks share: records of JSON (`data.sources`: `field: null`), and a head on the trunk."""

    reads_records = True
    scores_words = False
    shapes = ("decoder", "encoder", "encoder_decoder")
    head_dropout: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Share of what enters the head that is dropped in training; 0.1 in BERT."""
    bidirectional: bool = False
    """Whether a decoder's tokens see their whole text, as an encoder's do, and not only what stands before
    them (LLM2Vec, arXiv 2404.05961): better where each token is judged, and a trunk has to learn it anew."""

    @property
    def units(self) -> int:
        """Texts of a record that do not see each other, at most."""
        return 1


class CutConfig(TaskConfig):
    """A task whose records may be cut."""

    too_long: Literal["refuse", "leave_out", "cut"] = "refuse"
    """A record of more than data.sequence_length tokens: `refuse` names it and ends the run, `leave_out`
    trains on the others and tells their number, `cut` reads its beginning."""


class PooledConfig(CutConfig):
    """A task that makes one vector of each text."""

    pooling: Literal["auto", "first", "last", "mean"] = "auto"
    """Whose hidden state a text is told by: its first token's (through the pooler of a model that has one),
    its last one's, or the mean of all. `auto`: `last` of a decoder, which sees all at its end alone, `first`
    of an encoder, `mean` of a bidirectional decoder and of an encoder_decoder, whose encoder is the trunk."""


class LabelledConfig(CutConfig):
    """A task with labels by name."""

    labels: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Names of all labels; their order is that of the head's rows. Empty: those of the records, sorted, which
    a run finds when it begins and keeps."""
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of each target that is spread evenly over all labels (arXiv 1512.00567, section 7)."""

    @model_validator(mode="after")
    def _check_labels(self) -> Self:
        if doubled := sorted({name for name in self.labels if self.labels.count(name) > 1}):
            raise ValueError(f"labels names {shown(doubled[0])} twice; leave one out")
        if len(self.labels) == 1:
            raise ValueError(
                f"labels has {shown(self.labels[0])} alone, which there is no choice of; name others"
            )
        return self


class ClassificationConfig(LabelledConfig, PooledConfig):
    """Classification of texts and of pairs of texts."""

    implementation = "stack.objectives.classification:Classification"

    kind: Literal["classification"] = "classification"
    """A text, or a pair of texts, has one of several labels, or any of them (GLUE, arXiv 1804.07461)."""
    text: str = "text"
    """Field of a record, or path to it, with the text."""
    second: str | None = None
    """Field with the second text of a pair, which is read behind the first; null: there is none."""
    label: str = "label"
    """Field with the label: text, number, true or false; with multi_label a list of them."""
    multi_label: bool = False
    """Whether a record has any number of labels, each a yes or no of its own; of at most 56."""
    class_weights: Literal["none", "balanced"] | Annotated[tuple[PositiveFloat, ...], Field(strict=False)] = (
        "none"
    )
    """What a record counts by its label, in the order of labels; `balanced`: the inverse of a label's share
    of the records, 1 in the mean over records, which a run finds when it begins and keeps."""

    @model_validator(mode="after")
    def _check_kinds(self) -> Self:
        if self.multi_label and len(self.labels) > MOST_MULTI:
            raise ValueError(
                f"labels has {len(self.labels)} names, and multi_label takes {MOST_MULTI} at most; leave the"
                " rarest out, or train several runs"
            )
        if self.multi_label and self.class_weights != "none":
            raise ValueError("class_weights is not read with multi_label=true; remove it")
        if isinstance(self.class_weights, tuple) and len(self.class_weights) != len(self.labels):
            raise ValueError(
                f"class_weights has {len(self.class_weights)} numbers for {len(self.labels)} labels; name"
                " labels, and give each one"
            )
        return self


class TaggingConfig(LabelledConfig):
    """Tags of tokens."""

    implementation = "stack.objectives.tagging:Tagging"

    kind: Literal["tagging"] = "tagging"
    """Each token is outside, or begins or continues an entity of one of the labels (BIO; CoNLL-2003,
    arXiv cs/0306050)."""
    text: str = "text"
    """Field of a record, or path to it, with the text."""
    entities: str = "entities"
    """Field with a list of objects with `start` and `end`, characters of the text, and `label`."""
    whole_words: bool = False
    """Whether an entity begins and ends with a word, a run of letters, digits and _: in a prediction the
    tokens of a word then have one label together, the likeliest. Not for text without spaces between
    words."""


class AnswersConfig(TaskConfig):
    """Answers that are spans of a passage."""

    implementation = "stack.objectives.span_answers:SpanAnswers"

    kind: Literal["span_answers"] = "span_answers"
    """A question is answered by a span of a passage, or by none (SQuAD 2.0, arXiv 1806.03822)."""
    too_long: Literal["windows", "refuse", "leave_out"] = "windows"
    """A passage that does not fit beside its question: `windows` reads it in parts that overlap, `refuse`
    names the record and ends the run, `leave_out` trains on the others and tells their number."""
    stride: PositiveInt = 64
    """`windows`: tokens that two neighbours share, at most half of what a passage has room for."""
    question: str = "question"
    """Field of a record, or path to it, with the question."""
    context: str = "context"
    """Field with the passage."""
    answers: str = "answers"
    """Field with a list of objects with `start`, a character of the passage, and `text`; empty: there is no
    answer. The first is trained on, any is right."""
    longest_answer: PositiveInt = 30
    """Tokens of an answer that is given, at most."""
    no_answer_bias: float = 0.0
    """Added to the score of no answer, nats, when an answer is chosen."""


class KeySentencesConfig(CutConfig):
    """Sentences that tell the most."""

    implementation = "stack.objectives.key_sentences:KeySentences"

    kind: Literal["key_sentences"] = "key_sentences"
    """Each sentence of a text is in its summary or not; those that score best are taken (BertSum, arXiv
    1903.10318)."""
    too_long: Literal["refuse", "leave_out", "cut"] = "cut"
    """A text of more than data.sequence_length tokens: `refuse` names it and ends the run, `leave_out`
    trains on the others and tells their number, `cut` reads the sentences that fit."""
    sentences: str = "sentences"
    """Field of a record, or path to it, with the list of its sentences."""
    labels: str = "labels"
    """Field with a list of as many 0 and 1: whether a sentence is in the summary."""
    summary: str | None = None
    """Field with a summary that was written, which extracts are compared with (ROUGE) where a file is
    evaluated; null: with the sentences that are in it."""
    taken: PositiveInt = 3
    """Sentences that an extract takes."""


class RetrievalConfig(PooledConfig):
    """Texts that find each other."""

    implementation = "stack.objectives.retrieval:Retrieval"

    kind: Literal["retrieval"] = "retrieval"
    """A query and its passage become vectors whose cosine is high, and low with all other passages of the
    batch, on every device (DPR, arXiv 2004.04906; in-batch negatives)."""
    query: str = "query"
    """Field of a record, or path to it, with what is looked for."""
    passage: str = "passage"
    """Field with what answers it."""
    negatives: str | None = None
    """Field with a list of passages that do not; null: only those of others."""
    most_negatives: NonNegativeInt = 1
    """Of these, so many are read of each record, the first ones."""
    temperature: PositiveFloat = 0.05
    """Cosines are divided by it (SimCSE, arXiv 2104.08821)."""
    widths: Annotated[tuple[PositiveInt, ...], Field(strict=False)] = ()
    """Matryoshka (arXiv 2205.13147): the first so many numbers of a vector are to find as well as all, so
    that it may be cut; their losses are averaged with that of the whole."""
    symmetric: bool = False
    """Whether passages look for their queries as well, with half of the loss."""
    head_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of what enters the vector that is dropped in training."""

    @property
    def units(self) -> int:
        """A query, its passage, and others."""
        return 2 + (self.most_negatives if self.negatives is not None else 0)

    @model_validator(mode="after")
    def _check_negatives(self) -> Self:
        if self.negatives is None and self.most_negatives != 1:
            raise ValueError(
                f"most_negatives={self.most_negatives} is not read without negatives; name their field, or"
                " remove it"
            )
        return self


class RerankingConfig(PooledConfig):
    """Passages in the order in which they answer a query."""

    implementation = "stack.objectives.reranking:Reranking"

    kind: Literal["reranking"] = "reranking"
    """A query and each of its passages are read together and scored; those that answer are to score higher
    (monoBERT, arXiv 1901.04085; softmax over a list)."""
    query: str = "query"
    """Field of a record, or path to it, with what is looked for."""
    passages: str = "passages"
    """Field with the list of passages."""
    relevant: str = "relevant"
    """Field with the list of the numbers, from 0, of those that answer; one at least."""
    most_passages: PositiveInt = Field(default=8, ge=2)
    """Passages of a record that are read in training: those that answer, then the first of the others."""

    @property
    def units(self) -> int:
        """One for each passage."""
        return self.most_passages


type OneTask = (
    ClassificationConfig
    | TaggingConfig
    | AnswersConfig
    | KeySentencesConfig
    | RetrievalConfig
    | RerankingConfig
)
"""Any of the tasks."""

AnyTask = one_of(OneTask)
"""The same as pydantic reads it, by `kind`."""
