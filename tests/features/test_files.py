"""Files anywhere: S3 through a proxy that fails, local files, and what no waiting will mend."""

import contextlib
import hashlib
import io
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import boto3
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
import s3 as s3server
from mediafiles import write_tar
from s3 import FORWARD, REFUSE, UNAVAILABLE, Proxy

import features.decode.media
import features.files
from features.errors import FeaturesError, MediaError, StorageError
from features.files import (
    list_files,
    open_fs,
    parent,
    read_json,
    require_reachable,
    resolve,
    split_place,
    write_atomic,
    write_text,
)
from infra.head import free_ports

ROOT = Path(__file__).parents[2]
OUTAGE = 0.8  # seconds


@pytest.fixture(scope="module")
def direct():
    with s3server.server() as port:
        yield port


@pytest.fixture(autouse=True)
def credentials(monkeypatch):
    for name, value in s3server.CREDENTIALS.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def proxy(direct):
    with Proxy(direct) as proxy:
        fs, _ = open_fs(proxy.uri("s3://bucket", allow_bucket_creation="true"))
        fs.create_dir("bucket")
        yield proxy


@contextlib.contextmanager
def outage(proxy, mode):
    """The storage is away for a while from now on."""
    proxy.set(mode)
    back = threading.Timer(OUTAGE, proxy.set, [FORWARD])
    back.start()
    yield
    back.join()


@pytest.mark.slow
@pytest.mark.parametrize("mode", [REFUSE, UNAVAILABLE])
def test_reads_writes_listings_and_deletions_outlive_an_outage(proxy, mode):
    folder = proxy.uri(f"s3://bucket/calls-{mode}")
    fs, path = open_fs(folder)
    with outage(proxy, mode):
        fs.create_dir(path)
    with outage(proxy, mode):
        write_text(folder, "a.json", "[1]")
    with outage(proxy, mode):
        assert read_json(folder, "a.json") == [1]
    with outage(proxy, mode):
        assert [info.base_name for info in list_files(fs, path)] == ["a.json"]
    with fs.open_input_file(f"{path}/a.json") as file, outage(proxy, mode):  # open already
        assert file.read_at(1, 1) == b"1"
    with outage(proxy, mode):
        fs.delete_file(f"{path}/a.json")
    assert read_json(folder, "a.json") is None


@pytest.mark.slow
def test_a_large_file_cut_off_in_its_upload_and_in_its_download_arrives_whole(proxy):
    fs, path = open_fs(proxy.uri("s3://bucket/large.bin"))
    payload = os.urandom(16 << 20)
    for action in ("upload", "download"):
        cut = threading.Timer(0.05, proxy.fail, [0.3, 0.3])
        cut.start()
        if action == "upload":
            write_atomic(fs, path, payload)
        else:
            with fs.open_input_file(path) as file:
                arrived = file.read()
        cut.join()
    assert hashlib.sha256(arrived).digest() == hashlib.sha256(payload).digest()


@pytest.mark.slow
def test_a_writer_that_gave_up_or_was_killed_leaves_nothing(proxy):
    uri = proxy.uri("s3://bucket/torn")
    fs, path = open_fs(uri)
    stream = fs.open_output_stream(f"{path}/dropped.tar")
    stream.write(bytes(1 << 20))
    del stream
    code = (
        "import sys, time\nfrom features.files import open_fs\nfs, path = open_fs(sys.argv[1])\n"
        "stream = fs.open_output_stream(f'{path}/killed.tar')\nstream.write(bytes(30 << 20))\n"
        "print('written', flush=True)\ntime.sleep(600)"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, uri], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert writer.stdout.readline() == "written\n"
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    assert fs.get_file_info(pafs.FileSelector(path, allow_not_found=True)) == []
    client = boto3.client("s3", endpoint_url=proxy.endpoint, region_name="us-east-1")
    assert not client.list_multipart_uploads(Bucket="bucket", Prefix="torn").get("Uploads")


@pytest.mark.slow
def test_a_filesystem_stays_patient_in_another_process(proxy):
    fs, path = open_fs(proxy.uri("s3://bucket/pickled"))
    copy = pickle.loads(pickle.dumps(fs))
    assert copy == fs and copy.handler.patience == fs.handler.patience
    with outage(proxy, UNAVAILABLE), copy.open_output_stream(path) as file:
        file.write(b"1")
    assert fs.get_file_info(path).size == 1


@pytest.mark.slow
def test_one_client_serves_a_buckets_files_and_options_make_another(proxy):
    one, two = open_fs(proxy.uri("s3://bucket/a"))[0], open_fs(proxy.uri("s3://bucket/b/c"))[0]
    assert one is two and one is not open_fs(proxy.uri("s3://bucket/a", region="eu-west-1"))[0]


@pytest.mark.slow
def test_the_environment_names_the_endpoint_too(proxy, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    fs, path = open_fs("s3://bucket/a%20b/c d?region=us-west-1")
    assert path == "bucket/a b/c d"
    assert fs.handler.options["endpoint_override"] == proxy.endpoint
    write_text("s3://bucket/env?region=us-west-1", "x", "1")
    assert open_fs(proxy.uri("s3://bucket/env/x"))[0].get_file_info("bucket/env/x").size == 1


@pytest.mark.slow
def test_pyarrow_reads_and_copies_through_it(proxy, tmp_path):
    fs, path = open_fs(proxy.uri("s3://bucket/table"))
    table = pa.table({"n": range(1000)})
    pq.write_table(table, f"{path}/t.parquet", filesystem=fs)
    assert ds.dataset(path, filesystem=fs).to_table() == table
    pafs.copy_files(path, str(tmp_path), source_filesystem=fs)
    for number in range(40):  # more than Arrow has threads
        (tmp_path / f"{number}.bin").write_bytes(bytes(1000))
    pafs.copy_files(str(tmp_path), f"{path}2", destination_filesystem=fs)
    assert len(list_files(fs, f"{path}2")) == 41
    assert pq.read_table(f"{path}2/t.parquet", filesystem=fs) == table
    with pytest.raises(FileNotFoundError):
        fs.open_input_file(f"{path}/missing")


@pytest.mark.slow
def test_what_never_works_is_said_in_one_line_within_seconds(proxy, direct, monkeypatch):
    begun = time.monotonic()
    with pytest.raises(FeaturesError, match=r"s3://nosuch/x\?.* there is no bucket nosuch; make it, or check its name"):
        require_reachable(proxy.uri("s3://nosuch/x"))
    with pytest.raises(FeaturesError, match="nothing answers there; check endpoint_override"):
        require_reachable(f"s3://bucket/x?scheme=http&endpoint_override=127.0.0.1:{free_ports(1)[0]}")
    with pytest.raises(FeaturesError, match="its host is unknown; check endpoint_override"):
        require_reachable("s3://bucket/x?scheme=http&endpoint_override=nowhere.invalid:80")
    with pytest.raises(FeaturesError, match=r"cannot be opened: Unexpected query parameter.*'nonsense'"):
        require_reachable("s3://bucket/x?nonsense=1")
    assert time.monotonic() - begun < 60
    require_reachable(proxy.uri("s3://bucket/x"))
    require_reachable(proxy.uri("s3://willbemade/x", allow_bucket_creation="true"))


@pytest.mark.slow
def test_wrong_credentials_are_said_at_once():
    with s3server.server(credentials=True) as port, Proxy(port) as proxy:
        with pytest.raises(FeaturesError, match="access is denied; check the credentials and their rights"):
            require_reachable(proxy.uri("s3://bucket/x"))
        assert proxy.forwarded < 5


def test_a_uris_options_stay_with_its_folder_and_its_files():
    assert parent("s3://b/c/d.csv?region=x") == "s3://b/c?region=x"
    assert resolve("a b/1.mp4", "s3://b/c/?region=x") == "s3://b/c/a%20b/1.mp4?region=x"
    assert resolve("s3://other/1.mp4", "s3://b/c?region=x") == "s3://other/1.mp4"
    assert parent("/data/c.csv") == "/data" and resolve("a b.mp4", "/data") == "/data/a b.mp4"


@pytest.mark.slow
def test_storage_that_stays_away_is_no_fault_of_the_clip(proxy, monkeypatch):
    monkeypatch.setattr(features.decode.media, "PATIENCE", 1.0)
    fs, _ = open_fs(proxy.uri("s3://bucket"))
    write_atomic(fs, "bucket/clip.mp4", b"not a video")
    assert features.decode.media.open_source(proxy.uri("s3://bucket/clip.mp4")).read() == b"not a video"
    for mode in (REFUSE, UNAVAILABLE):
        proxy.set(mode)
        with pytest.raises(StorageError, match=r"cannot be read: .*run the same command again later"):
            features.decode.media.open_source(proxy.uri("s3://bucket/clip.mp4"))
    proxy.set(FORWARD)
    with pytest.raises(MediaError, match="does not exist"):
        features.decode.media.open_source(proxy.uri("s3://bucket/other.mp4"))


def test_storage_that_is_away_when_a_buckets_region_is_asked_for_is_no_fault_of_the_clip(monkeypatch):
    def connect(uri, patience):
        raise OSError("When resolving region for bucket 'b': AWS Error NETWORK_CONNECTION during HeadBucket operation")

    monkeypatch.setattr(features.files, "_connect", connect)
    with pytest.raises(StorageError, match=r"s3://b/clip\.mp4 cannot be read: .*run the same command again later"):
        features.decode.media.open_source("s3://b/clip.mp4")


def test_a_file_inside_a_tar_on_s3_is_read_without_the_rest(proxy):
    fs, path = open_fs(proxy.uri("s3://bucket/shard-000.tar"))
    content = {f"clips/{n}.bin": bytes([n]) * (1000 + n) for n in range(50)}
    with fs.open_output_stream(path) as stream, tarfile.open(fileobj=stream, mode="w|") as tar:
        for name, data in content.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    uri = proxy.uri("s3://bucket/shard-000.tar")
    for name, data in content.items():
        assert features.decode.media.open_source(f"{uri}#{name}").read() == data
    with pytest.raises(MediaError, match="the tar has 50 files, and none of that name"):
        features.decode.media.open_source(f"{uri}#clips/50.bin")
    assert resolve("shard-000.tar#clips/1.bin", "s3://bucket/folder") == "s3://bucket/folder/shard-000.tar#clips/1.bin"
    assert split_place("a b.tar#c#d.mp4") == ("a b.tar", "#c#d.mp4")


@pytest.mark.parametrize("name", ["./clips/é.bin", "clips/e\u0301.bin", "clips/./é.bin"])
def test_a_member_is_found_however_its_tar_writes_its_name(tmp_path, name):
    path = write_tar(tmp_path / "A.TAR", {name: b"x"})
    for asked in ("clips/é.bin", "./clips/é.bin", "clips/e\u0301.bin"):
        assert features.decode.media.open_source(f"{path}#{asked}").read() == b"x"


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.tar.xz"])
def test_a_packed_tar_is_refused_by_what_it_is(tmp_path, name):
    (tmp_path / "a.bin").write_bytes(b"x")
    with tarfile.open(tmp_path / name, "w:xz" if name.endswith("xz") else "w:gz") as tar:
        tar.add(tmp_path / "a.bin", "a.bin")
    with pytest.raises(MediaError, match=r"the tar does not read: .*; a tar must not be packed"):
        features.decode.media.open_source(f"{tmp_path / name}#a.bin")
