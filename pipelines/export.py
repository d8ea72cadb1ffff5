#!/usr/bin/env python
"""Export: a trained model for use elsewhere, as an MLflow model that answers raw clips, with a model card.

pipelines/export.py --model RUN --out exported
mlflow models serve -m exported -p 5001
mlflow.pyfunc.load_model("exported").predict(pandas.DataFrame({"clip": ["a.mp4"]}))  # in Python
"""

from dataclasses import dataclass
from pathlib import Path

from features.files import read_json
from pipelines.answering.clips import ClipAnswerer
from pipelines.common.cli import main, resolve_uri
from pipelines.common.errors import JobError
from pipelines.training.trained import open_model


@dataclass(frozen=True)
class ExportConfig:
    """Options of the export job."""

    model: str
    """--out of a finished pipelines/train.py, its folder `model`, or (with MLFLOW_TRACKING_URI set)
    models:/NAME/VERSION or models:/NAME@ALIAS"""
    out: str
    """new folder of this machine for the MLflow model"""


def export(config: ExportConfig) -> None:
    """The job: check that new clips can be encoded for the model, write it, write its card."""
    from pipelines.answering.card import write_card
    from pipelines.answering.pyfunc import save_pyfunc

    out = resolve_uri("--out", config.out)
    if "://" in out or Path(out).exists():
        raise JobError(f"--out {out}: name a new folder on this machine")
    trained = open_model("--model", config.model)
    ClipAnswerer(trained)
    save_pyfunc(trained, Path(out))
    folder = None if config.model.startswith("models:/") else resolve_uri("--model", config.model)
    metrics = read_json(folder, "metrics.json") if folder else None
    (Path(out) / "README.md").write_text(write_card(trained, Path(out).name, metrics))
    print(f"{out}: MLflow model and its card; mlflow models serve -m {out}", flush=True)


if __name__ == "__main__":
    main(export, ExportConfig, "A trained model as an MLflow model that answers raw clips, with a model card.")
