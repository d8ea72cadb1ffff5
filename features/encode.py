"""One clip of a corpus to one sample of a feature store: decode and encode each modality that the store wants."""

from collections.abc import Mapping

from features.audio import encode_audio
from features.corpus import Clip
from features.errors import MediaError
from features.specs import EncoderSpec, Sample
from features.video import decode_frames


def encode_clip(clip: Clip, media: Mapping[str, str], spec: EncoderSpec) -> Sample:
    """Encode every wanted modality of a clip.

    media: resolved URIs by column (`video`, `audio`); `audio` falls back to the video's own sound.
    A missing track makes that modality absent. Raises MediaError when a file cannot be decoded, when too little of it
    decodes (stage quality), or when no wanted modality is there.
    """
    features, durations, quality = {}, [], {}
    if spec.video is not None and "video" in media:
        frames = decode_frames(media["video"], spec.video, clip.start, clip.end)
        if frames is not None:
            spec.quality.check(media["video"], frames.quality)
            quality |= frames.quality
            features["video"] = frames.values
            durations.append(frames.duration)
    if spec.audio is not None and (source := media.get("audio") or media.get("video")):
        sound = encode_audio(source, spec.audio, clip.start, clip.end)
        if sound is not None:
            spec.quality.check(source, sound.quality)
            quality |= sound.quality
            features["audio"] = sound.values
            durations.append(sound.duration)
    if not features:
        wanted = " or ".join(spec.features())
        raise MediaError("open", f"{clip.clip_id}: no {wanted} track in {', '.join(media.values()) or 'the row'}")
    return Sample(features, max(durations), quality)
