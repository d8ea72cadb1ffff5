"""Several stores as one: the same interface, what only some of them have, and what does not go together by name."""

import pickle
from dataclasses import replace

import pyarrow as pa
import pyarrow.fs as pafs
import pytest
import s3
from storefiles import FEATURES, TASKS, make_clips, write_mixture, write_store, write_yaml

from features.corpus.tasks import Task
from features.errors import StoreError
from features.files import open_fs, write_text
from features.store import Mixture, Store, open_store
from features.store.shards import create_store


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    write_mixture(folder)
    return folder


@pytest.fixture
def mixture(folder):
    return open_store(str(folder / "mix.yaml"))


def test_every_row_of_every_store_is_indexed_and_read_as_its_own_store_reads_it(mixture, folder):
    stores = [Store(str(folder / name)) for name in ("whole", "few")]
    assert list(mixture.stores) == ["whole", "few"] and mixture.weights == (2, 1)
    assert mixture.spec.rows == 49 and mixture.counts() == (49, 0)
    rows, read = mixture.index(), list(mixture.samples())
    expected = [sample for store in stores for sample in store.samples()]
    assert [row["clip_id"] for row in read] == [row["clip_id"] for row in expected] == rows["clip_id"].to_pylist()
    for one, other in zip(read, expected, strict=True):
        assert one.keys() == other.keys() and one["labels"] == other["labels"]
        assert all((one["features"][m] == values).all() for m, values in other["features"].items())
    assert rows["store"].to_pylist() == ["whole"] * 37 + ["few"] * 12
    places = [(row["shard"], row["offset"], row["nbytes"]) for row in reversed(rows.to_pylist())]
    samples = pickle.loads(pickle.dumps(mixture)).read_many(places)
    assert [sample["json"]["clip_id"] for sample in samples] == rows["clip_id"].to_pylist()[::-1]
    assert pa.concat_tables([mixture.part("index", shard) for shard in sorted(mixture.committed())]).num_rows == 49
    mixture.require_complete()


def test_a_task_that_only_some_stores_declare_has_no_label_in_the_others(mixture):
    assert {task.name: task for task in mixture.spec.tasks} == {task.name: task for task in TASKS}
    rows = mixture.index("train", ["store", "label_label", "label_mood"]).to_pylist()
    few = [row for row in rows if row["store"] == "few"]
    assert len(few) == 8 and not any(row["label_label"] for row in few) and few[1]["label_mood"] == 0.1
    assert sum(row["label_label"] is not None for row in rows) == 24


def test_classes_and_features_of_all_stores_come_together_and_what_is_missing_is_absent(folder, tmp_path):
    frames = {"video": FEATURES["video"]}
    other = write_store(
        tmp_path / "b", make_clips(4), features=frames, tasks=(Task("label", "classification", ("c",)),)
    )
    both = open_store(write_yaml(tmp_path / "mix.yaml", {str(folder / "whole"): None, "b": None}))
    assert both.spec.tasks[0].classes == ("a", "b", "c") and not both.weights
    tokens = both.index("train", ["tokens_audio", "store"]).to_pylist()
    assert {row["tokens_audio"] for row in tokens if row["store"] == "b"} == {0}
    assert both.spec.fingerprint != open_store(str(folder / "mix.yaml")).spec.fingerprint != other.spec.fingerprint


def test_the_fingerprint_says_the_stores_and_their_weights(folder):
    digests = {
        open_store(write_yaml(folder / f"{n}.yaml", weights)).spec.fingerprint
        for n, weights in enumerate(({"whole": 2, "few": 1}, {"whole": 1, "few": 1}, {"few": 1}, {"few": None}))
    }
    assert len(digests) == 4
    again = open_store(write_yaml(folder / "again.yaml", {"whole": 2, "few": 1}))
    assert again.spec == Mixture(str(folder / "mix.yaml")).spec
    assert again.contents().endswith("weight 1") and again.contents().startswith("whole ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"features": FEATURES | {"video": replace(FEATURES["video"], rate=25.0)}},
            r"store b, feature video: rate is 25.0, not 12.5 as in whole; .*--like",
        ),
        (
            {"features": FEATURES | {"audio": replace(FEATURES["audio"], shape=(9,), encoder={"name": "mfcc"})}},
            r"store b, feature audio: encoder.mels is None, not 8; encoder.name is mfcc, not log_mel; shape is",
        ),
        ({"tasks": (Task("mood", "classification", ("0",)),)}, "store b, task mood: classification and not regression"),
    ],
)
def test_what_does_not_go_together_is_named_with_store_and_feature(folder, tmp_path, changes, message):
    write_store(tmp_path / "b", make_clips(1), **changes)
    with pytest.raises(StoreError, match=message):
        open_store(write_yaml(tmp_path / "mix.yaml", {str(folder / "whole"): 1, "b": 1}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stores: []", "expected one list, `stores`"),
        ("- a", "expected one list, `stores`"),
        ("stores: [a", "not YAML"),
        ("stores: [a]", "entry 1 of stores names no store"),
        ("stores: [{store: a, share: 2}]", "entry 1 of stores has a key share; known are store, weight"),
        ("stores: [{store: a, weight: 0}]", "weight 0 of store a: must be a number above 0"),
        ("stores: [{store: a, weight: two}]", "weight 'two' of store a"),
        ("stores: [{store: a, weight: .nan}]", "weight nan of store a"),
        ("stores: [{store: a, weight: 1}, {store: b}]", "store .*/b has no weight: give all stores one, or none"),
        ("stores: [{store: a}, {store: ./a}]", "store .*/a is named twice"),
        ("stores: [{store: other.yaml}]", "other.yaml is a mixture itself"),
        ("stores: [{store: ../none}]", "no feature store at /[^.]*/none"),
    ],
)
def test_a_file_that_is_no_mixture_is_one_line(tmp_path, text, message):
    (tmp_path / "mix.yaml").write_text(text)
    with pytest.raises(StoreError, match=message) as error:
        open_store(str(tmp_path / "mix.yaml"))
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_mixture_on_s3_names_its_stores_relative_to_itself(folder, monkeypatch):
    for name, value in s3.CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    with s3.server() as port, s3.Proxy(port) as proxy:
        fs, _ = open_fs(proxy.uri("s3://bucket", allow_bucket_creation="true"))
        fs.create_dir("bucket")
        for name in ("whole", "few"):
            pafs.copy_files(str(folder / name), f"bucket/stores/{name}", destination_filesystem=fs)
        text = (folder / "mix.yaml").read_text().replace("store: ", "store: ../stores/")
        write_text(proxy.uri("s3://bucket/mixes"), "mix.yaml", text)
        there, here = open_store(proxy.uri("s3://bucket/mixes/mix.yaml")), open_store(str(folder / "mix.yaml"))
        assert there.spec == here.spec and there.contents() == here.contents() and there.remote and not here.remote
        pairs = zip(there.samples("val"), here.samples("val"), strict=True)
        assert all((a["features"]["video"] == b["features"]["video"]).all() for a, b in pairs)


def test_what_takes_one_store_alone_says_so(folder, tmp_path):
    with pytest.raises(StoreError, match="a mixture of stores cannot be used here: name one of its stores"):
        Store(str(folder / "mix.yaml"))
    with pytest.raises(StoreError, match="a mixture of stores cannot be used here"):
        create_store(str(tmp_path / "new.yaml"), Store(str(folder / "few")).spec)
    assert not (tmp_path / "new.yaml").exists()
    with pytest.raises(StoreError, match="there is no such file"):
        open_store(str(tmp_path / "gone.yaml"))
