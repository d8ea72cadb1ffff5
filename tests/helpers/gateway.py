"""What companies put before an MLflow server: a reverse proxy with a path prefix and HTTP basic authentication.

with Gateway(port, "/team/mlflow", "me", "secret") as gateway:
    gateway.uri                # http://127.0.0.1:PORT/team/mlflow
    gateway.refuse(403)        # from now on every write is answered so; refuse(None) lets it through again
"""

import base64
import http.client
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

WRITES = ("POST", "PUT", "PATCH", "DELETE")
HOP = ("connection", "transfer-encoding", "content-length", "keep-alive", "host")


class Gateway(ThreadingHTTPServer):
    """Forwards to a local port what comes with the right prefix and credentials; else 404 or 401.

    writes: of a run's metrics so far; after: how many of them are let through before the others are answered `status`.
    """

    daemon_threads = True

    def __init__(self, target: int, prefix: str, user: str, password: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target, self.prefix = target, prefix
        self.credentials = "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
        self.writes, self.unauthorized = 0, 0
        self.refuse(None)

    @property
    def uri(self) -> str:
        """What MLFLOW_TRACKING_URI takes."""
        return f"http://127.0.0.1:{self.server_port}{self.prefix}"

    def refuse(self, status: int | None, after: int = 0) -> None:
        """Answer writes with a status once so many calls have brought metrics; None: let them through."""
        self.writes, self.after, self.status = 0, after, status

    def __enter__(self) -> "Gateway":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Gateway
    protocol_version = "HTTP/1.1"

    def _answer(self) -> None:
        gateway, body = self.server, self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if not self.path.startswith(gateway.prefix + "/"):
            return self._say(404)
        if self.headers.get("Authorization") != gateway.credentials:
            gateway.unauthorized += 1
            return self._say(401)
        if self.command in WRITES and "search" not in self.path:
            gateway.writes += "log-batch" in self.path and b'"metrics": [{' in body
            if gateway.status and gateway.writes > gateway.after:
                return self._say(gateway.status)
        backend = http.client.HTTPConnection("127.0.0.1", gateway.target, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in HOP}
        backend.request(self.command, self.path.removeprefix(gateway.prefix), body or None, headers)
        answer = backend.getresponse()
        content = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in HOP:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = _answer

    def _say(self, status: int) -> None:
        body = b"<html>answered by the gateway</html>"
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Nothing is said of each request."""
