"""One small encoder of every kind, its weights random and made here from a config: `KINDS[name](folder) -> Asked`."""

import json

import torch

from features.encoders import Asked

SMALL = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
SIGHT = {**SMALL, "image_size": 32, "patch_size": 8}
CONVOLUTIONS = {"conv_dim": [8, 8, 8], "conv_kernel": [10, 8, 4], "conv_stride": [5, 8, 8]}  # 320 samples to a token
WAVES = {**SMALL, **CONVOLUTIONS, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "vocab_size": 4}
OWN = '''
import numpy as np
from features.encoders import Encoder

class Colours(Encoder):
    identity, shape = {"version": 1}, (6,)
    def __call__(self, frames):
        return np.concatenate([frames.mean((1, 2)), frames.std((1, 2))], axis=1)

class Motion(Encoder):
    """Three frames at once, a token for each."""
    identity, shape, window = {"version": 1}, (1, 2), 3
    def __call__(self, clips):
        steps = np.abs(np.diff(clips.astype(float), axis=1)).mean((1, 2, 3, 4))
        return np.stack([steps, clips[:, 1].mean((1, 2, 3))], 1)[:, None]

class Loudness(Encoder):
    identity, shape, sample_rate, window, hop, tokens = {"version": 1}, (1,), 8000, 1600, 800, 2
    def __call__(self, sound):
        return np.abs(sound[:, 400:1200]).reshape(len(sound), 2, 400).max(2)[:, :, None]
'''


def _model(config_class, model_class, preprocessing=None, **options):
    def save(folder):
        import transformers

        torch.manual_seed(0)
        model = getattr(transformers, model_class)(getattr(transformers, config_class)(**options))
        model.save_pretrained(folder)
        if preprocessing:
            (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
        return f"hf:{folder}"

    return save


MODELS = {
    "clip": _model("CLIPConfig", "CLIPModel", vision_config=SIGHT, text_config={**SMALL, "vocab_size": 9}),
    "clip_vision": _model("CLIPVisionConfig", "CLIPVisionModel", **SIGHT),
    "siglip": _model("SiglipVisionConfig", "SiglipVisionModel", **SIGHT),
    "dinov2": _model("Dinov2Config", "Dinov2Model", {"crop_size": {"height": 24, "width": 24}}, **SIGHT),
    "vit": _model("ViTConfig", "ViTModel", {"image_mean": [0.1, 0.2, 0.3]}, **SIGHT),
    "videomae": _model("VideoMAEConfig", "VideoMAEModel", **SIGHT, num_frames=8, tubelet_size=2),
    "wav2vec2": _model("Wav2Vec2Config", "Wav2Vec2Model", **WAVES),
    "hubert": _model("HubertConfig", "HubertModel", {"do_normalize": False}, **WAVES),
    "wavlm": _model("WavLMConfig", "WavLMModel", **WAVES),
    "whisper": _model(
        "WhisperConfig", "WhisperModel", d_model=16, encoder_layers=3, encoder_attention_heads=2, encoder_ffn_dim=32,
        decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=32, vocab_size=9, num_mel_bins=16,
        max_source_positions=50, pad_token_id=0, bos_token_id=0, eos_token_id=0, decoder_start_token_id=0,
    ),
    "ast": _model("ASTConfig", "ASTModel", **SMALL, num_mel_bins=32, max_length=96),
}  # fmt: skip
LAYERS = {"layers": (1, 3)}


def _of(modality, model, **options):
    def make(folder):
        place = folder / model
        name = f"hf:{place}" if place.exists() else MODELS[model](place)
        return Asked(name, modality, **options)

    return make


def _own(modality, name):
    return lambda folder: Asked(f"python:encoders_of_one:{name}", modality)


def _vision(modality, **options):
    def make(folder):
        from torchvision.models import get_model

        if not (weights := folder / "mobilenet.pth").exists():
            torch.manual_seed(0)
            torch.save(get_model("mobilenet_v3_small").state_dict(), weights)
        return Asked("torchvision:mobilenet_v3_small", modality, str(weights), **options)

    return make


def _timm(modality, **options):
    def make(folder):
        import timm

        if not (weights := folder / "timm.pth").exists():
            torch.manual_seed(0)
            torch.save(timm.create_model("mobilenetv3_small_050").state_dict(), weights)
        return Asked("timm:mobilenetv3_small_050", modality, str(weights), **options)

    return make


def _field(number, value):
    """A field of a protocol buffer: a number, or bytes."""

    def varint(n):
        return bytes([n]) if n < 128 else bytes([n % 128 + 128]) + varint(n // 128)

    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(value)) + value


def write_onnx(path, shape, *nodes):
    """An exported network without weights: input x of a shape ("": any), nodes of (operator, input, output, kept)."""

    def value(name, dims):
        axes = b"".join(_field(1, _field(1, d) if d else _field(2, "n")) for d in dims)
        kind = _field(1, 1) + (_field(2, axes) if dims else b"")
        return _field(1, name) + _field(2, _field(1, kind))

    graph = b"".join(_field(1, _field(1, x) + _field(2, y) + _field(4, op)) for op, x, y, _ in nodes)
    graph += _field(2, "g") + _field(11, value("x", shape))
    graph += b"".join(_field(12, value(y, ())) for *_, y, out in nodes if out)
    path.write_bytes(_field(1, 8) + _field(7, graph) + _field(8, _field(1, "") + _field(2, 13)))
    return f"onnx:{path}"


def _onnx(modality, shape, *nodes, **options):
    return lambda folder: Asked(write_onnx(folder / f"{modality}.onnx", shape, *nodes), modality, **options)


def _voice(folder):
    if not (weights := folder / "voice.pt").exists():
        torch.manual_seed(0)
        lstm, linear = torch.nn.LSTM(40, 256, 3), torch.nn.Linear(256, 256)
        states = {"lstm": lstm.state_dict(), "linear": linear.state_dict()}
        named = {f"{part}.{name}": value for part, state in states.items() for name, value in state.items()}
        torch.save({"model_state": named}, weights)
    return Asked(f"voice:{weights}", "audio", layers=(1, 4))


KINDS = {
    "video python": _own("video", "Colours"),
    "video python window": _own("video", "Motion"),
    "audio python": _own("audio", "Loudness"),
    **{f"video {model}": _of("video", model, **LAYERS) for model in ("clip", "clip_vision", "siglip", "dinov2", "vit")},
    "video videomae": _of("video", "videomae", **LAYERS),
    "video videomae stride": _of("video", "videomae", **LAYERS, stride=4),
    **{f"audio {model}": _of("audio", model, **LAYERS, span=1.0) for model in ("wav2vec2", "hubert", "wavlm")},
    "audio wav2vec2 stride": _of("audio", "wav2vec2", **LAYERS, span=1.0, stride=0.2),
    "audio whisper": _of("audio", "whisper", **LAYERS),
    "audio whisper stride": _of("audio", "whisper", **LAYERS, stride=0.4),
    "audio ast": _of("audio", "ast", **LAYERS),
    "image clip": _of("image", "clip", **LAYERS, grid=2),
    "video torchvision": _vision("video", **LAYERS),
    "image torchvision": _vision("image", grid=2),
    "video timm": _timm("video", **LAYERS),
    "video onnx": _onnx("video", ("", 3, 32, 32), ("Abs", "x", "y", 1), ("Neg", "y", "z", 1)),
    "audio onnx": _onnx("audio", (2, 800), ("Abs", "x", "y", 1)),
    "video efficientnet_lite0": lambda folder: Asked("efficientnet_lite0", "video", layers=(1, 3)),
    "audio speech_embedding": lambda folder: Asked("speech_embedding", "audio"),
    "audio voice": _voice,
    "image vit": _of("image", "vit", grid=1),
}
