"""A real MLflow server in a process of its own, with its database and artifacts in a folder."""

import contextlib
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from infra.head import free_ports


@contextlib.contextmanager
def server(folder: Path) -> Iterator[int]:
    """The port of a fresh server on this machine; it dies with the block."""
    port = free_ports(1)[0]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    places = ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", f"{folder}/artifacts"]
    with open(folder / "server.log", "w") as log:
        process = subprocess.Popen([*command, *places], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 300
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((folder / "server.log").read_text()[-2000:])
            time.sleep(0.2)
        yield port
    finally:
        process.terminate()  # and not kill: its worker processes end with it
        process.wait()
