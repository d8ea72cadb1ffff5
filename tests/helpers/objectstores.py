"""Servers of the other object stores, each in a process of its own: GCS's emulator, and Azurite where it is installed.

with gcs() as bucket:
    open_fs(bucket("folder"))
"""

import base64
import contextlib
import hashlib
import hmac
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from urllib.parse import urlencode

from infra.head import free_ports

AZURITE = shutil.which("azurite")  # npm install -g azurite
ACCOUNT = "devstoreaccount1"  # of every Azurite, with this key; both are in its documentation
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
Bucket = Callable[[str], str]  # a path in the bucket as a URI


# One request at a time, as the emulator has it, waits for ever where a client reads two ranges at once.
GCS = """
import http.server, sys
http.server.HTTPServer = http.server.ThreadingHTTPServer
from gcp_storage_emulator.server import create_server
create_server("127.0.0.1", int(sys.argv[1]), in_memory=True, default_bucket="bucket").run()
"""


@contextlib.contextmanager
def gcs() -> Iterator[Bucket]:
    """A fresh GCS server with one bucket; it dies with the block."""
    (port,) = free_ports(1)
    query = urlencode({"scheme": "http", "endpoint_override": f"127.0.0.1:{port}", "retry_limit_seconds": "60"})
    with _process([sys.executable, "-c", GCS, str(port)], port):
        yield lambda path: f"gs://anonymous@bucket/{path}?{query}"


@contextlib.contextmanager
def azurite() -> Iterator[Bucket]:
    """A fresh Azure Blob Storage server, whose containers have to be made; it dies with the block."""
    ports = free_ports(3)
    kinds = zip(("blob", "queue", "table"), ports, strict=True)
    options = [word for kind, port in kinds for word in (f"--{kind}Port", str(port))]
    query = urlencode({"enable_tls": "false", **_signature()})
    with _process([str(AZURITE), *options, "--inMemoryPersistence", "--skipApiVersionCheck", "--silent"], ports[0]):
        yield lambda path: f"abfs://{ACCOUNT}@127.0.0.1:{ports[0]}/bucket/{path}?{query}"


@contextlib.contextmanager
def _process(command: list[str], port: int) -> Iterator[None]:
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
                break
            assert server.poll() is None and time.monotonic() < deadline, f"{command[0]} does not start"
            time.sleep(0.05)
        yield
    finally:
        server.kill()
        server.wait()


def _signature() -> dict[str, str]:
    """A SAS token for all of the account: pyarrow takes no account's key in a URI."""
    fields = {"sp": "rwdlacup", "ss": "b", "srt": "sco", "st": "", "se": "2099-01-01T00:00:00Z", "sip": ""}
    fields |= {"spr": "https,http", "sv": "2021-06-08", "ses": ""}
    text = "\n".join([ACCOUNT, *fields.values(), ""])
    digest = hmac.new(base64.b64decode(KEY), text.encode(), hashlib.sha256).digest()
    return {name: value for name, value in fields.items() if value} | {"sig": base64.b64encode(digest).decode()}
