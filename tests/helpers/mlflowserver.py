"""A real MLflow server in a process of its own, with its database and artifacts in a folder; and one that refuses."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from mlflow.exceptions import RestException

from infra.head import answers, free_ports

TRIES = 3  # of a port that another process may take before the server does


@contextlib.contextmanager
def server(folder: Path) -> Iterator[int]:
    """The port of a fresh server on this machine; it dies with the block."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        f"{folder}/artifacts",
    ]
    for _ in range(TRIES):
        port = free_ports(1)[0]
        with open(folder / "server.log", "w") as log:
            process = subprocess.Popen([*command, "--port", str(port)], stdout=log, stderr=log)
        try:
            if answers(f"http://127.0.0.1:{port}/health", process, seconds=300):
                yield port
                return
        finally:
            process.terminate()  # and not kill: its worker processes end with it
            process.wait()
    raise RuntimeError((folder / "server.log").read_text()[-2000:])


class Refusing:
    """A client of a tracking server that takes nothing any more."""

    def __init__(self, client):
        self.client = client

    def __getattr__(self, name):
        if name.startswith("log_"):
            raise RestException({"error_code": "PERMISSION_DENIED", "message": "read only"})
        return getattr(self.client, name)
