"""One writer per store: a dead owner's lock is taken over, a living one's is respected."""

import itertools
import json
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import s3

import features.store.lock
from features.errors import StoreError
from features.files import open_fs, read_json, write_atomic
from features.store.lock import StoreLock

ROOT = Path(__file__).parents[3]
HOLD = """
import sys, time
from features.store.lock import StoreLock
with StoreLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of tmp_path."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def lock_of(folder):
    return json.loads((folder / "lock.json").read_text())


def test_a_lock_is_gone_when_its_job_is_done(tmp_path):
    with StoreLock(str(tmp_path / "new")):
        assert lock_of(tmp_path / "new")["pid"] == psutil.Process().pid
    assert list((tmp_path / "new").iterdir()) == []


def test_a_lock_is_gone_when_its_job_failed(tmp_path):
    with pytest.raises(ZeroDivisionError), StoreLock(str(tmp_path)):
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_living_owner_is_refused_and_a_killed_ones_lock_is_taken_over_at_once(tmp_path, holder, monkeypatch, capsys):
    with pytest.raises(StoreError, match=rf"is being written by process {holder.pid} on .*: wait for it, or stop it"):
        StoreLock(str(tmp_path)).__enter__()
    assert f"locked by process {holder.pid}" in capsys.readouterr().out
    (tmp_path / "lock.json.0123.tmp").touch()  # the owner dies in the middle of a heartbeat
    holder.kill()  # and stays a zombie: its parent has not asked for it
    deadline = time.monotonic() + 10
    while psutil.Process(holder.pid).status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.01)
    with StoreLock(str(tmp_path)):
        assert lock_of(tmp_path)["pid"] != holder.pid
    assert "waiting" not in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_process_number_used_again_is_not_the_owner(tmp_path, capsys):
    with StoreLock(str(tmp_path)):
        lock = lock_of(tmp_path)
    (tmp_path / "lock.json").write_text(json.dumps(lock | {"started": lock["started"] - 3600}))
    with StoreLock(str(tmp_path)):
        assert lock_of(tmp_path)["owner"] != lock["owner"]
    assert "waiting" not in capsys.readouterr().out


@pytest.mark.parametrize("left", [b"", bytes(90), b'{"owner": "a'], ids=["empty", "zeros", "half"])
def test_a_lock_that_a_power_cut_emptied_is_nobodys(tmp_path, left, capsys):
    (tmp_path / "lock.json").write_bytes(left)
    with StoreLock(str(tmp_path)):
        assert lock_of(tmp_path)["pid"] == psutil.Process().pid
    assert "waiting" not in capsys.readouterr().out


def test_an_owner_on_another_host_counts_as_dead_without_a_heartbeat(tmp_path, monkeypatch):
    monkeypatch.setattr(features.store.lock, "STALE", 1.5)
    with StoreLock(str(tmp_path)):
        lock = lock_of(tmp_path)
    (tmp_path / "lock.json").write_text(json.dumps(lock | {"host": "elsewhere"}))
    begun = time.monotonic()
    with StoreLock(str(tmp_path)):
        assert time.monotonic() - begun >= 1.5


def test_slow_storage_does_not_keep_a_dead_owner_alive(tmp_path, monkeypatch):
    monkeypatch.setattr(features.store.lock, "POLL", 0.1)
    monkeypatch.setattr(features.store.lock, "STALE", 0.5)
    with StoreLock(str(tmp_path)):
        lock = lock_of(tmp_path)
    (tmp_path / "lock.json").write_text(json.dumps(lock | {"host": "elsewhere"}))
    read, reads = StoreLock._read, itertools.count()

    def slowly(self, fs=None):
        assert next(reads) < 20, "waited without end"
        time.sleep(0.15)
        return read(self, fs)

    monkeypatch.setattr(StoreLock, "_read", slowly)
    with StoreLock(str(tmp_path)):
        assert lock_of(tmp_path)["owner"] != lock["owner"]


def test_the_owner_gives_a_heartbeat(tmp_path, monkeypatch):
    monkeypatch.setattr(features.store.lock, "HEARTBEAT", 0.05)
    with StoreLock(str(tmp_path)):
        first, deadline = lock_of(tmp_path)["beats"], time.monotonic() + 30
        while lock_of(tmp_path)["beats"] <= first + 2:
            assert time.monotonic() < deadline, "no heartbeat"
            time.sleep(0.05)


def test_a_job_whose_lock_was_taken_over_stops_and_leaves_it_to_the_other(tmp_path, monkeypatch):
    monkeypatch.setattr(features.store.lock, "HEARTBEAT", 0.05)
    with StoreLock(str(tmp_path)) as lock:
        lock.check()
        write_atomic(lock.fs, lock.path, json.dumps(lock_of(tmp_path) | {"owner": "other", "pid": 7}).encode())
        deadline = time.monotonic() + 30
        with pytest.raises(StoreError, match=r"taken over by another job \(process 7 on .*\): this one stops"):
            while time.monotonic() < deadline:  # until the next heartbeat has seen it
                lock.check()
                time.sleep(0.05)
    assert lock_of(tmp_path)["owner"] == "other"


def test_an_owner_that_asks_for_it_hears_at_once_of_another_and_not_of_a_folder_that_was_deleted(tmp_path, monkeypatch):
    monkeypatch.setattr(features.store.lock, "HEARTBEAT", 0.05)
    heard = queue.Queue()
    with StoreLock(str(tmp_path / "a"), lost=heard.put) as lock:
        write_atomic(lock.fs, lock.path, json.dumps(lock_of(tmp_path / "a") | {"owner": "other", "pid": 7}).encode())
        assert "taken over by another job (process 7 on " in heard.get(timeout=30)
    with StoreLock(str(tmp_path / "b"), lost=heard.put) as lock:
        lock.fs.delete_file(lock.path)
        lock._thread.join(timeout=30)
        assert not lock._thread.is_alive() and heard.empty()


@pytest.mark.slow
def test_storage_that_is_away_longer_than_an_owner_may_be_silent_gives_its_lock_to_nobody(monkeypatch):
    for name, value in s3.CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    for name, seconds in (("HEARTBEAT", 1.0), ("POLL", 0.2), ("STALE", 2.5)):
        monkeypatch.setattr(features.store.lock, name, seconds)
    with s3.server() as port, s3.Proxy(port) as proxy:
        uri = proxy.uri("s3://bucket/store", allow_bucket_creation="true")
        open_fs(uri)[0].create_dir("bucket")
        with StoreLock(uri) as lock:
            outage = threading.Timer(0.5, proxy.fail, [2.0, 2.0])
            outage.start()
            with pytest.raises(StoreError, match=rf"is being written by process {psutil.Process().pid} on "):
                StoreLock(uri).__enter__()
            outage.join()
            lock.check()
            before, deadline = read_json(uri, "lock.json")["beats"], time.monotonic() + 30
            while read_json(uri, "lock.json")["beats"] <= before:
                assert time.monotonic() < deadline, "no heartbeat after the outage"
                time.sleep(0.1)
        assert read_json(uri, "lock.json") is None
