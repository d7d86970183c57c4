"""Texts that find each other: vectors that are near (DPR, arXiv 2004.04906), in a batch over all devices."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from stack.config import Config
from stack.config.errors import ConfigError, StackError
from stack.config.tasks import RetrievalConfig
from stack.data.fields import Field
from stack.data.records import text_at, value_at
from stack.data.tokenizer import Tokenizer
from stack.data.units import Part, Row, Unit
from stack.objectives.task import UNITS, Answer, Asked, Task, drop, pool

if TYPE_CHECKING:
    import jax
    from flax import nnx

    from stack.models.stack import Execution
    from stack.objectives.protocol import Sums

QUERY, PASSAGE, NEGATIVE = 1, 2, 3
"""What a unit is."""
_NAMED = 26
"""Bits of the number of a text, by which equal ones are known."""
AT = (1, 5, 10)
"""Numbers of passages of which recall is told."""


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Reads a query, its passage, and some that are not."""

    options: RetrievalConfig

    @property
    def key(self) -> str:
        """All options that it reads."""
        o = self.options
        return json.dumps(["retrieval", o.query, o.passage, o.negatives, o.units])

    def __call__(self, record: dict[str, Any], place: str, *, labelled: bool) -> Sequence[Unit]:
        """A unit for each; without labels either text may be missing, not both."""
        options = self.options
        text = partial(text_at, record, where=lambda: place)
        if not labelled:
            names = {options.query: QUERY, options.passage: PASSAGE}
            there = [(text(name) or "", kind) for name, kind in names.items() if _begins(name, record)]
            if not there:
                raise StackError(
                    f"{place}: neither field {options.query!r} nor {options.passage!r}; give it one of them"
                )
            return [_unit(each, kind) for each, kind in there]
        units = [
            _unit(text(options.query, setting="objective.query") or "", QUERY),
            _unit(text(options.passage, setting="objective.passage") or "", PASSAGE),
        ]
        if options.negatives is not None:
            found = value_at(record, options.negatives, lambda: place, setting="objective.negatives")
            if not isinstance(found, list) or any(not isinstance(each, str) for each in found):
                raise StackError(f"{place}: field {options.negatives!r} is no list of texts; give it one")
            units += [_unit(each, NEGATIVE) for each in found[: options.most_negatives]]
        return units


def _begins(path: str, record: Mapping[str, Any]) -> bool:
    return path in record or path.split(".", maxsplit=1)[0] in record


def _unit(text: str, kind: int) -> Unit:
    digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=4).digest()
    return Unit([Part(text)], value=int.from_bytes(digest) % (1 << _NAMED) << 2 | kind)


class Retrieval(Task):
    """Mean cross-entropy of each query's passage among all passages of the batch."""

    labels = (
        Field(name="kinds", axes=UNITS, padding=0),
        Field(name="names", axes=UNITS, padding=0),
        Field(name="records", axes=UNITS, padding=-1),
    )

    def __init__(self, config: Config) -> None:
        """The options.

        Raises:
          ConfigError: micro-batches, of which none would see the passages of another; a width that is none.
        """
        assert isinstance(config.objective, RetrievalConfig)
        self.options = config.objective
        super().__init__(config)
        if config.train.accumulation > 1:
            raise ConfigError(
                "objective.kind=retrieval: train.accumulation must be 1, as each query is compared with the"
                " passages of the whole batch; lower train.batch_size, or set train.remat=full"
            )
        if wide := [width for width in self.options.widths if width >= config.model.embed_dim]:
            raise ConfigError(
                f"objective.widths: {wide[0]} is not below model.embed_dim={config.model.embed_dim}, which is"
                " there anyway; remove it"
            )

    def reader(self) -> Pairs:
        """Of queries and passages."""
        return Pairs(options=self.options)

    def head(self, rngs: "nnx.Rngs") -> "nnx.Module":
        """Nothing: the pooled state is the vector."""
        from flax import nnx

        return nnx.Module()

    def label(self, row: Row) -> Mapping[str, np.ndarray]:
        """What each unit is, its text's number, and its record."""
        values = row.unit_values
        return {"kinds": values & 3, "names": values >> 2, "records": row.records}

    def read_out(
        self, model: Any, hidden: "jax.Array", batch: "Mapping[str, jax.Array]", run: "Execution"
    ) -> "dict[str, jax.Array]":
        """`vectors`, [batch, units, embed], not of length 1 yet."""
        import jax.numpy as jnp

        hidden = pool(hidden, batch, self.num_units(batch), self.pooling, run)
        if self.pools_by_model:
            hidden = model.pool(hidden, run.layout)
        return {"vectors": drop(hidden, self.task.head_dropout, run).astype(jnp.float32)}

    def losses(
        self, scores: "Mapping[str, jax.Array]", batch: "Mapping[str, jax.Array]", run: "Execution"
    ) -> "tuple[jax.Array, Sums]":
        """Mean over widths of the cross-entropies, and, if it is symmetric, over both sides."""
        import jax.numpy as jnp

        kinds, vectors = batch["kinds"], scores["vectors"]
        queries, passages = kinds == QUERY, kinds == PASSAGE
        candidates = passages | (kinds == NEGATIVE)
        # Numbers of records are those of a row; with that of the row they are of the batch.
        own = batch["example"][:, None] * self.sizes["units"] + batch["records"]
        sides = [(queries, candidates, passages)]
        if self.options.symmetric:
            sides.append((passages, queries, queries))
        loss, right = jnp.zeros(()), jnp.zeros(())
        widths = (*self.options.widths, vectors.shape[-1])
        for width in widths:
            unit = _normalized(vectors[..., :width])
            for number, (asking, among, wanted) in enumerate(sides):
                each, hits = self._side(unit, asking, among, wanted, own, batch["names"], run)
                loss += each / len(sides) / len(widths)
                right += hits if width == widths[-1] and number == 0 else 0.0
        return loss, {"accuracy": right, "number": self.count(batch)}

    def _side(
        self,
        unit: "jax.Array",
        asking: "jax.Array",
        among: "jax.Array",
        wanted: "jax.Array",
        own: "jax.Array",
        names: "jax.Array",
        run: "Execution",
    ) -> "tuple[jax.Array, jax.Array]":
        """The sum of the cross-entropies of some units' own among others, and how many score highest."""
        import jax
        import jax.numpy as jnp
        from jax.sharding import PartitionSpec as P

        def everywhere(values: jax.Array) -> jax.Array:
            flat = values if run.layout.trivial else jax.reshard(values, P())
            return flat.reshape(-1, *values.shape[2:])

        all_units, all_own, all_names = everywhere(unit), everywhere(own), everywhere(names)
        scores = jnp.einsum("bud,nd->bun", unit, all_units) / self.options.temperature
        mine = (own[..., None] == all_own) & everywhere(wanted)
        # Another record's text that reads the same answers as well; it is no wrong answer.
        name = (mine * all_names).sum(-1, keepdims=True)
        able = everywhere(among) & (mine | (all_names != name))
        scores = jnp.where(able, scores, -1e30)
        shares = jax.nn.log_softmax(scores)
        best = (scores == scores.max(-1, keepdims=True)) & mine
        return (
            -jnp.where(mine & asking[..., None], shares, 0.0).sum(),
            (best.any(-1) & asking).sum(dtype=jnp.float32),
        )

    def count(self, batch: "Mapping[str, jax.Array]") -> "jax.Array":
        """Queries."""
        return (batch["kinds"] == QUERY).sum(dtype="float32")

    def measure(self, outputs: Mapping[str, np.ndarray], tokenizer: Tokenizer) -> dict[str, float]:
        """recall_at_1, _5 and _10, mrr and ndcg_at_10 of queries among all passages that are held out."""
        from stack.objectives.metrics.ranking import measure

        kinds, rows = outputs["kinds"], np.arange(len(outputs["kinds"]))[:, None]
        own = rows * self.sizes["units"] + outputs["records"]
        vectors, names = outputs["vectors"].astype(np.float64), outputs["names"]
        queries, passages, others = (kinds == kind for kind in (QUERY, PASSAGE, NEGATIVE))
        # A text that stands in several records is one passage.
        texts, first = np.unique(names[passages | others], return_index=True)
        told = {}
        answer_of = dict(zip(own[passages].tolist(), names[passages].tolist(), strict=True))
        right = np.searchsorted(texts, [answer_of[one] for one in own[queries].tolist()])
        for width in (*self.options.widths, vectors.shape[-1]):
            unit = _normalized(vectors[..., :width])
            scores = unit[queries] @ unit[passages | others][first].T
            suffix = "" if width == vectors.shape[-1] else f"_width_{width}"
            told |= {f"{name}{suffix}": value for name, value in measure(scores, right, AT).items()}
        return told

    def answer(self, asked: Asked, tokenizer: Tokenizer) -> Answer:
        """`query_vector` and `passage_vector`, of length 1, of those that it has."""
        kinds = self.label(asked.rows[0])["kinds"]
        unit = _normalized(asked.outputs[0]["vectors"].astype(np.float64))
        names = {QUERY: "query_vector", PASSAGE: "passage_vector"}
        return {
            names[kind]: [round(value, 6) for value in vector.tolist()]
            for kind, vector in zip(kinds.tolist(), unit, strict=True)
            if kind in names
        }


def _normalized(vectors: Any) -> Any:
    """Of length 1, along the last axis; of 0 as it is."""
    return vectors / ((vectors**2).sum(-1, keepdims=True) + 1e-12) ** 0.5
