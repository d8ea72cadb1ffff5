"""The contract, for every kind of encoder: what it declares it gives, at the right time, whatever is beside it."""

import sys

import numpy as np
import pytest
import torch
from encoderkinds import KINDS, OWN
from mediafiles import write_media
from PIL import Image

from features.corpus.manifest import Clip
from features.decode.clip import encode_clip
from features.decode.like import spec_of_store
from features.decode.specs import AudioSpec, EncoderSpec, ImageSpec, VideoSpec
from features.encoders.registry import find_encoder, identity_of
from features.encoders.running import Runner, count_tokens, windows
from features.errors import FeaturesError, MediaError

FPS, RATE, SECONDS = 10, 16_000, 3.0
MOMENTS = (0.23, 0.73, 1.53, 2.63)  # seconds at which there is a flash and a click: in the middle of any token
# The middle of their .78 s and 1.6 s counts for no more than the edges.
WIDE = ("audio speech_embedding", "audio voice")
each_kind = pytest.mark.parametrize("kind", KINDS)
each_timed = pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if not kind.startswith("image") and kind not in WIDE]
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The models, an image, and a clip in which nothing happens, and one for each moment at which something does."""
    folder = tmp_path_factory.mktemp("encoders")
    (folder / "encoders_of_one.py").write_text(OWN)
    sys.path.append(str(folder))
    generator = np.random.default_rng(0)
    hum = (0.1 * generator.normal(size=round(SECONDS * RATE))).astype(np.float32)
    for number, moment in enumerate((None, *MOMENTS)):
        frames = [np.full((32, 32, 3), 40, np.uint8) for _ in range(round(SECONDS * FPS))]
        sound = hum.copy()
        if moment is not None:
            frames[int(moment * FPS)][8:24, 8:24] = 250
            at = round(moment * RATE)
            sound[at - 32 : at + 32] += 0.6 * np.sin(2 * np.pi * 2000 / RATE * np.arange(64))
        write_media(folder / f"{number}.mp4", frames, fps=FPS)
        write_media(folder / f"{number}.wav", sound=sound, rate=RATE)
    Image.fromarray(generator.integers(0, 255, (40, 40, 3), np.uint8)).save(folder / "0.png")
    yield folder
    sys.path.remove(str(folder))


def spec_of(asked):
    """The options of a job that names this encoder."""
    common = {"encoder": asked.name, "layers": asked.layers}
    pictures = {**common, "weights": asked.weights}
    return EncoderSpec(
        VideoSpec(**pictures, fps=FPS, size=32, stride=int(asked.stride)) if asked.modality == "video" else None,
        AudioSpec(**common, span=asked.span, stride=asked.stride) if asked.modality == "audio" else None,
        image=ImageSpec(**pictures, grid=asked.grid) if asked.modality == "image" else None,
    )


def encoded(folder, spec, number=0):
    """The tokens of a clip's one modality, as a store has them."""
    (modality,) = spec.features()
    file = folder / f"{number}{ {'video': '.mp4', 'audio': '.wav', 'image': '.png'}[modality] }"
    clip = Clip(
        "1",
        *[str(file) if m == modality else None for m in ("video", "audio", "image")],
        *[None] * 3,
        "train",
        None,
        None,
    )
    return encode_clip(clip, {modality: str(file)}, spec).features[modality]


@each_kind
def test_it_gives_what_it_declares_without_its_weights(folder, kind):
    spec = spec_of(KINDS[kind](folder))
    (feature,) = spec.features().values()
    values = encoded(folder, spec)
    assert (values.dtype, feature.dtype) == (np.float16, "float16") and values.shape[1:] == feature.shape
    assert np.isfinite(values).all() and values.std() > 0
    if feature.rate:
        assert len(values) == pytest.approx(SECONDS * feature.rate, abs=1)
    else:
        assert len(values) == spec.image.grid**2


@pytest.mark.parametrize("kind", WIDE)
def test_an_embedding_of_a_long_window_is_changed_by_what_lies_in_it_and_by_nothing_else(folder, kind):
    encoder = find_encoder(KINDS[kind](folder))
    spec = spec_of(KINDS[kind](folder))
    rate, half = spec.features()["audio"].rate, encoder.window / encoder.sample_rate / 2
    still = encoded(folder, spec)
    for number, moment in enumerate(MOMENTS, start=1):
        changed = (encoded(folder, spec, number) != still).any(axis=1)
        middles = (np.arange(len(still)) + 0.5) / rate
        near = np.abs(middles - moment)
        inside = changed[near < half - 0.05]  # an LSTM of random weights forgets the window's beginning
        assert not changed[near > half + 0.01].any() and (inside.any() if kind == "audio voice" else inside.all())


@each_timed
def test_a_flash_and_a_click_lie_in_the_token_that_covers_them(folder, kind):
    spec = spec_of(KINDS[kind](folder))
    (feature,) = spec.features().values()
    still = encoded(folder, spec).astype(float)
    for number, moment in enumerate(MOMENTS, start=1):
        changes = np.abs(encoded(folder, spec, number).astype(float) - still)
        change = changes.reshape(len(still), -1, feature.shape[-1])[:, 0].sum(axis=1)  # of the early layer
        begin, end = np.argmax(change) / feature.rate, (np.argmax(change) + 1) / feature.rate
        assert begin <= moment < end, (kind, moment)


@each_kind
def test_neighbours_change_no_bit_and_too_large_a_batch_is_halved(folder, kind):
    encoder = find_encoder(KINDS[kind](folder))
    clips = clips_for(encoder, KINDS[kind](folder).modality)
    runner = Runner(encoder, batch=4)
    together, alone = runner.many(clips), [runner.many([clip])[0] for clip in clips]
    small = Runner(encoder, batch=16)
    for one, other, clip in zip(together, alone, clips, strict=True):
        np.testing.assert_array_equal(one, other)
        np.testing.assert_allclose(one, small.one(clip), atol=4e-3, rtol=4e-3)
    small.encoder = OnlyTwo(encoder)
    for one, other in zip(small.many(clips), together, strict=True):
        np.testing.assert_allclose(one, other, atol=4e-3, rtol=4e-3)
    assert small.batch == 2


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e9])
def test_what_is_no_number_costs_its_clip_and_what_is_too_large_is_the_largest(folder, value):
    class Black:
        batch, window, tokens, shape = 1, None, 1, (2,)

        def load(self, device):
            pass

        def __call__(self, batch):
            return np.full((len(batch), 1, 2), value)

    runner = Runner(Black(), batch=1)
    if np.isnan(value):
        with pytest.raises(MediaError, match="no numbers"):
            runner._call(np.zeros((1, 4)))
    else:
        assert (runner._call(np.zeros((1, 4))) == 65_504).all()


class OnlyTwo:
    """An encoder on a device that has memory for two windows."""

    def __init__(self, encoder):
        self.encoder = encoder

    def __getattr__(self, name):
        return getattr(self.encoder, name)

    def __call__(self, batch):
        if len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.encoder(batch)


def clips_for(encoder, modality):
    generator = np.random.default_rng(1)
    size = encoder.size or 16
    if modality == "audio":
        return [generator.normal(size=n).astype(np.float32) for n in (7000, 40_000, 300)]
    lengths = (1, 1, 1) if modality == "image" else (5, 19, 1)
    return [generator.integers(0, 255, (n, size, size, 3), np.uint8) for n in lengths]


@each_kind
def test_its_options_are_read_back_from_a_store_and_its_place_is_nowhere_in_it(folder, kind):
    asked = KINDS[kind](folder)
    spec = spec_of(asked)
    (modality,) = spec.features()
    assert str(folder) not in str(identity_of(asked))
    form = asked.name.partition(":")[0]
    if form in ("hf", "onnx", "voice"):
        said = rf"from files \(sha256 .*name them with --{modality}.encoder {form}:PLACE"
        with pytest.raises(FeaturesError, match=said):
            spec_of_store(spec.features())
    assert spec_of_store(spec.features(), {modality: asked.weights or asked.name}).features() == spec.features()


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8])
@pytest.mark.parametrize(
    "window, hop, tokens, lead", [(1, 1, 1, None), (3, 1, 1, None), (4, 4, 2, None), (8, 4, 4, 2), (4, 2, 1, -1)]
)
def test_windows_lie_where_their_tokens_do(length, window, hop, tokens, lead):
    encoder = type("E", (), {"window": window, "hop": hop, "tokens": tokens, "lead": lead})()
    lead = (window - hop) // 2 if lead is None else lead
    cut = windows(np.arange(1, length + 1, dtype=np.float32), encoder)
    assert len(cut) == -(-count_tokens(length, encoder) // tokens)
    for number, piece in enumerate(cut):
        begin = number * hop - lead
        wanted = [t + 1 if 0 <= t < length else 0 for t in range(begin, begin + window)]
        assert np.atleast_1d(piece).tolist() == wanted
