"""A trained model, wherever it lies: a run's folder, its model folder, or MLflow's registry."""

import hashlib
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import clcr
from clcr.base import MultimodalModel
from features.files import open_fs, resolve
from features.store import Store, StoreSpec
from pipelines.common.cli import resolve_uri
from pipelines.common.errors import JobError

FILES = ("config.json", "weights.safetensors", "store.json")


@dataclass(frozen=True)
class TrainedModel:
    """model: in evaluation mode, on the CPU; learned: the spec of the store it was trained on; digest: of its files.

    fold: of cross-validation, the one that it did not learn from; None for the store's own splits.
    """

    model: MultimodalModel
    learned: StoreSpec
    digest: str
    fold: int | None = None

    def require_features(self, store: Store) -> None:
        """Raise JobError for a store whose features are not what the model learned from.

        A modality that the whole store lacks is one that every clip lacks, unless it is the only one.
        """
        shared = self.model.features.keys() & store.spec.features.keys()
        if not shared:
            learned, has = ", ".join(self.model.features), ", ".join(store.spec.features)
            raise JobError(f"--store {store.uri} holds {has}, and the model reads {learned}: extract those")
        read = tuple(f"features.{name}." for name in shared)
        differ = [line for line in self.learned.difference(store.spec) if line.startswith(read)]
        if differ:
            what = "; ".join(differ[:3])
            raise JobError(
                f"--store {store.uri} holds other features than the model learned from: {what}; "
                "extract the clips with pipelines/extract.py --like and this model"
            )


def store_file(learned: StoreSpec, fold: int | None) -> dict[str, Any]:
    """What `store.json` of a model's folder says."""
    return learned.to_dict() | ({} if fold is None else {"fold": fold})


def open_model(option: str, uri: str) -> TrainedModel:
    """The model that an option names: --out of a finished training, its folder `model`, or models:/NAME/VERSION.

    Raises JobError where there is none.
    """
    with tempfile.TemporaryDirectory() as local:
        folder = Path(_fetch(uri, local) if uri.startswith("models:/") else _copy(option, uri, local))
        payload = {name: (folder / name).read_bytes() for name in FILES}
        digest = hashlib.sha256(b"".join(payload.values())).hexdigest()
        store = json.loads(payload["store.json"])
        return TrainedModel(clcr.load(folder), StoreSpec.from_dict(store), digest, store.get("fold"))


def _fetch(uri: str, local: str) -> str:
    from pipelines.tracking.registry import fetch  # here, for it loads MLflow, which a worker that trains does not need

    return fetch(uri, local)


def _copy(option: str, uri: str, local: str) -> str:
    uri = resolve_uri(option, uri)
    for folder in (uri, resolve("model", uri)):
        fs, path = open_fs(folder)
        try:
            for name in FILES:
                with fs.open_input_file(f"{path}/{name}") as file:
                    Path(local, name).write_bytes(file.read())
        except (FileNotFoundError, NotADirectoryError):
            continue
        return local
    raise JobError(
        f"{option} {uri} holds no trained model: give the --out of a pipelines/train.py that ended, its folder "
        "`model`, models:/NAME/VERSION or models:/NAME@ALIAS of MLflow's registry"
    )
