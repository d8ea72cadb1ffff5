"""Is this machine ready? `python -m infra.doctor [--storage URI]` prints one line per check and what to do.

Every job first runs the checks that it depends on, so that it names what is missing before it starts anything.
"""

import importlib
import os
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import tyro

SOCKET_PATH, RAY_PATH = 107, 67  # characters that a socket's path may have, and that Ray adds to its folder's
SHORT_FOLDER = "/tmp/ray"  # where a job lets Ray work instead of in a folder that is too long
RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"


class Unhealthy(Exception):
    """A check failed; the message says which and what to do."""


@dataclass(frozen=True)
class Check:
    """The result of a check. found: what there is; fix: what to do if that is not ok."""

    name: str
    ok: bool
    found: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {self.found}" + ("" if self.ok else f"; {self.fix}")


def torch_pairing() -> Check:
    """Torchaudio loads only with a torch of the same CUDA build."""
    try:
        torch, torchaudio = importlib.import_module("torch"), importlib.import_module("torchaudio")
    except (ImportError, OSError, RuntimeError) as error:
        fix = "install the pinned pair: make setup, or pip install -r requirements.lock"
        return Check("torch and torchaudio", False, _first_line(error), fix)
    where = f"{torch.cuda.device_count()} GPUs" if torch.cuda.is_available() else "no GPU"
    return Check(
        "torch and torchaudio", True, f"torch {torch.__version__}, torchaudio {torchaudio.__version__}, {where}"
    )


def decoders() -> Check:
    """PyAV decodes sound on every platform; decord decodes frames where it has wheels, PyAV elsewhere."""
    try:
        av = importlib.import_module("av")
    except ImportError as error:
        return Check("decoders", False, _first_line(error), "install PyAV: pip install av")
    try:
        video = f"decord {importlib.import_module('decord').__version__}"
    except (ImportError, OSError):
        video = "PyAV for frames too (no decord on this platform)"
    return Check("decoders", True, f"PyAV {av.__version__}, {video}")


def ray_access() -> Check:
    """Ray is installed; if it asks for a token, there is one."""
    try:
        ray = importlib.import_module("ray")
    except ImportError as error:
        return Check("ray", False, _first_line(error), "install it: make setup")
    address = os.environ.get("RAY_ADDRESS", "")
    if os.environ.get("RAY_AUTH_MODE") == "token" and not _has_token():
        fix = (
            "copy the head node's token to ~/.ray/auth_token or set RAY_AUTH_TOKEN (ray get-auth-token prints it there)"
        )
        return Check("ray", False, "RAY_AUTH_MODE=token but there is no token here", fix)
    return Check("ray", True, f"ray {ray.__version__}, " + (f"cluster {address}" if address else "starts one here"))


def ray_folder() -> Check:
    """Ray's folder is short enough for the sockets in it."""
    name = next((name for name in ("RAY_TMPDIR", "TMPDIR") if name in os.environ), "")
    folder = os.environ.get(name, "/tmp")
    longest = SOCKET_PATH - RAY_PATH
    if len(os.fsencode(folder)) > longest:
        found = f"{name}={folder} is too long: sockets below it leave it {longest} characters"
        return Check("ray's folder", False, found, f"set {name} to a shorter path; jobs use {SHORT_FOLDER} instead")
    return Check("ray's folder", True, f"{folder}/ray")


def storage(uri: str) -> Check:
    """A file can be written to and deleted from the folder at `uri`, or its nearest parent that exists."""
    from features.files import PROBE, open_fs, require_reachable

    name = f"storage {uri}"
    try:
        require_reachable(uri)
        fs, path = open_fs(uri, PROBE)
        if fs.type_name == "local":
            path = str(next(p for p in (Path(path), *Path(path).parents) if p.exists()))
        probe = f"{path}/.probe-{uuid.uuid4().hex}"
        with fs.open_output_stream(probe) as f:
            f.write(b"1")
        fs.delete_file(probe)
    except Exception as error:  # every filesystem raises errors of its own
        return Check(
            name, False, _first_line(error), "give a folder that this user may write, or check the credentials"
        )
    return Check(name, True, "writable")


def mlflow_server(uri: str) -> Check:
    """The tracking server answers; a sqlite file needs none."""
    name = f"mlflow {uri}"
    if not uri.startswith("http"):
        return Check(name, True, "an embedded file, for one host")
    from mlflow.tracking import MlflowClient

    given = RETRIES in os.environ
    os.environ.setdefault(RETRIES, "3")
    try:
        MlflowClient(uri).search_experiments(max_results=1)
    except Exception as error:  # connection, authentication and proxy errors have no common base
        mend = "start it (mlflow server), or set MLFLOW_TRACKING_URI to one that runs"
        if "Invalid Host header" in str(error):
            host = urlsplit(uri).netloc.rpartition("@")[2]
            mend = f"it runs, but is not called so: add {host} to its --allowed-hosts (infra/README.md, MLflow)"
        return Check(name, False, _first_line(error), mend)
    finally:
        if not given:
            del os.environ[RETRIES]  # a run has a patience of its own, and workers get what stands here
    return Check(name, True, "reachable")


def require(*checks: Check) -> None:
    """Raise Unhealthy for the first check that failed."""
    for check in checks:
        if not check.ok:
            raise Unhealthy(str(check))


@dataclass(frozen=True)
class DoctorConfig:
    """Options of the doctor."""

    storage: tuple[str, ...] = (".",)
    """folders or URIs that jobs will write to"""


def run_all(config: DoctorConfig) -> Iterator[Check]:
    """Run every check, the slowest last."""
    checks: list[Callable[[], Check]] = [decoders, ray_access, ray_folder, torch_pairing]
    yield from (check() for check in checks)
    yield from (storage(uri) for uri in config.storage)
    yield mlflow_server(os.environ.get("MLFLOW_TRACKING_URI", "sqlite"))


def main() -> int:
    """Print every check; returns the number of checks that failed."""
    failed = 0
    for check in run_all(tyro.cli(DoctorConfig, description=__doc__, prog="python -m infra.doctor")):
        print(f"{'ok  ' if check.ok else 'FAIL'} {check}", flush=True)
        failed += not check.ok
    return failed


def _has_token() -> bool:
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", Path.home() / ".ray" / "auth_token"))
    return bool(os.environ.get("RAY_AUTH_TOKEN")) or path.exists()


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


if __name__ == "__main__":
    sys.exit(main())
