#!/usr/bin/env python
"""Export: a trained model for use elsewhere: as an MLflow model that answers raw clips, or the network alone.

    pipelines/export.py --model RUN --out exported
    mlflow models serve -m exported -p 5001
    mlflow.pyfunc.load_model("exported").predict(pandas.DataFrame({"clip": ["a.mp4"]}))  # in Python

    pipelines/export.py --model RUN --out network --formats torch,onnx

A model card says what the files read and answer.
"""

import importlib.util
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from features.files import read_json
from pipelines.answering.clips import ClipAnswerer
from pipelines.common.cli import main, resolve_uri
from pipelines.common.errors import JobError
from pipelines.evaluation.models import run_folder
from pipelines.training.trained import open_model

FORMATS = ("mlflow", "torch", "onnx")


@dataclass(frozen=True)
class ExportConfig:
    """Options of the export job."""

    model: str
    """--out of a finished pipelines/train.py, its folder `model`, or (with MLFLOW_TRACKING_URI set)
    models:/NAME/VERSION or models:/NAME@ALIAS"""
    out: str
    """new folder of this machine for the MLflow model and the other files"""
    formats: tuple[str, ...] = ("mlflow",)
    """what to write, separated by commas: mlflow, a model that answers raw clips; torch and onnx, the network alone,
    from features to logits, as network.pt2 and network.onnx (needs the extra [export])"""

    def __post_init__(self) -> None:
        if not self.formats or set(self.formats) - set(FORMATS):
            raise JobError(f"--formats {','.join(self.formats)}: choose from {', '.join(FORMATS)}")


def export(config: ExportConfig) -> None:
    """The job: check what cannot be exported, write the formats that are asked for, and the card."""
    from pipelines.answering.card import write_card

    out = resolve_uri("--out", config.out)
    if "://" in out or Path(out).exists():
        raise JobError(f"--out {out}: name a new folder on this machine")
    networks = tuple(name for name in FORMATS[1:] if name in config.formats)
    if "onnx" in networks and not all(map(importlib.util.find_spec, ("onnx", "onnxscript", "onnxruntime"))):
        raise JobError("--formats onnx needs more packages: pip install 'clcr-pipeline[export]'")
    trained = open_model("--model", config.model)
    folder = None if config.model.startswith("models:/") else resolve_uri("--model", config.model)
    metrics = read_json(run_folder(folder), "metrics.json") if folder else None
    with tempfile.TemporaryDirectory() as made:  # nothing is left where a network cannot be exported
        if networks:
            from pipelines.answering.network import export_network

            for name, file in export_network(trained.model, Path(made), networks).items():
                print(
                    f"{file.path.name}: {name}, answers differ from the model's by at most {file.error:.1e}", flush=True
                )
        if "mlflow" in config.formats:
            from pipelines.answering.pyfunc import save_pyfunc

            ClipAnswerer(trained)
            save_pyfunc(trained, Path(out))
        Path(out).mkdir(parents=True, exist_ok=True)
        for part in Path(made).iterdir():  # and not the folder, which nobody else may read
            shutil.move(part, out)
    (Path(out) / "README.md").write_text(write_card(trained, Path(out).name, metrics, networks))
    how = f"; mlflow models serve -m {out}" if "mlflow" in config.formats else ""
    print(f"{out}: {', '.join(config.formats)}, and a model card{how}", flush=True)


if __name__ == "__main__":
    main(export, ExportConfig, "A trained model as an MLflow model that answers raw clips, with a model card.")
