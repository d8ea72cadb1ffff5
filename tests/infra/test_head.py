"""A head node of our own: it runs jobs, lets in only who has its token, and takes all of its processes with it."""

import urllib.error
import urllib.request
from contextlib import suppress

import psutil
import pytest
import ray

from infra.head import local_head
from pipelines.common.cluster import retry_start

pytestmark = pytest.mark.slow


def ray_processes(session):
    """Running processes that name a session's folder, and all that were started by them."""
    found = set()
    for process in psutil.process_iter(["cmdline"]):
        if any(session in argument for argument in process.info["cmdline"] or ()):
            with suppress(psutil.NoSuchProcess):  # it has ended since
                found |= {process, *process.children(recursive=True)}
    return found


def session_of(head):
    """The --temp-dir of the head's process."""
    port = head.dashboard.rsplit(":", 1)[1]
    for process in psutil.Process().children():
        arguments = process.cmdline()
        if f"--dashboard-port={port}" in arguments:
            return next(a.partition("=")[2] for a in arguments if a.startswith("--temp-dir="))
    raise AssertionError(f"no head with dashboard port {port}")


@pytest.fixture
def other_ray():
    """Another Ray on this machine, its folder and its processes."""
    context = retry_start(ray.init, address="local", num_cpus=1, include_dashboard=False, logging_level="error")
    yield context.address_info["session_dir"]
    ray.shutdown()


def test_a_head_runs_jobs_for_its_token_and_leaves_nothing_and_nobody_else_hurt(other_ray, capfd):
    others = {p.pid for p in ray_processes(other_ray)}
    with local_head(cpus=1) as head:
        session = session_of(head)
        ours = ray_processes(session)
        assert len(ours) > 3 and not {p.pid for p in ours} & others
        assert head.submit("python", "-c", "print(6 * 7)") == 0
        assert "\n42\n" in capfd.readouterr().out
        ours |= ray_processes(session)
        for headers in ({}, {"Authorization": f"Bearer {'0' * 64}"}):
            request = urllib.request.Request(f"{head.dashboard}/api/jobs/", headers=headers)
            with pytest.raises(urllib.error.HTTPError, match=r"401|403"):
                urllib.request.urlopen(request, timeout=10)
    assert not [p for p in ours if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert not ray_processes(session)
    assert {p.pid for p in ray_processes(other_ray)} >= others
    assert ray.get(ray.remote(lambda: 42).remote(), timeout=60) == 42
