"""What a run that begins with weights makes of the held-out text of each source: before, and at its end."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from stack.config import PreferredConfig, StackError
from stack.config.multi_task import MultiTaskConfig
from stack.train.watch.listeners import Listener

if TYPE_CHECKING:
    from stack.train.trainer import Trainer

KEPT = "domains"


class Domains(Listener):
    """Evaluates each source by itself at step 0 and at the end, of a run over several that has `init_from`.

    So that it is seen what was learned of one, and what was forgotten of another.
    """

    def __init__(self, trainer: "Trainer") -> None:
        """Looks at nothing until the run starts."""
        self._trainer = trainer
        self._before: dict[str, float] = {}
        self._measure = "perplexity"

    def on_start(self, info: dict[str, Any]) -> None:
        """Evaluates at step 0; a run that goes on has it with its checkpoint."""
        config = self._trainer.config
        self._before = dict(info.get("kept", {}).get(KEPT, {}))
        # Of several tasks each is told anyway; of preferences the reference's part is of all rows.
        is_apart = not isinstance(config.objective, MultiTaskConfig | PreferredConfig)
        begins = info["step"] == 0 and config.init_from is not None
        if begins and is_apart and len(config.data.read_sources) > 1:
            self._before = self._evaluate()

    def on_save(self, step: int) -> Mapping[str, Any] | None:
        """Has what was before kept."""
        return {KEPT: self._before} if self._before else None

    def on_end(self, summary: dict[str, Any]) -> Mapping[str, Any] | None:
        """Evaluates once more, and shows both."""
        if not self._before or "error" in summary:
            return None
        after = self._evaluate()
        both = {name: (before, after[name]) for name, before in self._before.items() if name in after}
        width = max(map(len, both), default=0)
        lines = [f"{name:<{width}}  {old:>10.4f} -> {new:.4f}" for name, (old, new) in both.items()]
        shown = [("domains", "\n".join([f"{self._measure} of held-out text, before and after", *lines]))]
        return {KEPT: both, "rows": [*summary.get("rows", []), *shown]}

    def _evaluate(self) -> dict[str, float]:
        """By source; those of which nothing is held out, or nothing to predict, are left out."""
        trainer = self._trainer
        heldout, sources = trainer.data.heldout, trainer.config.data.read_sources
        found: dict[str, float] = {}
        for number, (part, source) in enumerate(zip(heldout.parts, sources, strict=True)):
            name = source.path or source.kind
            name = f"{name} ({number})" if name in found else name
            if not part.num_rows:
                continue
            try:
                metrics = trainer.evaluate(
                    replace(heldout, parts=(part,), weights=heldout.weights[number:][:1])
                )
            except StackError as error:
                self.warn(f"{name} is not told of by itself: {error}")
                continue
            self._measure = "perplexity" if "perplexity" in metrics else "loss"
            if self._measure in metrics:
                found[name] = metrics[self._measure]
        return found
