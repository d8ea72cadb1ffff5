"""How much of a clip truly decoded: the figures that every sample carries into the index, and the least they may be.

Decoders return partial or repeated content without an error. So the content is measured, and a clip beyond a threshold
is a failure with that reason.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa

from features.errors import MediaError

if TYPE_CHECKING:
    from features.store.spec import Feature

QUALITY_SCHEMA = pa.schema(
    [
        ("salvaged", pa.bool_()),  # the picture did not decode as it is, and PyAV concealed the damage
        ("good_frames", pa.float32()),  # share of the sampled frames that show no trace of damage
        ("repeated_frames", pa.float32()),  # share of the sampled frames equal to the one before
        ("decoded_video", pa.float32()),  # seconds decoded over seconds declared; null where a file declares none
        ("decoded_audio", pa.float32()),
        ("silence", pa.float32()),  # share of the log-mel frames without sound
    ]
)
FACE = pa.field("face_found", pa.float32())  # share of looks that found the face that the crop follows; 0: the middle
BROKEN = pa.field("broken_values", pa.float32())  # largest share of broken values in a clip's given vectors


def quality_schema(features: Mapping[str, "Feature"]) -> pa.Schema:
    """The index's quality columns of a store with these features."""
    given = any(feature.encoder.get("name") == "vectors" for feature in features.values())
    schema = QUALITY_SCHEMA.append(FACE) if follows_faces(features) else QUALITY_SCHEMA
    return schema.append(BROKEN) if given else schema


def follows_faces(features: Mapping[str, "Feature"]) -> bool:
    """Whether the picture of a store with these features is cropped to faces."""
    return any("detector" in feature.encoder for feature in features.values())


@dataclass(frozen=True)
class QualitySpec:
    """Which clips are good enough for a store: thresholds of the shares in the index's quality columns."""

    min_good_frames: float = 0.5
    """Least share (0-1) of sampled frames that decode undamaged; the rest of a damaged clip is concealed."""
    min_decoded: float = 0.9
    """Least share (0-1) of the declared duration that is there, of picture and sound each; files may be cut off."""
    max_repeated: float = 1.0
    """Largest share (0-1) of sampled frames equal to the one before; 1 keeps still pictures."""
    max_silence: float = 1.0
    """Largest share (0-1) of log-mel frames below -60 dB of full scale; 1 keeps silent sound tracks."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if not 0 <= (value := getattr(self, field.name)) <= 1:
                raise ValueError(f"--quality.{field.name.replace('_', '-')} {value:g} is not a share from 0 to 1")

    def check(self, uri: str, figures: Mapping[str, float | bool | None]) -> None:
        """Raise MediaError (stage quality) for the first figure beyond its threshold; figures: by index column."""
        for figure, threshold, reason in (
            ("decoded_video", "min_decoded", "the picture is cut off"),
            ("decoded_audio", "min_decoded", "the sound is cut off or damaged"),
            ("good_frames", "min_good_frames", "the picture is damaged"),
            ("repeated_frames", "max_repeated", "the picture stands still"),
            ("silence", "max_silence", "the sound is silence"),
        ):
            if (value := figures.get(figure)) is None:
                continue
            limit, least = getattr(self, threshold), threshold.startswith("min")
            if value < limit if least else value > limit:
                option = f"--quality.{threshold.replace('_', '-')} {limit:g}"
                raise MediaError(
                    "quality", f"{uri}: {reason}: {figure} {value:.4g} is {'below' if least else 'above'} {option}"
                )
