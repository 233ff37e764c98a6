"""The manifests that a cluster starts from: valid by schema, true to the project, closed."""

import copy
import json
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest
import ray.autoscaler
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import cli
from workspace import REPOSITORY

from pipelines.params import read_params

DEPLOY = REPOSITORY / "pipelines/deploy"
DOCS = (REPOSITORY / "docs/cluster.md").read_text()
TEXTS = {path.name: path.read_text() for path in sorted(DEPLOY.glob("*.yaml"))}
ALL = {**TEXTS, "cluster.md": DOCS}
LOCK = dict(
    line.split("==") for line in (REPOSITORY / "requirements.lock").read_text().split() if line
)
RAY_SCHEMA = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
JOB_SCHEMA = json.loads((REPOSITORY / "tests/support/rayjob_schema.json").read_text())
OWN = {"app.kubernetes.io/part-of": "gram"}

Edit = Callable[[dict[str, Any]], object]


def documents(name: str) -> list[dict[str, Any]]:
    """As Ray reads them; shared parts copied."""
    return [json.loads(json.dumps(d)) for d in yaml.safe_load_all(TEXTS[name])]


def cluster() -> dict[str, Any]:
    return documents("ray-cluster.yaml")[0]


def job() -> dict[str, Any]:
    return documents("rayjob.yaml")[0]


def policy() -> dict[str, Any]:
    return documents("rayjob.yaml")[1]


def start_commands() -> list[str]:
    config = cluster()
    return [config["head_start_ray_commands"][-1], config["worker_start_ray_commands"][-1]]


def pods() -> Iterator[dict[str, Any]]:
    spec = job()["spec"]
    yield spec["submitterPodTemplate"]
    yield spec["rayClusterSpec"]["headGroupSpec"]["template"]
    for group in spec["rayClusterSpec"]["workerGroupSpecs"]:
        yield group["template"]


def containers() -> Iterator[dict[str, Any]]:
    for pod in pods():
        yield from pod["spec"]["containers"]


def accept(document: Mapping[str, Any], schema: Mapping[str, Any]) -> None:
    jsonschema.validate(document, schema)


def test_ray_takes_the_cluster_file() -> None:
    accept(cluster(), RAY_SCHEMA)
    validate_config(prepare_config(cluster()))


@pytest.mark.parametrize(
    "edit",
    [
        lambda c: c.update(idle_timeout_minute=5),
        lambda c: c.update(max_workers="3"),
        lambda c: c["available_node_types"]["gpu"].update(max_worker=3),
        lambda c: c["available_node_types"]["gpu"].pop("node_config"),
        lambda c: c["auth"].update(ssh_key="key.pem"),
        lambda c: c.update(head_node_type="master"),
        lambda c: c["available_node_types"]["gpu"].update(min_workers=9),
    ],
)
def test_ray_refuses_a_mistake_in_the_cluster_file(edit: Edit) -> None:
    changed = cluster()
    edit(changed)
    with pytest.raises((jsonschema.ValidationError, ValueError)):
        validate_config(prepare_config(changed))


def test_schema_takes_the_job_and_its_policy() -> None:
    jsonschema.Draft202012Validator.check_schema(JOB_SCHEMA)
    assert [d["kind"] for d in documents("rayjob.yaml")] == ["RayJob", "NetworkPolicy"]
    for document in documents("rayjob.yaml"):
        accept(document, JOB_SCHEMA)


def head(document: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = document["spec"]["rayClusterSpec"]["headGroupSpec"]
    return found


def worker(document: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = document["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    return found


def container(document: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = head(document)["template"]["spec"]["containers"][0]
    return found


@pytest.mark.parametrize(
    "edit",
    [
        lambda d: d.update(apiVersion="ray.io/v1alpha1"),
        lambda d: d["metadata"].update(name="GRAM"),
        lambda d: d["spec"].update(entryPoint="dvc repro"),
        lambda d: d["spec"].update(entrypoint=["dvc", "repro"]),
        lambda d: d["spec"].update(submissionMode="K8sJob"),
        lambda d: d["spec"].update(ttlSecondsAfterFinished="3600"),
        lambda d: d["spec"]["rayClusterSpec"].pop("headGroupSpec"),
        lambda d: d["spec"]["rayClusterSpec"].update(rayVersion=2.6),
        lambda d: d["spec"]["rayClusterSpec"]["authOptions"].update(mode="tokens"),
        lambda d: d["spec"]["rayClusterSpec"]["autoscalerOptions"].update(upscalingMode="Fast"),
        lambda d: head(d).pop("template"),
        lambda d: head(d).update(replicas=1),
        lambda d: head(d)["rayStartParams"].update({"node-manager-port": 8077}),
        lambda d: worker(d).pop("groupName"),
        lambda d: worker(d).update(maxReplica=3),
        lambda d: worker(d).update(minReplicas="0"),
        lambda d: container(d).pop("image"),
        lambda d: container(d).update(envfrom=[]),
        lambda d: container(d)["env"].append({"name": "N", "value": 1}),
        lambda d: container(d)["ports"].append({"containerPort": 80650}),
        lambda d: container(d)["resources"]["limits"].update(memory="16 GB"),
    ],
)
def test_schema_refuses_a_mistake_in_the_job(edit: Edit) -> None:
    changed = job()
    edit(changed)
    with pytest.raises(jsonschema.ValidationError):
        accept(changed, JOB_SCHEMA)


def test_schema_refuses_a_mistake_in_the_policy() -> None:
    changed = copy.deepcopy(policy())
    changed["spec"]["ingress"][0]["form"] = []
    with pytest.raises(jsonschema.ValidationError):
        accept(changed, JOB_SCHEMA)


@pytest.mark.parametrize("name", ALL)
def test_named_versions_are_the_lock_files(name: str) -> None:
    text = ALL[name]
    named = re.findall(r"(?<![\w-])([a-z0-9]+)(?:\[\w+\])?==([\w.]+)", text)
    # boto3 has the version of botocore, and is wanted by nothing else here.
    wrong = [(n, v) for n, v in named if LOCK["botocore" if n == "boto3" else n] != v]
    assert wrong == []
    assert set(re.findall(r"rayVersion: \"(.*?)\"", text)) <= {LOCK["ray"]}
    assert set(re.findall(r"(?i)python[: =v]*(3\.\d+)", text)) <= {"3.11"}
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert set(re.findall(r"gram:(\d[\w.]*)", text)) <= {project["version"]}


def test_each_manifest_names_what_it_installs() -> None:
    install = " ".join(cluster()["setup_commands"])
    for wanted in ("--python 3.11", "-r ~/gram-requirements.lock", "==" + LOCK["ray"]):
        assert wanted in install
    assert cluster()["file_mounts"]["~/gram-requirements.lock"] == "requirements.lock"
    assert job()["spec"]["rayClusterSpec"]["rayVersion"] == LOCK["ray"]
    dockerfile = re.search(r"```dockerfile\n(.*?)```", DOCS, re.DOTALL)
    assert dockerfile is not None
    for wanted in ("FROM python:3.11", "-r requirements.lock", "WORKDIR /gram", "USER 1000"):
        assert wanted in dockerfile[1]


@pytest.mark.parametrize("name", ALL)
def test_named_stages_and_runs_exist(name: str) -> None:
    dvc = yaml.safe_load((REPOSITORY / "dvc.yaml").read_text())["stages"]
    params = read_params(REPOSITORY / "params.yaml")
    named = re.findall(r"stages\.([a-z]+) (\w+)", ALL[name])
    named += re.findall(r"dvc repro ([a-z]+)@(\w+)", ALL[name])
    for stage, key in named:
        assert stage in dvc
        assert key in params["tasks" if "tasks" in str(dvc[stage]["foreach"]) else "runs"]


def test_jobs_entrypoint_runs_the_pipeline_and_keeps_its_results() -> None:
    shell, flag, script = shlex.split(job()["spec"]["entrypoint"])
    assert (shell, flag) == ("bash", "-c")
    assert script.split(" && ") == ["cd /gram", "dvc repro", "dvc push"]


def ray_commands() -> list[str]:
    """Every command line of `ray` in the manifests and the walk-through."""
    lines = [line.strip() for line in DOCS.splitlines() if line.startswith("    ")]
    found = [line for line in lines if line.startswith("ray ")]
    return found + [command[command.index("ray start") :] for command in start_commands()]


@pytest.mark.parametrize("command", ray_commands())
def test_ray_knows_each_command_and_its_options(command: str) -> None:
    words = shlex.split(command.partition(" -- ")[0].partition(" > ")[0])[1:]
    known: click.Command = cli
    while isinstance(known, click.Group):
        known = known.commands[words.pop(0)]
    options = {option for parameter in known.params for option in parameter.opts}
    used = [word.partition("=")[0] for word in words if word.startswith("-")]
    assert [option for option in used if option not in options] == []


@pytest.mark.parametrize("name", ALL)
def test_no_credentials(name: str) -> None:
    text = ALL[name]
    assert not re.search(r"\b(AKIA|ASIA)[A-Z0-9]{16}\b|BEGIN [A-Z ]*PRIVATE KEY", text)
    assert not re.search(
        r"(?i)(secret|token|password|access_key)\w*[\"']?\s*[:=]\s*[\"']?[\w/+]{20}", text
    )
    for one in containers():
        assert all("value" not in e or e["name"].startswith("RAY_") for e in one.get("env", []))


def test_machines_have_roles_and_the_token_comes_from_the_user() -> None:
    config = cluster()
    for node in config["available_node_types"].values():
        assert set(node["node_config"]["IamInstanceProfile"]) == {"Name"}
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert all("RAY_AUTH_MODE=token ray start" in command for command in start_commands())
    assert job()["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}


def test_nothing_of_the_machines_is_public() -> None:
    config = cluster()
    # Ray opens SSH to everyone in a group that it makes or fills: each node has the user's own.
    for node in config["available_node_types"].values():
        assert node["node_config"]["SecurityGroupIds"]
    assert "security_group" not in config["provider"]
    assert "--dashboard-host=127.0.0.1" in start_commands()[0]
    assert "0.0.0.0" not in "".join(TEXTS.values())


def test_policy_covers_every_pod_and_admits_them_and_the_operator_alone() -> None:
    assert all(pod["metadata"]["labels"] == OWN for pod in pods())
    spec = policy()["spec"]
    assert policy()["metadata"]["namespace"] == job()["metadata"]["namespace"]
    assert spec["podSelector"]["matchLabels"] == OWN
    assert spec["policyTypes"] == ["Ingress"]
    own, operator = spec["ingress"]
    assert own == {"from": [{"podSelector": {"matchLabels": OWN}}]}
    assert set(operator["from"][0]) == {"podSelector", "namespaceSelector"}
    assert [entry["port"] for entry in operator["ports"]] == [8265]
    namespace = operator["from"][0]["namespaceSelector"]["matchLabels"]
    assert f"--namespace {namespace['kubernetes.io/metadata.name']} " in DOCS
    assert head(job())["serviceType"] == "ClusterIP"


def opened() -> set[int]:
    """Ports that the manifests open or name."""
    ports = {int(p) for c in start_commands() for p in re.findall(r"port=(\d+)", c)}
    ports |= {p["containerPort"] for c in containers() for p in c.get("ports", [])}
    for group in (head(job()), worker(job())):
        ports |= {int(v) for k, v in group["rayStartParams"].items() if k.endswith("-port")}
    return ports


def test_each_port_is_in_the_table_of_what_to_close() -> None:
    table = DOCS.partition("## What a cluster must close")[2]
    first = [row.split("|")[1] for row in table.splitlines() if row.startswith("| ")]
    documented = {int(port) for cell in first for port in re.findall(r"\d+", cell)}
    assert opened() - documented == set()
    assert {6379, 8265, 10001, 10002, 19999} <= opened()


def test_head_and_workers_offer_the_same() -> None:
    types = cluster()["available_node_types"]
    assert len({node["node_config"]["InstanceType"] for node in types.values()}) == 1
    sizes = [c["resources"] for c in containers() if c["name"].startswith("ray-")]
    assert sizes[0] == sizes[1]
    assert all(size["limits"]["nvidia.com/gpu"] == "1" for size in sizes)
