"""One clip of a corpus to one sample of a feature store: decode and encode each modality that the store wants."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from features.audio import AudioSpec, encode_audio
from features.corpus import Clip
from features.errors import MediaError
from features.quality import QualitySpec
from features.store import Feature
from features.video import VideoSpec, decode_frames, resolve_decoder


@dataclass(frozen=True)
class Sample:
    """features: `{modality: (T, *shape)}`, absent modalities left out; duration in seconds; quality: see quality.py."""

    features: Mapping[str, np.ndarray]
    duration: float
    quality: Mapping[str, float | bool | None] = field(default_factory=dict)


@dataclass(frozen=True)
class EncoderSpec:
    """How clips become numbers: one spec per modality, None where a store leaves it out; and which are good enough."""

    video: VideoSpec | None
    audio: AudioSpec | None
    quality: QualitySpec = field(default_factory=QualitySpec)

    def features(self) -> dict[str, Feature]:
        """What the store's spec says about each modality."""
        features, quality = {}, dict(vars(self.quality))  # the thresholds decide which clips are there
        if (v := self.video) is not None:
            decoder = resolve_decoder(v.decoder) if v.sampling == "exact" else "pyav"
            encoder = {"name": "frames", **vars(v), "decoder": decoder, "quality": quality}
            features["video"] = Feature((v.size, v.size, 3), "uint8", v.fps, encoder)
        if (a := self.audio) is not None:
            encoder = {"name": "log_mel", **vars(a), "quality": quality}
            features["audio"] = Feature((a.mels,), "float16", 1 / a.hop, encoder)
        return features


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
