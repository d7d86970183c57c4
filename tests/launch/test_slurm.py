"""The batch script is that of the repository, filled in; tests/test_slurm.py submits it to a real Slurm."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from stack.config import Config, parse
from stack.launch.job import job
from stack.launch.slurm import render

ROOT = Path(__file__).parents[2]
RUN = Config().replace("train.batch_size=32", "name=Llama3 8b", "target.devices=32")


def rendered(**options: Any) -> str:
    return render(job(RUN), **options)


def options(script: str) -> dict[str, str]:
    return dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", script, re.MULTILINE))


def test_the_script_of_the_repository_is_the_one_that_is_filled_in():
    """Not a link to it: those are lost where a checkout is copied or has none, as on Windows."""
    packed = ROOT / "stack" / "launch" / "slurm.sbatch"
    assert (ROOT / "launch" / "slurm.sbatch").read_text() == packed.read_text(), f"copy it from {packed}"


def test_it_asks_for_the_nodes_the_gpus_and_the_time():
    own = options((ROOT / "launch" / "slurm.sbatch").read_text())
    assert options(rendered(time="2-12", partition="a,b", grace=300)) == own | {
        "job-name": "Llama3-8b",
        "nodes": "4",
        "gpus-per-node": "8",
        "ntasks-per-node": "8",
        "time": "2-12",
        "partition": "a,b",
        "signal": "USR1@300",
    }
    assert options(rendered()).keys() == own.keys()


def test_a_config_that_reads_like_the_script_is_none_of_it():
    text = RUN.replace('sample.prompt=restarts=100 train "$@" #SBATCH --nodes=9')
    script = render(job(text))
    assert parse(script.split("END_OF_CONFIG'\n")[1].split("END_OF_CONFIG\n")[0]) == text


def test_it_holds_the_whole_config_and_trains_it():
    script = rendered(restarts=3)
    assert parse(script.split("END_OF_CONFIG'\n")[1].split("END_OF_CONFIG\n")[0]) == RUN
    assert 'stack train "$config" ||' in script
    assert "\nrestarts=3\n" in script


@pytest.mark.parametrize("script", [(ROOT / "launch" / "slurm.sbatch").read_text(), rendered()])
def test_bash_can_read_it(script):
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "-"], input=script, text=True, check=True)
