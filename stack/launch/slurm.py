"""A run as a batch script of Slurm: `slurm.sbatch`, filled in, with the config inside."""

import re
from importlib.resources import files

from stack.config import dump
from stack.launch.job import Job, check_number, check_text

_SCRIPT = files("stack.launch") / "slurm.sbatch"
_END = "END_OF_CONFIG"
_TIME = r"\d+|\d+:\d+|\d+:\d+:\d+|\d+-\d+|\d+-\d+:\d+|\d+-\d+:\d+:\d+"


def render(
    job: Job, *, time: str | None = None, partition: str | None = None, restarts: int = 100, grace: int = 120
) -> str:
    """A script for `sbatch`, which any option of its command line still changes.

    Args:
        job: the run and its size.
        time: limit of each start, as Slurm writes it (`24:00:00`, `2-12`); None: the partition's.
        partition: one or several, with commas; None: the default one.
        restarts: how often the job is queued again, at most.
        grace: seconds to save in, before the time is up.

    Raises:
        ConfigError: what Slurm does not take, by name.
    """
    check_number("--restarts", restarts, 0)
    check_number("--grace", grace, 1, most=65_535)
    check_text("--time", time, _TIME, "minutes, or a time as 24:00:00 or 2-12:00:00")
    check_text("--partition", partition, r"[\w.,-]+", "names of partitions, with commas between")
    options = {
        # Slurm puts it into the name of the log.
        "job-name": re.sub(r"[^\w.-]+", "-", job.config.name, flags=re.ASCII),
        "nodes": job.nodes,
        "gpus-per-node": job.gpus,
        "ntasks-per-node": job.gpus,
        "signal": f"USR1@{grace}",
    }
    text = _SCRIPT.read_text("utf-8")
    for name, value in options.items():
        text = _replace(text, rf"^#SBATCH --{name}=.*$", f"#SBATCH --{name}={value}")
    more = [
        f"#SBATCH --{name}={value}" for name, value in (("time", time), ("partition", partition)) if value
    ]
    text = _replace(text, r"^#SBATCH --exclusive$", "\n".join(["#SBATCH --exclusive", *more]))
    text = _replace(text, r"^#   sbatch .*$", "#   sbatch THIS_FILE")
    text = _replace(text, r' train "\$@" ', ' train "$config" ')
    # Last: what it says is not the script's.
    return _replace(text, r"^restarts=\d+$", f"restarts={restarts}\n\n{_config(job)}")


def _config(job: Job) -> str:
    """The lines that write the config where all nodes read it."""
    return f"config=slurm-$SLURM_JOB_ID.yaml\ncat >\"$config\" <<'{_END}'\n{dump(job.config)}{_END}"


def _replace(text: str, pattern: str, new: str) -> str:
    text, count = re.subn(pattern, lambda _: new, text, flags=re.MULTILINE)
    assert count == 1, pattern  # The script beside this file has each line once.
    return text
