"""The verbs of the command line, with their arguments."""

import argparse
from collections.abc import Sequence
from functools import cache

from stack.cli import commands
from stack.cli.verbs import Parser, add_accept, add_adapter, add_best, add_overrides, verb
from stack.config.errors import ConfigError

EPILOG = """\
examples:
  stack train configs/quickstart.yaml                 train, evaluate, save, print a sample
  stack train configs/quickstart.yaml train.steps=50  change any field by its dotted name
  stack train runs/quickstart                         go on with a run
  stack sample runs/quickstart "def " --length 100    generate text
  stack show runs/quickstart                          where a run stands, its losses and speed
  stack checkpoint verify runs/quickstart             whether its checkpoints are as they were written
  stack plan configs/llama3_8b.yaml --hardware h100 --devices 1024
                                                      memory and speed before anything is rented
  stack bench --seconds 420 --json bench.json         how fast this machine is, beside its peers
  stack config show configs/llama3_8b.yaml --sharding --devices 64
  stack launch render slurm configs/llama3_70b.yaml --time 24:00:00 --out job.sbatch

exit status: 0 done, 1 error while running, 2 bad command line or config, 75 asked to stop (SIGTERM,
SIGUSR1, train.stop_after_minutes) and saved, to be started again, 130 interrupted
"""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments; overrides and prompts may stand before, between and after options."""
    parser, verbs = _parser()
    argv, tail = _split_tail(argv)
    told = f"see `stack {argv[0]} --help`" if argv and argv[0] in verbs else "see `stack --help`"
    if argv and not argv[0].startswith("-") and argv[0] not in verbs:
        raise ConfigError(_unknown_verb(argv[0], verbs))
    arguments, rest = parser.parse_known_args(argv)
    for word in rest:
        if word.startswith("-"):
            hint = f"; an override is written {word.lstrip('-')}" if "=" in word else ""
            raise ConfigError(f"unknown option {word}{hint}; {told}")
        if not hasattr(arguments, "rest"):
            raise ConfigError(f"{word!r} is one argument too many; {told}")
        arguments.rest = [*arguments.rest, word]
    if tail and not hasattr(arguments, "rest"):
        raise ConfigError(f"{tail[0]!r} is one argument too many; {told}")
    if tail:
        arguments.rest = [*arguments.rest, *tail]
    return arguments


def _split_tail(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments, and what stands after `--`, whatever it looks like."""
    words = list(argv)
    place = words.index("--") if "--" in words else len(words)
    return words[:place], words[place + 1 :]


def _unknown_verb(word: str, verbs: Sequence[str]) -> str:
    from stack.config.explain import nearest

    match = nearest(word, verbs)
    meant = f"did you mean `stack {match}`?" if match else f"it is one of {', '.join(verbs)}"
    return f"{word!r} is not a command; {meant}"


@cache
def _parser() -> tuple[Parser, list[str]]:
    """The parser and its verbs."""
    parser = Parser(
        prog="stack",
        description="Plan, train and trust large models in JAX.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the versions of stack and JAX")
    parser.set_defaults(
        run=lambda arguments: commands.version() if arguments.version else parser.print_help()
    )
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND")

    train = verb(verbs, "train", commands.train, "train a config, or go on with a run")
    train.add_argument("config", metavar="CONFIG_OR_RUN", help="a YAML file, or the folder of a run")
    add_overrides(train)
    add_accept(train)
    train.add_argument(
        "--replay",
        type=int,
        metavar="STEP",
        help="do this step of a run once more and compare it bit for bit; nothing is written",
    )
    text = (
        "train it from this many seeds, each a run of its own, and print mean and spread of what they reach"
    )
    train.add_argument("--seeds", type=int, metavar="N", help=text)

    _add_launch(verbs)
    _add_plan(verbs)

    _add_kernels(verbs)

    evaluate = verb(verbs, "eval", commands.evaluate, "evaluate a run on its held-out text")
    evaluate.add_argument("config", metavar="RUN", help="the folder of a run")
    evaluate.add_argument(
        "--data", metavar="FILE", help="all that the objective tells of a file of your own, .jsonl or a text"
    )
    text = "--data: compare what is written or extracted as well (ROUGE, BLEU, chrF, exact match)"
    evaluate.add_argument("--answers", action="store_true", help=text)
    text = "--data: of several tasks the one that its records are of"
    evaluate.add_argument("--head", metavar="NAME", help=text)
    evaluate.add_argument(
        "--words",
        metavar="FILE",
        help="perplexity by words of a text of your own, or of the `text` of each line of a .jsonl",
    )
    evaluate.add_argument(
        "--last-words",
        metavar="FILE",
        help="how often it writes the last word of passages, one a line (LAMBADA)",
    )
    _add_tasks(evaluate)
    add_adapter(evaluate)
    add_overrides(evaluate)
    add_accept(evaluate)
    add_best(evaluate)

    text = "write what a run makes of each record of a file; goes on where it was ended"
    predict = verb(verbs, "predict", commands.predict, text)
    predict.add_argument("config", metavar="RUN", help="the folder of a run")
    add_overrides(predict)
    text = "a .jsonl with a record in each line"
    predict.add_argument("--input", required=True, metavar="FILE", help=text)
    add_adapter(predict)
    add_best(predict)
    predict.add_argument("--head", metavar="NAME", help="of several tasks the one that is asked")
    text = "the .jsonl to write: each record with its `prediction`"
    predict.add_argument("--output", required=True, metavar="FILE", help=text)

    _add_search(verbs)

    sample = verb(verbs, "sample", commands.sample, "generate text with a run")
    sample.add_argument("config", metavar="RUN", help="the folder of a run")
    text = "what the text starts with; - reads it from standard input; after -- it may begin with a dash"
    sample.add_argument("rest", metavar="PROMPT", nargs="*", default=(), help=text)
    sample.add_argument(
        "--file",
        action="append",
        default=[],
        metavar="FILE",
        help="a prompt that is in a file; may be repeated",
    )
    for option, kind, text in (
        ("length", int, "tokens to generate at most"),
        ("temperature", float, "divides the logits; 0 takes the likeliest token"),
        ("top-k", int, "sample among this many likeliest tokens"),
        ("top-p", float, "sample among the likeliest tokens that hold this probability"),
    ):
        sample.add_argument(f"--{option}", type=kind, help=f"{text} (default: the run's)")
    add_adapter(sample)
    add_best(sample)
    sample.add_argument("--seed", type=int, help="another seed gives another text (default: the run's)")

    show_runs = verb(verbs, "show", commands.show_runs, "look at runs: where they stand, and how they differ")
    show_runs.add_argument("runs", metavar="RUN", nargs="+", help="the folder of a run")
    show_runs.add_argument("--base", metavar="FILE_OR_RUN", help="compare their configs with this one's")
    show_runs.add_argument("--plot", metavar="FILE", help="draw their losses: .png, .svg, .pdf or .html")
    show_runs.add_argument("--json", action="store_true", help="print JSON")

    incoming = verb(verbs, "import", commands.import_weights, "make a run of a Hugging Face model")
    text = "with config.json, safetensors files and tokenizer.json"
    incoming.add_argument("folder", metavar="FOLDER", help=text)
    add_overrides(incoming)
    incoming.add_argument("--to", required=True, metavar="RUN", help="the folder of the run, a new one")

    outgoing = verb(
        verbs, "export", commands.export_run, "write a run as Hugging Face's transformers reads it"
    )
    outgoing.add_argument("config", metavar="RUN", help="the folder of a run")
    add_overrides(outgoing)
    add_accept(outgoing)
    add_best(outgoing)
    outgoing.add_argument(
        "--to", required=True, nargs=2, metavar=("FORMAT", "FOLDER"), help="hf or adapter, and a new folder"
    )
    text = "of the weights: float32 (default), bfloat16 or float16"
    outgoing.add_argument("--dtype", default="float32", help=text)

    checkpoint = verb(verbs, "checkpoint", None, "look at the checkpoints of a run")
    checkpoint_verbs = checkpoint.add_subparsers(metavar="COMMAND", required=True)
    for name, text in (
        ("list", "list them"),
        ("verify", "read them and compare every byte with its digest"),
        ("show", "print what one holds"),
    ):
        one = verb(checkpoint_verbs, name, commands.show_checkpoints, text)
        one.set_defaults(verb=name, step=None)
        one.add_argument("run_folder", metavar="RUN", help="the folder of a run")
        if name != "list":
            one.add_argument("--step", type=int, metavar="N", help="of this step alone (show: the newest)")

    configs = verb(verbs, "config", None, "show a config, or what a config may hold")
    config_verbs = configs.add_subparsers(metavar="COMMAND", required=True)
    show = verb(config_verbs, "show", commands.show_config, "print a config with every field")
    show.add_argument("config", metavar="FILE_OR_RUN", help="a YAML file, or the folder of a run")
    add_overrides(show)
    show.add_argument("--sharding", action="store_true", help="print how each parameter is laid out instead")
    show.add_argument(
        "--devices", type=int, metavar="N", help="devices to lay out over (default: those here)"
    )
    listed = verb(config_verbs, "fields", commands.show_fields, "explain the fields of a config")
    listed.add_argument("pattern", metavar="PATTERN", nargs="?", default="", help="a part of their names")
    listed.add_argument("--markdown", action="store_true", help="print all of them as a page")
    verb(config_verbs, "schema", commands.show_schema, "print the JSON schema of config files")

    data = verb(verbs, "data", None, "prepare data")
    data_verbs = data.add_subparsers(metavar="COMMAND", required=True)
    tokenizer = verb(
        data_verbs, "tokenizer", commands.train_tokenizer, "train a BPE tokenizer on a config's sources"
    )
    tokenizer.add_argument("config", metavar="CONFIG", help="a YAML file")
    add_overrides(tokenizer)
    tokenizer.add_argument("--vocab-size", type=int, required=True, metavar="N", help="words to learn")
    tokenizer.add_argument("--out", required=True, metavar="FILE", help="the tokenizer.json to write")

    extend = verb(
        data_verbs, "extend", commands.extend_tokenizer, "add words to a tokenizer, after those it has"
    )
    extend.add_argument("tokenizer", metavar="TOKENIZER", help="a tokenizer.json, or bytes")
    for option, text in (
        ("special", "a token that no text can forge, as <|user|>; may be repeated"),
        ("word", "a word that is found in any text; may be repeated"),
    ):
        extend.add_argument(f"--{option}", action="append", default=[], metavar="WORD", help=text)
    extend.add_argument("--out", required=True, metavar="FILE", help="the tokenizer.json to write")

    prepare = verb(
        data_verbs, "prepare", commands.prepare_data, "tokenize and pack a config's sources before a run"
    )
    prepare.add_argument("config", metavar="CONFIG", help="a YAML file, or the folder of a run")
    add_overrides(prepare)
    prepare.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="over the workers of a Ray cluster, which share the files of the sources: auto, HOST:PORT,"
        " ray://HOST:PORT, or local, which starts one on this machine",
    )

    report = verb(
        data_verbs, "report", commands.report_data, "show what a run would read, as its model sees it"
    )
    report.add_argument("config", metavar="CONFIG", help="a YAML file, or the folder of a run")
    add_overrides(report)
    report.add_argument("--rows", type=int, default=3, metavar="N", help="rows to show (default: 3)")
    report.add_argument("--html", metavar="FILE", help="write a page instead of printing")

    doctor = verb(verbs, "doctor", commands.examine, "print what this machine has and what stack makes of it")
    doctor.add_argument("--numerics", action="store_true", help="print the numerics contract instead")
    doctor.add_argument(
        "--calibrate",
        metavar="FILE",
        nargs="?",
        const="",
        help="measure this machine for `stack plan`, and write it to FILE for --hardware",
    )
    doctor.add_argument("--measure", action="store_true", help="measure that contract on the devices here")
    doctor.add_argument(
        "--faults",
        type=int,
        metavar="N",
        nargs="?",
        const=2,
        help="kill, freeze, signal, damage, fill and cut tiny runs N times each (default: 2), and compare",
    )
    doctor.add_argument("--seed", type=int, help="of --faults: what is struck, and when")

    _add_bench(verbs)
    return parser, list(verbs.choices)


def _add_search(verbs: "argparse._SubParsersAction[Parser]") -> None:
    text = "find the passages of documents that answer a query; keeps their index"
    search = verb(verbs, "search", commands.search, text)
    search.add_argument("config", metavar="RUN", help="the folder of a run of objective.kind=retrieval")
    add_overrides(search)
    text = "a folder of texts and code, one text, or a .jsonl with a document in the `text` of each line"
    search.add_argument("--documents", required=True, metavar="PATH", help=text)
    text = "what to look for; may be repeated (without it and --queries: each line of standard input)"
    search.add_argument("--query", action="append", default=[], metavar="TEXT", help=text)
    text = "a .jsonl with a query in the field objective.query of each line"
    search.add_argument("--queries", metavar="FILE", help=text)
    text = "--queries: the .jsonl to write: each record with its `hits`"
    search.add_argument("--output", metavar="FILE", help=text)
    text = "passages to show of each query (default: 5)"
    search.add_argument("--top", type=int, default=5, metavar="N", help=text)
    text = "a run of objective.kind=reranking that reads these with the query, and orders them"
    search.add_argument("--rerank", metavar="RUN", help=text)
    text = "where the index is kept (default: in the run's folder)"
    search.add_argument("--index", metavar="FOLDER", help=text)
    text = "compare the first so many numbers of vectors, one of objective.widths (default: all)"
    search.add_argument("--width", type=int, metavar="N", help=text)
    text = "tokens of a passage at most (default: 256, or what fits data.sequence_length)"
    search.add_argument("--passage", type=int, metavar="N", help=text)
    text = "tokens that a passage begins before the one before it ends (default: an eighth of it, at most 32)"
    search.add_argument("--overlap", type=int, metavar="N", help=text)
    text = "do not compare all passages, but walk a graph of neighbours by FAISS (extra search)"
    search.add_argument("--approximate", action="store_true", help=text)
    search.add_argument("--head", metavar="NAME", help="of a run of several tasks, the one that retrieves")
    add_adapter(search)
    add_best(search)


def _add_kernels(verbs: "argparse._SubParsersAction[Parser]") -> None:
    kernels = verb(verbs, "kernels", None, "tell what runs the operations of a step, and tune it")
    kernel_verbs = kernels.add_subparsers(metavar="COMMAND", required=True)
    text = "what runs each operation of a config, why, and what keeps the others from it"
    explained = verb(kernel_verbs, "explain", commands.explain_kernels, text)
    explained.add_argument("config", metavar="CONFIG", help="a YAML file, or the folder of a run")
    add_overrides(explained)
    text = "a chip as `stack plan` knows it (default: target.hardware, else the device here)"
    explained.add_argument("--hardware", metavar="CHIP", help=text)
    explained.add_argument("--json", action="store_true", help="print JSON")

    text = "time tiles of a config's attention on this machine, and keep the fastest for runs like it"
    tuned = verb(kernel_verbs, "tune", commands.tune_kernels, text)
    tuned.add_argument("config", metavar="CONFIG", help="a YAML file, or the folder of a run")
    add_overrides(tuned)
    text = "times that each is timed, in turns with the others (default: 7)"
    tuned.add_argument("--rounds", type=int, default=7, metavar="N", help=text)
    text = "of each part of an implementation at most (default: 300)"
    tuned.add_argument("--seconds", type=float, default=300.0, metavar="N", help=text)
    text = "of the run, each of which has as much to do as the config says (default: those here)"
    tuned.add_argument("--devices", type=int, metavar="N", help=text)
    tuned.add_argument("--json", metavar="FILE", help="write all that is measured")


def _add_bench(verbs: "argparse._SubParsersAction[Parser]") -> None:
    bench = verb(verbs, "bench", commands.bench, "measure kernels and whole steps on this machine")
    text = "attention, step, cross_entropy, parity, matmul, grouped_matmul, embedding (default: all)"
    bench.add_argument("suites", metavar="SUITE", nargs="*", help=text)
    bench.add_argument("--list", action="store_true", help="tell the cases for this machine and run none")
    bench.add_argument("--tiny", action="store_true", help="tiny problems, to try it out")
    bench.add_argument(
        "--seconds",
        type=float,
        default=420.0,
        metavar="N",
        help="begin no case after these (default: 420); none runs on for more than a minute after",
    )
    bench.add_argument("--json", metavar="FILE", help="write all that is measured, after every case")
    bench.add_argument(
        "--against",
        metavar="PEERS",
        help="torch,tokamax or none (default: those that are installed)",
    )
    bench.add_argument("--torch-python", metavar="PYTHON", help="an interpreter that has PyTorch")


def _add_launch(verbs: "argparse._SubParsersAction[Parser]") -> None:
    launch = verb(verbs, "launch", None, "start a run on a cluster, or write the job that does")
    launch_verbs = launch.add_subparsers(metavar="COMMAND", required=True)
    render = verb(launch_verbs, "render", None, "write the job of a config for a cluster")
    targets = render.add_subparsers(metavar="TARGET", required=True)
    for target, text in (
        ("kubernetes", "a JobSet, and a ConfigMap with the config"),
        ("azureml", "a command job of Azure ML"),
        ("slurm", "a batch script of Slurm"),
    ):
        _add_target(verb(targets, target, commands.render_job, text), target)

    ray = verb(
        launch_verbs,
        "ray",
        commands.launch_ray,
        "train with one process a worker on a Ray cluster whose machines share output_dir; when one is lost,"
        " all start again",
    )
    ray.add_argument("config", metavar="CONFIG_OR_RUN", help="a YAML file, or the folder of a run")
    add_overrides(ray)
    ray.add_argument("--workers", type=int, required=True, metavar="N", help="processes")
    ray.add_argument(
        "--gpus-per-worker", type=int, default=0, metavar="G", help="GPUs of each (default: 0, on the CPU)"
    )
    ray.add_argument(
        "--address",
        default="auto",
        metavar="ADDRESS",
        help="of the cluster: auto (this machine's, or RAY_ADDRESS; the default), HOST:PORT, ray://HOST:PORT,"
        " or local, which starts one on this machine",
    )
    ray.add_argument(
        "--max-restarts",
        type=int,
        default=3,
        metavar="M",
        help="give up after so many in a row without a newer checkpoint (default: 3)",
    )


def _add_plan(verbs: "argparse._SubParsersAction[Parser]") -> None:
    plan = verb(verbs, "plan", commands.plan, "tell memory, step time and the best layout before a run")
    plan.add_argument("config", metavar="CONFIG", nargs="?", help="a YAML file, or the folder of a run")
    add_overrides(plan)
    plan.add_argument(
        "--hardware",
        metavar="CHIP",
        help="v100-32gb, a100-80gb, h100, h200, b200, gb200, mi300x, tpu-v5p, ... (a wrong name lists all),"
        " or a YAML file of one (default: target.hardware)",
    )
    plan.add_argument(
        "--devices",
        metavar="N",
        help="devices; each keeps its layout, data takes the rest (default: target.devices);"
        " 8..10240 gives the scaling curve",
    )
    plan.add_argument("--search", action="store_true", help="find the best layouts of the config's batch")
    plan.add_argument("--top", type=int, default=8, metavar="N", help="layouts to show (default: 8)")
    plan.add_argument(
        "--schedule", action="store_true", help="show who does what and when in the config's pipeline"
    )
    plan.add_argument(
        "--out", metavar="FILE", help="--search: the config to write; a curve or --schedule: its plot"
    )
    plan.add_argument(
        "--compile", dest="compile_step", action="store_true", help="compile the exact step for the chip"
    )
    plan.add_argument("--price", type=float, metavar="P", help="of one chip and hour; adds the cost")
    plan.add_argument(
        "--validate",
        metavar="FILE.csv",
        nargs="?",
        const="",
        help="predict the published runs of a table (default: the one that comes with stack)",
    )
    plan.add_argument("--json", action="store_true", help="print JSON")


def _add_target(parser: Parser, target: str) -> None:
    """What all platforms need, and what this one does; any other option is unknown to it."""
    parser.set_defaults(target=target)
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, or the folder of a run")
    add_overrides(parser)
    parser.add_argument(
        "--nodes", type=int, metavar="N", help="default: what target.devices or the mesh take"
    )
    parser.add_argument("--gpus", type=int, metavar="N", help="of each node (default: 8, or all if fewer)")
    parser.add_argument("--out", metavar="FILE", help="the file to write (default: print it)")
    if target in ("kubernetes", "azureml"):
        parser.add_argument("--image", required=True, help="a container with `stack` on its path")
    if target in ("kubernetes", "slurm"):
        text = "how often it is started again, at most (default: 100)"
        parser.add_argument("--restarts", type=int, default=100, metavar="N", help=text)
        text = "to save in when it is told to stop (default: 120)"
        parser.add_argument("--grace", type=int, default=120, metavar="SECONDS", help=text)
    if target == "kubernetes":
        text = "a persistent volume claim that all pods may write to"
        parser.add_argument("--claim", required=True, help=text)
        parser.add_argument(
            "--name", help="of the JobSet (default: the run's, with - for what it may not hold)"
        )
        parser.add_argument("--namespace", help="where it goes (default: that of kubectl)")
        parser.add_argument("--queue", help="of Kueue, which then admits it (default: none)")
        text = "a label of the nodes; may be repeated"
        parser.add_argument("--node-selector", action="append", default=[], metavar="KEY=VALUE", help=text)
        parser.add_argument(
            "--service-account", metavar="NAME", help="whose rights the pods have, for buckets"
        )
    elif target == "azureml":
        parser.add_argument(
            "--compute", required=True, metavar="NAME", help="the cluster, whose nodes have the GPUs"
        )
        text = "azureml://datastores/NAME/paths/FOLDER, which all nodes mount"
        parser.add_argument("--storage", required=True, metavar="FOLDER", help=text)
    else:
        parser.add_argument("--time", metavar="TIME", help="limit of each start, as 24:00:00")
        parser.add_argument("--partition", metavar="NAME", help="one or several (default: Slurm's)")


def _add_tasks(parser: Parser) -> None:
    """Of the lm-evaluation-harness."""
    tasks = parser.add_argument_group("tasks of the lm-evaluation-harness (extra lm-eval)")
    tasks.add_argument(
        "--tasks",
        metavar="TASK,...",
        help="names, patterns (mmlu_*), .yaml files of tasks, or folders of them (my_tasks/)",
    )
    tasks.add_argument("--limit", type=int, metavar="N", help="documents of each task (default: all)")
    text = "examples before each question (default: what each task says)"
    tasks.add_argument("--num-fewshot", type=int, metavar="K", help=text)
    text = "options of generation in place of the tasks' own, as max_gen_toks=32,temperature=0"
    tasks.add_argument("--gen-kwargs", metavar="NAME=VALUE,...", help=text)
    text = "lay questions out by the tokenizer's chat template"
    tasks.add_argument("--apply-chat-template", action="store_true", help=text)
    text = "begin every text with the token that begins a document (default: as the tokenizer says)"
    tasks.add_argument("--add-bos-token", action="store_true", default=None, help=text)
    tasks.add_argument("--json", metavar="FILE", help="write all that the harness tells")
