"""MLflow as a cluster has it: runs in a real PostgreSQL, artifacts on an S3 server."""

import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
from pathlib import Path

import psycopg
import pyarrow.fs as pafs
import pytest
import s3
from mlflow.tracking import MlflowClient

from features.files import open_fs
from infra import doctor
from infra.head import ROOT, answers, free_ports
from pipelines.tracking import run as tracking

pytestmark = pytest.mark.slow
SCRIPT = ROOT / "infra" / "cluster" / "mlflow_server.sh"
BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))


@pytest.fixture(scope="module")
def database():
    """The address of an empty PostgreSQL database; its server refuses to run as root, so nobody runs it."""
    if not BINARIES:
        pytest.skip("no PostgreSQL: apt-get install postgresql")
    port = free_ports(1)[0]
    folder = Path(tempfile.mkdtemp(prefix="postgres-", dir="/tmp"))  # pytest's own folders are root's alone
    user = {"user": "nobody"} if os.geteuid() == 0 else {}
    if user:
        os.chown(folder, pwd.getpwnam("nobody").pw_uid, -1)
    (folder / "password").write_text("secret")
    (folder / "password").chmod(0o644)

    def postgres(program, *args):
        command = [BINARIES[-1] / program, "-D", folder / "data", *args]
        subprocess.run(command, check=True, cwd=folder, stdout=subprocess.DEVNULL, **user)

    postgres("initdb", "--username=mlflow", "--auth=scram-sha-256", f"--pwfile={folder}/password", "--no-sync")
    options = f"-h 127.0.0.1 -p {port} -k {folder} -c fsync=off"
    postgres("pg_ctl", "-w", "-l", folder / "log", "-o", options, "start")
    try:
        yield f"postgresql://mlflow:secret@127.0.0.1:{port}/postgres"
    finally:
        postgres("pg_ctl", "-m", "immediate", "stop")
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def storage():
    """A bucket of an S3 server, as the environment of a server and the URI of a client."""
    with s3.server() as port, s3.Proxy(port) as proxy:
        fs, _ = open_fs(proxy.uri("s3://bucket", allow_bucket_creation="true"))
        fs.create_dir("bucket")
        yield {**s3.CREDENTIALS, "AWS_ENDPOINT_URL": proxy.endpoint, "AWS_DEFAULT_REGION": "us-east-1"}, fs


@contextlib.contextmanager
def server(database, environment):
    port = free_ports(1)[0]
    settings = {"DATABASE": database, "ARTIFACTS": "s3://bucket/mlflow", **environment}
    command = [SCRIPT, "--host", "0.0.0.0", "--port", str(port), "--workers", "1"]
    process = subprocess.Popen(command, env=os.environ | settings, start_new_session=True)
    try:
        assert answers(f"http://127.0.0.1:{port}/health", process, seconds=400)
        arguments = Path(f"/proc/{process.pid}/cmdline").read_text()
        assert "mlflow" in arguments and "secret" not in arguments
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, 15)
        process.wait()


def test_a_run_lies_in_postgresql_and_its_artifacts_on_s3(database, storage, tmp_path, monkeypatch):
    environment, fs = storage
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_bytes(b"1" * 1000)
    monkeypatch.delenv(doctor.RETRIES, raising=False)
    with server(database, environment) as uri:
        other = doctor.mlflow_server(uri.replace("127.0.0.1", "127.0.0.2"))  # the same server by an unusual address
        assert not other.ok and f"add 127.0.0.2:{uri.rpartition(':')[2]} to its --allowed-hosts" in other.fix
        assert doctor.mlflow_server(uri).ok and doctor.RETRIES not in os.environ
        run = tracking.start_run(uri, "clcr", "one", {"model.width": 16}, {"model": "clcr"})
        for epoch in range(3):
            run.log_metrics({"val/accuracy": epoch / 4}, epoch)
        run.log_folder(tmp_path / "model", "model")
        run.finish()
        client = MlflowClient(uri)
        found = client.get_run(run.run_id)
        history = client.get_metric_history(run.run_id, "val/accuracy")
        (tmp_path / "back").mkdir()
        folder = client.download_artifacts(run.run_id, "model", str(tmp_path / "back"))
    assert found.info.status == "FINISHED" and found.data.params == {"model.width": "16"}
    assert [(m.step, m.value) for m in history] == [(0, 0.0), (1, 0.25), (2, 0.5)]
    assert Path(folder, "weights").read_bytes() == b"1" * 1000
    objects = fs.get_file_info(pafs.FileSelector("bucket/mlflow", recursive=True))
    assert [(i.base_name, i.size) for i in objects if i.type == pafs.FileType.File] == [("weights", 1000)]
    with psycopg.connect(database) as connection:
        assert connection.execute("select run_uuid, status from runs").fetchall() == [(run.run_id, "FINISHED")]


def test_what_is_not_set_is_one_line():
    clean = {k: v for k, v in os.environ.items() if k not in ("DATABASE", "ARTIFACTS")}
    for settings, missing in (({}, "DATABASE"), ({"DATABASE": "postgresql://x/y"}, "ARTIFACTS")):
        done = subprocess.run([SCRIPT], env=clean | settings, capture_output=True, text=True)
        assert done.returncode != 0 and len(done.stderr.splitlines()) == 1 and f"{missing}: set it to" in done.stderr
