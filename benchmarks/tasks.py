"""Tasks on real labelled text: the sets, and what classical methods reach on them.

    uv sync
    uv run python benchmarks/tasks.py data --out FOLDER
    uv run python benchmarks/tasks.py baselines FOLDER
    uv run stack data tokenizer configs/tasks_trunk.yaml --vocab-size 4096 --out FOLDER/tokenizer.json
    uv run stack train configs/tasks_trunk.yaml
    uv run python benchmarks/tasks.py train FOLDER --trunk runs/tasks_trunk

`data` fetches packages of Debian 12 and PyPI (apt and pip, about 180 MB) and writes the sets as JSON lines;
`baselines` fits classical methods to them and prints their figures on the test rows. docs/tasks.md says what
each set is, and has the figures.
"""

import argparse
import os
import sys
from pathlib import Path

# Before jax is imported: the compile-only GPU plugin may be installed, and would be tried first.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from stack import StackError


def main() -> None:
    """Run the command that was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    data = commands.add_parser("data", help="fetch the packages and write the sets")
    data.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    baselines = commands.add_parser("baselines", help="fit classical methods to the sets of a folder")
    baselines.add_argument("folder", type=Path, metavar="FOLDER")
    baselines.add_argument("--sets", nargs="+", metavar="NAME", help="only these")
    train = commands.add_parser(
        "train", help="train a trunk on the sets and score it, and go on where it was ended"
    )
    train.add_argument("folder", type=Path, metavar="FOLDER")
    train.add_argument("--trunk", type=Path, required=True, metavar="RUN", help="of configs/tasks_trunk.yaml")
    train.add_argument("--sets", nargs="+", metavar="NAME", help="only these")
    train.add_argument("--modes", nargs="+", metavar="MODE", help="seed, full, lora, frozen (default: all)")
    train.add_argument("--seeds", type=int, default=3, metavar="N", help="of each (default: 3)")
    asked = parser.parse_args()
    try:
        if asked.command == "data":
            from task_sets.build import build

            build(asked.out, say=lambda line: print(line, flush=True))
        elif asked.command == "train":
            from task_sets import training

            record = asked.folder / "trained.jsonl"
            training.run(
                asked.folder,
                asked.trunk,
                record,
                only=asked.sets,
                modes=asked.modes or training.MODES,
                seeds=range(asked.seeds),
            )
            print("\n".join(training.table(record, asked.folder / "baselines.json")))
        else:
            from task_sets.baselines import run

            run(asked.folder, only=asked.sets)
    except ModuleNotFoundError as error:
        sys.exit(f"{error.name} is missing: uv sync")
    except StackError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
