"""The extract job from end to end: every row ends in index or failures, whatever breaks or is killed."""

import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import s3
from inprocess import no_cluster
from mediafiles import write_manifest
from storefiles import LABELS, files_of, make_clips, make_spec

import pipelines.extract
from features.corpus.manifest import read_corpus
from features.errors import FeaturesError
from features.files import open_fs
from features.store import Store
from features.store.shards import Failure, ShardWriter, create_store
from pipelines.common.cli import run_job
from pipelines.common.errors import JobError
from pipelines.extract import ExtractConfig, extract, print_failures, require_media, shards_to_retry

ROOT = Path(__file__).parents[2]
JOB = [sys.executable, str(ROOT / "pipelines/extract.py")]
OPTIONS = ["--shard-rows", "1", "--video.size", "32", "--max-failed", "0.2"]
BROKEN = {"corrupt/1.x": "not a media file", "empty/3.x": "0 bytes", "missing/4.x": "does not exist"}


@pytest.fixture(scope="module")
def first_run(corpus, tmp_path_factory):
    """`python pipelines/extract.py` without a cluster, not disturbed: what it printed, and its store."""
    folder = tmp_path_factory.mktemp("first") / "store"
    done = subprocess.run(
        [*JOB, "--corpus", corpus, "--store", folder, *OPTIONS], capture_output=True, text=True, env=no_cluster()
    )
    return done, folder


def run(monkeypatch, capsys, *args):
    """The job inside this process: exit code, what it printed, its errors."""
    monkeypatch.setattr(sys, "argv", ["extract.py", *map(str, args)])
    code = run_job(extract, ExtractConfig, "")
    printed = capsys.readouterr()
    return code, printed.out, printed.err


@pytest.mark.slow
def test_plain_python_extracts_and_says_what_failed(first_run):
    done, folder = first_run
    assert done.returncode == 0, done.stderr
    assert "24 rows = 21 indexed + 3 failed" in done.stdout
    assert re.search(r"│ 3 +│ open +│ MediaError +│ (corrupt/1|empty/3|missing/4)\.x: ", done.stdout)
    assert "Traceback" not in done.stderr and "resource_tracker" not in done.stderr
    failures = {row["clip_id"]: row["message"] for row in Store(str(folder)).failures().to_pylist()}
    assert failures.keys() == BROKEN.keys()
    assert all(reason in failures[clip_id] for clip_id, reason in BROKEN.items())


@pytest.mark.slow
def test_every_row_of_the_manifest_ends_in_exactly_one_place(first_run, corpus):
    store = Store(str(first_run[1]))
    with open(corpus) as file:
        manifest = {row["clip_id"]: row for row in csv.DictReader(file)}
    index = store.index().to_pylist()
    assert sorted([row["clip_id"] for row in index] + list(BROKEN)) == sorted(manifest)
    store.require_complete()
    assert store.committed() == set(store.spec.shards()) and not (first_run[1] / "lock.json").exists()
    for row in index:
        planned = manifest[row["clip_id"]]
        assert [row["split"], row["group"], row["label_label"]] == [planned[k] for k in ("split", "group", "label")]
        assert str(row["label_mood"] or "") == planned["mood"].replace("0.0", "")
        sample = store.read(row["shard"], row["offset"], row["nbytes"])
        silent = row["clip_id"].startswith("silent")
        assert sample.keys() == ({"json", "video"} if silent else {"json", "video", "audio"})
        assert sample["video"].shape == (row["tokens_video"], 32, 32, 3)
        assert row["tokens_video"] == int(row["duration"] * 12.5) and (row["tokens_audio"] == 0) == silent


@pytest.mark.slow
def test_a_second_run_does_nothing_and_takes_the_shards_as_they_are(first_run, corpus, shared_ray, monkeypatch, capsys):
    before = {path: path.stat().st_mtime_ns for path in first_run[1].rglob("*.*")}
    code, out, _ = run(monkeypatch, capsys, "--corpus", corpus, "--store", first_run[1], *OPTIONS[2:])
    assert code == 0 and "nothing to do" in out and "21 indexed + 3 failed" in out
    assert {path: path.stat().st_mtime_ns for path in first_run[1].rglob("*.*")} == before


@pytest.mark.slow
def test_more_failures_than_allowed_make_the_exit_code_not_0(first_run, corpus, shared_ray, monkeypatch, capsys):
    code, _, err = run(
        monkeypatch, capsys, "--corpus", corpus, "--store", first_run[1], *OPTIONS, "--max-failed", "0.1"
    )
    assert code == 1 and err == "error: 3 of 24 clips failed, more than --max-failed 0.1 allows\n"


def is_decoder(process):
    """A Ray worker that runs the extractor, or a process that it started."""
    with suppress(psutil.Error):
        return "extract_shard" in " ".join(process.cmdline()) or "forkserver" in " ".join(process.cmdline())
    return False


@pytest.mark.slow
def test_a_job_killed_in_the_middle_and_run_again_gives_the_same_bytes(
    first_run, corpus, shared_ray, tmp_path, monkeypatch, capsys
):
    store = tmp_path / "store"
    job = subprocess.Popen(
        [*JOB, "--corpus", corpus, "--store", store, *OPTIONS, "--concurrency", "1"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=no_cluster(), start_new_session=True,
    )  # fmt: skip
    while not list((store / "index").glob("*.parquet")):
        assert job.poll() is None
        time.sleep(0.05)
    family = psutil.Process(job.pid).children(recursive=True)
    os.kill(job.pid, signal.SIGKILL)
    job.wait()
    _, left = psutil.wait_procs([p for p in family if is_decoder(p)], timeout=30)
    for process in family:  # Ray's own agents stay for a minute
        with suppress(psutil.NoSuchProcess):
            process.kill()
    assert not left
    assert (store / "lock.json").exists() and 0 < len(list((store / "index").glob("*.parquet"))) < 24
    code, out, _ = run(monkeypatch, capsys, "--corpus", corpus, "--store", store, *OPTIONS)
    assert code == 0 and "24 rows = 21 indexed + 3 failed" in out
    assert files_of(store) == files_of(first_run[1])


@pytest.mark.slow
def test_another_spec_and_a_changed_corpus_are_refused(first_run, corpus, tmp_path, monkeypatch, capsys):
    store = first_run[1]
    before = files_of(store)
    changed = tmp_path / "corpus.csv"
    changed.write_text(Path(corpus).read_text().replace("odd", "strange", 1))
    for manifest, options, named in [
        (corpus, ["--video.fps", "5"], "features.video.rate: 5.0 != 12.5"),
        (corpus, ["--shard-rows", "2"], "shard_rows: 2 != 1"),
        (corpus, ["--tasks", "label"], "tasks: "),
        (changed, [], "corpus: "),
    ]:
        code, _, err = run(monkeypatch, capsys, "--corpus", manifest, "--store", store, *OPTIONS, *options)
        assert code == 1 and named in err and "another spec" in err and err.count("\n") == 1
    assert files_of(store) == before


def test_a_dry_run_prints_the_plan_and_writes_nothing(corpus, tmp_path, monkeypatch, capsys):
    store = tmp_path / "store"
    code, out, err = run(monkeypatch, capsys, "--corpus", corpus, "--store", store, *OPTIONS, "--dry-run")
    assert (code, err) == (0, "")
    assert "24 shards, 0 committed already" in out and "12.5 tokens per second of uint8 [32, 32, 3]" in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_failed_clips_are_tried_again_and_no_others(first_run, corpus, shared_ray, tmp_path, monkeypatch, capsys):
    shutil.copytree(first_run[1], tmp_path / "store")
    before = files_of(tmp_path / "store")
    command = ["--corpus", corpus, "--store", tmp_path / "store", *OPTIONS, "--retry-failed"]
    code, _, err = run(monkeypatch, capsys, *command, "Timeout")
    assert code == 1 and err == f"error: --retry-failed Timeout: {tmp_path}/store has failures of MediaError, open\n"
    code, out, _ = run(monkeypatch, capsys, *command)
    assert code == 0 and "trying again 3 failed clips in 3 shards" in out and "21 indexed + 3 failed" in out
    assert {row["attempts"] for row in Store(str(tmp_path / "store")).failures().to_pylist()} == {2}
    after = files_of(tmp_path / "store")
    assert {name for name in before if before[name] != after[name]} == {
        name for name in before if name.startswith("failures/") and b"MediaError" in before[name]
    }


def store_with(folder, **failures):
    """A store of the shards train-000000, train-000001, ... of one clip each, which failed so: class=message."""
    clips = make_clips(len(failures) + 1)
    store = create_store(str(folder), make_spec(clips, shard_rows=1))
    for clip, name, (error, message) in zip(clips, store.spec.shards(), failures.items(), strict=False):
        with ShardWriter(str(folder), name, store.spec, LABELS) as writer:
            writer.fail(clip, Failure("open", error, message))
            writer.commit()
    return store


def test_a_retry_that_was_killed_goes_on_when_its_class_is_gone_and_a_first_run_that_was_has_nothing_to_retry(tmp_path):
    fresh, store = store_with(tmp_path / "fresh"), store_with(tmp_path / "store", Timeout="slow", Crash="exit code -6")
    assert shards_to_retry(fresh, ("Timeout",), ["train-000000"]) == shards_to_retry(fresh, (), []) == []
    assert shards_to_retry(store, ("Timeout", "Memory"), ["train-000002"]) == ["train-000000"]
    assert shards_to_retry(store, ("Memory",), ["train-000002"]) == []
    with pytest.raises(JobError, match=r"--retry-failed Memory: .* has failures of Crash, Timeout, open"):
        shards_to_retry(store, ("Timeout", "Memory"), [])


def test_the_failures_table_takes_what_files_are_called_as_text(tmp_path, capsys):
    print_failures(store_with(tmp_path, Crash="Some song [dqw4w9WgXcQ].mp4 [/x]"))
    assert "Some song [dqw4w9WgXcQ].mp4 [/x]" in capsys.readouterr().out


@pytest.mark.slow
def test_a_store_that_cannot_be_written_stops_the_job_in_one_line(
    first_run, corpus, shared_ray, tmp_path, monkeypatch, capsys
):
    shutil.copytree(first_run[1], tmp_path / "store")
    (tmp_path / "store" / "index" / "val-000002.parquet").unlink()
    (tmp_path / "store" / "failures" / "val-000002.parquet").unlink()
    (tmp_path / "store" / "failures" / "val-000002.parquet" / "x").mkdir(parents=True)  # a folder in the way
    code, _, err = run(monkeypatch, capsys, "--corpus", corpus, "--store", tmp_path / "store", *OPTIONS)
    assert code == 1 and err.startswith("error: shard val-000002 of ") and "cannot be written" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "store" / "lock.json").exists()


ROW = {"video": "x.mp4", "label": "a"}
GOOD = [{"clip_id": split, "split": split, **ROW, "group": split} for split in ("train", "val", "test")]
MISTAKES = {
    "a missing corpus": (None, [], "does not exist"),
    "an unknown media column": (GOOD, ["--modalities", "video,smell"], "smell"),
    "a missing clip_id column": ([{"clip": "1", "split": "train", **ROW}], [], "no column 'clip_id'"),
    "an unknown task": (GOOD, ["--tasks", "lable"], "did you mean 'label'"),
    "a duplicate clip_id": ([*GOOD, GOOD[0]], [], "clip_id 'train' is in rows 1 and 4"),
    "a split without clips": (GOOD[:2], [], "no test clips"),
    "a group in two splits": (
        [*GOOD, {**GOOD[0], "clip_id": "x", "split": "val"}],
        [],
        "group 'train' is in train and",
    ),
    "an unknown option": (GOOD, ["--shard-row", "3"], "did you mean --shard-rows?"),
    "a wrong value": (GOOD, ["--video.fps", "-3"], "fps -3"),
    "media that are nowhere": (GOOD, [], "none of the first 3 media files is there, such as "),
    "no end of time": (GOOD, ["--timeout", "inf"], "--timeout inf: must be a finite number"),
    "no end of memory": (GOOD, ["--memory-gb", "inf"], "--memory-gb inf: must be a finite number"),
    "a share that is no number": (GOOD, ["--max-failed", "nan"], "--max-failed nan: must be a finite number"),
    "no end of frames": (GOOD, ["--video.fps", "inf"], "fps inf"),
    "no end of a window": (GOOD, ["--audio.hop", "inf", "--audio.window", "inf"], "hop <= window < inf"),
    "too few of something": (GOOD, ["--shard-rows=-1"], "--shard-rows -1: must be 0 or more"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_input_is_one_line_and_leaves_nothing_behind(mistake, tmp_path, monkeypatch, capsys):
    rows, options, named = MISTAKES[mistake]
    manifest = write_manifest(tmp_path / "corpus.csv", rows) if rows else tmp_path / "corpus.csv"
    code, _, err = run(monkeypatch, capsys, "--corpus", manifest, "--store", tmp_path / "store", *options)
    assert code != 0 and err.startswith("error: ") and err.count("\n") == 1 and named in err
    assert [path.name for path in tmp_path.iterdir()] == (["corpus.csv"] if rows else [])


def test_a_name_that_cannot_be_opened_costs_its_clip_and_not_the_job(tmp_path, capsys):
    (tmp_path / "there.mp4").touch()
    bad = [{**GOOD[0], "video": name} for name in ("http://x.org/a.mp4", f"{'a' * 300}.mp4")]
    rows = [{**row, "clip_id": n} for n, row in enumerate([*bad, {**GOOD[0], "video": "there.mp4"}])]
    require_media(read_corpus(write_manifest(tmp_path / "corpus.csv", rows)))
    assert "note: 2 of the first 3 media files are missing: http://x.org/a.mp4 (" in capsys.readouterr().out
    with pytest.raises(JobError, match=r"none of the first 2 media files is there, such as http://x\.org/a\.mp4 \("):
        require_media(read_corpus(write_manifest(tmp_path / "bad.csv", rows[:2])))


def test_storage_that_is_away_is_waited_for_once(tmp_path, monkeypatch):
    looks = []

    def open_impatiently(uri):
        looks.append(uri)
        return open_fs(uri, patience=0)

    monkeypatch.setattr(pipelines.extract, "open_fs", open_impatiently)
    for name, value in s3.CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    away = "s3://bucket/{}.mp4?endpoint_override=127.0.0.1:9&scheme=http&region=us-east-1"
    rows = [{**row, "video": away.format(row["clip_id"])} for row in GOOD]
    with pytest.raises((OSError, FeaturesError)):
        require_media(read_corpus(write_manifest(tmp_path / "corpus.csv", rows)))
    assert len(looks) == 1


@pytest.mark.slow
def test_a_folder_that_cannot_be_read_is_one_line(first_run, corpus, shared_ray, tmp_path, monkeypatch, capsys):
    shutil.copytree(first_run[1], tmp_path / "store")
    shutil.rmtree(tmp_path / "store" / "failures")
    (tmp_path / "store" / "failures").touch()  # a file where the folder should be
    code, _, err = run(monkeypatch, capsys, "--corpus", corpus, "--store", tmp_path / "store", *OPTIONS)
    assert code == 1 and err.startswith("error: ") and err.count("\n") == 1 and "store/failures" in err
    assert not (tmp_path / "store" / "lock.json").exists()


@pytest.mark.slow
def test_the_command_itself_shows_no_traceback(tmp_path):
    done = subprocess.run([*JOB, "--corpus", "no.csv", "--store", "out"], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith("error: corpus ") and list(tmp_path.iterdir()) == []
