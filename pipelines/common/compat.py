"""Everything that this project does with private parts of Ray, tyro and Python, in one place.

None of it is documented, so any release may change it; tests/pipelines/common/test_compat.py fails when one does.
"""

import atexit
import inspect
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import docstring_parser

REPORTS = "ray.train.v2._internal.execution.context"  # the module that logs a line of INFO for every report


def run_exit_functions() -> None:
    """Run what was registered for the interpreter's exit, for a process that then ends by `os._exit`."""
    atexit._run_exitfuncs()


@contextmanager
def joined_docstrings() -> Iterator[None]:
    """While the block runs, tyro's help joins the lines of an option's docstring.

    It means to, but looks at how a line begins before it takes the indentation away.
    """
    library: Any = docstring_parser  # its function is replaced, which type checkers refuse
    parse = docstring_parser.parse_from_object

    def unindented(obj: object) -> docstring_parser.Docstring:
        docstring = parse(obj)
        for option in docstring.params:
            option.description = inspect.cleandoc(option.description or "") or None
        return docstring

    library.parse_from_object = unindented
    try:
        yield
    finally:
        library.parse_from_object = parse


def silence_train_reports() -> None:
    """Ray Train logs every report, in a process whose log level no option of its own reaches."""
    import ray.train.v2._internal.execution.context as context

    logging.getLogger(context.__file__).setLevel(logging.WARNING)


@contextmanager
def plain_train_driver(own_cluster: bool) -> Iterator[None]:
    """A TorchTrainer that leaves signals to the job and starts no process that we do not need, while the block runs.

    Ray Train takes SIGINT for itself and then ends in `sys.exit` of its own. It starts a process that hands out Ray
    Data's datasets, of which a training has none here (its workers read the store), and imports Ray Data in every
    worker. On a cluster that ends with the job (own_cluster) it also needs no process that looks out for machines that
    a cloud takes back, and no detached actor that returns its placement group; that one prints thirty lines where
    another Ray runs on the same machine: it asks the State API, which does not know which cluster is meant.
    """
    from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    trainer: Any = DataParallelTrainer  # its methods are replaced, which type checkers refuse
    register, create = trainer._register_sigint_handler, trainer._create_default_callbacks
    unneeded = (DatasetsCallback, PlacementGroupCleanerCallback) if own_cluster else (DatasetsCallback,)
    if own_cluster:
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    trainer._register_sigint_handler = lambda self, controller: None
    trainer._create_default_callbacks = lambda self: [c for c in create(self) if not isinstance(c, unneeded)]
    try:
        yield
    finally:
        trainer._register_sigint_handler = register
        trainer._create_default_callbacks = create


def checkpoint_snapshot(name: str) -> str:
    """What Ray Train writes down of a run that has one checkpoint, the folder `name`."""
    from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import (
        _CheckpointManagerState,
        _TrainingResultState,
    )

    one = _TrainingResultState(checkpoint_dir_name=name, metrics={})
    return _CheckpointManagerState(
        checkpoint_results=[one],
        checkpoint_report_indices=[0],
        latest_checkpoint_result=one,
        pending_training_results=[],
        pending_validation_specs=[],
        current_report_index=1,
        validated_checkpoint_dir_names=[],
        timed_out_validation_checkpoint_dir_names=[],
        failed_validation_checkpoint_dir_names=[],
    ).json()


def cluster_refuses(address: str, seconds: float = 5.0) -> str:
    """Why the Ray cluster at host:port does not let this process in; "" where it does.

    Ray itself waits a minute for what is no Ray, and says nothing of a token before it gives up.
    """
    import grpc

    token = _token()
    with grpc.insecure_channel(address) as channel:
        alive = channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")
        try:
            alive(b"", timeout=seconds, metadata=[("authorization", f"Bearer {token}")] if token else None)
        except grpc.RpcError as error:
            if error.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
                wrong = "its token is not the one here" if token else "it wants a token and there is none here"
                return f"{wrong}; copy the head's (ray get-auth-token) to ~/.ray/auth_token and set RAY_AUTH_MODE=token"
            if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNIMPLEMENTED):
                return "what listens there is no Ray head; give the port of its GCS, 6379 unless it was named"
            if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
                return f"it has not answered within {seconds:g} s"
    return ""


def _token() -> str:
    """The token that Ray itself would send, if this machine has one and is to send it."""
    if os.environ.get("RAY_AUTH_MODE") != "token":
        return ""
    if given := os.environ.get("RAY_AUTH_TOKEN"):
        return given
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", Path.home() / ".ray" / "auth_token"))
    return path.read_text().strip() if path.is_file() else ""
