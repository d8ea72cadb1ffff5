"""Frames' vectors on GPUs: neighbours change no bit, clips go through together, and the store is the one of a CPU.

Ray is told of a GPU; where there is none in truth, the network runs on the CPU behind the same actor.
"""

import asyncio

import numpy as np
import pytest
import ray
import torch
from inprocess import run_extract
from mediafiles import numbered, write_manifest, write_media
from torchvision.models import resnet18

from features.decode.specs import EncoderSpec, VideoSpec
from features.encoders import Asked
from features.errors import FeaturesError
from features.store import Store
from features.store.verify import verify
from pipelines.common.cluster import start_ray
from pipelines.common.embedding import CPU_BATCH, NetworkActor, SharedNetworks, shared_networks
from pipelines.common.errors import JobError

CLIPS = [np.random.default_rng(n).integers(0, 256, (n, 32, 32, 3), np.uint8) for n in (5, 150, 3, 1)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Seven clips of unequal length, one of them broken, and weights."""
    folder = tmp_path_factory.mktemp("frames")
    torch.manual_seed(0)
    torch.save(resnet18().state_dict(), folder / "resnet.pth")
    for n in range(7):
        write_media(folder / f"{n}.mp4", numbered(5 + 3 * n))
    (folder / "3.mp4").write_bytes(bytes(500))
    splits = ["train"] * 5 + ["val", "test"]
    rows = [{"clip_id": n, "video": f"{n}.mp4", "split": splits[n], "label": "ab"[n % 2]} for n in range(7)]
    write_manifest(folder / "corpus.csv", rows)
    return folder


@pytest.fixture(scope="module")
def with_gpu(no_shared_ray):
    """A Ray that knows of one GPU."""
    start_ray(address="local", num_cpus=2, num_gpus=1, log_to_driver=False)
    yield
    ray.shutdown()


def test_clips_that_wait_go_through_together_and_neighbours_change_no_bit(folder):
    encoder, passes = actor(folder), []
    net = encoder.runners["video"].encoder.net
    net.register_forward_hook(lambda net, x, out: passes.append(len(x[0])))

    async def embed(clips):
        return await asyncio.gather(*(encoder.embed("video", clip) for clip in clips))

    together = asyncio.run(embed(CLIPS))
    assert [vectors.shape for vectors in together] == [(len(clip), 512) for clip in CLIPS]
    assert passes == [CPU_BATCH] * (1 + 10)  # the first clip alone, then the three that waited meanwhile, 154 frames
    for clip, vectors in zip(CLIPS, together, strict=True):
        np.testing.assert_array_equal(asyncio.run(embed([clip]))[0], vectors)
    torch.nn.init.constant_(net[0].weight, 0)
    assert np.abs(asyncio.run(embed(CLIPS[:1]))[0].astype(float) - together[0]).max() > 1e-2


def test_an_error_costs_its_clip_and_none_that_waits_with_it(folder):
    encoder = actor(folder)

    async def embed(clips):
        return await asyncio.gather(*(encoder.embed("video", clip) for clip in clips), return_exceptions=True)

    outcomes = asyncio.run(embed([CLIPS[0], CLIPS[2], CLIPS[3][:, :, :, :2]]))
    assert [isinstance(outcome, Exception) for outcome in outcomes] == [False, False, True]
    assert asyncio.run(embed([CLIPS[3]]))[0].shape == (1, 512)


@pytest.mark.slow
def test_an_encoder_that_dies_starts_anew(folder, with_gpu):
    spec = resnet(folder)
    for none in (EncoderSpec(VideoSpec(size=32), None), -1), (spec, 0), (EncoderSpec(None, None), -1):
        with shared_networks(*none, workers=2) as on_gpus:
            assert on_gpus is None
    with shared_networks(spec, 1, workers=2) as on_gpus:
        before = on_gpus("video", CLIPS[0])()
        ray.kill(on_gpus.actors[0], no_restart=False)
        np.testing.assert_array_equal(on_gpus("video", CLIPS[0])(), before)


@pytest.mark.slow
def test_only_gpus_that_are_free_and_work_are_taken_unasked(folder, with_gpu, monkeypatch, capsys):
    spec = resnet(folder)
    with shared_networks(spec, -1, workers=2) as on_gpus:
        assert (on_gpus is None) == (not torch.cuda.is_available())
    said = capsys.readouterr().out
    assert torch.cuda.is_available() or "Ray has a GPU where torch sees none" in said
    monkeypatch.setattr("pipelines.common.embedding.PATIENCE", 5)
    with shared_networks(spec, 1, workers=1), shared_networks(spec, -1, workers=1) as second:
        assert second is None


@pytest.mark.slow
def test_an_encoder_that_is_lost_for_good_costs_its_answer_and_one_that_cannot_start_says_why(
    folder, with_gpu, monkeypatch
):
    monkeypatch.setattr("pipelines.common.embedding.PATIENCE", 3)
    spec = resnet(folder)
    with shared_networks(spec, 1, workers=1) as on_gpus:
        nowhere = ray.remote(num_gpus=2, num_cpus=0)(NetworkActor).remote(spec.networks())
        answers = [SharedNetworks([nowhere, on_gpus.actors[0]], ("video",), "")("video", CLIPS[3]) for _ in range(2)]
        for answer in answers:
            assert answer().shape == (1, 512)
        monkeypatch.setattr("pipelines.common.embedding.TRIES", 1)
        with pytest.raises(FeaturesError, match="no answer for 3 s"):
            SharedNetworks([nowhere], ("video",), "resnet18")("video", CLIPS[3])()
    wrong = resnet(folder, "gone.pth")
    said = r"does not start on a GPU: .*weights .*gone.pth are none"
    with pytest.raises(JobError, match=said), shared_networks(wrong, 1, workers=1):
        pass


@pytest.mark.slow
def test_the_job_stores_the_same_with_a_gpu_however_clips_are_grouped(folder, with_gpu, capsys):
    one, two, cpu = (stored(folder, name, *options) for name, options in {
        "one": ["--gpus=1"], "two": ["--gpus=1", "--shard-rows=2", "--concurrency=2"], "cpu": ["--gpus=0"]
    }.items())  # fmt: skip
    assert capsys.readouterr().out.count("resnet18 on 1 GPUs") == 2
    assert one.keys() == two.keys() == cpu.keys() == {"0", "1", "2", "4", "5", "6"}
    for clip_id, (video, quality) in one.items():
        np.testing.assert_array_equal(video, two[clip_id][0])
        np.testing.assert_allclose(video, cpu[clip_id][0], atol=4e-3)
        assert video.dtype == np.float16 and quality == cpu[clip_id][1]


def test_more_gpus_than_there_are_is_one_line(folder, tmp_path, with_gpu, capsys):
    assert extracted(folder, tmp_path / "store", "--gpus=2") != 0
    assert "--gpus 2: the cluster has 1" in capsys.readouterr().err


def resnet(folder, weights="resnet.pth"):
    """Frames of 32 pixels through ResNet-18."""
    return EncoderSpec(VideoSpec(size=32, encoder="resnet18", weights=str(folder / weights)), None)


def actor(folder):
    """ResNet-18's actor, in this process."""
    return NetworkActor({"video": Asked("resnet18", "video", str(folder / "resnet.pth"))})


def stored(folder, name, *options):
    """Vectors and quality of each clip in the store that the job makes."""
    assert extracted(folder, folder / name, *options) == 0
    store = Store(str(folder / name))
    assert verify(store, pytest.fail).problems == 0 and store.counts() == (6, 1)
    return {
        row["clip_id"]: (
            store.read(row["shard"], row["offset"], row["nbytes"])["video"],
            {name: row[name] for name in row if name not in ("shard", "offset", "nbytes", "sha256")},
        )
        for row in store.index().to_pylist()
    }


def extracted(folder, store, *options):
    """The exit code of the job inside this process."""
    what = ["--corpus", folder / "corpus.csv", "--store", store, "--modalities", "video", "--max-failed", "0.2"]
    how = ["--video.encoder", "resnet18", "--video.weights", folder / "resnet.pth", "--video.size", "32"]
    return run_extract(*what, *how, *options)
