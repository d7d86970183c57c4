"""The JobSet is one to Kubernetes and to JobSet, and its pods train together."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import nodes
import pytest
import yaml
from kubernetes_validate.utils import ValidationError
from tiny_runs import config as tiny

from stack.config import Config, ConfigError, parse
from stack.launch.job import job
from stack.launch.kubernetes import SHARED, render

RUN = Config().replace("train.batch_size=32", "name=Llama3_8b", "target.devices=32")
ALL = {
    "namespace": "research",
    "queue": "gpus",
    "node_selector": ["cloud.example.com/gpu=h100"],
    "service_account": "trainer",
    "restarts": 7,
    "grace": 300,
}


def rendered(
    config: Config = RUN, count: int | None = None, gpus: int | None = None, **options: Any
) -> list[Any]:
    text = render(job(config, count, gpus), image="ghcr.io/lab/stack:1", claim="work", **options)
    return list(yaml.safe_load_all(text))


def pod_of(job_set: dict[str, Any]) -> dict[str, Any]:
    return job_of(job_set)["template"]["spec"]


def job_of(job_set: dict[str, Any]) -> dict[str, Any]:
    return job_set["spec"]["replicatedJobs"][0]["template"]["spec"]


def check_kubernetes(document: dict[str, Any]) -> None:
    """By the schemas of Kubernetes, no field unknown."""
    kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


def as_job(job_set: dict[str, Any]) -> dict[str, Any]:
    """The one job of a JobSet, as JobSet makes it."""
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "a"}, "spec": job_of(job_set)}


CRD = json.loads((Path(__file__).parents[1] / "goldens" / "jobset_crd.json").read_text())["schema"]


def check_jobset(document: dict[str, Any]) -> None:
    """By the schema of JobSet's CRD, no field unknown: a cluster would drop it without a word."""
    jsonschema.Draft202012Validator(closed(CRD)).validate(document)


def closed(schema: Any) -> Any:
    """The same schema, which refuses what it does not name."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    inside = {name: closed(part) for name, part in schema.items()}
    names_all = isinstance(schema.get("properties"), dict) and "additionalProperties" not in schema
    return inside | ({"additionalProperties": False} if names_all and schema.get("type") == "object" else {})


@pytest.mark.parametrize("options", [{}, ALL])
def test_kubernetes_and_jobset_know_every_field(options):
    config_map, job_set = rendered(**options)
    check_kubernetes(config_map)
    check_kubernetes(as_job(job_set))
    check_jobset(job_set)


def test_a_field_that_is_misspelt_would_be_seen():
    _, job_set = rendered()
    wrong = copy.deepcopy(job_set)
    job_of(wrong)["podFailurePolicies"] = {}
    with pytest.raises(ValidationError, match="podFailurePolicies"):
        check_kubernetes(as_job(wrong))
    wrong = copy.deepcopy(job_set)
    wrong["spec"]["failurePolicy"]["maxRestart"] = 3
    with pytest.raises(jsonschema.ValidationError, match="'maxRestart' was unexpected"):
        check_jobset(wrong)
    wrong = copy.deepcopy(job_set)
    wrong["spec"]["failurePolicy"]["restartStrategy"] = "Sometimes"
    with pytest.raises(jsonschema.ValidationError, match="'Sometimes' is not one of"):
        check_jobset(wrong)
    wrong = copy.deepcopy(job_set)
    pod_of(wrong)["containers"][0]["comand"] = ["stack"]
    with pytest.raises(jsonschema.ValidationError, match="'comand' was unexpected"):
        check_jobset(wrong)


def test_every_pod_has_the_whole_config():
    config_map, job_set = rendered()
    assert parse(config_map["data"]["config.yaml"]) == RUN
    assert config_map["immutable"]
    pod = pod_of(job_set)
    (container,) = pod["containers"]
    paths = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes["config"]["configMap"]["name"] == config_map["metadata"]["name"]
    assert container["command"] == ["stack", "train", f"{paths['config']}/config.yaml"]
    assert volumes["shared"]["persistentVolumeClaim"]["claimName"] == "work"
    assert paths["shared"] == container["workingDir"] == SHARED


def test_a_node_has_a_pod_with_all_its_gpus():
    _, job_set = rendered(count=4)
    spec = job_of(job_set)
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 4, 4)
    assert pod_of(job_set)["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": 8}


def test_an_error_and_a_bad_config_end_the_jobset_and_all_else_starts_it_again():
    _, job_set = rendered(restarts=7)
    spec = job_of(job_set)
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    # 75 (asked to stop), 76 (a process is silent), 137 (killed) and kin are not among them.
    assert rule["onExitCodes"] == {"containerName": "train", "operator": "In", "values": [1, 2]}
    policy = job_set["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 7
    assert policy["rules"] == [
        {"name": "error", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    ]
    assert spec["backoffLimit"] == 0
    assert pod_of(job_set)["restartPolicy"] == "Never", "podFailurePolicy asks for it"


def test_names_of_hosts_fit_to_the_longest():
    _, job_set = rendered(RUN.replace(f"name={'a' * 45}"), count=4)
    name = job_set["metadata"]["name"]
    assert len(f"{name}-train-0-3-abcde") <= 63
    with pytest.raises(ConfigError, match="at most 47 characters in its name; set --name"):
        rendered(RUN.replace(f"name={'a' * 48}"), count=4)
    assert rendered(RUN.replace(f"name={'a' * 48}"), name="b")[1]["metadata"]["name"] == "b"


def test_a_run_that_would_be_lost_with_its_pod_is_refused():
    with pytest.raises(ConfigError, match="output_dir=/scratch is not in the shared folder /shared; give a"):
        rendered(RUN.replace("output_dir=/scratch"))


def test_options_arrive():
    config_map, job_set = rendered(**ALL)
    assert {config_map["metadata"]["namespace"], job_set["metadata"]["namespace"]} == {"research"}
    assert job_set["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "gpus"}
    pod = pod_of(job_set)
    assert pod["nodeSelector"] == {"cloud.example.com/gpu": "h100"}
    assert pod["serviceAccountName"] == "trainer"
    assert pod["terminationGracePeriodSeconds"] == 300


def variables(job_set: dict[str, Any], index: int) -> dict[str, str]:
    """The environment of a pod, its annotation read as the kubelet does."""
    annotations = {"metadata.annotations['batch.kubernetes.io/job-completion-index']": str(index)}
    return {
        one["name"]: one.get("value") or annotations[one["valueFrom"]["fieldRef"]["fieldPath"]]
        for one in pod_of(job_set)["containers"][0]["env"]
    }


def test_one_pod_meets_nobody():
    assert variables(rendered(count=1)[1], 0) == {"HOME": SHARED}


def start_pods(documents: list[Any], folder: Path) -> list[subprocess.Popen[str]]:
    """The pods, as processes that see the names of JobSet's hosts; volumes are folders."""
    config_map, job_set = documents
    places = {"/etc/stack": folder / "config", "/dev/shm": folder / "memory", SHARED: folder / "shared"}
    text = json.dumps(job_set)
    for mount in pod_of(job_set)["containers"][0]["volumeMounts"]:
        place = places[mount["mountPath"]]
        place.mkdir(exist_ok=True)
        text = text.replace(mount["mountPath"], str(place))
    for name, data in config_map["data"].items():
        (folder / "config" / name).write_text(data)
    job_set = json.loads(text)
    name, replicated = job_set["metadata"]["name"], job_set["spec"]["replicatedJobs"][0]["name"]
    hosts = Path("/etc/hosts").read_text()
    (folder / "hosts").write_text(f"{hosts}\n127.0.0.1 {name}-{replicated}-0-0.{name}\n")
    seen = 'mount --bind "$0" /etc/hosts && exec "$@"'
    (container,) = pod_of(job_set)["containers"]
    inside = ["unshare", "--map-root-user", "--mount", "bash", "-c", seen, str(folder / "hosts")]
    return [
        nodes.start(
            [*inside, *container["command"]],
            variables(job_set, index),
            Path(container["workingDir"]),
            folder / f"{index}.log",
        )
        for index in range(job_of(job_set)["completions"])
    ]


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="needs mount namespaces")
def test_two_pods_train_together_are_told_to_stop_and_go_on(tmp_path):
    config = tiny(tmp_path, "two", *nodes.OVERRIDES, "train.steps=200")
    documents = rendered(config, 2, nodes.DEVICES)
    run = tmp_path / "shared" / "runs" / "Two_nodes"
    pods = start_pods(documents, tmp_path)
    logs = [tmp_path / "0.log", tmp_path / "1.log"]
    nodes.wait_for_steps(run, 20, pods)
    pods[1].terminate()  # As when its node is drained.
    assert nodes.wait(pods) == [75, 75], [log.read_text() for log in logs]
    stopped = nodes.steps(run)
    assert stopped < 200
    again = start_pods(documents, tmp_path)
    assert nodes.wait(again) == [0, 0], [log.read_text() for log in logs]
    assert "devices   4 x cpu" in logs[0].read_text()
    assert nodes.steps(run) > stopped
    assert (tmp_path / "shared" / ".cache" / "stack" / "data").is_dir(), "its home is shared"


@pytest.mark.full
def test_a_pod_whose_config_cannot_be_ends_with_a_status_that_is_not_tried_again(tmp_path):
    documents = rendered(tiny(tmp_path, "two", *nodes.OVERRIDES), 2, nodes.DEVICES)
    (statuses,) = [
        rule["onExitCodes"]["values"] for rule in job_of(documents[1])["podFailurePolicy"]["rules"]
    ]
    documents[0]["data"]["config.yaml"] += "sede: 3\n"
    assert set(nodes.wait(start_pods(documents, tmp_path))) <= set(statuses)
    assert "sede" in (tmp_path / "0.log").read_text()
