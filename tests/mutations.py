"""Does a test fail when the code is broken? Breaks one line at a time, in a copy, and runs tests on it.

    uv run python tests/mutations.py [PART OF A NAME ...]

Each mutation of `mutation_list.py` was, or might be, somebody's mistake. The tests beside it must fail; one
that passes says what no test sees. `tests/test_mutations.py` sees to it that every line is still in its file.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from mutation import Mutation
from mutation_list import MUTATIONS

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("stack", "tests", "configs", "benchmarks", "docs", "pyproject.toml")

_NOTHING = 5  # The status of pytest where a tier of a file has no test.


def survives(mutation: Mutation, folder: Path) -> bool:
    """Whether the tests pass although the copy in a folder is broken."""
    file = folder / mutation.file
    whole = file.read_text("utf-8")
    file.write_text(whole.replace(mutation.old, mutation.new), "utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", mutation.tests]
    tiers = [[*command, "-m", tier] for tier in ("not full", "full")]
    cache = str(ROOT / ".cache" / "jax")
    environment = os.environ | {"PYTHONPATH": str(folder), "JAX_COMPILATION_CACHE_DIR": cache}
    try:
        for command in tiers:
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
            if done.returncode == 1:
                return False
            if done.returncode not in (0, _NOTHING):
                sys.exit(f"{mutation.name}: no test ran:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    finally:
        file.write_text(whole, "utf-8")
    return True


def main() -> None:
    """Breaks what the arguments name, or everything, and tells what no test saw."""
    wanted = [one for one in MUTATIONS if not sys.argv[1:] or any(part in one.name for part in sys.argv[1:])]
    with tempfile.TemporaryDirectory() as name:
        for item in COPIED:
            copy = shutil.copytree if (ROOT / item).is_dir() else shutil.copy
            copy(ROOT / item, Path(name) / item)
        unseen = []
        for mutation in wanted:
            passes = survives(mutation, Path(name))
            unseen += [mutation.name] * passes
            sys.stdout.write(f"{'NOT SEEN' if passes else 'seen':<9} {mutation.name}\n")
            sys.stdout.flush()
    sys.exit(f"{len(unseen)} of {len(wanted)} seen by no test" if unseen else None)


if __name__ == "__main__":
    main()
