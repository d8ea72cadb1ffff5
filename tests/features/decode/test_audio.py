"""The decoder contract for sound, and log-mel frames that share the picture's clock."""

import math
import struct
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
import torchaudio
from mediafiles import cut, numbered, sine, wreck_packet, write_media

import features.decode.audio
from features.decode.audio import KERNEL, _resampler, decode_sound, encode_audio, log_mel, resample
from features.decode.specs import AudioSpec
from features.errors import MediaError

RATE = 16_000
DECODERS = [decode_sound]

contract = pytest.mark.parametrize("decode", DECODERS)


def chirp(seconds, rate=RATE):
    """A rising tone: every moment sounds different, so that a shift of one sample shows."""
    time = np.arange(round(seconds * rate)) / rate
    return (0.5 * np.sin(2 * np.pi * (300 + 400 * time) * time)).astype(np.float32)


def band_of(hertz, spec):
    """The mel band whose centre is nearest to a frequency."""
    edges = torchaudio.functional.melscale_fbanks(4096, 0.0, spec.sample_rate / 2, spec.mels, spec.sample_rate)
    return int(edges[round(hertz / (spec.sample_rate / 2) * 4095)].argmax())


@contract
@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.mp3", "a.mp4"])
@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_sound_comes_back_at_the_files_rate(tmp_path, decode, name, rate):
    sound = decode(write_media(tmp_path / name, sound=sine(440, 1.5, rate), rate=rate))
    assert sound.rate == rate and sound.samples.dtype == np.float32 and sound.samples.ndim == 1
    assert len(sound.samples) / rate == pytest.approx(1.5, abs=0.08)  # codecs fill their last block
    middle = sound.samples[rate // 2 : rate]
    assert np.abs(middle).max() == pytest.approx(0.5, abs=0.03)
    assert np.abs(np.fft.rfft(middle)).argmax() == pytest.approx(440 / 2, abs=1)


@contract
def test_stereo_is_mixed_to_the_mean(tmp_path, decode):
    left = sine(440, 1)
    for right, peak in ((left, 0.5), (-left, 0.0), (0 * left, 0.25)):
        sound = decode(write_media(tmp_path / "stereo.wav", sound=np.stack([left, right]), layout="stereo"))
        assert np.abs(sound.samples).max() == pytest.approx(peak, abs=0.01)


@contract
def test_every_channel_of_surround_sound_but_the_deep_one_is_heard(tmp_path, decode):
    for channel in (0, 1, 2, 4, 5):
        channels = np.zeros((6, RATE), np.float32)
        channels[channel] = sine(440, 1)
        sound = decode(write_media(tmp_path / "surround.wav", sound=channels, layout="5.1"))
        assert 0.05 < np.abs(sound.samples).max() <= 0.5


@contract
@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.mp3", "a.mp4"])
@pytest.mark.parametrize(("start", "end"), [(0.1, 0.4), (1.25, 2.0), (2.5, 99.0), (1.7, None)])
def test_a_segment_is_cut_to_the_sample(tmp_path, decode, name, start, end):
    path = write_media(tmp_path / name, sound=chirp(3.0))
    whole, part = decode(path).samples, decode(path, start=start, end=end).samples
    expected = whole[round(start * RATE) : None if end is None else round(end * RATE)]
    assert len(part) == len(expected)
    np.testing.assert_allclose(part, expected, atol=2e-3)


@contract
@pytest.mark.parametrize(("start", "end"), [(1.0, 1.4), (1.9, None), (2.5, 2.9), (3.3, 3.6)])
def test_a_segment_of_a_program_stream_is_heard_where_it_is(tmp_path, decode, start, end):
    """After a seek the first frame of such a file may carry the time of the next one."""
    path = write_media(tmp_path / "a.mpg", numbered(25) * 4, codec="mpeg2video", sound=chirp(4.0, 48_000), rate=48_000)
    whole, part = decode(path).samples, decode(path, start=start, end=end).samples
    expected = whole[round(start * 48_000) : None if end is None else round(end * 48_000)]
    assert np.abs(part[: len(expected)] - expected).max() < 0.01


@contract
def test_sound_that_begins_after_the_picture_is_preceded_by_silence(tmp_path, decode):
    path = write_media(tmp_path / "late.mp4", numbered(40), sound=sine(440, 1.0), sound_at=0.5)
    samples = decode(path).samples
    assert np.abs(samples[: round(0.45 * RATE)]).max() < 0.01
    assert np.abs(samples[round(0.55 * RATE) : RATE]).max() > 0.4
    assert len(samples) / RATE == pytest.approx(1.5, abs=0.08)
    assert np.abs(decode(path, end=0.3).samples).max() == 0 and len(decode(path, end=0.3).samples) == 4800
    np.testing.assert_allclose(decode(path, start=0.4, end=0.8).samples, samples[6400:12800], atol=2e-3)


BLOCK = 4608  # samples of a FLAC packet


def write_streamed(path, tones, step=BLOCK):
    """Tones (Hz, start s, blocks) into Matroska as to a pipe: it declares no duration. step: from stamp to stamp."""
    parts = []
    with av.open(SimpleNamespace(write=parts.append), "w", format="matroska", options={"live": "1"}) as container:
        stream = container.add_stream("flac", rate=RATE, layout="mono")
        for hertz, start, blocks in tones:
            for number in range(blocks):
                time = np.arange(number * BLOCK, (number + 1) * BLOCK) / RATE
                samples = (2**14 * np.sin(2 * np.pi * hertz * time)).astype(np.int16)
                frame = av.AudioFrame.from_ndarray(samples[None], "s16", "mono")
                frame.pts, frame.time_base = round(start * RATE) + number * step, Fraction(1, RATE)
                frame.sample_rate = RATE
                container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    path.write_bytes(b"".join(parts))
    return str(path)


@contract
def test_sound_of_a_file_without_a_duration_lies_where_its_timestamps_say(tmp_path, decode):
    path = write_streamed(tmp_path / "live.mkv", [(440, 0, 7), (440, 4, 4)])
    sound = decode(path)
    assert sound.decoded is None and len(sound.samples) == 4 * RATE + 4 * BLOCK
    loud = np.abs(sound.samples) > 0.1
    assert loud[: 7 * BLOCK].mean() > 0.8 and not loud[7 * BLOCK : 4 * RATE].any() and loud[4 * RATE :].mean() > 0.8
    for start, end in ((1.5, 4.5), (3.0, 3.5), (4.2, 4.7)):
        part = decode(path, start=start, end=end).samples
        np.testing.assert_array_equal(part, sound.samples[round(start * RATE) : round(end * RATE)])


@contract
def test_samples_that_run_ahead_of_their_timestamps_are_cut(tmp_path, decode):
    path = write_streamed(tmp_path / "fast.mkv", [(0, 0, 71), (440, 20, 4)], step=4507)
    assert np.flatnonzero(decode(path).samples)[0] / RATE == pytest.approx(20, abs=0.051)
    assert np.flatnonzero(decode(path, start=19.5).samples)[0] / RATE == pytest.approx(0.5, abs=0.051)


@contract
@pytest.mark.parametrize("layout", ["mono", "stereo"])
def test_a_rate_that_changes_within_a_file_does_not_change_the_pitch(tmp_path, decode, layout):
    parts = []
    for rate in (44_100, 22_050):
        sound = np.tile(sine(440, 1.0, rate), (1 + (layout == "stereo"), 1))
        parts.append(Path(write_media(tmp_path / f"{rate}.mp3", sound=sound, rate=rate, layout=layout)).read_bytes())
    (tmp_path / "joined.mp3").write_bytes(b"".join(parts))
    sound = decode(str(tmp_path / "joined.mp3"))
    assert len(sound.samples) / sound.rate == pytest.approx(2, abs=0.15)
    for start in (0.25, 1.4):
        half = sound.samples[round(start * sound.rate) :][: sound.rate // 2]
        assert np.abs(np.fft.rfft(half)).argmax() == pytest.approx(440 / 2, abs=1)
        assert np.abs(half).max() == pytest.approx(0.5, abs=0.03)


@contract
def test_a_file_without_sound_has_none(tmp_path, decode):
    assert decode(write_media(tmp_path / "silent.mp4", numbered(5))) is None
    assert encode_audio(str(tmp_path / "silent.mp4"), AudioSpec()) is None


@contract
def test_a_segment_after_the_sounds_end_says_so(tmp_path, decode):
    with pytest.raises(MediaError, match="segment starts at 5 s, but the sound ends at 1") as caught:
        decode(write_media(tmp_path / "a.wav", sound=sine(440, 1)), start=5.0)
    assert caught.value.stage == "audio"


@contract
@pytest.mark.parametrize(
    ("content", "message"), [(None, "does not exist"), (b"", "is empty"), (b"only words\n" * 99, "is not a media file")]
)
def test_a_file_that_is_no_sound_is_one_named_error(tmp_path, decode, content, message):
    path = tmp_path / "a.wav"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(MediaError, match=message) as caught:
        decode(str(path))
    assert caught.value.stage == "open" and "\n" not in str(caught.value)


@contract
@pytest.mark.parametrize("name", ["cut.mp4", "cut.mkv", "cut.flac", "cut.mp3"])
def test_a_file_that_is_cut_off_gives_what_is_left_and_says_how_much(tmp_path, decode, name):
    static = np.random.default_rng(0).uniform(-0.5, 0.5, 3 * RATE)
    path = write_media(tmp_path / name, sound=static, faststart=name.endswith("mp4"))
    whole = decode(path)
    sound = decode(cut(path, 0.5))
    left = len(sound.samples) / RATE
    assert whole.decoded == 1.0 and 1.2 < left < 1.8
    assert sound.decoded == pytest.approx(left / 3, abs=0.05)
    same = len(sound.samples) - 4000  # codecs blend the last blocks
    np.testing.assert_allclose(sound.samples[:same], whole.samples[:same], atol=2e-3)
    assert decode(path, end=1.0).decoded == 1.0
    assert decode(path, start=1.0, end=2.0).decoded == pytest.approx(left - 1, abs=0.11)


@contract
@pytest.mark.parametrize(("name", "codec"), [("cut.wav", "pcm_s16le"), ("cut.avi", "pcm_s16le"), ("cut.wma", "wmav2")])
def test_of_a_file_that_is_cut_off_ffmpeg_takes_the_rest_for_the_whole(tmp_path, decode, name, codec):
    path = write_sound(tmp_path / name, chirp(3.0), codec)
    assert decode(path).decoded == pytest.approx(1, abs=0.01)
    assert decode(cut(path, 0.6)).decoded == pytest.approx(0.6, abs=0.07)
    assert decode(path, end=1.0).decoded == 1.0
    with pytest.raises(MediaError, match="starts at 2 s, but the sound ends at") as caught:
        decode(path, start=2.0)
    assert type(caught.value) is MediaError  # and no segment after the end of a whole file


@contract
@pytest.mark.parametrize("size", [0, 0xFFFF_FFFF, 0x7FFF_F024])
def test_a_wav_that_was_written_as_a_stream_states_no_size(tmp_path, decode, size):
    path = Path(write_media(tmp_path / "a.wav", sound=chirp(1.0)))
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, 4, size)
    path.write_bytes(data)
    assert decode(str(path)).decoded == 1.0


@contract
@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.wav", "adpcm_ms"), ("a.wav", "adpcm_ima_wav"), ("a.mov", "adpcm_ima_qt")],
)
def test_a_segment_of_sound_that_refers_to_what_is_long_past_is_cut_to_the_sample(tmp_path, decode, name, codec):
    path = write_sound(tmp_path / name, chirp(4.0), codec)
    whole = decode(path).samples
    for start, end in ((1.3, 1.9), (2.7, None)):
        expected = whole[round(start * RATE) : None if end is None else round(end * RATE)]
        np.testing.assert_array_equal(decode(path, start=start, end=end).samples, expected)


@contract
@pytest.mark.parametrize("name", ["a.mkv", "a.flv"])
def test_times_that_are_rounded_to_milliseconds_move_no_sample(tmp_path, decode, name):
    rate = 44_100
    path = write_media(tmp_path / name, sound=chirp(2.0, rate), rate=rate)
    whole = decode(path).samples
    for start in (0.2, 0.3, 0.5):
        expected = whole[round(start * rate) : round((start + 0.4) * rate)]
        np.testing.assert_allclose(decode(path, start=start, end=start + 0.4).samples, expected, atol=2e-3)


@contract
def test_sound_that_begins_beyond_ffmpegs_first_look_is_no_silent_clip(tmp_path, decode):
    path = write_media(tmp_path / "late.ts", numbered(25) * 13, sound=sine(440, 1.0), sound_at=12.0)
    with pytest.raises(MediaError, match=r"its sound begins too late .* remux it"):
        decode(path)


def write_sound(path, samples, codec):
    """Sound alone, by a codec in whatever format it takes."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=RATE, layout="mono")
        stream.bit_rate = 64_000
        resampler = av.AudioResampler(stream.codec_context.format, "mono", RATE)
        frame = av.AudioFrame.from_ndarray(np.float32(samples)[None], "fltp", "mono")
        frame.sample_rate, frame.pts, frame.time_base = RATE, 0, Fraction(1, RATE)
        fifo = av.AudioFifo()
        for part in resampler.resample(frame):
            fifo.write(part)
        while (part := fifo.read(stream.codec_context.frame_size or 1024, partial=True)) is not None:
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))
    return str(path)


@contract
def test_packets_that_do_not_decode_are_silence_and_counted(tmp_path, decode):
    path = write_media(tmp_path / "a.mp4", sound=sine(440, 3.0))
    whole = decode(path)
    for stamp in range(16 * 1024, 26 * 1024, 1024):
        wreck_packet(path, stamp, "audio")
    sound = decode(path)
    assert len(sound.samples) == pytest.approx(len(whole.samples), abs=1024)
    assert sound.decoded == pytest.approx(1 - 10 * 1024 / RATE / 3, abs=0.03)
    assert np.abs(sound.samples[18 * 1024 : 24 * 1024]).max() == 0
    np.testing.assert_allclose(sound.samples[: 14 * 1024], whole.samples[: 14 * 1024], atol=2e-3)
    np.testing.assert_allclose(sound.samples[29 * 1024 : 40 * 1024], whole.samples[29 * 1024 : 40 * 1024], atol=2e-3)
    assert decode(path, end=1.0).decoded == 1.0


@contract
def test_a_stream_whose_length_is_a_guess_declares_none(tmp_path, decode):
    assert decode(write_media(tmp_path / "a.aac", sound=sine(440, 1.0))).decoded is None


@pytest.mark.parametrize(("gain", "silence"), [(0.5, 0.5), (0.0005, 1.0)])
def test_frames_without_a_sound_above_60_db_are_silence(tmp_path, gain, silence):
    sound = np.concatenate([sine(440, 1.0, gain=gain), np.zeros(RATE, np.float32)])
    mel = encode_audio(write_media(tmp_path / "a.flac", sound=sound), AudioSpec())
    assert mel.quality == {"decoded_audio": 1.0, "silence": pytest.approx(silence, abs=0.01)}


@pytest.mark.parametrize(
    ("sample", "message"), [(np.nan, "NaN or infinite"), (np.inf, "NaN or infinite"), (1e30, "louder")]
)
def test_numbers_that_no_sound_has_are_an_error(tmp_path, sample, message):
    samples = sine(440, 0.5)
    samples[4000] = sample
    with pytest.raises(MediaError, match=message):
        encode_audio(float_wav(tmp_path / "a.wav", samples), AudioSpec())


def float_wav(path, samples):
    """A wav of 32-bit floats, as editors save it."""
    body = samples.astype("<f4").tobytes()
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 3, 1, RATE, 4 * RATE, 4, 32)
    data = b"WAVE" + form + struct.pack("<4sI", b"data", len(body)) + body
    path.write_bytes(struct.pack("<4sI", b"RIFF", len(data)) + data)
    return str(path)


@pytest.mark.parametrize("rate", [16_000, 22_050, 48_000])
@pytest.mark.parametrize("hertz", [250, 1000, 3000])
def test_a_sine_sounds_in_its_own_mel_band(rate, hertz):
    spec = AudioSpec()
    values = log_mel(sine(hertz, 1.0, rate), rate, spec)
    assert values.shape == (50, 64) and values.dtype == np.float16
    assert set(values[2:-2].argmax(axis=1)) <= {band_of(hertz, spec) + d for d in (-1, 0, 1)}


@pytest.mark.parametrize(("samples", "frames"), [(16_000, 50), (15_839, 49), (15_841, 50), (100, 1), (1, 1)])
def test_frames_follow_the_duration(samples, frames):
    assert len(log_mel(np.zeros(samples, np.float32), RATE, AudioSpec())) == frames


@pytest.mark.parametrize("frame", [0, 7, 25, 49])
def test_a_click_is_loudest_in_the_frame_centred_on_it(frame):
    samples = np.zeros(RATE, np.float32)
    samples[round((frame + 0.5) * 0.02 * RATE)] = 1.0
    energy = log_mel(samples, RATE, AudioSpec()).astype(np.float32).sum(axis=1)
    assert energy.argmax() == frame
    if 0 < frame < 49:
        assert energy[frame - 1] == pytest.approx(energy[frame + 1], rel=0.02)


def test_silence_is_the_floor_and_finite():
    np.testing.assert_allclose(log_mel(np.zeros(RATE, np.float32), RATE, AudioSpec()), np.log(1e-6), rtol=1e-3)


def test_encode_audio_gives_the_log_mel_of_the_segment(tmp_path):
    path = write_media(tmp_path / "a.mp4", numbered(40), sound=chirp(2.0))
    mel = encode_audio(path, AudioSpec(), 0.5, 1.5)
    sound = decode_sound(path, 0.5, 1.5)
    assert mel.duration == pytest.approx(1.0) and mel.values.shape == (50, 64)
    np.testing.assert_array_equal(mel.values, log_mel(sound.samples, sound.rate, AudioSpec()))


def test_a_hop_between_samples_is_refused():
    with pytest.raises(ValueError, match="not a whole number of samples"):
        AudioSpec(sample_rate=22_050, hop=0.0333)


RATES = [8000, 11_025, 22_050, 22_254, 32_000, 44_099, 44_100, 48_000, 96_000, 15_999]


@pytest.mark.parametrize("rate", RATES)
def test_any_rate_is_resampled_to_the_same_sound(rate):
    wave = torch.from_numpy(sine(440, 1.0, rate))
    out = resample(wave, rate, RATE).numpy()
    assert abs(len(out) - RATE) <= 2
    np.testing.assert_allclose(out[500:15_000], sine(440, 1.0, RATE)[500:15_000], atol=0.01)


@pytest.mark.parametrize("rate", [8000, 22_050, 44_100, 48_000])
def test_both_resamplers_agree(monkeypatch, rate):
    wave = torch.from_numpy(chirp(1.0, rate))
    usual = resample(wave, rate, RATE).numpy()
    monkeypatch.setattr(features.decode.audio, "KERNEL", 0)
    other = resample(wave, rate, RATE).numpy()
    size = min(len(usual), len(other))
    assert np.abs(usual[200 : size - 200] - other[200 : size - 200]).max() < 0.01


def test_no_resampling_kernel_is_large():
    for rate in (*RATES, 192_000, 37_800, 6_000):
        divisor = math.gcd(rate, RATE)
        assert rate // divisor * (RATE // divisor) > KERNEL or _resampler(rate, RATE).kernel.numel() < 5 * KERNEL
