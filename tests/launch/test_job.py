"""The size of a job, and what no platform could honour, in one line."""

import pytest

from stack.cli import main
from stack.config import Config, ConfigError, MeshConfig, TargetConfig
from stack.launch.job import check_shared, job, plain_name
from stack.launch.render import render

RUN = Config().replace("train.batch_size=64")


def size(config: Config, **given: int) -> tuple[int, int]:
    made = job(config, **given)
    return made.nodes, made.gpus


def test_nodes_and_gpus_are_those_the_config_is_meant_for():
    aimed = RUN.replace("target={hardware: h100, devices: 32}")
    assert size(aimed) == (4, 8)
    assert size(aimed, gpus=4) == (8, 4)
    assert size(aimed, nodes=2) == (2, 8)
    assert size(RUN.replace("target={devices: 4}")) == (1, 4)
    assert size(RUN.replace("mesh={data: 2, fsdp: 8}")) == (2, 8)
    assert size(RUN) == (1, 8)
    assert size(RUN.replace("mesh=auto"), nodes=3) == (3, 8)


@pytest.mark.parametrize(
    ("changes", "given", "told"),
    [
        (
            ("mesh={data: 2, fsdp: 2}",),
            {"nodes": 2},
            "--nodes=2 x --gpus=4 = 8 devices: mesh: data 2 x fsdp 2 = 4",
        ),
        (("mesh={data: 3}",), {"nodes": 1}, "data 3 = 3 does not divide the 8 devices"),
        (("train.batch_size=12",), {}, "batch_size=12 in 1 micro-batch does not divide"),
        (("target={devices: 12}",), {}, "12 devices do not fill nodes of 8 GPUs; give --nodes and --gpus"),
        (("target={hardware: tpu-v5p}",), {}, "jobs are written for NVIDIA GPUs, not"),
        (("target={hardware: h10}",), {}, "hardware 'h10' is unknown; did you mean h100?"),
        (("checkpoint.resume=false",), {}, "could not go on; set checkpoint.resume=true"),
        ((), {"nodes": 0}, "--nodes 0: give at least 1"),
        ((), {"gpus": -1}, "--gpus -1: give at least 1"),
    ],
)
def test_what_the_config_cannot_do_on_such_nodes_is_refused(changes, given, told):
    with pytest.raises(ConfigError) as error:
        job(RUN.replace(*changes), **given)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_a_name_is_made_to_fit_or_refused():
    assert plain_name("Llama3_8b.v2", what="JobSet", longest=20) == "llama3-8b-v2"
    assert plain_name("-über-", what="JobSet", longest=20) == "ber"
    for name, told in (
        ("3d", "begins with a letter; set --name"),
        ("é", "begins"),
        ("a" * 21, "at most 20 "),
    ):
        with pytest.raises(ConfigError, match=told):
            plain_name(name, what="JobSet", longest=20)


@pytest.mark.parametrize("place", ["runs", "~/runs", "a/../b", "/shared/runs", "gs://bucket/runs"])
def test_places_in_the_shared_folder_are_taken(place):
    check_shared(RUN.replace(f"checkpoint.folder={place}"), "/shared")


@pytest.mark.parametrize("place", ["/data/runs", "/shared2", "../runs", "~/../runs", "~root/runs"])
@pytest.mark.parametrize("field", ["output_dir", "data.cache_dir", "checkpoint.folder"])
def test_places_outside_of_it_are_refused_by_name(field, place):
    for root in ("/shared", None):
        with pytest.raises(ConfigError, match=f"^{field}={place} is not in the shared folder"):
            check_shared(RUN.replace(f"{field}={place}"), root)


def test_where_its_path_is_not_known_it_is_never_written_out():
    with pytest.raises(ConfigError, match="output_dir=/shared/runs is not in the shared folder of the job"):
        check_shared(RUN.replace("output_dir=/shared/runs"), None)


def test_a_platform_that_is_none_is_refused():
    with pytest.raises(ConfigError, match="no platform 'nomad'; give one of kubernetes, azureml, slurm"):
        render("nomad", RUN)


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["kubernetes", "--image", "a"], "the following arguments are required: --claim"),
        (["kubernetes", "--claim", "a"], "the following arguments are required: --image"),
        (["azureml", "--image", "a", "--compute", "b"], "the following arguments are required: --storage"),
        (["slurm", "--image", "a"], "unknown option --image"),
        (
            ["azureml", "--restarts=1", "--image=a", "--compute=b", "--storage=c"],
            "unknown option --restarts=1",
        ),
        (["slurm", "--partition", "a b"], "--partition 'a b': give names of partitions"),
        (["slurm", "--time", "1h"], "--time '1h': give minutes, or a time as 24:00:00"),
        (["slurm", "--restarts=-1"], "--restarts -1: give at least 0"),
        (["slurm", "--grace=0"], "--grace 0: give at least 1"),
        (["slurm", "--grace=70000"], "--grace 70000: give at least 1, and at most 65,535"),
        (["kubernetes", "--image=a", "--claim=A_b"], "--claim 'A_b': give a name of small letters"),
        (["kubernetes", "--image=a b", "--claim=a"], "--image 'a b': give the name of an image"),
        (["kubernetes", "--image=a", "--claim=b", "--node-selector=x"], "--node-selector 'x': give a label"),
        (["kubernetes", "--image=a", "--claim=b", "--queue=x/y"], "--queue 'x/y': give a name"),
        (
            ["azureml", "--image=a", "--compute=a b", "--storage=c"],
            "--compute 'a b': give the name of a cluster",
        ),
        (
            ["azureml", "--image=a", "--compute=b", "--storage=/c"],
            "--storage '/c': give a folder as azureml://",
        ),
    ],
)
def test_an_option_that_a_platform_lacks_or_does_not_take_is_named(capsys, tmp_path, argv, told):
    (tmp_path / "a.yaml").write_text("train: {batch_size: 8}")
    assert main(["launch", "render", argv[0], str(tmp_path / "a.yaml"), *argv[1:]]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: {told}")
    assert captured.err.count("\n") == 1


def test_a_file_is_written_only_where_one_is_asked_for(capsys, tmp_path):
    (tmp_path / "a.yaml").write_text("train: {batch_size: 8}")
    argv = ["launch", "render", "slurm", str(tmp_path / "a.yaml"), "seed=7"]
    assert main(argv) == 0
    printed = capsys.readouterr().out
    assert "\nseed: 7\n" in printed
    assert main([*argv, "--out", str(tmp_path / "job")]) == 0
    assert capsys.readouterr().out == f"submit    sbatch {tmp_path}/job\n"
    assert (tmp_path / "job").read_text() == printed
    assert main([*argv, "--out", str(tmp_path)]) == 1
    assert "cannot be written: it is a folder" in capsys.readouterr().err


def test_the_configs_of_one_machine_are_rendered_for_another():
    config = Config(mesh=MeshConfig(tensor=8, data=-1, fsdp=1), target=TargetConfig(devices=16))
    assert size(config.replace("model.num_heads=8", "model.embed_dim=64")) == (2, 8)
