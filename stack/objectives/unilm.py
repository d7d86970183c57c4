"""UniLM (arXiv 1905.03197): masked words under three masks of attention, drawn text by text."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Integer

from stack.config import Config, UniLmConfig
from stack.data.dataset import Dataset
from stack.data.examples import generator
from stack.data.fields import Field
from stack.data.tokenizer import Tokenizer
from stack.objectives.masked_words import FIELDS, MaskedExamples, MaskedWords
from stack.objectives.words import ROW, word

BIDIRECTIONAL, LEFT_TO_RIGHT, SOURCE, TARGET = range(4)
"""Types of segments, by which a model tells what it may see."""

MORE = (Field(name="prefix", axes=ROW, padding=0), Field(name="types", axes=ROW, padding=0))


class UniLm(MaskedWords):
    """Mean cross-entropy of words at hidden places, seen from both sides, from the left, or both by turns."""

    fields = (*FIELDS[:-1], *MORE, FIELDS[-1])

    def __init__(self, config: Config) -> None:
        """The options."""
        super().__init__(config)
        assert isinstance(config.objective, UniLmConfig)
        self.mixture = config.objective

    def examples(self, tokenizer: Tokenizer) -> "UniLmExamples":
        """Rows with hidden words and kinds of attention; see `MaskedWords.examples`."""
        mask = word(tokenizer, self.masks.mask_token, self.model.vocab_size, field="mask_token")
        return UniLmExamples(self.mixture, tokenizer, mask=mask)


class UniLmExamples(MaskedExamples):
    """Rows with hidden words whose texts are each of one kind; see `stack.data.examples.Examples`."""

    def __init__(self, options: UniLmConfig, tokenizer: Tokenizer, *, mask: int) -> None:
        """See `MaskedExamples`."""
        super().__init__(options, tokenizer, mask=mask)
        weights = np.array(
            [options.bidirectional_weight, options.left_to_right_weight, options.sequence_to_sequence_weight]
        )
        shares = weights / weights.max()  # The sum of large ones may be infinite.
        self.shares = shares / shares.sum()

    def read(
        self,
        dataset: Dataset,
        rows: Integer[np.ndarray, " rows"],
        draws: Integer[np.ndarray, "rows 3"],
        fields: Sequence[Field],
    ) -> Mapping[str, np.ndarray]:
        """The fields of rows by number; see `stack.data.examples.Examples`.

        `prefix` is 1 where a token is seen by all of its text, and `types` is the kind of its text.
        """
        batch = dict(super().read(dataset, rows, draws, fields))
        segments = batch["segments"]
        types = np.zeros_like(segments)
        for number, draw in enumerate(draws):
            random = generator(draw + np.array([0, 2, 0]))  # Not what words are hidden with.
            row = segments[number]
            for text in range(1, int(row.max(initial=0)) + 1):
                places = np.flatnonzero(row == text)
                kind = int(random.choice(3, p=self.shares))
                types[number, places] = kind
                if kind == SOURCE:
                    middle = int(random.integers(1, max(2, len(places))))
                    types[number, places[middle:]] = TARGET
        seen_by_all = (types == BIDIRECTIONAL) | (types == SOURCE)
        return batch | {"types": types, "prefix": (seen_by_all & (segments > 0)).astype(np.int32)}
