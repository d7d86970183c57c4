"""How wrong the planner is: its predictions against published runs."""

import csv
import dataclasses
import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args

from stack.config import ConfigError, DecoderConfig
from stack.hardware import chip as chips
from stack.hardware.chip import Precision
from stack.planner.formula.projects import published_memory
from stack.planner.formula.time import published_time
from stack.planner.formula.workload import Remat, Schedule, Workload
from stack.planner.search.layouts import describe

TABLE = Path(str(files("stack.planner"))) / "data" / "published_runs.csv"
"""Published runs, each with its source; those the efficiencies are calibrated on."""

TORCHTITAN = TABLE.with_name("torchtitan_runs.csv")
"""More of them, with the same columns, on which nothing is calibrated."""

GIB = 2**30

_PRECISIONS: Mapping[str, Precision] = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp8": "float8",
    "fp32": "float32",
}

_REMATS: Mapping[str, Remat] = {
    **{name: name for name in get_args(Remat)},
    "": "none",
    "none(default)": "none",
    "minimal_flash": "dots",
    "selective": "attention_core",
    "selective op": "alternate_products",
    "selective layer": "alternate_layers",
}
"""Other projects' names for what is computed again; what is not recorded is taken for none."""

_SELECTIVE: Mapping[str, Remat] = {"torchtitan": "alternate_products", "2410.06511": "alternate_products"}
"""What `selective` means where the source has this in its name; elsewhere it is Megatron-LM's, whose word it
is (arXiv 2205.05198), as in Megatron-Bridge and NeMo. torchtitan's presets for Llama 3 set
`selective_ac_option = 'op'` (train_configs/llama3_8b.toml); its other option, whole layers in turn, is named
`selective layer` here as in its docs/performance.md."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One published run and what is predicted of it."""

    line: int
    model: str
    hardware: str
    precision: str
    source: str
    work: Workload
    seconds: float
    """Published, of a step."""
    predicted_seconds: float
    memory: float | None
    """Published peak in bytes."""
    predicted_memory: float

    @property
    def error(self) -> float:
        """Of the step time: predicted over published, minus one."""
        return self.predicted_seconds / self.seconds - 1

    @property
    def memory_error(self) -> float | None:
        """The same of the peak memory; None where it was not published."""
        return None if self.memory is None else self.predicted_memory / self.memory - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """Errors as fractions of what was published, signs dropped."""

    runs: int
    median_abs_error: float | None
    median_of_source_medians: float | None
    p90_abs_error: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Validation:
    """Every run of a table, and what could not be scored."""

    runs: tuple[Run, ...]
    refusals: tuple[str, ...]
    """`line 12: why`, one each."""

    def score(self, *precisions: str) -> Score:
        """Step times of the runs in these precisions."""
        return _score([(run.source, run.error) for run in self.runs if run.precision in precisions])

    @property
    def memory(self) -> Score:
        """Peak memory of the runs that published it."""
        return _score([(run.source, run.memory_error) for run in self.runs if run.memory_error is not None])

    @property
    def kendall_tau(self) -> float | None:
        """Of the ranking of layouts by speed within one model, chip, precision and number of devices.

        (concordant - discordant) / all pairs, over all such groups together; None without a pair.
        """
        groups: dict[tuple, list[tuple[float, float]]] = defaultdict(list)
        for run in self.runs:
            speed = run.work.tokens / run.work.devices
            key = (run.model, run.hardware, run.precision, run.work.devices)
            groups[key].append((speed / run.seconds, speed / run.predicted_seconds))
        signs = [
            math.copysign(1, (a[0] - b[0]) * (a[1] - b[1]))
            for group in groups.values()
            for a, b in itertools.combinations(group, 2)
            if a[0] != b[0] and a[1] != b[1]
        ]
        return statistics.fmean(signs) if signs else None


def validate(path: str | Path = TABLE) -> Validation:
    """Predicts every run of a table.

    Args:
      path: CSV with the columns of the table that comes with Stack; more are ignored. An empty
        micro_batch is taken for 1, an empty remat for none.

    Raises:
      ConfigError: no such file, or a column is missing. A row that cannot be read is refused by its
        line, and the rest still scored.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a CSV file: {error}") from None
    reader = csv.DictReader(text.splitlines())
    missing = [name for name in _COLUMNS if name not in (reader.fieldnames or ())]
    if missing:
        raise ConfigError(f"{path}: no column {missing[0]}; the columns are {', '.join(_COLUMNS)}")
    runs, refusals = [], []
    for row in reader:
        try:
            runs.append(_run(row, reader.line_num))
        except (ValueError, ConfigError) as error:
            refusals.append(f"line {reader.line_num}: {error}")
    return Validation(runs=tuple(runs), refusals=tuple(refusals))


def as_dict(validation: Validation) -> dict[str, Any]:
    """For JSON: scores by precision and of memory, the ranking, and what was refused."""
    return {
        "bf16": dataclasses.asdict(validation.score("bf16", "fp16")),
        "fp8": dataclasses.asdict(validation.score("fp8")),
        "memory": dataclasses.asdict(validation.memory),
        "kendall_tau": validation.kendall_tau,
        "refused": list(validation.refusals),
    }


def lines(validation: Validation, *, worst: int = 12) -> list[str]:
    """Errors of the step time by source, chip, precision and size; of the memory; and the worst runs."""
    runs = validation.runs
    text = [f"{len(runs)} runs predicted, {len(validation.refusals)} refused"]
    text += [f"  refused {refusal}" for refusal in validation.refusals]
    text += ["", "step time, error as a share of the published"]
    heading = f"{'':52} {'runs':>5} {'median':>8} {'p90':>8} {'bias':>8}"
    for title, key in _GROUPINGS.items():
        text += ["", heading.replace(" " * len(title), title, 1)]
        groups: dict[str, list[float]] = defaultdict(list)
        for run in sorted(runs, key=lambda run: (run.precision, run.hardware)):
            groups[key(run)].append(run.error)
        text += [f"{name[:52]:52} {_errors(errors)}" for name, errors in groups.items()]
    text += ["", heading]
    for name, precisions in (("bf16", ("bf16", "fp16")), ("fp8", ("fp8",))):
        score = validation.score(*precisions)
        if errors := [run.error for run in runs if run.precision in precisions]:
            text += [f"{name:52} {_errors(errors)}"]
        if score.median_of_source_medians is not None:
            text += [f"  median of the sources' medians {score.median_of_source_medians:.1%}"]
    memory = [run.memory_error for run in runs if run.memory_error is not None]
    text += [f"{'peak memory':52} {_errors(memory)}"] if memory else []
    if validation.kendall_tau is not None:
        text += [
            f"Kendall tau of layouts within one model and number of devices {validation.kendall_tau:.2f}"
        ]
    text += ["", "the worst"]
    for run in sorted(runs, key=lambda run: -abs(run.error))[:worst]:
        text.append(
            f"{run.error:+8.1%}  line {run.line}: {run.model}, {run.work.devices} x {run.hardware},"
            f" {run.precision}, {run.work.length} tokens, {describe(run.work)}: {why(run)}"
        )
    return text


def why(run: Run) -> str:
    """What of the prediction the error most likely lies in: its largest uncertain part."""
    chip, work = _chip(run.hardware), run.work
    time = published_time(work, chip)
    if run.error < 0 and work.devices > chip.domain_size and time.exposed > 0.1 * time.total:
        return f"{time.exposed / time.total:.0%} exposed communication, over networks slower than their peak"
    if time.attention > 0.25 * time.total:
        return f"{time.attention / time.total:.0%} attention, whose kernels differ most between projects"
    if run.error < 0 and work.stage > 1:
        return "a pipeline whose stages are uneven or wait for each other"
    if work.model.embed_dim < 2560:
        return f"narrow weights ({work.model.embed_dim}), bound by kernels around the products"
    if run.error < 0:
        return "slower kernels, or waits, than its generation's"
    return "faster kernels, or more overlap, than its generation's"


_chip = cache(chips.load)

_GROUPINGS = {
    "source": lambda run: f"{run.source} {run.precision}",
    "chip and precision": lambda run: f"{_chip(run.hardware).name} {run.precision}",
    "parameters": lambda run: _size(run.work.model),
    "devices": lambda run: _count(run.work.devices),
}

_COLUMNS = (
    *("model", "layers", "d_model", "heads", "kv_heads", "d_ff", "vocab", "gated_mlp", "tied_embeddings"),
    *("hardware", "gpus", "seq_len", "global_batch", "micro_batch", "precision", "tensor", "stage"),
    *("virtual_stages", "context", "fsdp", "data", "zero", "sequence_parallel", "overlapped_tensor_parallel"),
    *("schedule", "remat", "step_seconds", "tokens_per_second_per_gpu", "peak_memory_gib", "source"),
)


def _run(row: Mapping[str, str | None], line: int) -> Run:
    if row.get("source") is None:
        raise ValueError("too few columns")
    cells = {name: (row[name] or "").strip() for name in _COLUMNS}
    chip, work = _chip(cells["hardware"]), _workload(cells)
    if work.devices != _integer(cells, "gpus"):
        raise ValueError(f"gpus={cells['gpus']}, but the mesh axes multiply to {work.devices}")
    if work.batch % (work.replicas * work.micro_batch):
        raise ValueError(
            f"global_batch={work.batch} does not divide into micro-batches of {work.micro_batch}"
            f" on {work.replicas} replicas"
        )
    if cells["step_seconds"]:
        seconds = _number(cells, "step_seconds")
    else:
        seconds = work.tokens / work.devices / _number(cells, "tokens_per_second_per_gpu")
    return Run(
        line=line,
        model=cells["model"],
        hardware=cells["hardware"],
        precision=cells["precision"],
        source=cells["source"],
        work=work,
        seconds=seconds,
        predicted_seconds=published_time(work, chip).total,
        memory=_number(cells, "peak_memory_gib") * GIB if cells["peak_memory_gib"] else None,
        predicted_memory=published_memory(work).total,
    )


def _workload(cells: Mapping[str, str]) -> Workload:
    gated = _flag(cells, "gated_mlp")
    model = DecoderConfig(
        vocab_size=_integer(cells, "vocab"),
        max_length=_integer(cells, "seq_len"),
        num_layers=_integer(cells, "layers"),
        embed_dim=_integer(cells, "d_model"),
        num_heads=_integer(cells, "heads"),
        num_kv_heads=_integer(cells, "kv_heads"),
        mlp_dim=_integer(cells, "d_ff"),
        tied_embeddings=_flag(cells, "tied_embeddings"),
        # Positions and norms are not recorded; the gate tells the Llama family from GPT's.
        mlp="swiglu" if gated else "gelu",
        position="rotary" if gated else "learned",
        norm="rmsnorm" if gated else "layernorm",
        qkv_bias=not gated,
        out_bias=not gated,
        mlp_bias=not gated,
    )
    return Workload(
        model=model,
        length=_integer(cells, "seq_len"),
        batch=_integer(cells, "global_batch"),
        micro_batch=_integer(cells, "micro_batch") if cells["micro_batch"] else 1,
        data=_integer(cells, "data"),
        fsdp=_integer(cells, "fsdp"),
        stage=_integer(cells, "stage"),
        context=_integer(cells, "context"),
        tensor=_integer(cells, "tensor"),
        zero=_choice(cells["zero"], {str(stage): stage for stage in range(4)}, "zero"),
        sequence_parallel=_flag(cells, "sequence_parallel"),
        virtual_stages=_integer(cells, "virtual_stages"),
        schedule=_choice(
            cells["schedule"] or "1f1b", {name: name for name in get_args(Schedule)}, "schedule"
        ),
        overlapped_tensor_parallel=_flag(cells, "overlapped_tensor_parallel"),
        remat=_remat(cells),
        precision=_choice(cells["precision"], _PRECISIONS, "precision"),
    )


def _remat(cells: Mapping[str, str]) -> Remat:
    source = cells["source"].lower()
    meanings = (meaning for project, meaning in _SELECTIVE.items() if project in source)
    if cells["remat"] == "selective" and (meaning := next(meanings, None)):
        return meaning
    return _choice(cells["remat"], _REMATS, "remat")


def _integer(cells: Mapping[str, str], name: str) -> int:
    number = _number(cells, name)
    if number != int(number):
        raise ValueError(f"{name}={cells[name]} is not a whole number")
    return int(number)


def _number(cells: Mapping[str, str], name: str) -> float:
    try:
        number = float(cells[name])
    except ValueError:
        raise ValueError(f"{name}={cells[name]!r} is not a number") from None
    if not (number > 0 and math.isfinite(number)):
        raise ValueError(f"{name}={cells[name]} is not above 0")
    return number


def _flag(cells: Mapping[str, str], name: str) -> bool:
    return _choice(cells[name].lower(), {"0": False, "1": True, "false": False, "true": True}, name)


def _choice[T](text: str, choices: Mapping[str, T], name: str) -> T:
    if text not in choices:
        raise ValueError(f"{name}={text!r} is none of {', '.join(choice for choice in choices if choice)}")
    return choices[text]


def _score(errors: Sequence[tuple[str, float]]) -> Score:
    sources: dict[str, list[float]] = defaultdict(list)
    for source, error in errors:
        sources[source].append(abs(error))
    every = [error for part in sources.values() for error in part]
    if not every:
        return Score(runs=0, median_abs_error=None, median_of_source_medians=None, p90_abs_error=None)
    return Score(
        runs=len(every),
        median_abs_error=statistics.median(every),
        median_of_source_medians=statistics.median(statistics.median(part) for part in sources.values()),
        p90_abs_error=percentile(every, 0.9),
    )


def percentile(values: Iterable[float], share: float) -> float:
    """The value below which that share lies, interpolated between neighbours."""
    order = sorted(values)
    place = share * (len(order) - 1)
    low = math.floor(place)
    high = min(low + 1, len(order) - 1)
    return order[low] + (place - low) * (order[high] - order[low])


def _errors(errors: Sequence[float]) -> str:
    absolute = [abs(error) for error in errors]
    median, bias = statistics.median(absolute), statistics.median(errors)
    return f"{len(errors):5} {median:8.1%} {percentile(absolute, 0.9):8.1%} {bias:+8.1%}"


def _size(model: DecoderConfig) -> str:
    from stack.models.flops import matmul_parameters

    limits = (1e9, 4e9, 10e9, 50e9, math.inf)
    names = ("below 1B", "1B to 4B", "4B to 10B", "10B to 50B", "50B and more")
    return next(n for n, limit in zip(names, limits, strict=True) if matmul_parameters(model) < limit)


def _count(devices: int) -> str:
    return "8 and fewer" if devices <= 8 else "9 to 128" if devices <= 128 else "more than 128"
