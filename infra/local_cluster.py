"""Several hosts on one machine, for tests and for trying out what a cluster does when it loses one.

    python -m infra.local_cluster up --hosts 3 --cpus 2
    python -m infra.local_cluster put corpus s3://data/corpus
    python -m infra.local_cluster submit -- python pipelines/extract.py --corpus s3://data/corpus/corpus.csv ...
    python -m infra.local_cluster kill host2            # and: start, cut, heal, run HOST -- COMMAND, status, down

A host is a set of Linux namespaces: it has its own network stack and address, name, processes, shared memory, /tmp and
home folder, and sees the rest of the machine's disk read-only, as an image that it was installed from. All that it
writes is in its /dev/shm/disk. Its first process holds it together: when that is killed, so is everything on the host,
at once, and its disk is gone. Cables (veth pairs) lead to a switch (a bridge) on one more host, named storage, with an
S3 server and an MLflow server. host1 is the head node; what joins the cluster needs its token.

Nothing outlives its processes, and these carry the cluster's folder in their command line: `down` finds them whatever
happened to `up`. Needs root, and Debian's iproute2.
"""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import psutil
import pyarrow.fs as pafs
import tyro

from features.errors import FeaturesError
from features.files import open_fs
from infra.head import ROOT, Head

MARK = "clcr-host"  # in the command line of every host's first process, before the cluster's folder and the host's name
STORAGE = "storage"
START_SECONDS = 240.0
FOLDER = Path(tempfile.gettempdir()) / "clcr-cluster"
# A host's first process: makes the host what it is, waits for its cable, then keeps its service running.
INIT = """
set -eu
folder=$1 name=$2 address=$3; shift 3
hostname "$name"
for mount in $(findmnt -rno TARGET -t ext4,xfs,btrfs,zfs,overlay,virtiofs); do
  mount -o remount,bind,ro "$mount"
done
mount --bind "$folder/hosts" /etc/hosts
mount -t tmpfs tmpfs /dev/shm
mkdir /dev/shm/disk /dev/shm/work
mount -t overlay overlay -o lowerdir=/tmp,upperdir=/dev/shm/disk,workdir=/dev/shm/work /tmp
mkdir -p "$HOME"
ip link set lo up
until ip link set eth0 up 2>/dev/null; do sleep 0.1; done
ip address add "$address/24" dev eth0
while true; do "$@" || true; sleep 1; done
"""


class ClusterError(Exception):
    """The cluster cannot do what it was asked to; the message says what to do."""


@dataclass(frozen=True)
class LocalCluster:
    """A running cluster, as its folder tells it.

    network: the first three numbers of every address. token: what lets clients in. cpus: what each host offers to Ray.
    dead_after: seconds without an answer until a host counts as dead.
    """

    folder: str
    network: str
    token: str
    hosts: tuple[str, ...]
    cpus: int
    dead_after: float

    @property
    def s3(self) -> str:
        """What AWS_ENDPOINT_URL takes."""
        return f"http://{self.address(STORAGE)}:9000"

    @property
    def mlflow(self) -> str:
        """What MLFLOW_TRACKING_URI takes."""
        return f"http://{self.address(STORAGE)}:5000"

    @property
    def head(self) -> Head:
        """Where jobs are submitted to."""
        address = self.address(self.hosts[0])
        return Head(f"http://{address}:8265", f"{address}:6379", self.environment())

    def address(self, host: str) -> str:
        """A host's address; the machine itself, as a station on the same network, has .254."""
        return f"{self.network}.{1 if host == STORAGE else 11 + self.hosts.index(host)}"

    def environment(self) -> dict[str, str]:
        """What processes on a host, and clients, have in their environment."""
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
            **self.client_environment(),
        }

    def client_environment(self) -> dict[str, str]:
        """What reaches the cluster's storage and tracking server."""
        return {
            "AWS_ENDPOINT_URL": self.s3,
            "AWS_ACCESS_KEY_ID": "local",
            "AWS_SECRET_ACCESS_KEY": "local",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "MLFLOW_TRACKING_URI": self.mlflow,
        }

    def service(self, host: str) -> list[str]:
        """What a host runs for as long as it is up."""
        python, address = sys.executable, self.address(host)
        if host == STORAGE:
            s3 = f"INITIAL_NO_AUTH_ACTION_COUNT=1000000000 {python} -m moto.server -H {address} -p 9000 2>/dev/null"
            mlflow = f"{python} -m mlflow server --host {address} --port 5000 --workers 1"
            stores = "--backend-store-uri sqlite:////tmp/mlflow.db --artifacts-destination s3://mlflow"
            return ["bash", "-c", f"{s3} & {mlflow} {stores} & wait -n"]
        ray = [python, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
        ray += [f"--node-ip-address={address}", f"--num-cpus={self.cpus}", "--object-store-memory=200000000"]
        if host == self.hosts[0]:
            return [*ray, "--head", "--port=6379", "--dashboard-host=0.0.0.0"]
        return [*ray, f"--address={self.head.address}"]

    def start(self, host: str) -> None:
        """Boot a host, with an empty disk, and plug it in. Raises ClusterError when it runs already."""
        if find_init(self.folder, host):
            raise ClusterError(f"{host} runs already: kill it first")
        init = spawn(self.folder, host, self.address(host), self.service(host), self.environment())
        switch = require_init(self.folder, STORAGE)
        sh(f"ip link add eth0 netns {init} type veth peer name {host} netns {switch}")
        inside(switch, f"ip link set {host} master eth0 up")

    def kill(self, host: str) -> None:
        """Every process of a host dies at once, and its disk is gone."""
        init = require_init(self.folder, host)
        os.kill(init, signal.SIGKILL)
        wait_until(lambda: not find_init(self.folder, host), f"{host} to die", 30)

    def cut(self, host: str) -> None:
        """Pull a host's cable: its processes live on, and nobody hears of it."""
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
        """The command line that submits a job from the head node, and follows it."""
        return self.command(self.hosts[0], *self.head.submit_command(*entrypoint))

    def nodes(self) -> dict[str, bool]:
        """Whether Ray counts each host as alive, by name; a host that joined again is there once."""
        request = urllib.request.Request(
            f"{self.head.dashboard}/nodes?view=summary", headers={"Authorization": f"Bearer {self.token}"}
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            summary = json.load(answer)["data"]["summary"]
        alive = {n["hostname"] for n in summary if n["raylet"].get("state") == "ALIVE"}
        return {host: host in alive for host in self.hosts}

    def require_alive(self, *hosts: str, seconds: float = START_SECONDS) -> None:
        """Wait until Ray counts these hosts as alive."""

        def alive() -> bool:
            with suppress(OSError):
                nodes = self.nodes()
                return all(nodes[host] for host in hosts)
            return False

        wait_until(alive, f"Ray on {', '.join(hosts)} (logs: {self.folder}/*.log)", seconds)


def up(folder: str, hosts: int, cpus: int, dead_after: float) -> LocalCluster:
    """Start a cluster and wait until it takes jobs. Raises ClusterError, with nothing left behind."""
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
    # The network's number is not known yet: the switch starts with it, and who may have it is found out by its uplink.
    network = free_network()
    cluster = LocalCluster(folder, network, secrets.token_hex(32), hosts, cpus, dead_after)
    names = [f"{cluster.address(host)} {host}" for host in (STORAGE, *hosts)]
    Path(folder, "hosts").write_text("\n".join(["127.0.0.1 localhost", *names]) + "\n")
    _write_private(Path(folder, "cluster.json"), json.dumps(asdict(cluster)))
    switch = spawn(folder, STORAGE, cluster.address(STORAGE), cluster.service(STORAGE), cluster.environment())
    uplink = f"clcr{network.split('.')[2]}"
    sh(f"ip link add {uplink} type veth peer name uplink netns {switch}")  # fails where another cluster was faster
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
    """Kill every process of a cluster and remove its folder, whatever state it is in."""
    for process, _ in host_processes(folder):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    wait_until(lambda: not any(host_processes(folder)), "the hosts to die", 30)
    with suppress(OSError, ValueError, KeyError):
        network = json.loads(Path(folder, "cluster.json").read_text())["network"]
        uplink = Path(f"/sys/class/net/clcr{network.split('.')[2]}")
        with suppress(ClusterError):  # the kernel takes it away with the storage host, some time later
            wait_until(lambda: not uplink.exists(), "the network to go", 15)
    if not keep_logs:
        shutil.rmtree(folder, ignore_errors=True)


def load(folder: str) -> LocalCluster:
    """The cluster of a folder. Raises ClusterError where none runs."""
    try:
        fields = json.loads(Path(folder, "cluster.json").read_text())
    except FileNotFoundError:
        raise ClusterError(f"no cluster in {folder}: start one (up), or give its --folder") from None
    return LocalCluster(**{**fields, "hosts": tuple(fields["hosts"])})


def put(cluster: LocalCluster, source: str | None, target: str) -> None:
    """Copy a local folder to the cluster's S3 server; no source only makes the bucket."""
    query = f"scheme=http&endpoint_override={cluster.address(STORAGE)}:9000&allow_bucket_creation=true"
    fs, path = open_fs(f"s3://local:local@{target.removeprefix('s3://')}?{query}")
    fs.create_dir(path, recursive=True)
    if source is not None:
        pafs.copy_files(os.path.abspath(source), path, destination_filesystem=fs)


def require_tools() -> None:
    """Raise ClusterError for what this machine lacks."""
    if os.geteuid():
        raise ClusterError("hosts are made of namespaces, which needs root: run it with sudo")
    packages = {"ip": "iproute2", "nsenter": "util-linux", "unshare": "util-linux", "findmnt": "util-linux"}
    if missing := sorted({package for tool, package in packages.items() if not shutil.which(tool)}):
        raise ClusterError(f"{', '.join(missing)} is missing: apt-get install {' '.join(missing)}")


def free_network() -> str:
    """A network that no interface of this machine is on."""
    taken = {link.name for link in Path("/sys/class/net").iterdir()}
    addresses = [a.address for links in psutil.net_if_addrs().values() for a in links]
    for number in range(256):
        network = f"10.77.{number}"
        if f"clcr{number}" not in taken and not any(a.startswith(f"{network}.") for a in addresses):
            return network
    raise ClusterError("no network left in 10.77.0.0/16")


def spawn(folder: str, host: str, address: str, service: Sequence[str], environment: Mapping[str, str]) -> int:
    """Start a host's first process, which waits for an eth0; returns its process id."""
    namespaces = ["unshare", "--net", "--mount", "--uts", "--ipc", "--pid", "--mount-proc", "--fork", "--kill-child"]
    command = [*namespaces, "bash", "-c", INIT, MARK, folder, host, address, *service]
    with open(Path(folder, f"{host}.log"), "ab") as log:
        process = subprocess.Popen(
            command, env=dict(environment), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    wait_until(lambda: find_init(folder, host) or process.poll() is not None, f"{host} to start", 30)
    return require_init(folder, host)


def host_processes(folder: str) -> Iterator[tuple[psutil.Process, str]]:
    """What holds the hosts of a cluster together, with their names: `unshare`, and below it the first process."""
    for process in psutil.process_iter():
        with suppress(psutil.Error, ValueError, IndexError):
            words = process.cmdline()
            at = words.index(MARK)
            if words[at + 1] == folder and process.status() != psutil.STATUS_ZOMBIE:
                yield process, words[at + 2]


def find_init(folder: str, host: str) -> int | None:
    """The process that is number 1 on a host."""
    for process, name in host_processes(folder):
        if name == host:
            with suppress(OSError):
                status = Path(f"/proc/{process.pid}/status").read_text()
                numbers = next(line for line in status.splitlines() if line.startswith("NSpid:")).split()[1:]
                if len(numbers) > 1 and numbers[-1] == "1":
                    return process.pid
    return None


def require_init(folder: str, host: str) -> int:
    """The same; raises ClusterError where the host is not up."""
    if init := find_init(folder, host):
        return init
    raise ClusterError(f"{host} is not up (log: {folder}/{host}.log)")


def inside(init: int, command: str) -> None:
    """Run a command in a host's network."""
    sh(f"nsenter --target {init} --net {command}")


def sh(command: str) -> None:
    """Run a command; raises ClusterError with what it said."""
    done = subprocess.run(command.split(), capture_output=True, text=True)
    if done.returncode:
        raise ClusterError(f"{command}: {done.stderr.strip()}")


def answers(url: str, token: str = "") -> bool:
    """Whether a page is there."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    with suppress(OSError), urllib.request.urlopen(request, timeout=5):
        return True
    return False


def wait_until(condition: Callable[[], Any], what: str, seconds: float = START_SECONDS) -> None:
    """Raises ClusterError when it does not come true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise ClusterError(f"waited {seconds:.0f} s for {what} in vain")
        time.sleep(0.2)


def _write_private(path: Path, text: str) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)


Folder = Annotated[str, tyro.conf.arg(help="the cluster's folder: its token, logs and lock")]
Host = Annotated[str, tyro.conf.Positional]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. What follows `--` is the command to run or submit."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    at = words.index("--") if "--" in words else len(words)
    words, command = words[:at], words[at + 1 :]

    def up_(hosts: int = 3, cpus: int = 1, dead_after: float = 15.0, folder: Folder = str(FOLDER)) -> int:
        """Start a cluster of so many hosts, each offering so many CPUs; silent for dead_after seconds = dead."""
        if min(hosts, cpus, dead_after) < 1:
            raise ClusterError("--hosts, --cpus and --dead-after: must be 1 or more")
        cluster = up(os.path.abspath(folder), hosts, cpus, dead_after)
        print(f"{hosts} hosts are up. Ray: {cluster.head.dashboard}  MLflow: {cluster.mlflow}  S3: {cluster.s3}")
        return 0

    def down_(folder: Folder = str(FOLDER)) -> int:
        """End the cluster: no process, network or file of it is left."""
        down(os.path.abspath(folder))
        return 0

    def status(folder: Folder = str(FOLDER)) -> int:
        """Each host: whether it is up, and whether Ray counts it as alive."""
        cluster = load(os.path.abspath(folder))
        nodes = cluster.nodes()
        for host in cluster.hosts:
            running = "up" if find_init(cluster.folder, host) else "down"
            print(f"{host} {cluster.address(host)} {running}, {'alive' if nodes[host] else 'dead'} to Ray")
        return 0

    def on_host(verb: str) -> Callable[..., int]:
        def act(host: Host, folder: Folder = str(FOLDER)) -> int:
            cluster = load(os.path.abspath(folder))
            if host not in cluster.hosts:
                raise ClusterError(f"{host}: the hosts are {', '.join(cluster.hosts)}")
            getattr(cluster, verb)(host)
            return 0

        act.__doc__ = getattr(LocalCluster, verb).__doc__
        return act

    def env(folder: Folder = str(FOLDER)) -> int:
        """What programs on this machine need to reach the cluster: eval "$(python -m infra.local_cluster env)"."""
        cluster = load(os.path.abspath(folder))
        access = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": cluster.token}
        address = {"RAY_API_SERVER_ADDRESS": cluster.head.dashboard}
        print("export", *(f"{k}={v}" for k, v in (cluster.client_environment() | access | address).items()))
        return 0

    def put_(source: Host, target: Host, folder: Folder = str(FOLDER)) -> int:
        """Copy a local folder to the S3 server: put corpus s3://data/corpus."""
        put(load(os.path.abspath(folder)), source, target)
        return 0

    def submit(folder: Folder = str(FOLDER)) -> int:
        """Submit a job from the head node and follow it: submit -- python pipelines/extract.py ..."""
        cluster = load(os.path.abspath(folder))
        return subprocess.run(cluster.submit_command(*require(command)), env=cluster.environment()).returncode

    def run(host: Host, folder: Folder = str(FOLDER)) -> int:
        """Run a command on a host: run host2 -- ls /tmp"""
        cluster = load(os.path.abspath(folder))
        return subprocess.run(cluster.command(host, *require(command)), env=cluster.environment()).returncode

    def require(command: list[str]) -> list[str]:
        if not command:
            raise ClusterError("no command: give it after --")
        return command

    commands = {"up": up_, "down": down_, "status": status, "env": env, "put": put_, "submit": submit, "run": run}
    commands |= {verb: on_host(verb) for verb in ("kill", "start", "cut", "heal")}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that an interrupted `up` cleans up
    try:
        return tyro.extras.subcommand_cli_from_dict(
            commands, args=words, prog="python -m infra.local_cluster", description=__doc__.partition("\n")[0]
        )
    except (ClusterError, FeaturesError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
