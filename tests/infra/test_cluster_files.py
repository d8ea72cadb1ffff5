"""What brings a cluster up elsewhere is checked against what will read it: Ray's launcher and EC2's API, KubeRay's
fields, Slurm's variables, and each other."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import boto3
import pytest
import yaml
from moto import mock_aws
from ray.autoscaler._private.aws.config import bootstrap_aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import prepare_config, validate_config

from infra.head import ROOT
from pipelines.common.cli import parse
from pipelines.extract import ExtractConfig

FILES = ROOT / "infra" / "cluster"
LOCKED = dict(re.findall(r"^([\w-]+)==(\S+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE))
# ray.io/v1 as KubeRay 1.6 documents it: the fields that a manifest may have, with their types.
CONTAINER = {"name": str, "image": str, "envFrom": list, "ports": list, "resources": dict}
GROUP = {"rayStartParams": dict, "template": dict}
RAY_CLUSTER = {
    "rayVersion": str,
    "authOptions": dict,
    "enableInTreeAutoscaling": bool,
    "autoscalerOptions": dict,
    "headGroupSpec": dict,
    "workerGroupSpecs": list,
}
WORKERS = {**GROUP, "groupName": str, "replicas": int, "minReplicas": int, "maxReplicas": int}
RAY_JOB = {
    "clusterSelector": dict,
    "submissionMode": str,
    "backoffLimit": int,
    "submitterConfig": dict,
    "runtimeEnvYAML": str,
    "entrypoint": str,
}


def read(name):
    return yaml.safe_load((FILES / name).read_text())


def require_fields(found, known):
    for name, value in found.items():
        assert isinstance(value, known[name]), f"{name}: {value}"


@pytest.fixture
def aws(monkeypatch, tmp_path):
    """An account with the instance profile that the file names."""
    for name, value in {"ACCESS_KEY_ID": "x", "SECRET_ACCESS_KEY": "x", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("HOME", str(tmp_path))  # gets the key pair
    (tmp_path / ".ssh").mkdir()
    with mock_aws():
        boto3.client("iam").create_instance_profile(InstanceProfileName="clcr")
        yield


@pytest.mark.slow
def test_rays_launcher_makes_every_kind_of_host_of_the_aws_file(aws):
    config = prepare_config(read("aws.yaml"))
    validate_config(config)
    config = bootstrap_aws(config)
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    for name, kind in config["available_node_types"].items():
        provider.create_node(kind["node_config"], {"ray-user-node-type": name}, 1)
    running = provider.non_terminated_nodes({})
    types = {provider.node_tags(node)["ray-user-node-type"]: provider._get_node(node).instance_type for node in running}
    assert types == {"head": "m6i.xlarge", "decode": "c6i.4xlarge", "train": "g5.2xlarge"}
    config = AWSNodeProvider.fillout_available_node_types_resources(config)
    resources = {name: kind["resources"] for name, kind in config["available_node_types"].items()}
    assert resources["head"]["CPU"] == 0 and resources["decode"]["CPU"] == 16 and resources["train"]["GPU"] == 1


def test_every_host_on_aws_has_the_token_and_wants_it():
    config = read("aws.yaml")
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]


def test_the_kuberay_manifests_have_only_known_fields_of_the_right_types():
    cluster, job = read("raycluster.yaml"), read("rayjob.yaml")
    assert {m["apiVersion"] for m in (cluster, job)} == {"ray.io/v1"}
    assert (cluster["kind"], job["kind"]) == ("RayCluster", "RayJob")
    spec = cluster["spec"]
    require_fields(spec, RAY_CLUSTER)
    require_fields(spec["headGroupSpec"], GROUP)
    for group in spec["workerGroupSpecs"]:
        require_fields(group, WORKERS)
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        (container,) = group["template"]["spec"]["containers"]
        require_fields(container, CONTAINER)
        assert container["resources"]["requests"] == container["resources"]["limits"]
    assert spec["authOptions"] == {"mode": "token"} and spec["rayVersion"] == LOCKED["ray"]
    require_fields(job["spec"], RAY_JOB)
    assert job["spec"]["clusterSelector"] == {"ray.io/cluster": cluster["metadata"]["name"]}
    assert yaml.safe_load(job["spec"]["runtimeEnvYAML"]) == {"working_dir": "/app"}


def test_the_jobs_in_the_files_have_options_that_exist():
    python, script, *options = shlex.split(read("rayjob.yaml")["spec"]["entrypoint"])
    assert python == "python" and (ROOT / script).exists()
    assert parse(ExtractConfig, options).store == "s3://BUCKET/store"


def test_the_image_is_built_from_the_lock_and_leaves_out_what_is_not_code():
    lines = (FILES / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    steps = [line for line in lines if line and not line.startswith("#")]
    instructions = [step.split()[0] for step in steps]
    assert instructions[0] == "FROM" and instructions[-1] == "USER" and set(instructions) <= {
        "FROM", "RUN", "WORKDIR", "COPY", "USER"}  # fmt: skip
    major, minor = map(int, re.match(r"FROM python:(\d+)\.(\d+)-slim$", steps[0]).groups())
    assert (3, 11) <= (major, minor) < (3, 14)
    install = next(i for i, step in enumerate(steps) if "-r requirements.lock" in step)
    assert steps[install - 1] == "COPY requirements.lock ." and steps[install + 1] == "COPY . ."
    ignored = (FILES / "Dockerfile.dockerignore").read_text().splitlines()
    assert {".git", ".venv", "tests"} <= set(ignored)
    kept = {line.split()[1] for line in steps if line.startswith("COPY")} - {"."}
    assert not kept & set(ignored)


def test_the_compose_file_runs_our_server_on_the_database_beside_it():
    services = read("mlflow-compose.yaml")["services"]
    server, database = services["mlflow"], services["database"]
    build = server["build"]
    assert (FILES / build["context"] / build["dockerfile"]).resolve() == FILES / "Dockerfile"
    assert os.access(ROOT / server["command"][0], os.X_OK)
    needed = re.findall(r"\$\{(\w+):\?", (FILES / "mlflow_server.sh").read_text())
    assert needed and set(needed) <= server["environment"].keys()
    assert server["environment"]["DATABASE"].startswith("postgresql://mlflow:${POSTGRES_PASSWORD}@database/mlflow")
    assert database["environment"]["POSTGRES_USER"] == database["environment"]["POSTGRES_DB"] == "mlflow"
    assert server["depends_on"] == {"database": {"condition": "service_healthy"}}


@pytest.mark.parametrize("script", sorted(FILES.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_parse_and_stop_at_the_first_error(script):
    assert os.access(script, os.X_OK) and "set -euo pipefail" in script.read_text()
    assert subprocess.run(["bash", "-n", script]).returncode == 0


def test_sbatch_without_a_job_is_one_line():
    done = subprocess.run([FILES / "slurm.sh"], capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "give the job" in done.stderr


FAKES = {
    "scontrol": "printf 'a\\nb\\n'",
    "srun": """echo "$SRUN_CPUS_PER_TASK" >> cpus
case "$*" in
  *hostname*) echo 10.0.0.1 ;;
  *--head*) exec sleep 60 ;;
  *) exit 1 ;;
esac""",
    "ray": "echo '[1]'",  # health-check, and list nodes
}


def test_a_slurm_job_ends_when_ray_does_not_start_on_every_host(tmp_path):
    for name, body in FAKES.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "[a-b]", "SLURM_CPUS_PER_TASK": "8"}
    path = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        [FILES / "slurm.sh", "true"],
        cwd=tmp_path, env={**os.environ, **slurm, "PATH": path}, capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, "error: Ray did not start on all of a b\n")
    assert set((tmp_path / "cpus").read_text().split()) == {"8"}
