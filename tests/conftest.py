"""What all tests share: helper modules on the path, small corpora and stores, and no silent skips.

With CI=true a skipped test fails, unless it needs what a CI machine may lack: a GPU or the data folder.
"""

import os
import sys
from itertools import chain
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "helpers"))

# Two test processes share two cores: threads of torch's that wait for each other by spinning would stand in their way.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Ray runs its workers at niceness 15, where anything else on a small machine starves them.
os.environ.setdefault("RAY_worker_niceness", "0")
# How often Ray Train's controller looks at its workers, who wait for it at each report: tests report every epoch.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
# Ray starts a worker for each CPU before anyone asks, and Ray Train one that looks out for machines that a cloud takes
# back: in some forty Rays and twenty trainings, minutes of imports.
os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
# An MLflow server otherwise starts seven processes for jobs that nothing here gives it.
os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")

EXCUSES = ("data", "gpu")


def pytest_collection_modifyitems(items):
    """Long files first, so that neither process waits for the other at the end; those that share a Ray in a row."""
    by_file = {}
    for item in items:
        by_file.setdefault(item.path, []).append(item)
    items[:] = chain.from_iterable(sorted(by_file.values(), key=_turn))


def _turn(of_file):
    if any("shared_ray" in item.fixturenames for item in of_file):
        return 1
    return 0 if any(item.get_closest_marker("slow") for item in of_file) else 2


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    excused = any(item.get_closest_marker(name) for name in EXCUSES) or hasattr(report, "wasxfail")
    return report if excused else _skipped_is_failed(report)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    return _skipped_is_failed((yield))


def _skipped_is_failed(report):
    if report.skipped and os.environ.get("CI") == "true":
        report.outcome = "failed"
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.longrepr = f"with CI=true a skip is a failure: {reason}"
    return report


@pytest.fixture(scope="session")
def media(tmp_path_factory):
    """A folder of real media: good.mp4 and long.mp4, silent.mp4 without a sound track, corrupt.mp4, empty.mp4."""
    from mediafiles import numbered, sine, write_media

    folder = tmp_path_factory.mktemp("media")
    write_media(folder / "good.mp4", numbered(25), sound=sine(440, 1.0))
    write_media(folder / "long.mp4", numbered(40, 320, 240) * 5, sound=sine(220, 8.0))
    write_media(folder / "silent.mp4", numbered(25))
    (folder / "corrupt.mp4").write_bytes((folder / "good.mp4").read_bytes()[:400] + bytes(2000))
    (folder / "empty.mp4").touch()
    return folder


@pytest.fixture(scope="session")
def corpus(media):
    """The manifest of 24 clips in three splits: three of them (corrupt, empty, missing) cannot be used."""
    from mediafiles import write_manifest

    names = ["good", "corrupt", "silent", "empty", "missing", *["long"] * 19]
    rows = [
        {
            "clip_id": f"{name}/{number}.x",
            "video": f"{name}.mp4",
            "split": ("train", "train", "val", "test")[number % 4],
            "group": f"g{number}",
            "label": "odd" if number % 2 else "even",
            "mood": "" if number == 2 else number / 10,
        }
        for number, name in enumerate(names)
    ]
    return write_manifest(media / "corpus.csv", rows)


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """A finished store of 29 + 3 + 5 samples in shards of 4; some lack a modality or a label. See storefiles."""
    from storefiles import make_clips, write_store

    return write_store(tmp_path_factory.mktemp("store") / "store", make_clips(29, 3, 5), shard_rows=4)


@pytest.fixture(scope="session")
def _stop_ray():
    yield
    if ray := sys.modules.get("ray"):
        ray.shutdown()


@pytest.fixture(scope="module")
def shared_ray(_stop_ray):
    """The Ray that the test files of one process share, with two CPUs: who asks for it must leave it running."""
    from pipelines.common.cluster import start_ray

    start_ray(address="local", num_cpus=2, log_to_driver=False)


@pytest.fixture(scope="module")
def no_shared_ray():
    """For files that start a Ray of another kind: the shared one ends, and the next file that asks starts it again."""
    if ray := sys.modules.get("ray"):
        ray.shutdown()
