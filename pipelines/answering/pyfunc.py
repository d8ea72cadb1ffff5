"""A trained model as an MLflow pyfunc: `mlflow models serve` and `mlflow.pyfunc.load_model` answer raw clips by it.

Input is a table with the column `clip`, a path or URI of a media file; output has a row per clip with each task's
answer, and `error`, empty where the clip could be used.
"""

import importlib.metadata
import re
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import pandas as pd
from mlflow.models import ModelSignature
from mlflow.pyfunc.model import PythonModel
from mlflow.types import ColSpec, DataType, Schema, TensorSpec
from mlflow.types.schema import Map

import clcr
from pipelines.answering.clips import ClipAnswerer, clip_of_file
from pipelines.common.errors import JobError
from pipelines.training.trained import FILES, TrainedModel, open_model, store_file

ROOT = Path(__file__).parents[2]
CODE = ("clcr", "features", "infra", "pipelines")  # what answering imports
EXAMPLE = "clip.mp4"


class ClipModel(PythonModel):
    """Loads the model folder among its artifacts, and answers clips one by one."""

    def load_context(self, context: Any) -> None:
        """Open the model and start its decoding process."""
        self.answerer = ClipAnswerer(open_model("--model", context.artifacts["model"])).start()

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """A row of answers per clip; `error` says why a clip has none."""
        table = pd.DataFrame([self._row(uri) for uri in model_input["clip"]]).astype(object)
        return table.where(table.notna(), None)  # JSON has no NaN

    def _row(self, uri: str) -> dict[str, Any]:
        try:
            answer = self.answerer.answer(clip_of_file(uri))
        except JobError as error:
            return {"clip": uri, "error": str(error)}
        why = f"{answer.failure['error']}: {answer.failure['message']}" if answer.failure else ""
        values = {name: value for name, value in answer.values.items() if name not in ("clip_id", "split", "fold")}
        return {"clip": uri, **values, "error": why}


def save_pyfunc(trained: TrainedModel, folder: Path) -> None:
    """Write an MLflow model to a new folder: weights, this project's code, pinned requirements, signature, example."""
    import tempfile

    with tempfile.TemporaryDirectory() as temporary:
        local = str(Path(temporary, "model"))  # its name in the MLflow model
        clcr.save(trained.model, local, store_file(trained.learned, trained.fold))
        assert sorted(path.name for path in Path(local).iterdir()) == sorted(FILES)
        mlflow.pyfunc.save_model(
            str(folder),
            python_model=ClipModel(),
            artifacts={"model": local},
            signature=signature_of(trained),
            input_example=pd.DataFrame({"clip": [EXAMPLE]}),
            code_paths=[str(ROOT / name) for name in CODE],
            pip_requirements=requirements(),
        )


def signature_of(trained: TrainedModel) -> ModelSignature:
    """Column `clip` in; of classes the class, its probability and all of them by name, of numbers the number out."""
    columns: list[ColSpec | TensorSpec] = [ColSpec(DataType.string, "clip")]
    for name, task in trained.model.tasks.items():
        if not task.has_classes:
            columns.append(ColSpec(DataType.double, name, required=False))
        elif not task.rate:
            columns += [
                ColSpec(DataType.string, name, required=False),
                ColSpec(DataType.double, f"{name}_probability", required=False),
                ColSpec(Map(DataType.double), f"{name}_probabilities", required=False),
            ]
    columns.append(ColSpec(DataType.string, "error"))
    return ModelSignature(Schema([ColSpec(DataType.string, "clip")]), Schema(columns))


def requirements() -> list[str]:
    """What the project's jobs need, without further extras, pinned to what is installed here."""
    pinned = [f"cloudpickle=={importlib.metadata.version('cloudpickle')}"]  # what `python_model` is written with
    for line in importlib.metadata.requires("clcr-pipeline") or []:
        required = re.match(r"([\w.-]+)(\[[\w,-]+\])?", line)
        assert required is not None  # every requirement begins with a name
        name, extras = required.groups()
        if "extra ==" in line and not re.search(r"extra == .pipeline.", line):
            continue
        try:
            pinned.append(f"{name}{extras or ''}=={importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:  # not for this platform
            continue
    return pinned
