"""The export job: an MLflow model that answers raw clips from its own copy of the code, and a model card."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch
from mediafiles import numbered, sine, write_media
from models import small_model
from storefiles import TASKS, make_clips, write_store

import clcr
from clcr.config import ModelConfig, MulTConfig
from clcr.registry import MODELS
from features.decode.specs import AudioSpec, EncoderSpec, VideoSpec
from features.store import Store, StoreSpec
from pipelines.answering.card import write_card
from pipelines.answering.clips import ClipAnswerer, clip_of_file
from pipelines.answering.network import Network, export_network, largest_error
from pipelines.answering.pyfunc import requirements, signature_of
from pipelines.common.errors import JobError
from pipelines.export import ExportConfig, export
from pipelines.training.loading import feature_specs, task_specs
from pipelines.training.trained import open_model

ASK = """
import json, sys, mlflow, pandas
model = mlflow.pyfunc.load_model(sys.argv[1])
import clcr, pipelines.answering.clips
assert clcr.__file__.startswith(sys.argv[1]), clcr.__file__
table = model.predict(pandas.DataFrame({"clip": sys.argv[2:]}))
print(json.dumps([clcr.__file__, table.to_dict("records")], allow_nan=False))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    store = write_store(folder / "store", make_clips(8, 4, 4))
    small_model(folder / "run" / "model", store)
    spec = StoreSpec(EncoderSpec(VideoSpec(size=4), AudioSpec(mels=8)).features(), TASKS, {"train": 8}, 4, "x")
    (folder / "run" / "model" / "store.json").write_text(json.dumps(spec.to_dict()))
    (folder / "run" / "metrics.json").write_text(json.dumps({"label": {"accuracy": 0.75}}))
    write_media(folder / "loud.mp4", numbered(25), sound=sine(440, 1.0))
    return folder


@pytest.mark.slow
def test_the_mlflow_model_answers_as_predict_does_from_its_own_code(run, tmp_path):
    export(ExportConfig(str(run / "run"), str(run / "out")))
    (tmp_path / "notes.doc").touch()
    clips = [str(run / "loud.mp4"), str(run / "no.mp4"), str(tmp_path / "notes.doc")]
    done = subprocess.run(
        [sys.executable, "-c", ASK, str(run / "out"), *clips], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    _, rows = json.loads(done.stdout.splitlines()[-1])
    answerer = ClipAnswerer(open_model("--model", str(run / "run")))
    wanted = answerer.answer(clip_of_file(clips[0])).values
    answerer.close()
    assert rows[0]["label"] == wanted["label"] and rows[0]["mood"] == pytest.approx(wanted["mood"], abs=1e-5)
    assert rows[0]["error"] == "" and "MediaError" in rows[1]["error"] and "not a media file" in rows[2]["error"]
    assert "accuracy | 0.750" in (run / "out" / "README.md").read_text()
    with pytest.raises(JobError, match="name a new folder on this machine"):
        export(ExportConfig(str(run / "run"), str(run / "out")))


WHEN = clcr.TaskSpec("when", "events", ("background", "a", "b"), 5.0)


@pytest.mark.slow  # a minute of tracing
def test_a_network_alone_answers_as_the_model_for_any_number_of_clips_and_tokens(run, tmp_path):
    """CLCR, whose bases ONNX cannot make, with a task of each kind; what is exported is read by onnxruntime alone."""
    store = Store(str(run / "store"))
    tasks = task_specs(store) | {"when": WHEN}
    config = clcr.CLCRConfig(ModelConfig(width=8, heads=2, levels=1, blocks=1))
    torch.manual_seed(0)
    model = clcr.build("clcr", config, feature_specs(store), tasks).eval()
    clcr.save(model, tmp_path / "model", Store(str(run / "store")).spec.to_dict())
    assert np.isnan(largest_error(Network(model), lambda inputs: [np.float32("nan")] * 3))
    export(ExportConfig(str(tmp_path / "model"), str(tmp_path / "new" / "out"), ("torch", "onnx")))
    (tmp_path / "new" / "out").rename(tmp_path / "out")
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "new").stat().st_mode  # others may read it
    assert {f.name for f in (tmp_path / "out").iterdir()} == {"network.pt2", "network.onnx", "README.md"}
    session = onnxruntime.InferenceSession(tmp_path / "out" / "network.onnx", providers=["CPUExecutionProvider"])
    network = Network(model)
    inputs = network.example(4, 33, seed=9)
    found = session.run(network.outputs, {n: x.numpy() for n, x in zip(network.inputs, inputs, strict=True)})
    for name, values, wanted in zip(network.outputs, found, network(*inputs), strict=True):
        np.testing.assert_allclose(values, wanted.detach(), atol=1e-4, err_msg=name)
    assert [values.shape for values in found] == [(4, 2), (4, 1), (4, 34, 3)]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| `audio.values` | in, float16 | clips, tokens, 8 |" in card and "- `when`: background, a, b" in card
    assert "| `when.logits` | out | clips, bins, 3 |" in card


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in [*MODELS, "video"] if name != "clcr"])
def test_every_architecture_is_exported_and_answers_alike(name, tmp_path):
    """Frames beyond 24 pixels are averaged over patches, and these sides are no multiple of one.

    The concatenation reads two layers of a network of sound, which enter two stages.
    """
    layers = 1 + (name == "concat")
    frames = clcr.FeatureSpec((25, 27, 3), 12.5, "uint8")
    sound = clcr.FeatureSpec((layers, 8) if layers > 1 else (8,), 100.0, "float16")
    label, mood = clcr.TaskSpec("label", "classification", ("a", "b")), clcr.TaskSpec("mood", "regression")
    config = clcr.CLCRConfig(ModelConfig(width=8, heads=2, levels=layers, blocks=1), mult=MulTConfig(1))
    torch.manual_seed(0)
    model = clcr.build(name, config, {"video": frames, "audio": sound}, {"label": label, "mood": mood})
    network = Network(model)
    seen = replace(network.batch(*network.example(16, 9)), clip_ids=list("abcdefghijklmnop"))
    model.fit_statistics([seen], labels={"mood": np.arange(16.0)})
    model.prepare_evaluation(lambda clips: [seen])
    found = export_network(model, tmp_path, ("onnx",))  # made of the torch.export program
    assert found["onnx"].error <= 1e-4


def test_what_cannot_be_exported_is_refused_by_name_and_leaves_nothing(run, tmp_path, monkeypatch):
    class Stubborn(Network):
        def forward(self, *tensors):
            return (torch.zeros(int(tensors[0].sum())),)  # a shape that follows from values

    monkeypatch.setattr("pipelines.answering.network.Network", Stubborn)
    with pytest.raises(JobError, match=r"^concat cannot be exported as onnx: "):
        export(ExportConfig(str(run / "run"), str(tmp_path / "out"), ("onnx",)))
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(JobError, match=r"--formats onnx needs more packages: pip install 'clcr-pipeline\[export\]'"):
        export(ExportConfig(str(run / "run"), str(tmp_path / "out"), ("onnx",)))
    with pytest.raises(JobError, match="--formats tflite: choose from mlflow, torch, onnx"):
        ExportConfig("m", "o", ("tflite",))


def test_signature_requirements_and_card_say_what_the_model_is(run):
    trained = open_model("--model", str(run / "run"))
    assert signature_of(trained).inputs.input_names() == ["clip"]
    assert {"label", "label_probability", "mood", "error"} <= set(signature_of(trained).outputs.input_names())
    pinned = requirements()
    assert {"ray", "pyarrow", "tyro", "av"} <= {re.split(r"[\[=]", line)[0] for line in pinned}
    assert any(line.startswith("torch==") for line in pinned) and not any("pytest" in line for line in pinned)
    card = write_card(trained, "net", None)
    assert "| video | uint8 4 x 4 x 3 | 12.5 | frames |" in card and "**label** (classification): a, b" in card
