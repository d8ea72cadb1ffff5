"""Names on the hub are pinned to a commit once, where the job starts: hosts, fingerprint and spec say the same."""

import pytest
import timm
import torch
from encoderkinds import MODELS

from features.decode.like import spec_of_store
from features.decode.specs import EncoderSpec, VideoSpec
from features.encoders import hub
from features.encoders import timm as own
from features.encoders.registry import find_encoder
from pipelines.common.networks import resolved

NAME, COMMITS = "mobilenetv3_small_050", ("a" * 40, "b" * 40)


@pytest.fixture
def heads(monkeypatch):
    """What the hub's branches stand for; a commit stands for itself."""
    heads = {"main": COMMITS[0]}
    monkeypatch.setattr(hub, "commit_of", lambda place, revision, option: heads.get(revision or "main", revision))
    return heads


def test_a_models_name_on_the_hub_becomes_one_with_its_commit(heads, tmp_path, monkeypatch):
    MODELS["vit"](tmp_path)
    loaded = []

    def pretrained(kind, name, option):
        import transformers

        loaded.append(name)
        return getattr(transformers, kind).from_pretrained(tmp_path)

    monkeypatch.setattr(hub, "pretrained", pretrained)
    monkeypatch.setattr(hub, "preprocessing", lambda name: {})
    for name in ("hf:us/vit", "hf:us/vit@main", f"hf:us/vit@{COMMITS[0]}"):
        assert resolved("video", VideoSpec(encoder=name)).encoder == f"hf:us/vit@{COMMITS[0]}"
    spec = EncoderSpec(resolved("video", VideoSpec(encoder="hf:us/vit")), None)
    features = spec.features()
    heads["main"] = COMMITS[1]  # somebody uploads another one
    assert features["video"].encoder["encoder"] == f"hf:us/vit@{COMMITS[0]}"
    assert spec_of_store(features).features() == features and set(loaded) == {f"hf:us/vit@{COMMITS[0]}"}


def test_timms_pretrained_weights_are_those_of_a_commit(heads, monkeypatch):
    hub_id = timm.create_model(NAME, features_only=True).pretrained_cfg["hf_hub_id"]
    spec = EncoderSpec(resolved("video", VideoSpec(encoder=f"timm:{NAME}", weights=own.HUB)), None)
    assert spec.video.weights == f"pretrained@{COMMITS[0]}"
    heads["main"] = COMMITS[1]
    assert spec_of_store(spec.features()).video.weights == spec.video.weights
    assert spec.features()["video"].encoder["weights"] == f"pretrained@{COMMITS[0]}"
    asked = []

    def download(hub_id, **options):
        asked.append(hub_id)
        torch.manual_seed(0)
        return timm.create_model(NAME).state_dict()

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", download)
    find_encoder(spec.video.asked()).load("cpu")
    assert asked == [f"{hub_id}@{COMMITS[0]}"]
