"""A run as a JobSet of Kubernetes: one pod and one process on each node, with all its GPUs.

JobSet (jobset.x-k8s.io) is the controller that starts the pods of one run together, gives them names that
find each other, and starts all of them again when one is lost.
"""

from collections.abc import Sequence
from typing import Any

from stack.config import dump
from stack.launch import documents
from stack.launch.job import Job, check_number, check_shared, check_text, plain_name

SHARED = "/shared"
"""Where the volume lies in each pod: the folder it starts in, and its home."""

_CONFIG = "/etc/stack/config.yaml"
_JOB = "train"  # Of the JobSet's jobs, the only one.
_PORT = 8476  # Of process 0, for the others to meet at; a pod has all ports to itself.
_NAME = r"[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?"
_LABEL = (
    r"([a-z0-9.-]{1,253}/)?[A-Za-z0-9]([\w.-]{0,61}[A-Za-z0-9])?=([A-Za-z0-9]([\w.-]{0,61}[A-Za-z0-9])?)?"
)
_LONGEST = 63  # Letters of a host's name (RFC 1123).


def render(
    job: Job,
    *,
    image: str,
    claim: str,
    name: str | None = None,
    namespace: str | None = None,
    queue: str | None = None,
    node_selector: Sequence[str] = (),
    service_account: str | None = None,
    restarts: int = 100,
    grace: int = 120,
) -> str:
    """A ConfigMap with the config, and a JobSet that trains it.

    Args:
        job: the run and its size.
        image: a container that holds Stack, as `stack` on its path.
        claim: a persistent volume claim that all pods may write to (ReadWriteMany).
        name: of the JobSet; None: the run's, made to fit.
        namespace: None leaves it to who applies it.
        queue: Kueue's, which then admits the JobSet; None: none.
        node_selector: labels of the nodes, `key=value`.
        service_account: whose rights the pods have, for buckets; None: the default one.
        restarts: of the whole JobSet, at most.
        grace: seconds to save in, from the signal to the end of a pod.

    Raises:
        ConfigError: what Kubernetes does not take, by name.
    """
    check_number("--restarts", restarts, 0)
    check_number("--grace", grace, 1)
    check_text("--image", image, r"[\w.:/@-]+", "the name of an image")
    for option, value in (
        ("--claim", claim),
        ("--namespace", namespace),
        ("--queue", queue),
        ("--service-account", service_account),
    ):
        check_text(option, value, _NAME, "a name of small letters and digits, with - between")
    check_shared(job.config, SHARED)
    # A pod is NAME-train-0-INDEX-abcde.
    longest = _LONGEST - len(f"-{_JOB}-0-{job.nodes - 1}-abcde")
    name = plain_name(name or job.config.name, what="JobSet", longest=longest)
    metadata = {"name": name} | ({"namespace": namespace} if namespace else {})
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata,
        # A pod that is started again reads what the first read.
        "immutable": True,
        "data": {"config.yaml": dump(job.config)},
    }
    labels = {"labels": {"kueue.x-k8s.io/queue-name": queue}} if queue else {}
    pod = _pod(job, name, image=image, claim=claim, grace=grace) | (
        {"nodeSelector": _labels(node_selector)} if node_selector else {}
    )
    if service_account:
        pod["serviceAccountName"] = service_account
    job_set = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata | labels,
        "spec": {
            "network": {"enableDNSHostnames": True},
            "failurePolicy": {
                "maxRestarts": restarts,
                # Any other failure starts all pods again.
                "rules": [
                    {"name": "error", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
                ],
            },
            "replicatedJobs": [{"name": _JOB, "replicas": 1, "template": {"spec": _job(job.nodes, pod)}}],
        },
    }
    return documents.write([config_map, job_set])


def _job(nodes: int, pod: dict[str, Any]) -> dict[str, Any]:
    return {
        "completionMode": "Indexed",
        "completions": nodes,
        "parallelism": nodes,
        # One pod that is lost ends the job: the others cannot go on without it.
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",
                    # An error, and a config that cannot be: they would only come again.
                    "onExitCodes": {"containerName": _JOB, "operator": "In", "values": [1, 2]},
                }
            ]
        },
        "template": {"spec": pod},
    }


def _pod(job: Job, name: str, *, image: str, claim: str, grace: int) -> dict[str, Any]:
    volumes = {
        "config": ({"configMap": {"name": name}}, "/etc/stack"),
        "shared": ({"persistentVolumeClaim": {"claimName": claim}}, SHARED),
        # NCCL's buffers between the GPUs of a node; a pod has 64 MB of it otherwise.
        "memory": ({"emptyDir": {"medium": "Memory", "sizeLimit": "16Gi"}}, "/dev/shm"),
    }
    container = {
        "name": _JOB,
        "image": image,
        "command": ["stack", "train", _CONFIG],
        "workingDir": SHARED,
        "env": _environment(job, name),
        "resources": {"limits": {"nvidia.com/gpu": job.gpus}},
        "volumeMounts": [{"name": volume, "mountPath": path} for volume, (_, path) in volumes.items()],
    }
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": grace,
        "containers": [container],
        # Nodes with GPUs are often kept free of what does not ask for them.
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "volumes": [{"name": volume} | source for volume, (source, _) in volumes.items()],
    }


def _environment(job: Job, name: str) -> list[dict[str, Any]]:
    """A home that is shared, and where the processes meet: see `stack.parallel.processes.join`."""
    home: dict[str, Any] = {"name": "HOME", "value": SHARED}
    if job.nodes == 1:
        return [home]
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    return [
        home,
        {"name": "JAX_COORDINATOR_ADDRESS", "value": f"{name}-{_JOB}-0-0.{name}:{_PORT}"},
        {"name": "JAX_NUM_PROCESSES", "value": str(job.nodes)},
        {"name": "JAX_PROCESS_ID", "valueFrom": {"fieldRef": {"fieldPath": index}}},
    ]


def _labels(pairs: Sequence[str]) -> dict[str, str]:
    for pair in pairs:
        check_text("--node-selector", pair, _LABEL, "a label as key=value")
    return dict(pair.split("=", 1) for pair in pairs)
