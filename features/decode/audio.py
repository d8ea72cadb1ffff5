"""The sound of one clip as log-mel frames: PyAV decodes, torchaudio resamples and transforms.

Sound and pictures share one clock, the file's: sound that begins later than the file is preceded by silence, so that
log-mel frame k, whose window is centred at (k + 0.5) * hop, belongs to the video frame shown at that time. Packets
that do not decode become silence.
"""

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import av
import numpy as np
import torch
from av.audio.stream import AudioStream
from av.container import InputContainer
from torchaudio.transforms import MelSpectrogram, Resample

from features.decode.media import (
    PADDING,
    MediaFile,
    check_segment,
    clock_zero,
    held_share,
    media_file,
    packet_time,
    packets,
    tick_of,
)
from features.decode.probe import declared_end, is_declared_filled, sound_stream
from features.decode.specs import AudioSpec
from features.encoders.registry import find_encoder
from features.errors import MediaError, SegmentBeyondEnd, one_line

PREROLL = 0.5  # s decoded before a segment: AAC and MP3 frames need the ones before them
# Codecs that sound as from the file's beginning after that, in files that say where a seek has led. Those of speech and
# ADPCM refer to what was heard seconds ago; they are read from the beginning.
FORGETFUL = ("pcm_", "aac", "mp3", "mp2", "opus", "libopus", "vorbis", "flac", "alac", "ac3", "eac3", "wmav")
GAP = 0.05  # s by which sound may drift from its timestamps before silence fills the gap, or what overlaps is cut
SLIP = 2e-3  # s by which a time differs from the count of samples, at least, where it is not just rounded
RESTART = 1.0  # s; timestamps that go back further begin anew: what follows is no overlap
QUIET = 1e-3  # of full scale (-60 dB): a log-mel frame without a louder sample is silence
KERNEL = 1_000_000  # numbers of a resampling kernel, about; of the usual rates none has a third of it
FLOOR = 1e-6  # added to the mel power, so that silence has a logarithm


class Sound(NamedTuple):
    """samples: (N,) float32, mono, in [-1, 1]; rate: the file's own, samples per second.

    decoded: share of the declared seconds that decoded; None where the file declares none.
    """

    samples: np.ndarray
    rate: int
    decoded: float | None


@dataclass
class Tokens:
    """values: (T, mels) float16, or (N,) float32 samples for a network; duration: seconds of sound.

    quality: the sound's columns of QUALITY_SCHEMA.
    """

    values: np.ndarray
    duration: float
    quality: Mapping[str, float | None]


def encode_audio(
    file: str | MediaFile, spec: AudioSpec, start: float | None = None, end: float | None = None
) -> Tokens | None:
    """The log-mel frames of a clip's sound, or of its segment from start to end (s); None where it has no sound.

    For a network, its samples at the rate that the network takes.
    Raises MediaError (stage open or audio).
    """
    sound = decode_sound(file, start, end)
    if sound is None:
        return None
    if (asked := spec.asked()) is None:
        values = log_mel(sound.samples, sound.rate, spec)
    else:
        values = resample(torch.from_numpy(sound.samples), sound.rate, find_encoder(asked).sample_rate).numpy()
    if not np.isfinite(values).all():
        uri = file if isinstance(file, str) else file.uri
        raise MediaError("audio", f"{uri}: the sound is louder than log-mel frames can hold; it is damaged")
    frames = max(1, round(len(sound.samples) / sound.rate / spec.hop))
    edges = np.round(np.arange(frames) * spec.hop * sound.rate).astype(int)
    loudest = np.maximum.reduceat(np.abs(sound.samples), edges)
    quality = {"decoded_audio": sound.decoded, "silence": float((loudest < QUIET).mean())}
    return Tokens(values, len(sound.samples) / sound.rate, quality)


def decode_sound(file: str | MediaFile, start: float | None = None, end: float | None = None) -> Sound | None:
    """Decode the clip's sound (`probe.sound_stream`), mixed to mono, from start to end (s; cut at the file's end).

    A damaged or cut off file gives what is left of it, and decoded says how much that is. None where the file has no
    sound. Raises MediaError (stage open or audio), SegmentBeyondEnd where the sound ends before the segment starts.
    """
    with media_file(file) as media:
        begin, stop = check_segment("audio", media.uri, start, end)
        try:
            sound = _read(media, begin, stop, seek=begin > PREROLL)
        except (MediaError, MemoryError):
            raise
        except (av.FFmpegError, OSError, ValueError) as error:
            raise MediaError("audio", f"{media.uri}: the sound does not decode: {one_line(error)}") from error
    if sound is not None and not np.isfinite(sound.samples).all():
        broken = "the sound holds NaN or infinite samples; it is damaged, fetch it again"
        raise MediaError("audio", f"{media.uri}: {broken}")
    return sound


def _read(media: MediaFile, begin: float, stop: float | None, seek: bool) -> Sound | None:
    """Decode from begin to stop; every frame lies where its timestamp says on the file's clock."""
    with media.opened(fresh=True) as container:
        stream = sound_stream(media, container)
        if stream is None:
            return None
        seek = seek and stream.codec_context.name.startswith(FORGETFUL)
        if seek:
            try:
                container.seek(round((begin - PREROLL + clock_zero(container)) / tick_of(stream)), stream=stream)
            except av.FFmpegError:  # a format, or a file without an index, that cannot
                return _read(media, begin, stop, seek=False)
        if not (rate := stream.rate):  # declared, and FFmpeg's first look saw none of it
            if any(packet.size for packet in container.demux(stream)):
                late = "its sound begins too late in the file for FFmpeg to tell its rate; remux it"
                raise MediaError("audio", f"{media.uri}: {late}")
            return None
        first, last = round(begin * rate), None if stop is None else round(stop * rate)
        origin, samples, lost = _join(container, stream, first, last, at=first + 1 if seek else 0)
        held = (origin + len(samples)) / rate
        declared = declared_end(media, container, stream, held)
        filled = is_declared_filled(stream)
    if seek and (origin > first or not len(samples)):  # some formats seek past the time asked for
        return _read(media, begin, stop, seek=False)
    if not len(samples) and not lost and not filled:
        return None  # a track that is declared and empty
    if not len(samples):
        raise MediaError("audio", f"{media.uri} has an audio stream without sound; it is damaged, fetch it again")
    if held <= begin:
        whole = declared is None or declared <= begin + PADDING
        beyond = f"{media.uri}: the segment starts at {begin:g} s, but the sound ends at {held:.3f} s"
        raise SegmentBeyondEnd("audio", beyond) if whole else MediaError("audio", beyond)
    decoded = held_share(begin, stop, held, stop if stop is not None and held >= stop else declared, lost)
    silence = max(0, min(origin, origin if last is None else last) - first)
    samples = samples[max(0, first - origin) : None if last is None else max(0, last - origin)]
    return Sound(np.concatenate([np.zeros(silence, np.float32), samples]), rate, decoded)


def _join(
    container: InputContainer, stream: AudioStream, first: int, last: int | None, at: int
) -> tuple[int, np.ndarray, float]:
    """All samples from here to sample number last as one array, and the number of its first sample.

    And how many seconds between first and last did not decode. at: the number of a first sample that has no time.
    """
    zero, rate = clock_zero(container), stream.rate
    # A timestamp that jumps further is a broken one; a file as it was streamed declares no duration.
    longest = (container.duration / av.time_base + 1) * rate if container.duration else math.inf
    stream.codec_context.thread_type, stream.codec_context.thread_count = "NONE", 1
    mixer = _Mixer(rate)
    chunks: list[np.ndarray] = []
    origin, end, lost = at, at, 0.0
    for packet, frame in _frames(container, stream):
        time = packet_time(packet) if frame is None else frame.time
        position = end if time is None else round((time - zero) * rate)
        beyond = last is not None and position >= last and bool(chunks)
        if frame is None and not beyond:
            lost += float((packet.duration or 0) * packet.time_base) if position >= first else 0.0
            continue
        if not chunks:
            origin = end = position if position < longest else first
        elif end <= first and origin <= position <= first and abs(position - end) > SLIP * rate:
            chunks, origin, end = [], position, position  # the first times after a seek were wrong
        if GAP * rate < position - end < longest:
            chunks.append(np.zeros(position - end, np.float32))
            end = position
        if beyond:
            break
        assert frame is not None  # else `beyond`, or passed over
        samples = mixer.mix(frame)
        if GAP * rate < end - position < RESTART * rate:
            samples = samples[end - position :]
        chunks.append(samples)
        end += len(samples)
    return origin, np.concatenate(chunks) if chunks else np.empty(0, np.float32), lost


class _Mixer:
    """Frames of any format, layout and rate, which may change within a file, to mono at one rate.

    FFmpeg weighs the channels of a layout that the file states. A layout that it does not state ("6 channels") FFmpeg
    would guess, and leave out what it takes for the channel of deep sound: there every channel counts as much.
    """

    def __init__(self, rate: int) -> None:
        self.rate = rate
        self.given: tuple[str, str, int] | None = None
        self.resampler: av.AudioResampler

    def mix(self, frame: av.AudioFrame) -> np.ndarray:
        """(N,) float32: the frame, less the few samples that a resampler holds back for the next one."""
        layout = frame.layout.name
        if layout.endswith(" channels"):
            frame, layout = _equally_mixed(frame), "mono"
        parts: list[av.AudioFrame] = []
        given = frame.format.name, layout, frame.sample_rate
        if given != self.given:
            parts = self.resampler.resample(None) if self.given else []
            self.given = given
            # Without the limit FFmpeg mixes floats beyond full scale: equal channels come out 1.4 times as loud.
            self.resampler = av.AudioResampler("fltp", "mono", self.rate, options={"rematrix_maxval": "1.0"})
        parts += self.resampler.resample(frame)
        arrays = [_samples(part) for part in parts if part is not None]  # None: nothing was held back
        return np.concatenate(arrays) if arrays else np.empty(0, np.float32)


def _samples(frame: av.AudioFrame) -> np.ndarray:
    """(N,) float32: what a mono frame of floats holds; a view."""
    plane: Any = frame.planes[0]  # PyAV's hints do not say that it is a buffer
    return np.frombuffer(plane, np.float32, frame.samples)


def _equally_mixed(frame: av.AudioFrame) -> av.AudioFrame:
    """The mean of a frame's channels, as a frame of its own."""
    samples: Any = frame.to_ndarray()
    if samples.dtype.kind != "f":
        zero, scale = (128, 128) if samples.dtype == np.uint8 else (0, -float(np.iinfo(samples.dtype).min))
        samples = (samples.astype(np.float32) - zero) / scale
    if not frame.format.is_planar:
        samples = samples.reshape(-1, frame.layout.nb_channels).T
    mean = np.ascontiguousarray(samples.mean(axis=0, keepdims=True), np.float32)
    mixed = av.AudioFrame.from_ndarray(mean, "fltp", "mono")
    mixed.sample_rate, mixed.pts, mixed.time_base = frame.sample_rate, frame.pts, frame.time_base
    return mixed


def _frames(container: InputContainer, stream: AudioStream) -> Iterator[tuple[av.Packet, av.AudioFrame | None]]:
    """Every frame that decodes, with its packet; None in its place for a packet that does not decode."""
    for packet in packets(container, stream):
        try:
            frames: list[Any] = packet.decode()
        except av.FFmpegError:
            frames = [None]
        yield from ((packet, frame) for frame in frames)


def log_mel(samples: np.ndarray, rate: int, spec: AudioSpec) -> np.ndarray:
    """(N,) float32 samples at a rate to (T, mels) float16: log(mel power + 1e-6).

    T = round(seconds / hop), at least 1; the window of frame k is centred at (k + 0.5) * hop, silence around the ends.
    """
    hop, transform = round(spec.hop * spec.sample_rate), _mel(spec)
    frames = max(1, round(len(samples) / rate / spec.hop))
    with torch.inference_mode():
        wave = torch.from_numpy(np.ascontiguousarray(samples, np.float32))
        if rate != spec.sample_rate:
            wave = resample(wave, rate, spec.sample_rate)
        lead = (transform.n_fft - hop) // 2
        wanted = (frames - 1) * hop + transform.n_fft
        wave = torch.nn.functional.pad(wave, (lead, max(0, wanted - lead - len(wave))))[:wanted]
        return torch.log(transform(wave) + FLOOR).T.contiguous().half().numpy()


@functools.lru_cache(maxsize=8)
def _mel(spec: AudioSpec) -> MelSpectrogram:
    window = round(spec.window * spec.sample_rate)
    return MelSpectrogram(
        spec.sample_rate,
        n_fft=1 << (window - 1).bit_length(),  # at least the window: narrow low bands need fine frequency bins
        win_length=window,
        hop_length=round(spec.hop * spec.sample_rate),
        n_mels=spec.mels,
        center=False,
    )


def resample(wave: torch.Tensor, rate: int, wanted: int) -> torch.Tensor:
    """(N,) float32 samples at one rate to another, by torchaudio where its kernel is small, else by FFmpeg.

    torchaudio's kernel grows with both rates over their greatest common divisor: from 22,254 to 16,000 Hz it has 89
    million numbers, and takes 3.6 GB to make.
    """
    divisor = math.gcd(rate, wanted)
    if (rate // divisor) * (wanted // divisor) <= KERNEL:
        return _resampler(rate, wanted)(wave)
    resampler = av.AudioResampler("fltp", "mono", wanted)
    parts = []
    for first in range(0, len(wave), rate):
        frame = av.AudioFrame.from_ndarray(wave[None, first : first + rate].numpy(), "fltp", "mono")
        frame.sample_rate, frame.pts, frame.time_base = rate, first, Fraction(1, rate)
        parts += resampler.resample(frame)
    parts += resampler.resample(None)
    samples = [_samples(part) for part in parts if part is not None]
    return torch.from_numpy(np.concatenate(samples)) if samples else wave[:0]


# Few, for they stay: how much memory is left for a clip must not depend on the rates of those before it.
@functools.lru_cache(maxsize=4)
def _resampler(rate: int, wanted: int) -> Resample:
    return Resample(rate, wanted)
