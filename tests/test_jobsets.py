"""The container and the JobSets for GKE: what Kubernetes would make of them, and whether their numbers agree."""

import json
import math
import os
import re
import subprocess
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubeflow_trainer_api.models import IoK8sApiCoreV1Container, JobsetV1alpha2JobSet

from slicecast.configs import slices
from slicecast.convert import cli, interruption

ROOT = Path(__file__).parent.parent
TIMEOUT_SECONDS = 60.0
DOCUMENT = (ROOT / "docs" / "launching.md").read_text()
MANIFESTS = ("jobset.yaml", "jobset_cpu.yaml")


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((ROOT / "container" / name).read_text()))


def jobset(name: str) -> dict[str, Any]:
    (found,) = (document for document in documents(name) if document["kind"] == "JobSet")
    return found


def job(name: str) -> dict[str, Any]:
    (replicated,) = jobset(name)["spec"]["replicatedJobs"]
    assert replicated["replicas"] == 1
    spec: dict[str, Any] = replicated["template"]["spec"]
    return spec


def container(name: str) -> dict[str, Any]:
    (found,) = job(name)["template"]["spec"]["containers"]
    checked: dict[str, Any] = found
    return checked


@pytest.mark.parametrize("name", MANIFESTS)
def test_jobset_knows_every_field(name: str) -> None:
    """Fields that the API does not have, at any depth, are lost on the way through its models."""
    manifest = jobset(name)
    assert manifest["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    model = JobsetV1alpha2JobSet.from_dict(manifest)
    assert model is not None
    assert model.to_dict() == manifest


def test_a_field_that_there_is_not_is_found() -> None:
    """The check above can fail."""
    wrong = {**container("jobset.yaml"), "argument": []}
    model = IoK8sApiCoreV1Container.from_dict(wrong)
    assert model is not None
    assert model.to_dict() != wrong


def test_the_slice_is_a_v5e_16() -> None:
    described = slices.parse("v5e-16")
    assert job("jobset.yaml")["parallelism"] == job("jobset.yaml")["completions"] == described.hosts
    resources = container("jobset.yaml")["resources"]
    assert resources["limits"] == resources["requests"] == {"google.com/tpu": described.chips_of_each_host}
    selector = job("jobset.yaml")["template"]["spec"]["nodeSelector"]
    assert selector["cloud.google.com/gke-tpu-accelerator"] == "tpu-v5-lite-podslice"
    width, height = map(int, selector["cloud.google.com/gke-tpu-topology"].split("x"))
    assert width * height == described.chips


def test_the_documented_slices_exist() -> None:
    rows = re.findall(r"^\| (v\S+) \| tpu-\S+ \| (\S+) \| (\d+) \| (\d+) \|$", DOCUMENT, re.MULTILINE)
    assert len(rows) == 4
    for name, topology, hosts, chips in rows:
        described = slices.parse(name)
        assert (described.hosts, described.chips_of_each_host) == (int(hosts), int(chips))
        assert math.prod(map(int, topology.split("x"))) == described.chips


@pytest.mark.parametrize("name", MANIFESTS)
def test_slicecast_understands_its_words(name: str) -> None:
    words = [word.replace("$(PROCESS_ID)", "3") for word in container(name)["args"]]
    parsed = cli.parse(words)
    assert parsed.command == "convert"
    assert parsed.base_output_directory.startswith("gs://")


def test_cpu_hosts_find_each_other() -> None:
    manifest, spec = jobset("jobset_cpu.yaml"), job("jobset_cpu.yaml")
    parsed = cli.parse([word.replace("$(PROCESS_ID)", "3") for word in container("jobset_cpu.yaml")["args"]])
    assert parsed.num_processes == spec["parallelism"] == spec["completions"]
    first = f"{manifest['metadata']['name']}-{manifest['spec']['replicatedJobs'][0]['name']}-0-0"
    host, _, port = parsed.coordinator_address.partition(":")
    assert host == f"{first}.{manifest['spec']['network']['subdomain']}"
    assert 1024 < int(port) < 65536
    environment = {variable["name"]: variable for variable in container("jobset_cpu.yaml")["env"]}
    assert environment["JAX_PLATFORMS"]["value"] == "cpu"
    index = environment["PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert index == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert spec["completionMode"] == "Indexed"


@pytest.mark.parametrize("name", MANIFESTS)
def test_errors_end_the_run_and_preemptions_do_not(name: str) -> None:
    policy = jobset(name)["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 10
    (rule,) = policy["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    spec = job(name)
    assert spec["backoffLimit"] == 0
    (failure,) = spec["podFailurePolicy"]["rules"]
    assert failure["action"] == "FailJob"
    assert failure["onExitCodes"] == {"containerName": container(name)["name"], "operator": "In", "values": [1, 2]}
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # Kubernetes allows no other with a podFailurePolicy.
    assert pod["terminationGracePeriodSeconds"] > interruption.GRACE_SECONDS


@pytest.mark.parametrize("name", MANIFESTS)
def test_the_token_is_a_secret(name: str) -> None:
    environment = {variable["name"]: variable for variable in container(name)["env"]}
    assert "value" not in environment["HF_TOKEN"]
    assert environment["HF_TOKEN"]["valueFrom"]["secretKeyRef"]["optional"] is True
    account = job(name)["template"]["spec"]["serviceAccountName"]
    (made,) = (document for document in documents(name) if document["kind"] == "ServiceAccount")
    assert made["metadata"]["name"] == account
    assert "iam.gke.io/gcp-service-account" in made["metadata"]["annotations"]


def test_the_documented_loop_starts_every_process(tmp_path: Path) -> None:
    """The loop runs as it stands in the document, with stand-ins for gcloud, which is a shell, and for slicecast."""
    (loop,) = re.findall(r"^for i in .*?^done$", DOCUMENT, re.MULTILINE | re.DOTALL)
    for name, program in (
        ("gcloud", 'bash -c "${5#--command=}"'),
        ("slicecast", 'printf "%s\\0" "$JAX_PLATFORMS" "$@" >"$(mktemp ./started.XXXXXX)"'),
    ):
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{program}\n")
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    del environment["JAX_PLATFORMS"]
    subprocess.run(["bash", "-c", loop], cwd=tmp_path, env=environment, check=True, timeout=TIMEOUT_SECONDS)
    deadline = time.monotonic() + TIMEOUT_SECONDS
    started: list[list[str]] = [[]]
    while len(started) < 4 or [] in started:
        assert time.monotonic() < deadline
        time.sleep(0.05)
        started = [path.read_text().split("\0")[:-1] for path in tmp_path.glob("started.*")]
    assert {platform for platform, *_ in started} == {"cpu"}
    parsed = [cli.parse(words) for _, *words in started]
    assert sorted(arguments.process_id for arguments in parsed) == list(range(4))
    assert {(arguments.num_processes, arguments.coordinator_address) for arguments in parsed} == {(4, "convert-0:8476")}


def test_slicecast_is_process_1() -> None:
    dockerfile = (ROOT / "container" / "Dockerfile").read_text()
    (entry,) = re.findall(r"^ENTRYPOINT (.*)$", dockerfile, re.MULTILINE)
    assert json.loads(entry) == ["slicecast"]  # The exec form: no shell in between.
    assert not re.search(r"^(CMD|ENV|ARG)", dockerfile, re.MULTILINE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (extra,) = re.findall(r"/source\[(\w+)\]", dockerfile)
    assert extra in project["optional-dependencies"]
    assert "slicecast" in project["scripts"]


def test_the_image_gets_the_package_and_nothing_else() -> None:
    lines = (ROOT / "container" / "Dockerfile.dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    kept = {rule.removeprefix("!") for rule in rules if rule.startswith("!")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = set(project["tool"]["setuptools"]["package-dir"].values())
    assert kept == folders | {"pyproject.toml", project["project"]["readme"]}
