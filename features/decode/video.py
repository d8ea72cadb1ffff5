"""Frames of one clip, sampled by time: the frame on screen at start + (k + 0.5) / fps, cropped and scaled to a square.

FFmpeg's packet index (PyAV) says which frames a clip has and when each is shown, so that variable frame rates, rotated
phone clips and segments need no special case; a decoder then gives the pixels of the frames that are needed. There
are two: decord, and PyAV where decord has no wheels or does not know the codec. What neither decodes is salvaged:
PyAV once more, with FFmpeg's error concealment, and a count of the frames that show no trace of the damage.
"""

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from av import FFmpegError
from av import time_base as TIME_BASE

from features.decode.media import (
    Source,
    check_segment,
    clock_zero,
    declared_end,
    held_share,
    open_container,
    open_source,
    packets,
    stamp_of,
)
from features.decode.pyav import exact_pictures, latest_pictures, video_stream
from features.decode.specs import VideoSpec, decord_misreads, resolve_decoder
from features.errors import MediaError, one_line

try:  # no wheels outside x86-64
    import decord
except ImportError:
    decord = None
else:
    decord.logging.set_level(decord.logging.QUIET)

FAULTS = 1e-6  # share of frames that decord may replace by earlier ones without a word: none
EARLIER = 10.0  # s that a file is sought to before a segment whose key frame a first seek did not find
TICK = 1e-3  # s; decord rounds times to milliseconds, and a target often falls exactly on a frame's edge


@dataclass
class Frames:
    """values: (T, size, size, 3) uint8 RGB; times: (T,) s from the file's beginning; duration: s of the segment.

    quality: the picture's columns of quality.QUALITY_SCHEMA.
    """

    values: np.ndarray
    times: np.ndarray
    duration: float
    quality: Mapping[str, float | bool | None]


@dataclass(frozen=True)
class Shown:
    """Times (s) on the file's clock: when frames appear (sorted), when the last one goes, when the stream begins.

    share: how much of what the file declares is there; None where it declares nothing. format: FFmpeg's container.
    """

    times: np.ndarray
    end: float
    first: float
    share: float | None
    format: str


class Pictures(NamedTuple):
    """values: (N, height, width, 3) uint8; good: (N,) bool, without a trace of damage; salvaged: some were damaged."""

    values: np.ndarray
    good: np.ndarray
    salvaged: bool


def decode_frames(uri: str, spec: VideoSpec, start: float | None = None, end: float | None = None) -> Frames | None:
    """Sample the frames of a clip, or of its segment from start to end (s; an end beyond the file's end is cut).

    Frame k of round(duration * fps), at least one, is the last one shown at or before start + (k + 0.5) / fps. A
    damaged or cut off file gives what is left of it, and quality says how much that is. None where the file has no
    video. Raises MediaError (stage open or video) where it cannot be read.
    """
    begin, stop = check_segment("video", uri, start, end)
    source = open_source(uri)
    try:
        shown = _frame_times(source, uri, begin, stop)
        if shown is None:
            return None
        until = shown.end if stop is None else min(stop, shown.end)
        if not until > begin:
            raise MediaError("video", f"{uri}: the segment starts at {begin:g} s, but the video ends at {until:.3f} s")
        times = begin + (np.arange(max(1, round((until - begin) * spec.fps))) + 0.5) / spec.fps
        on_screen = np.maximum(np.searchsorted(shown.times, times + TICK, side="right") - 1, 0)
        needed, repeats = np.unique(on_screen, return_inverse=True)
        pictures = _decode(source, uri, shown, shown.times[needed], spec, seek=begin > 0)
    except MediaError:
        raise
    except Exception as error:  # decord raises its own classes, RuntimeError and AssertionError alike
        raise MediaError("video", f"{uri}: the video does not decode: {one_line(error)}") from error
    _, _, left, top = spec.window()
    values = np.ascontiguousarray(pictures.values[repeats, top : top + spec.size, left : left + spec.size])
    quality = {
        "salvaged": pictures.salvaged,
        "good_frames": float(pictures.good[repeats].mean()),
        "repeated_frames": float((values[1:] == values[:-1]).all((1, 2, 3)).sum() / len(values)),
        "decoded_video": shown.share,
    }
    return Frames(values, np.minimum(times, until), until - begin, quality)


def _frame_times(source: Source, uri: str, begin: float, stop: float | None, margin: float = 0.0) -> Shown | None:
    """When each frame from begin to stop is shown, from the packets alone; None where there is no video stream.

    margin: s before begin that the file is sought to; infinite: it is read from its beginning.
    """
    with open_container(source, uri) as container:
        stream = video_stream(container)
        if stream is None:
            return None
        tick, zero = float(stream.time_base), clock_zero(container)
        first = (stream.start_time or 0) * tick - zero
        if container.format.name == "mpeg":  # its packets' times are right only a while after a seek
            margin = max(margin, EARLIER)
        seek = begin - margin > max(first, 0.0)
        if seek:
            container.seek(round((begin - margin + zero) / tick), stream=stream)
        key = None if seek else -math.inf  # s; of what is shown before it, packets may be missing
        stamps, end, hidden, whole = [], 0.0, 0, not seek
        longest = 2 * container.duration / TIME_BASE + 10 if container.duration else math.inf  # s
        for packet in packets(container, stream):
            stamp = stamp_of(packet)
            if key is None:
                if stamp is None or not packet.is_keyframe:
                    continue
                key = stamp * tick - zero
            if key > begin + TICK:
                break
            if stamp is None or packet.is_discard:  # the empty packet at the end; what the file's edit list cuts away
                hidden += packet.is_discard
                continue
            if stamp * tick - zero > longest:  # a broken timestamp would ask for hours of frames
                continue
            stamps.append(stamp * tick - zero)
            end = max(end, min(stamps[-1] + (packet.duration or 0) * tick, longest))
            if stop is not None and packet.dts is not None and packet.dts * tick - zero > stop:
                whole = False
                break
        if seek and (not stamps or key > begin + TICK):  # some formats seek past the time asked for
            return _frame_times(source, uri, begin, stop, math.inf if margin else EARLIER)
        declared = stop if stop is not None and end >= stop else declared_end(source, uri, container, stream)
        share = held_share(begin, stop, end, declared)
        if whole and share is not None and stream.frames:  # a header may tell more truth of one than of the other
            share = min(1.0, max(share, (len(stamps) + hidden) / stream.frames))
    if not stamps:
        raise MediaError("video", f"{uri} holds no video frame; it is damaged or incomplete, fetch it again")
    return Shown(np.sort(np.asarray(stamps)), end, first, share, container.format.name)


def _decode(source: Source, uri: str, shown: Shown, wanted: np.ndarray, spec: VideoSpec, seek: bool) -> Pictures:
    """The pictures shown at the wanted times (sorted, s), scaled as a whole."""
    if spec.sampling == "exact" and (exact := _exact_pictures(source, uri, shown, wanted, spec, seek)) is not None:
        return Pictures(exact, np.ones(len(wanted), bool), salvaged=False)
    # FFmpeg conceals damage without a word: what is damaged shows where it must not conceal, the pictures where it may.
    width, height, _, _ = spec.window()
    strict = latest_pictures(source, uri, wanted, width, height, spec.sampling, strict=True, seek=seek)
    if spec.sampling != "exact" and len(strict.values) and not strict.damaged:
        return Pictures(strict.values, np.ones(len(wanted), bool), salvaged=False)
    concealed = latest_pictures(source, uri, wanted, width, height, spec.sampling, strict=False, seek=seek)
    if not len(concealed.values):
        raise MediaError("video", f"{uri}: no frame decodes; it is damaged, fetch it again")
    good = strict.intact & (concealed.exact if spec.sampling == "exact" else True)
    return Pictures(concealed.values, good, salvaged=True)


def _exact_pictures(
    source: Source, uri: str, shown: Shown, wanted: np.ndarray, spec: VideoSpec, seek: bool
) -> np.ndarray | None:
    """The wanted pictures by decord or PyAV, None where one of them does not decode without concealment."""
    width, height, _, _ = spec.window()
    suits = not seek and not decord_misreads(width) and shown.format != "mpeg"  # it repeats frames of these
    if spec.decoder == "decord" or (resolve_decoder(spec.decoder) == "decord" and suits):
        try:
            return _decord_pictures(source, wanted - shown.first, width, height)
        except Exception:
            if spec.decoder == "decord":
                raise
            # auto: AV1, damage: there PyAV has the last word
    margins = (0.0,) * (shown.format != "mpeg") + (EARLIER,) if seek else ()
    try:
        for margin in (*margins, math.inf):
            pictures = exact_pictures(source, uri, wanted, width, height, margin)
            if len(pictures) == len(wanted):
                return pictures
    except FFmpegError:
        pass
    return None


def _decord_pictures(source: Source, wanted: np.ndarray, width: int, height: int) -> np.ndarray:
    """decord's pictures; wanted counts from the stream's first frame."""
    if isinstance(source, io.BytesIO):
        source.seek(0)
    reader = decord.VideoReader(source, num_threads=1, width=width, height=height, fault_tol=FAULTS)
    shown = reader.get_frame_timestamp(range(len(reader)))[:, 0]
    nearest = np.searchsorted(np.concatenate([shown[:-1] + shown[1:], [np.inf]]) / 2, wanted)
    if np.abs(shown[nearest] - wanted).max() > 2 * TICK:
        raise ValueError("decord's frame times are not the packets'")
    # get_batch seeks where it skips over a key frame, and in some files lands beside it: so it never skips over one.
    keys = np.asarray(reader.get_key_indices())
    keys = keys[(keys > nearest[0]) & (keys <= nearest[-1])]
    read = np.unique(np.concatenate([nearest, keys - 1, keys]))
    pictures = reader.get_batch(read).asnumpy()  # not decord's bridge, which is set per thread
    pictures = pictures[np.searchsorted(read, nearest)]
    if pictures.shape != (len(wanted), height, width, 3):
        raise ValueError(f"decord gives pictures of shape {pictures.shape[1:]}")
    return pictures
