"""What each verb of the command line does: a few lines each; the work is done by the library."""

import argparse
import itertools
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from stack import environment
from stack.cli.prompts import prompt, prompt_in
from stack.config.errors import ConfigError
from stack.hardware import defaults
from stack.interrupt import die_with_launcher

if TYPE_CHECKING:
    from stack.train.trainer import Trainer


def version() -> None:
    """Prints the versions of Stack, JAX and Python."""
    from importlib.metadata import version

    print(f"stack {version('stack')} (jax {version('jax')}, Python {sys.version.split()[0]})")


def train(arguments: argparse.Namespace) -> None:
    """Trains, or does one step of a run once more."""
    from stack.config.reading import load

    config = load(arguments.config, arguments.rest)  # what is wrong is told before anything heavy is loaded
    if arguments.seeds is not None and arguments.replay is not None:
        raise ConfigError("--seeds trains runs, and --replay does a step of one again; give one of them")
    if os.environ.get("JAX_PROCESS_ID", os.environ.get("SLURM_PROCID", "0")) == "0":
        print(f"start     {config.name}: loading JAX, then its data", flush=True)

    die_with_launcher()
    defaults.import_jax()
    from stack.parallel.processes import first, together
    from stack.train.trainer import Trainer

    with together():
        if arguments.seeds is not None:
            from stack.train.seeds import fit_seeds

            spread = fit_seeds(config, arguments.seeds, accept=arguments.accept)
            if first():
                print("\n".join(spread.lines()), flush=True)
            return
        trainer = Trainer(config, accept=arguments.accept)
        if arguments.replay is None:
            trainer.fit()
            return
        from stack.train.replay import replay

        for line in replay(trainer, arguments.replay):
            if first():
                print(line, flush=True)


def launch_ray(arguments: argparse.Namespace) -> None:
    """Trains on a Ray cluster."""
    from stack.launch.ray_cluster import launch

    launch(
        arguments.config,
        arguments.rest,
        workers=arguments.workers,
        gpus_per_worker=arguments.gpus_per_worker,
        address=arguments.address,
        max_restarts=arguments.max_restarts,
    )


def plan(arguments: argparse.Namespace) -> None:
    """Prints what a run will take."""
    defaults.import_jax()
    from stack.planner.command import run

    options = {
        name: value for name, value in vars(arguments).items() if name not in ("run", "version", "rest")
    }
    for line in run(**options, overrides=arguments.rest):
        print(line, flush=True)


def explain_kernels(arguments: argparse.Namespace) -> None:
    """Prints what runs each operation of a config, and why."""
    environment.import_jax()
    from stack.config import load
    from stack.planner import kernels

    operations = list(kernels.explain(load(arguments.config, arguments.rest), arguments.hardware))
    if arguments.json:
        print(json.dumps(kernels.as_json(operations), indent=2))
    else:
        print("\n".join(kernels.lines(operations)))


def tune_kernels(arguments: argparse.Namespace) -> None:
    """Finds the fastest tiles of a config's attention on this machine, and keeps them."""
    from stack.config.reading import load

    config = load(arguments.config, arguments.rest)
    environment.import_jax()
    from stack.bench.tune import run

    for line in run(
        config,
        rounds=arguments.rounds,
        seconds=arguments.seconds,
        devices=arguments.devices,
        path=arguments.json,
        progress=lambda text: print(text, file=sys.stderr, flush=True),
    ):
        print(line, flush=True)


def evaluate(arguments: argparse.Namespace) -> None:
    """Prints what a run's held-out text gives, files of one's own, or tasks of the lm-evaluation-harness."""
    if arguments.tasks is None:
        given = [name for name in _OF_TASKS if getattr(arguments, name) not in (None, False)]
        if given:
            raise ConfigError(f"--{given[0].replace('_', '-')} is of tasks; name them with --tasks")
    defaults.import_jax()
    from stack.evaluation.files import evaluate_file
    from stack.evaluation.texts import last_words, word_perplexity
    from stack.parallel.processes import first, together
    from stack.train.reference import completed
    from stack.train.trainer import Trainer

    asked = {word_perplexity: arguments.words, last_words: arguments.last_words}
    if arguments.answers and arguments.data is None:
        raise ConfigError("--answers is of a file: give --data FILE.jsonl")
    if arguments.head is not None and arguments.data is None:
        raise ConfigError("--head is of a file: give --data FILE.jsonl")
    with together():
        ask = None if arguments.tasks is None else _tasks(arguments)
        trainer = Trainer.from_run(
            arguments.config, arguments.rest, accept=arguments.accept, **_which(arguments)
        )
        given = ask or arguments.data or any(asked.values())
        metrics = {} if given else trainer.evaluate()
        if arguments.data:
            run = trainer.program, trainer.trained, trainer.words
            options = {"answers": arguments.answers, "task": arguments.head}
            metrics = evaluate_file(*run, arguments.data, complete=partial(completed, trainer), **options)
        for evaluation, path in asked.items():
            if path is not None:
                metrics |= evaluation(trainer.program, trainer.trained, trainer.words, path)
        if first() and metrics:
            print("\n".join(f"{name} {value:.6g}" for name, value in metrics.items()), flush=True)
        if ask:
            ask(trainer)


_OF_TASKS = ("limit", "num_fewshot", "gen_kwargs", "apply_chat_template", "add_bos_token", "json")


def _tasks(arguments: argparse.Namespace) -> "Callable[[Trainer], None]":
    """What asks a run the tasks and prints the answers; what cannot be is told before the run is loaded."""
    from stack.config.paths import check_writable, expand
    from stack.evaluation.harness import StackLM
    from stack.evaluation.harness_tasks import check_options, evaluate_tasks, load_tasks, table, write_json
    from stack.parallel.processes import first

    path = None if arguments.json is None else expand(arguments.json)
    if path is not None:
        check_writable(path)
    options = {name: getattr(arguments, name) for name in _OF_TASKS[:4]}
    check_options(limit=arguments.limit, num_fewshot=arguments.num_fewshot)
    chosen = load_tasks(arguments.tasks.split(","))

    def ask(trainer: "Trainer") -> None:
        bos = arguments.add_bos_token
        model = StackLM(trainer.program, trainer.trained, trainer.words, add_bos_token=bos)
        results = evaluate_tasks(model, chosen, **options)
        if first():
            print(table(results))
            if path is not None:
                write_json(results, path)

    return ask


def _which(arguments: argparse.Namespace) -> dict[str, Any]:
    """Which parameters of a run are asked for."""
    return {"adapter": arguments.adapter, "step": "best" if arguments.best else None}


def predict(arguments: argparse.Namespace) -> None:
    """Writes what a run makes of each record of a file."""
    defaults.import_jax()
    from stack.evaluation.files import predict_file
    from stack.parallel.processes import first, together
    from stack.train.bits import fingerprint
    from stack.train.trainer import Trainer

    with together():
        trainer = Trainer.from_run(arguments.config, arguments.rest, **_which(arguments))
        name = f"{fingerprint(trainer.trained)} {arguments.rest} {arguments.head}"
        run = trainer.program, trainer.trained, trainer.words
        number = predict_file(*run, (arguments.input, arguments.output), name=name, task=arguments.head)
        if first():
            print(f"{number:,} records in {arguments.output}", flush=True)


def search(arguments: argparse.Namespace) -> None:
    """Prints the passages of documents that answer queries, or writes them."""
    defaults.import_jax()
    from stack.parallel.processes import first, together
    from stack.search.command import run

    def tell(text: str) -> None:
        if first():
            print(text, file=sys.stderr, flush=True)

    with together():
        which = _which(arguments)
        others = ("run", "version", "adapter", "best")
        options = {name: value for name, value in vars(arguments).items() if name not in others}
        for line in run(**options, which=which, tell=tell):
            if first():
                print(line, flush=True)


def sample(arguments: argparse.Namespace) -> None:
    """Prints texts as they are generated."""
    defaults.import_jax()
    from stack.parallel.processes import first, together
    from stack.train.trainer import Trainer

    fields = {
        "sample.length": arguments.length,
        "sample.temperature": arguments.temperature,
        "sample.top_k": arguments.top_k,
        "sample.top_p": arguments.top_p,
    }
    overrides = [f"{name}={value}" for name, value in fields.items() if value is not None]
    with together():
        prompts = [*map(prompt, arguments.rest), *map(prompt_in, arguments.file)]
        trainer = Trainer.from_run(arguments.config, overrides, **_which(arguments))
        prompts = prompts or [trainer.config.sample.prompt]
        between = trainer.program.objective.between
        if len(prompts) == 1:
            text = trainer.stream(prompts[0], seed=arguments.seed)
            begin = next(text, "")  # What cannot be written is told before the prompt is.
            pieces = itertools.chain(prompts, [between, begin], text, ["\n"])
        else:
            texts = trainer.generate(prompts, seed=arguments.seed)
            pieces = (f"{prompt}{between}{text}\n" for prompt, text in zip(prompts, texts, strict=True))
        for piece in pieces:
            if first():
                print(piece, end="", flush=True)


def import_weights(arguments: argparse.Namespace) -> None:
    """Makes a run of a model that comes from elsewhere."""
    defaults.import_jax()
    from stack.parallel.processes import first, together
    from stack.transfer.importing import load_weights

    with together():
        for line in load_weights(arguments.folder, arguments.to, arguments.rest):
            if first():
                print(line, flush=True)


def export_run(arguments: argparse.Namespace) -> None:
    """Writes a run as others read it."""
    form, folder = arguments.to
    if form not in ("hf", "adapter"):
        raise ConfigError(f"--to {form}: there is only hf and adapter, as in --to hf FOLDER")
    if form == "adapter" and arguments.dtype != "float32":
        raise ConfigError(f"--dtype {arguments.dtype} is of --to hf; an adapter is written in float32")
    defaults.import_jax()
    from stack.parallel.processes import first, together
    from stack.train.trainer import Trainer
    from stack.transfer.adapter import export_adapter
    from stack.transfer.exporting import export

    with together():
        step = "best" if arguments.best else None
        trainer = Trainer.from_run(arguments.config, arguments.rest, step=step, accept=arguments.accept)
        export_dtype = partial(export, dtype=arguments.dtype)
        for line in {"hf": export_dtype, "adapter": export_adapter}[form](trainer, folder):
            if first():
                print(line, flush=True)


def show_runs(arguments: argparse.Namespace) -> None:
    """Prints where runs stand, or draws them."""
    from stack.config.reading import load
    from stack.report import figure, show
    from stack.report.runs import read_run

    target = figure.check_plot(arguments.plot) if arguments.plot else None
    runs = [read_run(folder) for folder in arguments.runs]
    others = {arguments.base: load(arguments.base)} if arguments.base else {}
    if arguments.json:
        print(json.dumps([show.as_dict(run) for run in runs], indent=2))
    else:
        plain = not (sys.stdout.encoding or "").lower().startswith("utf")
        print("\n".join(show.lines(runs, others, plain=plain)))
    if target:
        figure.write_plot(runs, target, others)
        print(f"drew {target}", file=sys.stderr if arguments.json else sys.stdout)


def show_checkpoints(arguments: argparse.Namespace) -> None:
    """Prints the checkpoints of a run, and whether they are sound."""
    from stack.report import checkpoints

    for line in checkpoints.lines(arguments.verb, arguments.run_folder, arguments.step):
        print(line, flush=True)


def render_job(arguments: argparse.Namespace) -> None:
    """Prints or writes what a platform starts a run by."""
    from stack.config.reading import load
    from stack.launch.render import render, write

    options = {
        name: value
        for name, value in vars(arguments).items()
        if name not in ("run", "version", "rest", "config", "target", "out")
    }
    text = render(arguments.target, load(arguments.config, arguments.rest), **options)
    if arguments.out is None:
        print(text, end="")
    else:
        print(f"submit    {write(text, arguments.target, arguments.out)}")


def show_config(arguments: argparse.Namespace) -> None:
    """Prints a config with every field, or how its parameters are laid out."""
    from stack.config.reading import dump, load

    config = load(arguments.config, arguments.rest)
    if not arguments.sharding:
        print(dump(config), end="")
        return
    defaults.import_jax()
    from stack.objectives.labels import with_labels
    from stack.planner.plan import for_devices
    from stack.step.describe import sharding_table

    config = with_labels(config)
    if arguments.devices is None:
        print(sharding_table(config, len(environment.devices())))
    else:
        print(sharding_table(for_devices(config, arguments.devices)[0], arguments.devices))


def show_fields(arguments: argparse.Namespace) -> None:
    """Explains the fields of a config."""
    from stack.config import fields

    if arguments.markdown:
        print(fields.page(), end="")
        return
    some = fields.fields(arguments.pattern)
    if not some:
        match = fields.suggest(arguments.pattern)
        raise ConfigError(
            f"no field has {arguments.pattern!r} in it" + (f"; did you mean {match}?" if match else "")
        )
    print("\n".join(fields.lines(some)))


def show_schema(_: argparse.Namespace) -> None:
    """Prints the JSON schema of config files."""
    from stack.config.reading import schema

    print(json.dumps(schema(), indent=2))


def train_tokenizer(arguments: argparse.Namespace) -> None:
    """Trains a tokenizer on the sources of a config."""
    from stack.config.reading import load
    from stack.data.tokenizer import train_bpe

    config = load(arguments.config, arguments.rest)
    tokenizer = train_bpe(config.data, arguments.vocab_size, arguments.out, seed=config.seed)
    print(f"{arguments.out}: {tokenizer.vocab_size} words")


def extend_tokenizer(arguments: argparse.Namespace) -> None:
    """Adds words to a tokenizer."""
    from stack.data.words import extend

    for line in extend(arguments.tokenizer, arguments.out, special=arguments.special, words=arguments.word):
        print(line)


def prepare_data(arguments: argparse.Namespace) -> None:
    """Fills the cache of tokenized and packed text, and prints where it is."""
    from stack.config.reading import load
    from stack.data.prepare import prepare
    from stack.objectives import build
    from stack.objectives.labels import with_labels

    config = with_labels(load(arguments.config, arguments.rest))
    for line in prepare(config, arguments.ray, build(config).examples):
        print(line, flush=True)


def report_data(arguments: argparse.Namespace) -> None:
    """Prints what a run would read, or writes it as a page."""
    from stack.config.paths import check_writable, expand
    from stack.config.reading import load
    from stack.report import data as reports

    if arguments.rows < 0:
        raise ConfigError(f"--rows {arguments.rows} is below 0; give how many rows to show")
    if arguments.html is None:
        for line in reports.as_text(
            reports.examine(load(arguments.config, arguments.rest), rows=arguments.rows)
        ):
            print(line)
        return
    path = expand(arguments.html)
    check_writable(path)
    reports.write_html(reports.examine(load(arguments.config, arguments.rest), rows=arguments.rows), path)
    print(arguments.html)


def examine(arguments: argparse.Namespace) -> None:
    """Prints what this machine has, or measures it."""
    if arguments.seed is not None and arguments.faults is None:
        raise ConfigError("--seed is of --faults; give both, or neither")
    if arguments.faults is not None:
        from stack.doctor.faults import harness

        for line in harness.run(arguments.faults, seed=arguments.seed or 0):
            print(line, flush=True)
        return
    defaults.import_jax()
    environment.devices()
    from stack import doctor

    if arguments.calibrate is not None:
        from stack.doctor.calibrate import run

        for line in run(arguments.calibrate or None):
            print(line, flush=True)
    elif arguments.measure:
        for line in doctor.measure():
            print(line, flush=True)
    else:
        print(doctor.numerics() if arguments.numerics else doctor.report())


def bench(arguments: argparse.Namespace) -> None:
    """Measures kernels and whole steps on this machine."""
    environment.import_jax()
    from stack.bench.command import run

    for line in run(
        arguments.suites,
        tiny=arguments.tiny,
        seconds=arguments.seconds,
        path=arguments.json,
        against=arguments.against,
        torch_python=arguments.torch_python,
        only_list=arguments.list,
    ):
        print(line, flush=True)
