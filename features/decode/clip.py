"""One clip of a corpus to one sample of a feature store: decode and encode each modality that the store wants."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from features.corpus.events import NO_TIME
from features.corpus.manifest import VECTORS, Clip
from features.decode.audio import encode_audio
from features.decode.media import MediaFile
from features.decode.specs import Encoded, EncoderSpec
from features.decode.video import decode_frames
from features.encoders import faces
from features.errors import MediaError, SegmentBeyondEnd
from features.store.samples import Sample


def encode_clip(clip: Clip, media: Mapping[str, str], spec: EncoderSpec) -> Sample:
    """Encode every wanted modality of a clip.

    media: resolved URIs by column (`video`, `audio`, `image`, a `text` that is a file, `{modality}_features`); `audio`
    falls back to the video's own sound. A missing track, one that ends before the segment starts, or an empty field
    makes that modality absent. Raises MediaError when a file cannot be decoded, when too little of it decodes (stage
    quality), when no wanted modality is there, or when a clip with events has no length.
    """
    features: dict[str, np.ndarray] = {}
    quality: dict[str, Any] = {}
    duration = 0.0
    beyond: SegmentBeyondEnd | None = None
    with contextlib.ExitStack() as stack:
        opened = functools.cache(lambda uri: stack.enter_context(contextlib.closing(MediaFile(uri))))
        for modality, encode in _modalities(clip, media, spec, opened):
            try:
                encoded = encode()
            except SegmentBeyondEnd as error:
                beyond = beyond or error
                continue
            if encoded is not None:
                features[modality] = encoded.values
                duration = max(duration, encoded.duration)
                quality = _worse(quality, encoded.quality)
    if not features and beyond is not None:
        raise MediaError(beyond.stage, beyond.message)
    if not features:
        wanted = " or ".join(spec.features())
        raise MediaError("open", f"{clip.clip_id}: no {wanted} track in {', '.join(media.values()) or 'the row'}")
    if not duration and clip.end is not None:  # what has no time of its own has the row's
        duration = clip.end - (clip.start or 0.0)
    if not duration and any(isinstance(label, list) for label in clip.labels.values()):
        raise MediaError("open", f"{clip.clip_id}: {NO_TIME}")
    return Sample(features, duration, quality)


def prepare(spec: EncoderSpec) -> None:
    """Load the networks that a spec needs, once per process, so that no clip's time or memory pays for that."""
    if spec.video is not None and spec.video.follows():
        faces.load()
    if spec.text is not None:
        from features.decode.text import load

        load(spec.text)
    if spec.image is not None and spec.image.encoder == "resnet18":
        from features.decode.image import load_resnet18

        load_resnet18(spec.image.weights)
    for modality, asked in spec.networks().items():
        if modality not in spec.raw:
            from features.encoders.running import runner_alone

            runner_alone(asked)


def _modalities(
    clip: Clip, media: Mapping[str, str], spec: EncoderSpec, opened: Callable[[str], MediaFile]
) -> Iterator[tuple[str, Callable[[], Encoded | None]]]:
    """Each wanted modality that the row names a source of, and what encodes it; None where the source lacks it.

    opened: the file at a URI, the same one for picture and sound.
    """
    if spec.video is not None and "video" in media:
        yield "video", lambda: _encode_video(opened(media["video"]), clip, spec)
    if spec.audio is not None and (source := media.get("audio") or media.get("video")):
        yield "audio", lambda: _encode_sound(opened(source), clip, spec)
    if spec.image is not None and "image" in media:
        yield "image", lambda: _encode_image(media["image"], spec)
    if spec.text is not None and (words := clip.text):
        yield "text", lambda: _encode_text(media.get("text", words), spec)
    for modality in spec.given():
        if (uri := media.get(modality + VECTORS)) is not None:
            yield modality, functools.partial(_read_vectors, uri, modality, spec)


# What not every store needs is imported where it is needed: it would cost every decoding process memory.


def _encode_video(file: MediaFile, clip: Clip, spec: EncoderSpec) -> Encoded | None:
    assert spec.video is not None
    frames = decode_frames(file, spec.video.frames(), clip.start, clip.end)
    if frames is None:
        return None
    spec.quality.check(file.uri, frames.quality)
    return Encoded(_through_network("video", frames.values, spec), frames.duration, frames.quality)


def _through_network(modality: str, values: np.ndarray, spec: EncoderSpec) -> np.ndarray:
    """What the modality's network makes of decoded values; the values, where it has none or runs elsewhere."""
    asked = spec.networks().get(modality)
    if asked is None or modality in spec.raw:
        return values
    from features.encoders.running import runner_alone

    return runner_alone(asked).one(values)


def _encode_sound(file: MediaFile, clip: Clip, spec: EncoderSpec) -> Encoded | None:
    assert spec.audio is not None
    sound = encode_audio(file, spec.audio, clip.start, clip.end)
    if sound is None:
        return None
    spec.quality.check(file.uri, sound.quality)
    return Encoded(_through_network("audio", sound.values, spec), sound.duration, sound.quality)


def _encode_image(uri: str, spec: EncoderSpec) -> Encoded:
    from features.decode.image import encode_image

    assert spec.image is not None
    image = encode_image(uri, spec.image)
    return image._replace(values=_through_network("image", image.values, spec))


def _encode_text(text: str, spec: EncoderSpec) -> Encoded | None:
    from features.decode.text import encode_text

    assert spec.text is not None
    return encode_text(text, spec.text, spec.declared["text"])


def _read_vectors(uri: str, modality: str, spec: EncoderSpec) -> Encoded | None:
    from features.decode.vectors import read_vectors

    assert spec.vectors is not None
    return read_vectors(uri, spec.vectors, spec.declared[modality])


def _worse(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Figures side by side; of the one that several modalities may have, broken values, the larger share."""
    return {**before, **now, **{name: max(before[name], now[name]) for name in before.keys() & now.keys()}}
