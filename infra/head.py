"""A private Ray head node on this machine for as long as a `with` block: the demo and the tests submit jobs to it.

It has its own ports, session folder and token, so it never interferes with another Ray on the machine. When it ends, so
do all processes that it started.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
CHECKOUT = (ROOT / "pyproject.toml").is_file()  # else an installed package, which the jobs have already
GRACE = 5.0  # seconds to end by itself: while an actor outlives its job, as some of Ray Train's do, Ray would take more
AGENT_PORTS = ("dashboard-agent-grpc-port", "metrics-export-port", "runtime-env-agent-port")


@dataclass(frozen=True)
class Head:
    """A running head node.

    dashboard: the address to submit jobs to. address: the address that drivers join. env: the environment that a client
    needs, with the token.
    """

    dashboard: str
    address: str
    env: Mapping[str, str]

    def submit(self, *entrypoint: str, env: Mapping[str, str] | None = None) -> int:
        """Run `ray job submit`, with this checkout if it is one; prints the job's log and returns its exit code."""
        return subprocess.run(self.submit_command(*entrypoint), env={**self.env, **(env or {})}, cwd=ROOT).returncode

    def submit_command(self, *entrypoint: str) -> Sequence[str]:
        """The command line that `submit` runs."""
        code = ["--working-dir", "."] if CHECKOUT else []
        return [program("ray"), "job", "submit", "--address", self.dashboard, *code, "--", *entrypoint]


@contextmanager
def local_head(cpus: int | None = None, env: Mapping[str, str] | None = None) -> Iterator[Head]:
    """Start a head node; at the end of the block, stop it and every process that it started."""
    port, dashboard, client, agent, *others = free_ports(7)
    session = tempfile.mkdtemp(prefix="ray-")
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        **(env or {}),
    }
    environment.pop("RAY_ADDRESS", None)
    command = [program("ray"), "start", "--head", "--block", "--disable-usage-stats", f"--port={port}"]
    command += [f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}", f"--temp-dir={session}"]
    # The agent starts the jobs. Without a port of its own it fails if another Ray on this machine has the default one.
    command += [f"--dashboard-agent-listen-port={agent}", *([f"--num-cpus={cpus}"] if cpus else [])]
    # A node that is given all of its agents' ports does not wait for them to choose; else it gives up after 15 s.
    command += [f"--{name}={port}" for name, port in zip(AGENT_PORTS, others, strict=True)]
    with open(Path(session) / "start.log", "wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{dashboard}"
        for ready in (f"{url}/api/version", f"http://127.0.0.1:{agent}/api/local_raylet_healthz"):
            if not answers(ready, process, environment["RAY_AUTH_TOKEN"]):
                log_text = (Path(session) / "start.log").read_text()
                raise RuntimeError(f"the Ray head node did not start:\n{log_text[-2000:]}")
        yield Head(url, f"127.0.0.1:{port}", environment)
    finally:
        _stop(process, session)


def answers(url: str, process: subprocess.Popen, token: str = "", seconds: float = 90) -> bool:
    """Wait until a server answers; False if its process ended or `seconds` have passed."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        # Where another process took the port, what it answers may be no HTTP; the server will end.
        with suppress(OSError, HTTPException), urllib.request.urlopen(request, timeout=2):
            return True
        time.sleep(0.3)
    return False


def _stop(process: subprocess.Popen, session: str) -> None:
    """Stop the head and every process of its session, also those in process groups of their own."""
    ours = _session_processes(session) + ([psutil.Process(process.pid)] if process.poll() is None else [])
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=GRACE)
    for left in {*ours, *_session_processes(session)}:
        with suppress(psutil.NoSuchProcess):
            left.kill()
    psutil.wait_procs(ours, timeout=10)
    shutil.rmtree(session, ignore_errors=True)


def _session_processes(session: str) -> list[psutil.Process]:
    """Every process that Ray started for this session, with its descendants."""
    processes: list[psutil.Process] = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if any(session in argument for argument in process.cmdline()) and process.pid != os.getpid():
                processes += [process, *process.children(recursive=True)]
    return processes


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nothing listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def program(name: str) -> str:
    """The path of a program of the running Python, whatever PATH says; by PATH where it lies elsewhere (pip --user)."""
    own = Path(sys.executable).with_name(name)
    return str(own) if own.is_file() else shutil.which(name) or name


def job(script: str) -> list[str]:
    """How a job is started: its file in a checkout, the command of an installed package."""
    return ["python", script] if CHECKOUT else [f"clcr-{Path(script).stem}"]
