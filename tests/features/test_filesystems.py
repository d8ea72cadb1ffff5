"""What our code needs of a filesystem, held by each that it runs on: this disk, S3, GCS, and Azure's blobs.

The servers are moto, gcp-storage-emulator and Azurite. The last is no Python package, so `abfs` joins where `azurite`
is on the path: npm install -g azurite.
"""

import contextlib
import hashlib
import io
import json
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import objectstores
import optuna
import pyarrow.fs as pafs
import pytest
import s3
import torch
from storefiles import LABELS, files_of, make_clips, make_sample, make_spec, shards_of, write_shard, write_store

import features.store.lock
from features.errors import StoreError
from features.files import (
    list_files,
    open_fs,
    parent,
    publish,
    read_json,
    read_text,
    resolve,
    temporary_path,
    write_atomic,
    write_text,
)
from features.store import Store
from features.store.lock import StoreLock
from features.store.samples import pack
from features.store.shards import ShardWriter, sweep_litter
from infra.doctor import storage
from pipelines.training.checkpoints import SNAPSHOT, repair
from tuning.objectives import Objective
from tuning.study import StudyFile

ROOT = Path(__file__).parents[2]
KINDS = ["local", pytest.param("s3", marks=pytest.mark.slow), "gs", *(["abfs"] if objectstores.AZURITE else [])]
NAMES = ["plain.json", "a b.json", "é 日本.json", "a%20b.json", "x=1&y.json", "deep/er/one.json"]


@contextlib.contextmanager
def buckets(kind, folder):
    """A function from a path to its URI, on a fresh filesystem of this kind."""
    if kind == "local":
        yield lambda path: str(folder / path)
    elif kind == "s3":
        with pytest.MonkeyPatch.context() as patch, s3.server() as port, s3.Proxy(port) as proxy:
            for name, value in s3.CREDENTIALS.items():
                patch.setenv(name, value)
            fs, _ = open_fs(proxy.uri("s3://bucket", allow_bucket_creation="true"))
            fs.create_dir("bucket")
            yield lambda path: proxy.uri(f"s3://bucket/{path}")
    else:
        with (objectstores.gcs if kind == "gs" else objectstores.azurite)() as bucket:
            open_fs(bucket("x"))[0].create_dir("bucket")
            yield bucket


@pytest.fixture(scope="module", params=KINDS)
def bucket(request, tmp_path_factory):
    with buckets(request.param, tmp_path_factory.mktemp("files")) as bucket:
        yield bucket


@pytest.fixture
def folder(bucket, request):
    """A URI of a folder of this test's own, which does not exist yet."""
    return bucket(hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:12])


def content(fs, path):
    with fs.open_input_file(path) as file:
        return file.read()


def objects(uri):
    """Every file below a folder by its relative path, with its bytes."""
    fs, path = open_fs(uri)
    infos = fs.get_file_info(pafs.FileSelector(path, recursive=True))
    files = [info for info in infos if info.type == pafs.FileType.File]
    return {info.path.removeprefix(f"{path}/"): content(fs, info.path) for info in files}


def write_x(fs, path, payload):
    fs.create_dir(path, recursive=True)
    write_atomic(fs, f"{path}/x", payload)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_written_read_replaced_and_deleted_whatever_its_name(folder, name):
    assert read_json(folder, name) is None
    fs, path = open_fs(folder)
    fs.create_dir(f"{path}/{name}".rpartition("/")[0], recursive=True)
    for value in ([1], {"longer": "x" * 1000}, 2):
        write_text(folder, name, json.dumps(value))
        assert read_json(folder, name) == value
    uri = resolve(name, folder)
    assert open_fs(uri)[1] == f"{path}/{name}" and open_fs(parent(uri))[1] == f"{path}/{name}".rpartition("/")[0]
    fs.delete_file(f"{path}/{name}")
    assert read_text(folder, name) is None and fs.get_file_info(f"{path}/{name}").type == pafs.FileType.NotFound


def test_a_folder_is_listed_by_name_without_its_folders_and_unfinished_files(folder):
    fs, path = open_fs(folder)
    assert list_files(fs, path) == []
    fs.create_dir(path, recursive=True)
    for name in ("b.tar", "a.tar", "c.tar.0.tmp"):
        write_atomic(fs, f"{path}/{name}", b"x" * 7)
    fs.create_dir(f"{path}/below", recursive=True)
    write_atomic(fs, f"{path}/below/d.tar", b"")
    assert [(info.base_name, info.size) for info in list_files(fs, path)] == [("a.tar", 7), ("b.tar", 7)]
    assert fs.get_file_info(f"{path}/below").type == pafs.FileType.Directory
    assert fs.get_file_info(f"{path}/below/d.tar").size == 0


def test_a_file_is_read_by_ranges_and_more_than_its_end(folder):
    fs, path = open_fs(folder)
    fs.create_dir(path, recursive=True)
    payload = bytes(range(256)) * 40_000  # 10 MB: several parts of an upload
    write_atomic(fs, f"{path}/x", payload)
    with fs.open_input_file(f"{path}/x") as file:
        assert file.size() == len(payload)
        for offset, size in ((0, 10), (9_999_000, 500), (255, 1), (len(payload) - 3, 100)):
            assert file.read_at(size, offset) == payload[offset : offset + size]
        file.seek(512)
        assert io.BufferedReader(file).read(4) == bytes(range(4))
    with pytest.raises(FileNotFoundError):
        fs.open_input_file(f"{path}/missing")


def test_an_earlier_file_stays_until_the_next_is_whole(folder):
    fs, path = open_fs(folder)
    write_x(fs, path, b"earlier")
    temporary = temporary_path(fs, f"{path}/x")
    with fs.open_output_stream(temporary) as stream:
        stream.write(b"half")
        stream.flush()
        assert content(fs, f"{path}/x") == b"earlier"
        assert [info.base_name for info in list_files(fs, path)] == ["x"]
        stream.write(b" and half")
    publish(fs, temporary, f"{path}/x")
    assert objects(folder) == {"x": b"half and half"}


WRITER = """
import sys, time
from features.files import open_fs, temporary_path
fs, path = open_fs(sys.argv[1])
stream = fs.open_output_stream(temporary_path(fs, f"{path}/x"))
stream.write(bytes(9 << 20))
print("written", flush=True)
time.sleep(600)
"""


def test_a_killed_writer_leaves_the_earlier_file_as_it_was(folder):
    fs, path = open_fs(folder)
    write_x(fs, path, b"earlier")
    writer = subprocess.Popen([sys.executable, "-c", WRITER, folder], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert writer.stdout.readline() == "written\n"
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    assert [info.base_name for info in list_files(fs, path)] == ["x"] and content(fs, f"{path}/x") == b"earlier"


def test_a_store_has_the_same_bytes_as_on_disk_and_reads_back(folder, tmp_path):
    clips = make_clips(train=9, val=3, test=2)
    here, there = write_store(tmp_path / "store", clips), write_store(folder, clips)
    assert objects(folder) == files_of(tmp_path / "store")
    assert there.committed() == here.committed() and there.index() == here.index()
    samples = list(there.samples("train"))
    assert [s["clip_id"] for s in samples] == [s["clip_id"] for s in here.samples("train")] and len(samples) == 9
    assert pickle.loads(pickle.dumps(there.fs)).get_file_info(f"{there.path}/store.json").size  # as Ray's workers do


def test_a_shard_written_again_by_a_job_that_fails_counts_as_before_or_not_at_all(folder):
    clips = make_clips(train=8)
    store = write_store(folder, clips)
    (name, rows), *_ = shards_of(clips, 4)
    with pytest.raises(ZeroDivisionError), ShardWriter(folder, name, store.spec, LABELS) as writer:
        number, clip = rows[0]
        writer.add(clip, pack(clip, make_sample(number)))
        raise ZeroDivisionError
    sweep_litter(Store(folder))
    assert len(list(Store(folder).samples("train"))) in (8, 4)
    write_shard(folder, name, rows, make_spec(clips))
    assert sweep_litter(Store(folder)) == 0 and len(list(Store(folder).samples("train"))) == 8


def test_a_living_owners_lock_is_respected_and_a_silent_ones_is_taken_over(folder, monkeypatch):
    for name, seconds in (("HEARTBEAT", 0.1), ("POLL", 0.1), ("STALE", 10.0)):
        monkeypatch.setattr(features.store.lock, name, seconds)
    with StoreLock(folder) as lock:
        with pytest.raises(StoreError, match="is being written by process"):
            StoreLock(folder).__enter__()
        for _ in range(20):  # no heartbeat ever hides the owner
            lock.check()
        left = lock._read()
    assert objects(folder) == {}
    write_text(folder, "lock.json", json.dumps(left | {"host": "elsewhere"}))
    monkeypatch.setattr(features.store.lock, "STALE", 0.3)
    with StoreLock(folder):
        assert read_json(folder, "lock.json")["owner"] != left["owner"]


def test_a_run_folder_is_copied_there_and_back(folder, tmp_path):
    fs, path = open_fs(folder)
    (tmp_path / "model/sub").mkdir(parents=True)
    for number in range(20):  # more files than Arrow has threads
        (tmp_path / f"model/sub/{number}.bin").write_bytes(bytes([number]) * 1000)
    fs.create_dir(f"{path}/model", recursive=True)
    pafs.copy_files(str(tmp_path / "model"), f"{path}/model", destination_filesystem=fs)
    (tmp_path / "back").mkdir()
    pafs.copy_files(f"{path}/model", str(tmp_path / "back"), source_filesystem=fs)
    assert files_of(tmp_path / "back") == files_of(tmp_path / "model")


def test_the_list_of_checkpoints_is_repaired_from_their_folders(folder):
    fs, path = open_fs(folder)
    for number in (1, 2):
        fs.create_dir(f"{path}/checkpoints/checkpoint_{number}", recursive=True)
    state = io.BytesIO()
    torch.save({"epoch": 1}, state)
    write_atomic(fs, f"{path}/checkpoints/checkpoint_1/state.pt", state.getvalue())
    write_atomic(fs, f"{path}/checkpoints/checkpoint_2/state.pt", state.getvalue()[:-9])
    write_text(folder, SNAPSHOT, "")
    repair(folder)
    assert "checkpoint_1" in read_text(folder, SNAPSHOT) and "checkpoint_2" not in read_text(folder, SNAPSHOT)


def test_a_sweeps_study_is_found_again(folder):
    open_fs(folder)[0].create_dir(open_fs(folder)[1], recursive=True)
    objective = [Objective("val/score", "maximize")]
    for number in range(2):
        file = StudyFile(folder)
        study = file.open(objective)
        assert len(study.trials) == number
        study.add_trial(optuna.trial.create_trial(value=0.5))
        file.save()


def test_doctor_finds_it_writable(folder):
    assert storage(folder).ok
