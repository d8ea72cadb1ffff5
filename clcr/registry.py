"""Models by name, and the folder a trained model lives in: config.json, weights.safetensors, store.json."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from clcr.base import MultimodalModel
from clcr.baselines.concat import Concat
from clcr.baselines.film import FiLM
from clcr.baselines.late import Late
from clcr.baselines.misa import MISA
from clcr.baselines.mm_orient import MMOrient
from clcr.baselines.mult import Mult
from clcr.baselines.ogm_ge import OGMGE
from clcr.baselines.single import SingleModality
from clcr.batches import FeatureSpec
from clcr.config import CLCRConfig
from clcr.errors import ClcrError, ConfigError
from clcr.model import CLCR
from clcr.tasks import TaskSpec
from clcr.versions import VERSION, completed, completed_weights

MODELS: dict[str, type[MultimodalModel]] = {
    "clcr": CLCR,
    "mm_orient": MMOrient,
    "concat": Concat,
    "late": Late,
    "film": FiLM,
    "misa": MISA,
    "ogm_ge": OGMGE,
    "mult": Mult,
}


def build(
    name: str, config: CLCRConfig, features: Mapping[str, FeatureSpec], tasks: Mapping[str, TaskSpec]
) -> MultimodalModel:
    """A new model by name: one of MODELS, or a modality's name for that modality alone."""
    if name in MODELS:
        model = MODELS[name](config, features, tasks)
    elif name in features:
        model = SingleModality(name, config, features, tasks)
    else:
        raise ConfigError(f"no model named {name!r}: choose one of {', '.join([*MODELS, *features])}")
    # What it takes to build the same model again; the single-modality model is built from all features.
    model.recipe = {
        "version": VERSION,
        "model": name,
        "config": dataclasses.asdict(config),
        "features": {m: dataclasses.asdict(spec) for m, spec in features.items()},
        "tasks": {t: dataclasses.asdict(spec) for t, spec in tasks.items()},
    }
    return model


def save(model: MultimodalModel, folder: str | Path, spec: dict[str, Any]) -> None:
    """Write a model made by `build` to a folder; spec: the feature store's spec that it expects."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model.recipe, indent=2) + "\n")
    (folder / "store.json").write_text(json.dumps(spec, indent=2) + "\n")
    weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / "weights.safetensors")


def load(folder: str | Path) -> MultimodalModel:
    """The model in a folder written by `save`, of this version or an earlier one, in evaluation mode, on the CPU."""
    model = build_saved(folder)
    weights = load_file(Path(folder) / "weights.safetensors")
    model.load_state_dict(completed_weights(weights, model.state_dict()))
    return model.eval()


def build_saved(folder: str | Path) -> MultimodalModel:
    """The same model with fresh weights. Raises ClcrError where the folder holds none, or a later version's."""
    folder = Path(folder)
    missing = [name for name in ("config.json", "weights.safetensors") if not (folder / name).is_file()]
    if missing:
        raise ClcrError(f"{folder} is not a trained model: no {' and no '.join(missing)}; give a folder made by save")
    recipe = json.loads((folder / "config.json").read_text())
    if (version := recipe.get("version", 1)) > VERSION:
        raise ClcrError(f"{folder} was written by a later version ({version}, this one is {VERSION}): update clcr")
    return build(
        recipe["model"],
        CLCRConfig.from_dict(_completed(recipe["config"], version)),
        {m: FeatureSpec(**spec) for m, spec in recipe["features"].items()},
        {t: TaskSpec(**spec) for t, spec in recipe["tasks"].items()},
    )


def _completed(config: Mapping[str, Mapping[str, Any]], version: int) -> dict[str, dict[str, Any]]:
    options = {f"{group}.{name}": value for group, part in config.items() for name, value in part.items()}
    groups: dict[str, dict[str, Any]] = {}
    for dotted, value in completed(options, version).items():
        group, _, name = dotted.rpartition(".")
        if group:  # an option of the training alone is none of the model's
            groups.setdefault(group, {})[name] = value
    return groups
