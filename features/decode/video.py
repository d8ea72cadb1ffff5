"""Frames of one clip, sampled by time: the frame on screen at start + (k + 0.5) / fps, cropped and scaled to a square.

FFmpeg's packet index (PyAV) says which frames a clip has and when each is shown, so that variable frame rates, rotated
phone clips and segments need no special case; a decoder then gives the pixels of the frames that are needed. There
are two: decord, and PyAV where decord has no wheels or does not know the codec. What neither decodes is salvaged:
PyAV once more, with FFmpeg's error concealment, and a count of the frames that show no trace of the damage.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from av import FFmpegError

from features.decode.follow import follow, picture_size
from features.decode.media import PADDING, MediaFile, check_segment, media_file
from features.decode.probe import EARLIER, TICK, Orientation, Shown, frame_times
from features.decode.pyav import Mistimed, Scale, exact_pictures, latest_pictures
from features.decode.specs import VideoSpec, decord_misreads, resolve_decoder
from features.errors import MediaError, SegmentBeyondEnd, one_line

try:  # no wheels outside x86-64
    import decord
except ImportError:
    decord = None
else:
    decord.logging.set_level(decord.logging.QUIET)

FAULTS = 1e-6  # share of frames that decord may replace by earlier ones without a word: none
PASSED = 64  # frames that decord decodes at once on the way to a segment


@dataclass
class Frames:
    """values: (T, size, size, 3) uint8 RGB; times: (T,) s from the file's beginning; duration: s of the segment.

    quality: the picture's columns of quality.QUALITY_SCHEMA.
    """

    values: np.ndarray
    times: np.ndarray
    duration: float
    quality: Mapping[str, float | bool | None]


class Pictures(NamedTuple):
    """values: (N, height, width, 3) uint8; good: (N,) bool, without a trace of damage; salvaged: some were damaged."""

    values: np.ndarray
    good: np.ndarray
    salvaged: bool


def decode_frames(
    file: str | MediaFile, spec: VideoSpec, start: float | None = None, end: float | None = None
) -> Frames | None:
    """Sample the frames of a clip, or of its segment from start to end (s; an end beyond the file's end is cut).

    Frame k of round(duration * fps), at least one, is the last one shown at or before start + (k + 0.5) / fps. A
    damaged or cut off file gives what is left of it, and quality says how much that is. None where the file has no
    video. Raises MediaError (stage open or video) where it cannot be read, SegmentBeyondEnd where the picture ends
    before the segment starts.
    """
    with media_file(file) as media:
        begin, stop = check_segment("video", media.uri, start, end)
        try:
            shown = frame_times(media, begin, stop)
            try:
                return None if shown is None else _sample(media, shown, spec, begin, stop)
            except Mistimed as error:
                shown = frame_times(media, begin, stop, timing=error.timing)
                assert shown is not None  # it had a picture before
                return _sample(media, shown, spec, begin, stop)
        except (MediaError, MemoryError):
            raise
        except Exception as error:  # decord raises its own classes, RuntimeError and AssertionError alike
            raise MediaError("video", f"{media.uri}: the video does not decode: {one_line(error)}") from error


def _sample(media: MediaFile, shown: Shown, spec: VideoSpec, begin: float, stop: float | None) -> Frames:
    until = shown.end if stop is None else min(stop, shown.end)
    if not until > begin:
        whole = shown.declared is None or shown.declared <= begin + PADDING
        beyond = f"{media.uri}: the segment starts at {begin:g} s, but the video ends at {until:.3f} s"
        raise SegmentBeyondEnd("video", beyond) if whole else MediaError("video", beyond)
    times = begin + (np.arange(max(1, round((until - begin) * spec.fps))) + 0.5) / spec.fps
    on_screen = np.maximum(np.searchsorted(shown.times, times + TICK, side="right") - 1, 0)
    needed, repeats = np.unique(on_screen, return_inverse=True)
    wanted = shown.times[needed]
    pictures = _decode(media, shown, wanted, spec, seek=begin > 0 and shown.seekable)
    faces: dict[str, float] = {}
    if isinstance(spec.crop, str):
        values, faces["face_found"] = follow(pictures.values, wanted, spec.crop, spec.size)
        values = values[repeats]
    else:
        _, _, left, top = spec.window()
        values = np.ascontiguousarray(pictures.values[repeats, top : top + spec.size, left : left + spec.size])
    quality = {
        "salvaged": pictures.salvaged,
        "good_frames": float(pictures.good[repeats].mean()),
        "repeated_frames": float((values[1:] == values[:-1]).all((1, 2, 3)).sum() / len(values)),
        "decoded_video": shown.share,
        **faces,
    }
    return Frames(values, np.minimum(times, until), until - begin, quality)


def _decode(media: MediaFile, shown: Shown, wanted: np.ndarray, spec: VideoSpec, seek: bool) -> Pictures:
    """The pictures shown at the wanted times (sorted, s), scaled as a whole; not scaled, where faces are followed."""
    width, height = picture_size(shown.width, shown.height, len(wanted)) if spec.follows() else spec.window()[:2]
    scale = Scale(width, height, shown.orientation)
    if spec.sampling == "exact":
        exact = _exact_pictures(media, shown, wanted, scale, spec.decoder, seek)
        if exact is not None:
            return Pictures(exact, np.ones(len(wanted), bool), salvaged=False)
    # FFmpeg conceals damage without a word: what is damaged shows where it must not conceal, the pictures where it may.
    strict = latest_pictures(media, shown, wanted, scale, spec.sampling, strict=True, seek=seek)
    if spec.sampling != "exact" and len(strict.values) and not strict.damaged:
        return Pictures(strict.values, np.ones(len(wanted), bool), salvaged=False)
    concealed = latest_pictures(media, shown, wanted, scale, spec.sampling, strict=False, seek=seek)
    if not len(concealed.values):
        raise MediaError("video", f"{media.uri}: no frame decodes; it is damaged, fetch it again")
    good = strict.intact & (concealed.exact if spec.sampling == "exact" else True)
    return Pictures(concealed.values, good, salvaged=True)


def _exact_pictures(
    media: MediaFile, shown: Shown, wanted: np.ndarray, scale: Scale, decoder: str, seek: bool
) -> np.ndarray | None:
    """The wanted pictures by decord or PyAV, None where one of them does not decode without concealment."""
    if decoder == "decord":
        whole = frame_times(media, 0.0, None, timing=shown.timing)
        assert whole is not None  # a part of it was seen
        _require_decord(media.uri, whole, scale.width)
        return _decord_pictures(media, whole, wanted, scale.width, scale.height)
    suits = not decord_misreads(scale.width) and shown.orientation == Orientation()
    if resolve_decoder(decoder) == "decord" and suits and _decord_agrees(shown):
        try:
            return _decord_pictures(media, shown, wanted, scale.width, scale.height)
        except MemoryError:
            raise
        except Exception:  # AV1, damage: there PyAV has the last word
            pass
    margins = (0.0,) * (shown.format != "mpeg") + (EARLIER,) if seek else ()
    try:
        for margin in (*margins, math.inf):
            pictures = exact_pictures(media, shown, wanted, scale, margin)
            if len(pictures) == len(wanted):
                return pictures
    except MemoryError:
        raise
    except FFmpegError:
        pass
    return None


def _decord_agrees(shown: Shown) -> bool:
    """Whether decord takes the same stream of a whole file, and each packet for the frame that it is.

    In MPEG's streams it loses its way when it seeks, and where a packet shows nothing it counts on as if it did.
    """
    alone = shown.alone and shown.timing == "stated"
    return alone and shown.plain and not shown.sparse and shown.format not in ("mpeg", "mpegts")


def _require_decord(uri: str, whole: Shown, width: int) -> None:
    """Raise MediaError where decord alone would give other pictures: it turns those of an mp4, and mirrors none."""
    turns = whole.orientation.is_rotation and whole.format.startswith("mov")
    if not (_decord_agrees(whole) and (whole.orientation == Orientation() or turns)) or decord_misreads(width):
        raise MediaError("video", f"{uri}: decord and FFmpeg take other pictures of it; use --video.decoder auto")


def _decord_pictures(media: MediaFile, whole: Shown, wanted: np.ndarray, width: int, height: int) -> np.ndarray:
    """decord's pictures at the wanted times of a file that was probed as a whole."""
    reader = decord.VideoReader(media.handle(), num_threads=1, width=width, height=height, fault_tol=FAULTS)
    times = whole.first + reader.get_frame_timestamp(range(len(reader)))[:, 0]
    if len(times) != len(whole.times) or np.abs(times - whole.times).max() > 2 * TICK:
        raise ValueError("decord's frame times are not the packets'")
    numbers = np.searchsorted(whole.times, wanted, side="right") - 1
    # get_batch seeks where it skips over a key frame, and misses it where frames before it refer to it: it never skips.
    keys = np.asarray(reader.get_key_indices())
    keys = keys[(keys > 0) & (keys <= numbers[-1])]
    read = np.unique(np.concatenate([numbers, keys - 1, keys]))
    passed, read = read[read < numbers[0]], read[read >= numbers[0]]
    for begin in range(0, len(passed), PASSED):  # on the way to a segment, few at a time
        reader.get_batch(passed[begin : begin + PASSED])
    pictures = reader.get_batch(read).asnumpy()  # not decord's bridge, which is set per thread
    pictures = pictures[np.searchsorted(read, numbers)]
    if pictures.shape != (len(wanted), height, width, 3):
        raise ValueError(f"decord gives pictures of shape {pictures.shape[1:]}")
    return pictures
