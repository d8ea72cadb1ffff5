"""`hf:NAME[@revision]`: hidden layers of a Hugging Face model, from a folder or the hub, for the modality it is for."""

import importlib
from dataclasses import replace
from typing import Any

from features.encoders import hub
from features.encoders.contract import Asked, Encoder
from features.errors import FeaturesError

PICTURES, SOUND = "features.encoders.hf_pictures", "features.encoders.hf_sound"
# By transformers' model_type: for which modalities, the file and class here, the class of transformers that loads it.
FAMILIES: dict[str, tuple[tuple[str, ...], str, str, str]] = {
    **dict.fromkeys(("vit", "dinov2"), (("video", "image"), PICTURES, "Pictures", "AutoModel")),
    **dict.fromkeys(("clip", "clip_vision_model"), (("video", "image"), PICTURES, "Pictures", "CLIPVisionModel")),
    **dict.fromkeys(("siglip", "siglip_vision_model"), (("video", "image"), PICTURES, "Pictures", "SiglipVisionModel")),
    "videomae": (("video",), PICTURES, "Clips", "AutoModel"),
    **dict.fromkeys(("wav2vec2", "hubert", "wavlm"), (("audio",), SOUND, "Waves", "AutoModel")),
    "whisper": (("audio",), SOUND, "Whisper", "AutoModel"),
    "audio-spectrogram-transformer": (("audio",), SOUND, "Spectrograms", "AutoModel"),
}


def pin(asked: Asked) -> Asked:
    """See features.encoders.registry.pinned."""
    return replace(asked, name=hub.pinned(asked.name, asked.option))


def make(asked: Asked) -> Encoder:
    """See features.encoders.registry. Raises FeaturesError for a model that is none of FAMILIES, or of another use."""
    config: Any = hub.pretrained("AutoConfig", asked.name, f"--{asked.modality}.encoder")
    modalities, module, made, model = FAMILIES.get(config.model_type, ((), "", "", ""))
    if asked.modality not in modalities:
        known = ", ".join(name for name, (of, *_) in FAMILIES.items() if asked.modality in of)
        raise FeaturesError(f"{asked.option}: a {config.model_type} is no {asked.modality} encoder; known are {known}")
    return getattr(importlib.import_module(module), made)(asked, getattr(config, "vision_config", config), model)
