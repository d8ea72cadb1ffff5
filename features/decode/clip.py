"""One clip of a corpus to one sample of a feature store: decode and encode each modality that the store wants."""

from collections.abc import Iterator, Mapping

from features.corpus.events import NO_TIME
from features.corpus.manifest import VECTORS, Clip
from features.decode.audio import encode_audio
from features.decode.specs import Encoded, EncoderSpec
from features.decode.video import decode_frames
from features.errors import MediaError
from features.store.samples import Sample


def encode_clip(clip: Clip, media: Mapping[str, str], spec: EncoderSpec) -> Sample:
    """Encode every wanted modality of a clip.

    media: resolved URIs by column (`video`, `audio`, `image`, a `text` that is a file, `{modality}_features`); `audio`
    falls back to the video's own sound. A missing track or an empty field makes that modality absent. Raises MediaError
    when a file cannot be decoded, when too little of it decodes (stage quality), when no wanted modality is there, or
    when a clip with events has no length.
    """
    features, duration, quality = {}, 0.0, {}
    for modality, encoded in _modalities(clip, media, spec):
        if encoded is not None:
            features[modality] = encoded.values
            duration = max(duration, encoded.duration)
            quality = _worse(quality, encoded.quality)
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
    if spec.text is not None:
        from features.decode.text import load_encoder

        load_encoder(spec.text.encoder)
    for pictures in (spec.video, spec.image):
        if pictures is not None and pictures.encoder == "resnet18":
            from features.decode.image import load_resnet18

            load_resnet18(pictures.weights)


def _modalities(clip: Clip, media: Mapping[str, str], spec: EncoderSpec) -> Iterator[tuple[str, Encoded | None]]:
    """Each wanted modality that the row names a source of; None where the source lacks it.

    What not every store needs is imported where it is needed: it would cost every decoding process memory.
    """
    if spec.video is not None and "video" in media:
        frames = decode_frames(media["video"], spec.video, clip.start, clip.end)
        if frames is not None:
            spec.quality.check(media["video"], frames.quality)
            values = frames.values
            if spec.video.encoder == "resnet18":
                from features.decode.image import embed_frames

                values = embed_frames(values, spec.video.weights)
            yield "video", Encoded(values, frames.duration, frames.quality)
    if spec.audio is not None and (source := media.get("audio") or media.get("video")):
        sound = encode_audio(source, spec.audio, clip.start, clip.end)
        if sound is not None:
            spec.quality.check(source, sound.quality)
            yield "audio", Encoded(sound.values, sound.duration, sound.quality)
    if spec.image is not None and "image" in media:
        from features.decode.image import encode_image

        yield "image", encode_image(media["image"], spec.image)
    if spec.text is not None and clip.text:
        from features.decode.text import encode_text

        yield "text", encode_text(media.get("text", clip.text), spec.text, spec.declared["text"])
    for modality in spec.given():
        if (uri := media.get(modality + VECTORS)) is not None:
            from features.decode.vectors import read_vectors

            yield modality, read_vectors(uri, spec.vectors, spec.declared[modality])


def _worse(before: Mapping[str, float], now: Mapping[str, float]) -> dict[str, float]:
    """Figures side by side; of the one that several modalities may have, broken values, the larger share."""
    return {**before, **now, **{name: max(before[name], now[name]) for name in before.keys() & now.keys()}}
