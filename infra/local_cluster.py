"""A Ray cluster of several hosts on one machine, for tests and for trying out what happens when a host fails.

    python -m infra.local_cluster up --hosts 3 --cpus 2
    python -m infra.local_cluster put corpus s3://data/corpus
    python -m infra.local_cluster submit -- python pipelines/extract.py --corpus s3://data/corpus/corpus.csv ...
    python -m infra.local_cluster kill host2            # and: start, cut, heal, run HOST -- COMMAND, status, down

The hosts (infra/hosts.py) share no disk. A switch connects them, on one more host named storage, which also runs an
S3 server and an MLflow server. host1 is the head node. To join the cluster or submit to it, its token is needed.
"""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import psutil
import pyarrow.fs as pafs
import tyro

from features.errors import FeaturesError
from features.files import open_fs
from infra.head import AGENT_PORTS, ROOT, Head
from infra.hosts import (
    START_SECONDS,
    ClusterError,
    find_init,
    free_network,
    host_processes,
    inside,
    require_init,
    require_tools,
    sh,
    spawn,
    wait_until,
)

STORAGE = "storage"
FOLDER = f"{tempfile.gettempdir()}/clcr-cluster"


@dataclass(frozen=True)
class LocalCluster:
    """A running cluster, as its folder describes it.

    network: the first three numbers of every address. token: the secret that clients need. cpus: what each host offers
    to Ray. dead_after: seconds without an answer after which a host counts as dead.
    """

    folder: str
    network: str
    token: str
    hosts: tuple[str, ...]
    cpus: int
    dead_after: float

    @property
    def s3(self) -> str:
        """The S3 server's address, as a value for AWS_ENDPOINT_URL."""
        return f"http://{self.address(STORAGE)}:9000"

    @property
    def mlflow(self) -> str:
        """The MLflow server's address, as a value for MLFLOW_TRACKING_URI."""
        return f"http://{self.address(STORAGE)}:5000"

    @property
    def head(self) -> Head:
        """The head node, to which jobs are submitted."""
        address = self.address(self.hosts[0])
        return Head(f"http://{address}:8265", f"{address}:6379", self.environment())

    def address(self, host: str) -> str:
        """A host's address. The machine itself is on the same network, as .254."""
        return f"{self.network}.{1 if host == STORAGE else 11 + self.hosts.index(host)}"

    def environment(self) -> dict[str, str]:
        """The environment of processes on a host, and of clients."""
        seconds = max(1.0, self.dead_after / 3 - 1)  # of three checks in a row, a second apart
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "AWS_", "MLFLOW_", "TMPDIR"))}
        return {
            **inherited,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "HOME": "/tmp/home",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_timeout_ms": str(int(seconds * 1000)),
            "RAY_health_check_failure_threshold": "3",
            "RAY_gcs_rpc_server_reconnect_timeout_s": str(int(2 * self.dead_after)),
            "RAY_worker_niceness": "0",
            "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # no cloud takes these hosts back
            **self.client_environment(),
        }

    def client_environment(self) -> dict[str, str]:
        """The part of the environment that leads to the cluster's storage and tracking server."""
        return {
            "AWS_ENDPOINT_URL": self.s3,
            "AWS_ACCESS_KEY_ID": "local",
            "AWS_SECRET_ACCESS_KEY": "local",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "MLFLOW_TRACKING_URI": self.mlflow,
        }

    def service(self, host: str) -> list[str]:
        """The command that a host runs for as long as it is up."""
        python, address = sys.executable, self.address(host)
        if host == STORAGE:
            s3 = f"INITIAL_NO_AUTH_ACTION_COUNT=1000000000 {python} -m moto.server -H {address} -p 9000 2>/dev/null"
            # MLflow's own jobs (evaluation by judges) take seven more processes.
            mlflow = f"MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false {python} -m mlflow server --host {address}"
            mlflow += " --port 5000 --workers 1"
            stores = "--backend-store-uri sqlite:////tmp/mlflow.db --artifacts-destination s3://mlflow"
            return ["bash", "-c", f"{s3} & {mlflow} {stores} & wait -n"]
        ray = [python, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
        ray += [f"--node-ip-address={address}", f"--num-cpus={self.cpus}", "--object-store-memory=200000000"]
        ray += [f"--{name}={port}" for port, name in enumerate(AGENT_PORTS, 9101)]  # a node waits 15 s for others
        if host == self.hosts[0]:
            return [*ray, "--head", "--port=6379", "--dashboard-host=0.0.0.0"]
        return [*ray, f"--address={self.head.address}"]

    def start(self, host: str) -> None:
        """Start a host with an empty disk, and plug in its cable."""
        if find_init(self.folder, host):
            raise ClusterError(f"{host} runs already: kill it first")
        init = spawn(self.folder, host, self.address(host), self.service(host), self.environment())
        switch = require_init(self.folder, STORAGE)
        with suppress(ClusterError):  # the link of a host that died: the kernel removes it too, but some time later
            inside(switch, f"ip link delete {host}")
        sh(f"ip link add eth0 netns {init} type veth peer name {host} netns {switch}")
        inside(switch, f"ip link set {host} master eth0 up")

    def kill(self, host: str) -> None:
        """Kill every process of a host at once; its disk is gone."""
        init = require_init(self.folder, host)
        os.kill(init, signal.SIGKILL)
        wait_until(lambda: not find_init(self.folder, host), f"{host} to die", 30)

    def cut(self, host: str) -> None:
        """Unplug a host's cable: its processes keep running, but no one can reach it."""
        require_init(self.folder, host)
        inside(require_init(self.folder, STORAGE), f"ip link set {host} down")

    def heal(self, host: str) -> None:
        """Plug a host's cable in again."""
        require_init(self.folder, host)
        inside(require_init(self.folder, STORAGE), f"ip link set {host} up")

    def command(self, host: str, *command: str) -> list[str]:
        """The command line that runs a command on a host, in this checkout's folder. Give it `environment()`."""
        enter = ["nsenter", "--target", str(require_init(self.folder, host)), "--all"]
        return [*enter, "sh", "-c", 'cd "$0" && exec "$@"', str(ROOT), *command]

    def submit_command(self, *entrypoint: str) -> list[str]:
        """The command line that submits a job from the head node and follows its log."""
        return self.command(self.hosts[0], *self.head.submit_command(*entrypoint))

    def nodes(self) -> dict[str, bool]:
        """Whether Ray counts each host as alive, by name; a host that joined again is there once."""
        request = urllib.request.Request(
            f"{self.head.dashboard}/nodes?view=summary", headers={"Authorization": f"Bearer {self.token}"}
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            summary = json.load(answer)["data"]["summary"]
        alive = {n["raylet"].get("nodeManagerAddress") for n in summary if n["raylet"].get("state") == "ALIVE"}
        return {host: self.address(host) in alive for host in self.hosts}

    def require_alive(self, *hosts: str, seconds: float = START_SECONDS) -> None:
        """Wait until Ray counts these hosts as alive."""

        def alive() -> bool:
            with suppress(OSError):
                nodes = self.nodes()
                return all(nodes[host] for host in hosts)
            return False

        wait_until(alive, f"Ray on {', '.join(hosts)} (logs: {self.folder}/*.log)", seconds)


def up(folder: str, hosts: int, cpus: int, dead_after: float) -> LocalCluster:
    """Start a cluster and wait until it accepts jobs. If it raises ClusterError, only the logs are left behind."""
    require_tools()
    if Path(folder).exists():
        raise ClusterError(f"{folder} holds a cluster already: end it (down), or give another --folder")
    try:
        return _up(folder, tuple(f"host{n}" for n in range(1, hosts + 1)), cpus, dead_after)
    except BaseException:
        down(folder, keep_logs=True)
        raise


def _up(folder: str, hosts: tuple[str, ...], cpus: int, dead_after: float) -> LocalCluster:
    Path(folder).mkdir(parents=True, mode=0o700)
    Path(folder, "hosts").touch()
    # Two clusters may choose the same network at the same time: the uplink's name decides which of them has it.
    network = free_network()
    cluster = LocalCluster(folder, network, secrets.token_hex(32), hosts, cpus, dead_after)
    names = [f"{cluster.address(host)} {host}" for host in (STORAGE, *hosts)]
    Path(folder, "hosts").write_text("\n".join(["127.0.0.1 localhost", *names]) + "\n")
    _write_private(Path(folder, "cluster.json"), json.dumps(asdict(cluster)))
    switch = spawn(folder, STORAGE, cluster.address(STORAGE), cluster.service(STORAGE), cluster.environment())
    uplink = f"clcr{network.split('.')[2]}"
    sh(f"ip link add {uplink} type veth peer name uplink netns {switch}")  # fails if another cluster was faster
    sh(f"ip address add {network}.254/24 dev {uplink}")
    sh(f"ip link set {uplink} up")
    # The switch is the storage host's eth0: its init gives it the host's address.
    inside(switch, "ip link add eth0 type bridge")
    inside(switch, "ip link set uplink master eth0 up")
    for host in hosts:
        cluster.start(host)
    wait_until(lambda: answers(cluster.s3), "the S3 server")
    for bucket in ("data", "mlflow"):
        put(cluster, None, f"s3://{bucket}")
    wait_until(lambda: answers(f"{cluster.mlflow}/health"), "the MLflow server")
    cluster.require_alive(*hosts)
    agent = f"http://{cluster.address(hosts[0])}:52365/api/local_raylet_healthz"  # it starts the jobs
    wait_until(lambda: answers(agent, cluster.token), "the head node's agent")
    return cluster


def down(folder: str, keep_logs: bool = False) -> None:
    """Kill every process of a cluster and remove its folder, whatever state the cluster is in."""
    for process, _ in host_processes(folder):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    wait_until(lambda: not any(host_processes(folder)), "the hosts to die", 30)
    with suppress(OSError, ValueError, KeyError):
        network = json.loads(Path(folder, "cluster.json").read_text())["network"]
        uplink = Path(f"/sys/class/net/clcr{network.split('.')[2]}")
        with suppress(ClusterError):  # the kernel removes it some time after the storage host
            wait_until(lambda: not uplink.exists(), "the network to go", 15)
    if not keep_logs:
        shutil.rmtree(folder, ignore_errors=True)


def load(folder: str) -> LocalCluster:
    """The cluster whose folder this is. Raises ClusterError if none is running."""
    try:
        fields = json.loads(Path(folder, "cluster.json").read_text())
    except FileNotFoundError:
        raise ClusterError(f"no cluster in {folder}: start one (up), or give its --folder") from None
    return LocalCluster(**{**fields, "hosts": tuple(fields["hosts"])})


def put(cluster: LocalCluster, source: str | None, target: str) -> None:
    """Copy a local folder to the cluster's S3 server; without a source, only create the bucket.

    Raises ClusterError if the source is no folder.
    """
    if source is not None and not os.path.isdir(source):
        raise ClusterError(f"{source} is not a folder: name the folder to copy")
    query = f"scheme=http&endpoint_override={cluster.address(STORAGE)}:9000&allow_bucket_creation=true"
    fs, path = open_fs(f"s3://local:local@{target.removeprefix('s3://')}?{query}")
    fs.create_dir(path, recursive=True)
    if source is not None:
        pafs.copy_files(os.path.abspath(source), path, destination_filesystem=fs)


def answers(url: str, token: str = "") -> bool:
    """Whether a server answers at this address now."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    with suppress(OSError), urllib.request.urlopen(request, timeout=5):
        return True
    return False


def _write_private(path: Path, text: str) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)


Folder = Annotated[str, tyro.conf.arg(help="the cluster's folder: its token and its logs")]
Host = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="HOST", help="host1, host2, ...")]
Word = Annotated[str, tyro.conf.Positional]
Command = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="-- COMMAND", help="what to run")]


def up_command(hosts: int = 3, cpus: int = 1, dead_after: float = 15.0, folder: Folder = FOLDER) -> int:
    """Start a cluster: how many hosts, CPUs of each host, and seconds of silence after which a host counts as dead."""
    if hosts < 1 or cpus < 1 or dead_after < 6:
        raise ClusterError("--hosts and --cpus must be 1 or more, --dead-after 6 or more")
    cluster = up(os.path.abspath(folder), hosts, cpus, dead_after)
    print(f"{hosts} hosts are up. Ray: {cluster.head.dashboard}  MLflow: {cluster.mlflow}  S3: {cluster.s3}")
    return 0


def down_command(folder: Folder = FOLDER) -> int:
    """Stop the cluster and remove its processes, network and files."""
    down(os.path.abspath(folder))
    return 0


def status_command(folder: Folder = FOLDER) -> int:
    """Print each host's address, whether it is up, and whether Ray counts it as alive."""
    cluster = load(os.path.abspath(folder))
    nodes: dict[str, bool] = {}
    with suppress(OSError):  # Ray dies with its head node
        nodes = cluster.nodes()
    for host in cluster.hosts:
        running = "up" if find_init(cluster.folder, host) else "down"
        print(f"{host} {cluster.address(host)} {running}, {'alive' if nodes.get(host) else 'dead'} to Ray")
    if not nodes:
        raise ClusterError(f"Ray's head node {cluster.hosts[0]} does not answer (log: {folder}/{cluster.hosts[0]}.log)")
    return 0


def env_command(folder: Folder = FOLDER) -> int:
    """Print the environment with which programs on this machine reach the cluster, for the shell's `eval`."""
    cluster = load(os.path.abspath(folder))
    access = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": cluster.token}
    address = {"RAY_API_SERVER_ADDRESS": cluster.head.dashboard}
    print("export", *(f"{name}={value}" for name, value in (cluster.client_environment() | access | address).items()))
    return 0


def put_command(source: Word, target: Word, folder: Folder = FOLDER) -> int:
    """Copy a folder to the cluster's S3 server: put corpus s3://data/corpus."""
    put(load(os.path.abspath(folder)), source, target)
    return 0


def submit_command(command: Command, folder: Folder = FOLDER) -> int:
    """Submit a job from the head node and follow its log: submit -- python pipelines/extract.py ..."""
    cluster = load(os.path.abspath(folder))
    return subprocess.run(cluster.submit_command(*_given(command)), env=cluster.environment()).returncode


def run_command(host: Host, command: Command, folder: Folder = FOLDER) -> int:
    """Run a command on a host: run host2 -- ls /tmp."""
    cluster = load(os.path.abspath(folder))
    return subprocess.run(cluster.command(host, *_given(command)), env=cluster.environment()).returncode


def on_host(act: Callable[[LocalCluster, str], None]) -> Callable[..., int]:
    """The command that applies an action to a host."""

    def command(host: Host, folder: Folder = FOLDER) -> int:
        cluster = load(os.path.abspath(folder))
        if host not in cluster.hosts:
            raise ClusterError(f"{host}: the hosts are {', '.join(cluster.hosts)}")
        act(cluster, host)
        return 0

    command.__doc__ = act.__doc__
    return command


def _given(command: tuple[str, ...]) -> tuple[str, ...]:
    if not command:
        raise ClusterError("no command: give it after --")
    return command


COMMANDS: dict[str, Callable[..., int]] = {
    "up": up_command,
    "down": down_command,
    "status": status_command,
    "put": put_command,
    "submit": submit_command,
    "run": run_command,
    "env": env_command,
    **{
        act.__name__: on_host(act)
        for act in (LocalCluster.kill, LocalCluster.start, LocalCluster.cut, LocalCluster.heal)
    },
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. An error is printed in one line."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `up` cleans up
    try:
        return tyro.extras.subcommand_cli_from_dict(
            COMMANDS, args=arguments, prog="python -m infra.local_cluster", description=__doc__.partition("\n")[0]
        )
    except (ClusterError, FeaturesError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
