"""Several hosts on one machine: each is a set of Linux namespaces with a network cable that can be unplugged.

A host has its own network stack and address, name, processes, shared memory, /tmp and home folder. It sees the rest of
the machine's disk read-only, like the image that it was installed from, and writes to its own /dev/shm/disk. When its
first process is killed, every process of the host is killed at once and its disk is gone.

Nothing of a host outlives its processes. Their command lines name the folder of their cluster, so they can be found
even if the program that started them is gone. Needs root, and Debian's iproute2.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

START_SECONDS = 240.0
MARK = "clcr-host"  # stands in the command line of a host's first process, before the cluster's folder and its name
# The script of a host's first process: sets the host up, waits for its cable, then keeps its service running.
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
    """The cluster cannot do what was asked of it; the message says what to do."""


def require_tools() -> None:
    """Raise ClusterError if this machine lacks root rights or a tool."""
    if os.geteuid():
        raise ClusterError("hosts are made of namespaces, which needs root: run it with sudo")
    packages = {"ip": "iproute2", "nsenter": "util-linux", "unshare": "util-linux", "findmnt": "util-linux"}
    if missing := sorted({package for tool, package in packages.items() if not shutil.which(tool)}):
        raise ClusterError(f"{', '.join(missing)} is missing: apt-get install {' '.join(missing)}")


def free_network() -> str:
    """A network that no interface of this machine belongs to."""
    taken = {link.name for link in Path("/sys/class/net").iterdir()}
    addresses = [a.address for links in psutil.net_if_addrs().values() for a in links]
    for number in range(256):
        network = f"10.77.{number}"
        if f"clcr{number}" not in taken and not any(a.startswith(f"{network}.") for a in addresses):
            return network
    raise ClusterError("no network left in 10.77.0.0/16")


def spawn(folder: str, host: str, address: str, service: Sequence[str], environment: Mapping[str, str]) -> int:
    """Start a host's first process, which waits for its eth0; returns the process id."""
    namespaces = ["unshare", "--net", "--mount", "--uts", "--ipc", "--pid", "--mount-proc", "--fork", "--kill-child"]
    command = [*namespaces, "bash", "-c", INIT, MARK, folder, host, address, *service]
    with open(Path(folder, f"{host}.log"), "ab") as log:
        process = subprocess.Popen(
            command, env=dict(environment), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    wait_until(lambda: find_init(folder, host) or process.poll() is not None, f"{host} to start", 30)
    return require_init(folder, host)


def host_processes(folder: str) -> Iterator[tuple[psutil.Process, str]]:
    """The processes that keep the hosts of a cluster up, with the hosts' names: `unshare` and its first child."""
    for process in psutil.process_iter():
        with suppress(psutil.Error, ValueError, IndexError):
            words = process.cmdline()
            at = words.index(MARK)
            if words[at + 1] == folder and process.status() != psutil.STATUS_ZOMBIE:
                yield process, words[at + 2]


def find_init(folder: str, host: str) -> int | None:
    """The id, on this machine, of the process that has id 1 on a host; None if the host is down."""
    for process, name in host_processes(folder):
        if name == host:
            with suppress(OSError):
                status = Path(f"/proc/{process.pid}/status").read_text()
                numbers = next(line for line in status.splitlines() if line.startswith("NSpid:")).split()[1:]
                if len(numbers) > 1 and numbers[-1] == "1":
                    return process.pid
    return None


def require_init(folder: str, host: str) -> int:
    """Like `find_init`, but raises ClusterError if the host is down."""
    if init := find_init(folder, host):
        return init
    raise ClusterError(f"{host} is not up (log: {folder}/{host}.log)")


def inside(init: int, command: str) -> None:
    """Run a command in a host's network."""
    sh(f"nsenter --target {init} --net {command}")


def sh(command: str) -> None:
    """Run a command; if it fails, raises ClusterError with its error output."""
    done = subprocess.run(command.split(), capture_output=True, text=True)
    if done.returncode:
        raise ClusterError(f"{command}: {done.stderr.strip()}")


def wait_until(condition: Callable[[], Any], what: str, seconds: float = START_SECONDS) -> None:
    """Wait until a condition holds; raises ClusterError if it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise ClusterError(f"gave up after waiting {seconds:.0f} s for {what}")
        time.sleep(0.2)
