"""What a run is: kept with every checkpoint, and compared whenever the run is opened again."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from stack.config import AverageConfig, Config, ConfigError, Fp8Config, ScheduleConfig, StackError
from stack.config.fields import flatten, suggest
from stack.data.position import Position
from stack.hardware.defaults import Setting, compared
from stack.step.optimizer import schedule
from stack.versions import RECORDED, installed_version

_IDENTITY = (
    *("seed", "init_from", "model", "objective", "optimizer", "adapter", "data", "average"),
    *("train.batch_size", "train.grad_reduce_dtype", "kernels.matmul"),
    *("mesh.gather_dtype", "mesh.scatter_dtype"),
    *(f"kernels.fp8.{name}" for name in Fp8Config.model_fields),
    *("stability.spike_deviations", "stability.spike_window"),
)
"""What changes the function that is trained, or the order of its data."""
_READ = ("seed", "model", "objective", "adapter", "data")
"""What of it changes the meaning of an evaluation or a sample."""
_FREE = (
    # How a model runs, and nothing of what it is.
    "model.scan_unroll",
    "objective.logits_bytes",
    # Where instances meet, and for how long they wait.
    "average.folder",
    "average.wait_seconds",
    # Told instead, with the jump that they make.
    "optimizer.learning_rate",
    "optimizer.schedule",
    # Compared by what is read, wherever it lies.
    "data.cache_dir",
    "data.workers",
    "data.tokenizer",
    "data.sources",
)
_CONTENT = {
    "tokenizer": "data.tokenizer",
    "corpus": "data.sources",
    "rows": "data.rows",
    "order": "data.order",
    "records": "data.records",
}
"""What a fingerprint's parts are called: rows and order are how this version of Stack makes rows of documents
and orders them; records is how an objective reads them, a chat template among it."""
_BEFORE = {"init_from": None, "adapter": None, "kernels": {"matmul": "xla"}}
_BEFORE |= {"average": AverageConfig().model_dump()}
"""What a config that does not say it began with."""
_DROPOUT = "attention dropout"
_DRAWS = {_DROPOUT: "2"}
"""Version of the bits that drop attention weights, which change no expectation: 1 where nothing is said."""
_VERSIONS = ("rows", "order")
"""Those that were not always recorded, and were 1 then."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """A run, but for its state."""

    config: Mapping[str, Any]
    """As plain values; of a run that has not begun, the model alone."""
    data: Mapping[str, str]
    """`Data.fingerprint`; of such a run, what there is of it."""
    rows: int
    """Used by now."""
    skipped: Sequence[Sequence[int]] = ()
    """`Position.skipped`."""
    accepted: Sequence[Mapping[str, Any]] = ()
    """Differences it went on with: step, field, old, new."""
    listeners: Mapping[str, Any] = field(default_factory=dict)
    """What they wanted kept."""
    origin: Mapping[str, Any] = field(default_factory=dict)
    """Of its first parameters, as `starting.begin` tells it; empty: from the seed."""
    settings: Sequence[Mapping[str, Any]] | None = None
    """Of the compiler and the libraries, each as `Setting` has it; None: they were not always recorded."""
    versions: Mapping[str, str | None] = field(
        default_factory=lambda: {name: installed_version(name) for name in RECORDED} | _DRAWS
    )
    """Of the packages that made it, and of how it draws."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def position(self, step: int) -> Position:
        """Where in its data it stands."""
        skipped = tuple((int(start), int(stop)) for start, stop in self.skipped)
        return Position(step=step, rows=self.rows, skipped=skipped)


def compare(
    record: Record,
    config: Config,
    data: Mapping[str, str] | None,
    *,
    place: str,
    accept: Sequence[str] = (),
    reading: bool = False,
) -> list[dict[str, Any]]:
    """What of a run differs from what it was, where that is accepted.

    Args:
      record: kept with its checkpoint.
      config: of now.
      data: `Data.fingerprint` of now, or the parts of it that are read; None: it is not read.
      place: names the run.
      accept: fields that may differ, or sections.
      reading: only what an evaluation or a sample depends on.

    Returns:
      The accepted differences: field, old and new.

    Raises:
      ConfigError: `accept` names no field.
      StackError: something else differs.
    """
    _check_names(accept, config)
    wanted = _READ if reading else _IDENTITY
    found: list[tuple[str, str, str]] = [
        (name, old, new)
        for name, old, new in differences(_BEFORE | dict(record.config), config.model_dump(mode="json"))
        if _is_below(name, wanted) and (not _is_below(name, _FREE) or name.endswith(".weight"))
    ]
    content = {part: name for part, name in _CONTENT.items() if data is not None and part in data}
    for part, name in content.items():
        if part not in record.data and part not in _VERSIONS:  # It has read none.
            continue
        old, new = (values.get(part, "1") for values in (record.data, data or {}))
        if old != new:
            then, now = (value if len(value) < 10 else f"content {value[:8]}" for value in (old, new))
            found.append((name, then, now))
    refused = [one for one in found if not _is_below(one[0], accept)]
    if refused:
        told = ", ".join(f"{name} {old} -> {new}" for name, old, new in refused[:4])
        more = f" and {len(refused) - 4} more" if len(refused) > 4 else ""
        fields = " ".join(f"--accept {name}" for name, _, _ in refused[:4])
        raise StackError(
            f"{place}: the run began otherwise: {told}{more}; restore it, give a new run another name with"
            f" name=..., or go on all the same with {fields}"
        )
    return [{"field": name, "old": old, "new": new} for name, old, new in found]


def check_state(record: Record, config: Config, *, place: str) -> None:
    """Refuses to go on with a state of other instances, whatever is accepted.

    Args:
      record: kept with it.
      config: of now.
      place: names the run.

    Raises:
      StackError: it is.
    """
    then = AverageConfig.model_validate(record.config.get("average", {}))
    old, new = (_state_of(average) for average in (then, config.average))
    if old != new:
        raise StackError(
            f"{place}: its state is that of {old}, not of {new}; restore average, or begin a new run from it:"
            f" name=... init_from={place}"
        )


def _state_of(average: AverageConfig) -> str:
    """What a state is of, as far as instances go."""
    if not average.apart:
        return "one model"
    who = f"{average.instances} instances" if average.folder is None else "an instance that meets others"
    return who + (" with an outer momentum" if average.outer == "nesterov" else "")


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Dotted fields in which two configs differ, with both values; fields that only one knows are left out.

    A field that is new in this version has a default that changes nothing; but one below a section that
    the other has too, and says to be null, is a difference.
    """
    old, new = dict(flatten(dict(then))), dict(flatten(dict(now)))
    both = [(name, old[name], new[name]) for name in new if name in old and old[name] != new[name]]
    for mine, other, order in ((new, old, 1), (old, new, -1)):
        for name in mine.keys() - other.keys():
            above = [".".join(name.split(".")[:end]) for end in range(1, name.count(".") + 1)]
            for section in above:
                if section in other:
                    pair = [other[section], f"{mine[name]} ({name})"][::order]
                    both.append((section, pair[0], pair[1]))
    return sorted(set(both))


def schedule_note(record: Record, config: Config, step: int) -> str | None:
    """What the learning rate does where the run goes on, if it jumps; and how to keep it from that."""
    if "optimizer" not in record.config:  # Weights that came from elsewhere.
        return None
    then = Config.model_validate(_known(record.config, config))
    if then.optimizer == config.optimizer and then.train.steps == config.train.steps:
        return None
    old, new = rate(then, step), rate(config, step)
    before = rate(then, max(0, step - 1))
    if abs(new - old) <= 1e-6 * max(abs(new), abs(old)):
        return None
    told = f"the learning rate goes from {before:.3g} to {new:.3g} at step {step:,}"
    shape = config.optimizer.schedule
    if shape == then.optimizer.schedule and config.optimizer.learning_rate == then.optimizer.learning_rate:
        return (
            f"{told}: its schedule ends with the run, which is {then.train.steps:,} -> {config.train.steps:,}"
            f" steps now. To keep it there: {hold(shape, then.train.steps)}; to go on at one rate:"
            f" optimizer.schedule.kind=constant optimizer.learning_rate={before:.3g}; to warm up and"
            f" decay once more: optimizer.schedule.start_step={step}"
        )
    return f"{told}, as optimizer.learning_rate or schedule changed"


def rate(config: Config, step: int) -> float:
    """The learning rate of a step, counted from 0."""
    value: Any = schedule(config.optimizer, steps=config.train.steps)(step)
    return float(value)


def hold(shape: ScheduleConfig, steps: int) -> str:
    """The override that lets a run of so many steps go on without its rate rising again."""
    return f"optimizer.schedule.decay_steps={max(1, steps - shape.start_step - shape.warmup(steps))}"


def extension(config: Config) -> list[str]:
    """The overrides that train twice as long, without a jump of the learning rate if that can be."""
    steps, shape = config.train.steps, config.optimizer.schedule
    longer = [f"train.steps={2 * steps}"]
    if shape.kind == "constant" or shape.decay_steps is not None:
        return longer
    if shape.final_fraction > 0:
        return [*longer, hold(shape, steps)]
    return [*longer, f"optimizer.schedule.start_step={steps}"]


def version_note(record: Record) -> str | None:
    """Which versions are others than those the run began with."""
    then: dict[str, str | None] = dict(record.versions)
    now = {name: installed_version(name) for name in RECORDED}
    if record.config["model"].get("attention_dropout"):
        then, now = {_DROPOUT: "1"} | then, now | _DRAWS
    changed = [
        f"{name} {then[name]} -> {version}"
        for name, version in now.items()
        if then.get(name) not in (None, version)
    ]
    if not changed:
        return None
    return f"{', '.join(changed)} since its newest checkpoint: the same run, but not bit for bit"


def settings_note(record: Record, settings: Sequence[Setting]) -> str | None:
    """Which options of the compiler are others than those of the newest checkpoint."""
    if record.settings is None:
        return None
    then, now = compared([Setting(**one) for one in record.settings]), compared(settings)
    changed = [
        f"{name} {then.get(name, 'not set')} -> {now.get(name, 'not set')}"
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name)
    ]
    if not changed:
        return None
    return f"compiled with {', '.join(changed)}: the same run, but not bit for bit"


def _known(recorded: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """A recorded config with the names and folders of now, which may be checked."""
    return dict(recorded) | {"name": config.name, "output_dir": config.output_dir}


def _check_names(accept: Sequence[str], config: Config) -> None:
    known = {name for name, _ in flatten(config.model_dump(mode="json"))} | set(_CONTENT.values())
    for name in accept:
        if not any(one == name or one.startswith(f"{name}.") for one in known):
            match = suggest(name)
            meant = f"; did you mean {match}?" if match else ""
            raise ConfigError(f"--accept {name}: there is no such field{meant}")


def _is_below(name: str, sections: Sequence[str]) -> bool:
    return any(name == section or name.startswith(f"{section}.") for section in sections)


def lines(accepted: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What was accepted, a line each."""
    for one in accepted:
        yield f"accepted: {one['field']} {one['old']} -> {one['new']}"
