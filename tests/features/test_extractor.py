"""One shard's work: what is tried again, what stays, and what happens where nothing can be written."""

import os
import resource
import shutil

import numpy as np
import pytest
from mediafiles import write_manifest
from storefiles import files_of

from features.corpus.manifest import read_corpus
from features.decode.specs import AudioSpec, EncoderSpec, VideoSpec
from features.errors import MediaError, StoreError
from features.extractor import Extraction, embedded, isolated_encoder
from features.store import Store, StoreSpec
from features.store.plan import write_plan
from features.store.samples import Sample, pack
from features.store.shards import Failure, create_store, failed_shards, sweep_litter

ENCODER = EncoderSpec(VideoSpec(size=16), AudioSpec())
NAMES = ["good", "late", "silent", "corrupt", "good", "late"]
pytestmark = pytest.mark.slow


@pytest.fixture
def folder(media, tmp_path):
    """Six training clips: the two of late.mp4, which is missing as yet, and the one of corrupt.mp4 fail."""
    for name in ("good", "silent", "corrupt"):
        shutil.copy(media / f"{name}.mp4", tmp_path)
    rows = [
        {"clip_id": f"{n}", "video": f"{v}.mp4", "split": "train", "label": "ab"[n % 2]} for n, v in enumerate(NAMES)
    ]
    write_manifest(tmp_path / "corpus.csv", rows)
    yield tmp_path
    isolated_encoder.cache_clear()


def extraction(folder, name="store", retry=None):
    """A planned store of one shard, and its work."""
    corpus = read_corpus(str(folder / "corpus.csv"))
    store = create_store(str(folder / name), StoreSpec(ENCODER.features(), (), {"train": 6}, 6, "digest"))
    write_plan(store, corpus)
    return Extraction(store.uri, corpus, ENCODER, timeout=60, memory_gb=2, retry=retry)


def counts(writer):
    return len(writer.rows), len(writer.failed)


def test_only_failures_of_the_named_classes_are_tried_again(folder, media):
    assert counts(extraction(folder).shard("train-000000")) == (3, 3)
    store = Store(str(folder / "store"))
    assert failed_shards(store, ["Timeout"]) == {} and failed_shards(store, []) == {"train-000000": 3}
    before = files_of(folder / "store")
    shutil.copy(media / "good.mp4", folder / "late.mp4")
    assert counts(extraction(folder, retry=("Timeout",)).shard("train-000000")) == (3, 3)
    assert files_of(folder / "store") == before, "what is kept is the same to the byte"
    assert counts(extraction(folder, retry=("Timeout", "open")).shard("train-000000")) == (5, 1)
    (failure,) = Store(str(folder / "store")).failures().to_pylist()
    assert (failure["clip_id"], failure["attempts"]) == ("3", 2)
    assert counts(extraction(folder, "fresh").shard("train-000000")) == (5, 1)
    retried, fresh = files_of(folder / "store"), files_of(folder / "fresh")
    assert retried.pop("failures/train-000000.parquet") != fresh.pop("failures/train-000000.parquet")  # the attempts
    assert retried == fresh


def test_a_retry_that_died_before_its_commit_is_an_extraction(folder, media):
    extraction(folder).shard("train-000000")
    os.remove(folder / "store" / "index" / "train-000000.parquet")  # what commit does first
    shutil.copy(media / "good.mp4", folder / "late.mp4")
    assert counts(extraction(folder, retry=()).shard("train-000000")) == (5, 1)


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(folder):
    work = extraction(folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # less than a clip's frames
    try:
        with pytest.raises(
            StoreError, match=r"shard train-000000 of .* cannot be written: .*run the same command again"
        ):
            work.shard("train-000000")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((folder / "store" / "index").iterdir()) and not list((folder / "store" / "shards").iterdir())
    assert counts(work.shard("train-000000")) == (3, 3) and sweep_litter(Store(work.store_uri)) == 0


class Mean:
    """A network that cannot take dark clips."""

    modalities = ("video",)

    def __call__(self, modality, values):
        def wait():
            if not values.any():
                raise MediaError(modality, "mean: it is dark")
            return values.reshape(len(values), -1).mean(axis=1, keepdims=True).astype("float16")

        return wait


def test_what_a_network_raises_costs_its_clip_alone(folder):
    clips = list(read_corpus(str(folder / "corpus.csv")).clips())[:3]
    frames = [np.full((4, 2, 2, 3), light, np.uint8) for light in (9, 0, 7)]
    decoded = [(clip, pack(clip, Sample({"video": f}, 1.0))) for clip, f in zip(clips, frames, strict=True)]
    outcomes = [outcome for _, outcome in embedded(decoded, Mean())]
    assert outcomes[1] == Failure("video", "MediaError", "mean: it is dark")
    assert [outcome.tokens for outcome in (outcomes[0], outcomes[2])] == [{"video": 4}] * 2
