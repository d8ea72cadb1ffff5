"""The export job: an MLflow model that answers raw clips from its own copy of the code, and a model card."""

import json
import re
import subprocess
import sys

import pytest
from mediafiles import numbered, sine, write_media
from models import small_model
from storefiles import TASKS, make_clips, write_store

from features.decode.specs import AudioSpec, EncoderSpec, VideoSpec
from features.store import StoreSpec
from pipelines.answering.card import write_card
from pipelines.answering.clips import ClipAnswerer, clip_of_file
from pipelines.answering.pyfunc import requirements, signature_of
from pipelines.common.errors import JobError
from pipelines.export import ExportConfig, export
from pipelines.training.trained import open_model

ASK = """
import json, sys, mlflow, pandas
model = mlflow.pyfunc.load_model(sys.argv[1])
import clcr, pipelines.answering.clips
assert clcr.__file__.startswith(sys.argv[1]), clcr.__file__
table = model.predict(pandas.DataFrame({"clip": sys.argv[2:]}))
print(json.dumps([clcr.__file__, json.loads(table.to_json(orient="records"))]))
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


def test_signature_requirements_and_card_say_what_the_model_is(run):
    trained = open_model("--model", str(run / "run"))
    assert signature_of(trained).inputs.input_names() == ["clip"]
    assert {"label", "label_probability", "mood", "error"} <= set(signature_of(trained).outputs.input_names())
    pinned = requirements()
    assert {"ray", "pyarrow", "tyro", "av"} <= {re.split(r"[\[=]", line)[0] for line in pinned}
    assert any(line.startswith("torch==") for line in pinned) and not any("pytest" in line for line in pinned)
    card = write_card(trained, "net", None)
    assert "| video | uint8 4 x 4 x 3 | 12.5 | frames |" in card and "**label** (classification): a, b" in card
