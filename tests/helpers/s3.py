"""An S3 server (moto's) in a process of its own, and a TCP proxy before it that can be told to fail.

with server() as direct, Proxy(direct) as proxy:
    proxy.uri("s3://bucket/folder")
    proxy.fail(refuse=5, unavailable=20)
"""

import contextlib
import os
import re
import selectors
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from urllib.parse import urlencode

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_EC2_METADATA_DISABLED": "true"}
SLOW_DOWN = (
    b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)
ANSWER = b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nContent-Length: %d\r\nConnection: close\r\n\r\n"
FORWARD, REFUSE, UNAVAILABLE = "forward", "refuse", "unavailable"


@contextlib.contextmanager
def server(credentials: bool = False) -> Iterator[int]:
    """The port of a fresh, empty S3 server on this machine; it dies with the block.

    credentials: whether it looks at them, and then it knows none.
    """
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    environment = os.environ | {"INITIAL_NO_AUTH_ACTION_COUNT": "0" if credentials else "1000000000"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment)
    try:
        lines = iter(process.stderr)
        port = next(int(found[1]) for line in lines if (found := re.search(r"http://127\.0\.0\.1:(\d+)", line)))
        # One line per request follows; a pipe that nobody reads would stop the server.
        reader = threading.Thread(target=lambda: [None for _ in lines], daemon=True)
        reader.start()
        with contextlib.suppress(urllib.error.HTTPError):  # it loads its S3 with the first request, which takes long
            urllib.request.urlopen(f"http://127.0.0.1:{port}/nosuch/x", timeout=120)
        yield port
    finally:
        process.kill()
        process.wait()


def _bound(port: int) -> socket.socket:
    """A socket on a local port, 0 = any; another may listen on the same one as long as this one does not."""
    bound = socket.socket()
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind(("127.0.0.1", port))
    return bound


class Proxy:
    """Forwards TCP to a local port, or refuses connections, or answers every request 503 SlowDown.

    latency: seconds that a request takes to get there.
    """

    def __init__(self, target: int, latency: float = 0.0) -> None:
        self.target, self.mode, self.latency = target, REFUSE, latency
        self.unavailable = self.forwarded = 0  # connections that met each mode
        self._port = _bound(0)  # keeps the port ours while nothing listens on it
        self._listener: socket.socket | None = None
        self._open: set[socket.socket] = set()

    @property
    def port(self) -> int:
        """The port to connect to."""
        return self._port.getsockname()[1]

    @property
    def endpoint(self) -> str:
        """What AWS_ENDPOINT_URL takes."""
        return f"http://127.0.0.1:{self.port}"

    def uri(self, uri: str, **options: str) -> str:
        """An s3:// URI that goes through this proxy."""
        query = {"scheme": "http", "endpoint_override": f"127.0.0.1:{self.port}", **options}
        return f"{uri}?{urlencode(query)}"

    def __enter__(self) -> "Proxy":
        self.set(FORWARD)
        return self

    def __exit__(self, *error: object) -> None:
        self.set(REFUSE)
        self._port.close()

    def set(self, mode: str) -> None:
        """Change at once, cutting what is under way."""
        self.mode = mode
        if mode == REFUSE and self._listener:
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes `accept`; such a socket cannot listen again
            self._listener.close()
            self._listener = None
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        if mode != REFUSE and not self._listener:
            self._listener = _bound(self.port)
            self._listener.listen(128)
            threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def fail(self, refuse: float, unavailable: float) -> None:
        """An outage: connections refused, then 503, each for so many seconds; returns when it is over."""
        self.set(REFUSE)
        time.sleep(refuse)
        self.set(UNAVAILABLE)
        time.sleep(unavailable)
        self.set(FORWARD)

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        self._open.add(client)
        try:
            if self.mode == FORWARD:
                self.forwarded += 1
                self._forward(client)
            else:
                self.unavailable += 1
                self._answer_unavailable(client)
        except OSError:
            pass
        finally:
            self._open.discard(client)
            client.close()

    def _forward(self, client: socket.socket) -> None:
        with socket.create_connection(("127.0.0.1", self.target)) as server, selectors.DefaultSelector() as ready:
            ready.register(client, selectors.EVENT_READ, server)
            ready.register(server, selectors.EVENT_READ, client)
            while True:
                for key, _ in ready.select():
                    data = key.fileobj.recv(1 << 16)
                    if not data:
                        return
                    if self.latency and key.fileobj is client:
                        time.sleep(self.latency)
                    key.data.sendall(data)

    def _answer_unavailable(self, client: socket.socket) -> None:
        received = b""
        while b"\r\n\r\n" not in received:
            data = client.recv(1 << 16)
            if not data:
                return
            received += data
        client.sendall(ANSWER % len(SLOW_DOWN) + (b"" if received.startswith(b"HEAD") else SLOW_DOWN))
        client.shutdown(socket.SHUT_WR)
        client.settimeout(5)
        while client.recv(1 << 16):  # the rest of the request: closing before it is read would reset the connection
            pass
