"""A manifest may grow, and the sources of failed clips may change; all that was extracted stays as it is."""

import hashlib
import itertools
import shutil
import tarfile
from pathlib import Path

import pytest
from mediafiles import numbered, sine, write_manifest, write_media

from features.corpus.manifest import Corpus, read_corpus
from features.corpus.validation import validate
from features.decode.specs import DECODING, AudioSpec, EncoderSpec, VideoSpec
from features.errors import StoreError
from features.extractor import Extraction
from features.store import Store, StoreSpec
from features.store.growth import apply_change, changed_spec
from features.store.plan import planned_clips, write_plan
from features.store.shards import create_store, find_store, require_same_decoding
from features.store.verify import verify

ENCODER = EncoderSpec(VideoSpec(fps=5, size=8), AudioSpec(mels=8))


def rows(count, offset=0):
    splits = ("train", "train", "val", "test")
    return [
        {"clip_id": f"c{n}", "video": "good.mp4", "split": splits[n % 4], "label": "ab"[n // 4 % 2]}
        for n in range(offset, offset + count)
    ]


@pytest.fixture
def folder(tmp_path):
    write_media(tmp_path / "good.mp4", numbered(10), sound=sine(440, 0.4))
    return tmp_path


def spec_of(corpus, encoder=ENCODER):
    report = validate(corpus)
    decoding = encoder.decoding()
    return StoreSpec(encoder.features(), report.tasks, report.splits, 3, report.digest, decoding=decoding)


def extract(folder, manifest, extend=False, retry=None):
    corpus = read_corpus(write_manifest(folder / "corpus.csv", manifest))
    spec, uri = spec_of(corpus), str(folder / "store")
    if extend or retry is not None:
        changed = changed_spec(Store(uri), spec, corpus, extend)
        store = apply_change(Store(uri), changed, corpus)
    else:
        store = create_store(uri, spec)
        write_plan(store, corpus)
    extraction = Extraction(uri, corpus, ENCODER, 60, 4.0, retry)
    committed = store.committed()
    for name in store.spec.shards():
        if name not in committed or retry is not None:
            extraction.shard(name)
    return Store(uri)


def killed():
    raise KeyboardInterrupt
    yield


def digests(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in Path(folder).glob("store/[sif]*/*.*")}


def check(store):
    problems = []
    verify(store, problems.append)
    assert not problems
    assert sum(store.counts()) == store.spec.rows


@pytest.mark.slow
def test_a_grown_manifest_extracts_only_what_is_new(folder):
    before = extract(folder, rows(10))
    old, fingerprint = digests(folder), before.spec.fingerprint
    store = extract(folder, rows(10) + rows(7, 10), extend=True)
    check(store)
    assert store.counts() == (17, 0) and store.spec.rows == 17
    new = digests(folder)
    assert {name: new[name] for name in old} == old
    assert store.spec.fingerprint != fingerprint
    assert store.spec.extends == ({"corpus": before.spec.corpus, "splits": before.spec.splits},)
    assert find_store(store.uri, spec_of(read_corpus(str(folder / "corpus.csv")))) is not None  # the same command again
    check(extract(folder, rows(10) + rows(7, 10) + rows(3, 17), extend=True))
    assert len(Store(store.uri).spec.extends) == 2


@pytest.mark.slow
def test_what_was_extracted_must_not_change(folder):
    store = extract(folder, rows(10))
    for manifest, message in (
        ([{**rows(1)[0], "label": "b"}, *rows(9, 1)], "column 'label' of clip 'c0' has changed"),
        (rows(9), "'c9' is gone"),
        ([rows(1, 20)[0], *rows(10)], "'c20' stands where 'c0' stood"),
    ):
        corpus = read_corpus(write_manifest(folder / "other.csv", manifest))
        with pytest.raises(StoreError, match=message):
            changed_spec(store, spec_of(corpus), corpus, extend=True)
    corpus = read_corpus(write_manifest(folder / "other.csv", rows(11)))
    with pytest.raises(StoreError, match=r"'c10' has been added .* --extend"):
        changed_spec(store, spec_of(corpus), corpus, extend=False)
    with pytest.raises(StoreError, match="if clips were added to the corpus, --extend"):
        find_store(store.uri, spec_of(corpus))


@pytest.mark.slow
def test_a_label_stays_the_task_that_it_was(folder):
    """pandas writes whole numbers as fractions once one is missing."""
    manifest = [{**row, "label": n % 2, "score": 1 + n} for n, row in enumerate(rows(8))]
    corpus = read_corpus(write_manifest(folder / "corpus.csv", manifest)).declare("label,score:regression")
    report = validate(corpus, "label,score:regression")
    spec = StoreSpec(ENCODER.features(), report.tasks, report.splits, 3, report.digest, decoding=ENCODER.decoding())
    store = create_store(str(folder / "store"), spec)
    write_plan(store, corpus)
    more = [{**row, "label": n % 2, "score": 1 + n} for n, row in enumerate(rows(12))]
    for changes, message in (
        ({"label": ""}, "'label' is regression now, and was classification .* give --tasks label:classification"),
        ({"score": 3.5}, "column 'score' holds double now, and held int64"),
    ):
        grown = [*more[:8], {**more[8], **changes}, *more[9:]]
        if "label" in changes:
            grown = [{**row, "label": row["label"] if row["label"] == "" else float(row["label"])} for row in grown]
        changed = read_corpus(write_manifest(folder / "grown.csv", grown)).declare("label,score:regression")
        now = validate(changed, "label,score:regression")
        wanted = StoreSpec(ENCODER.features(), now.tasks, now.splits, 3, now.digest, decoding=ENCODER.decoding())
        with pytest.raises(StoreError, match=message):
            changed_spec(store, wanted, changed, extend=True)


@pytest.mark.slow
def test_the_source_of_a_failed_clip_may_change(folder):
    manifest = rows(8)
    manifest[2]["video"] = "lost.mp4"
    store = extract(folder, manifest)
    assert store.counts() == (7, 1)
    manifest[2]["video"] = "good.mp4"
    store = extract(folder, manifest, retry=())
    check(store)
    assert store.counts() == (8, 0)


@pytest.mark.slow
@pytest.mark.parametrize("extend", [False, True], ids=["sources", "rows"])
def test_a_change_that_was_killed_while_it_was_planned_is_compared_again(folder, extend, monkeypatch):
    manifest = rows(8)
    manifest[2]["video"] = "lost.mp4"
    store = extract(folder, manifest)
    manifest[2]["video"] = "good.mp4"
    manifest += rows(4, 8) if extend else []
    read = Corpus.batches
    with monkeypatch.context() as patch:
        patch.setattr(Corpus, "batches", lambda self: itertools.chain(read(self), killed()))
        patch.setattr("features.store.growth._compare", lambda *_: None)
        with pytest.raises(KeyboardInterrupt):
            extract(folder, manifest, extend, retry=())
    corpus = read_corpus(write_manifest(folder / "other.csv", [{**manifest[0], "label": "b"}, *manifest[1:]]))
    with pytest.raises(StoreError, match="column 'label' of clip 'c0' has changed"):
        changed_spec(Store(store.uri), spec_of(corpus), corpus, extend)
    store = extract(folder, manifest, extend, retry=())
    check(store)
    assert store.counts() == (len(manifest), 0)


def test_a_plan_of_another_manifest_than_the_stores_is_made_anew(folder, monkeypatch):
    """A change was killed between its plan and store.json, and then taken back."""
    manifest = rows(8)
    corpus = read_corpus(write_manifest(folder / "corpus.csv", manifest))
    store = create_store(str(folder / "store"), spec_of(corpus))
    write_plan(store, corpus)
    changed = read_corpus(write_manifest(folder / "changed.csv", [{**manifest[0], "video": "x.mp4"}, *manifest[1:]]))
    with monkeypatch.context() as patch:
        patch.setattr("features.store.growth.write_atomic", lambda *_: next(killed()))
        with pytest.raises(KeyboardInterrupt):
            apply_change(Store(store.uri), spec_of(changed), changed)
    assert next(planned_clips(store, "train"))["video"] == "x.mp4"
    write_plan(Store(store.uri), corpus)
    assert next(planned_clips(store, "train"))["video"] == "good.mp4"


@pytest.mark.slow
def test_a_store_of_another_decode_version_is_read_and_not_extended(folder):
    import json

    store = extract(folder, rows(4))
    path = folder / "store/store.json"
    plain = json.loads(path.read_text())
    assert plain.pop("decoding") == DECODING
    path.write_text(json.dumps(plain))
    old = Store(str(folder / "store"))
    assert old.spec.decoding == 1 and "decoding" not in old.spec.to_dict()
    assert find_store(old.uri, store.spec) is not None and old.index().num_rows == 4
    with pytest.raises(StoreError, match="decoders of version 1, and these are of version 3"):
        require_same_decoding(old, ENCODER.decoding())


@pytest.mark.slow
def test_media_inside_a_tar_are_as_media_beside_it(folder):
    with tarfile.open(folder / "shard-000.tar", "w") as tar:
        for number in range(4):
            tar.add(folder / "good.mp4", f"clips/{number}.mp4")
        tar.add(folder / "good.mp4", "clips/é #1.mp4")
    plain = extract(folder, rows(4))
    whole = plain.index(columns=["clip_id", "sha256"]).to_pylist()
    shutil.rmtree(folder / "store")
    names = ["clips/0.mp4", "clips/1.mp4", "clips/é #1.mp4", "clips/none.mp4"]
    manifest = [row | {"video": f"shard-000.tar#{name}"} for row, name in zip(rows(4), names, strict=True)]
    store = extract(folder, manifest)
    check(store)
    inside = {row["clip_id"]: row["sha256"] for row in store.index(columns=["clip_id", "sha256"]).to_pylist()}
    assert inside == {row["clip_id"]: row["sha256"] for row in whole if row["clip_id"] != "c3"}
    (failure,) = store.failures().to_pylist()
    assert failure["message"].startswith("shard-000.tar#clips/none.mp4 does not exist: the tar has 5 files")
