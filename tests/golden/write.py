"""Write the golden files of this version of the code: `python tests/golden/write.py vN` (once per version, see README).

They are what people have on disk: a store, a run, a sweep's recipe, a model of every architecture. Later code must read
them with the same meaning, so they are added to and never written anew.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1] / "helpers")]

import clcr
from clcr.batches import FeatureSpec, collate
from clcr.config import CLCRConfig
from clcr.registry import MODELS
from clcr.tasks import TaskSpec
from clcr.training import OptimConfig, Trainer

GOLDEN = Path(__file__).parent
STEPS = 20
FEATURES = {
    "video": FeatureSpec((8, 8, 3), 5.0, "uint8"),
    "audio": FeatureSpec((4,), 20.0, "float16"),
    "text": FeatureSpec((3, 6), 0.0, "float16"),
    "network": FeatureSpec((2, 6), 5.0, "float16"),  # layers of what has a time; since version 4
}
TASKS = {
    "label": TaskSpec("label", "classification", ("a", "b", "c")),
    "mood": TaskSpec("mood", "regression"),
}
SHAPE = {"model": {"width": 8, "heads": 2}, "mult": {"depth": 1}, "mm_orient": {"bank": 8}}


def samples(count):
    """Clips of one to two seconds, made of a fixed generator's numbers; every fourth has no sound."""
    generator, later = np.random.default_rng(7), np.random.default_rng(8)
    for number in range(count):
        seconds = 1 + number % 2
        features = {
            "video": generator.integers(0, 256, (5 * seconds, 8, 8, 3), dtype=np.uint8),
            "audio": generator.normal(size=(20 * seconds, 4)).astype(np.float16),
            "text": generator.normal(size=(4 + number % 3, 3, 6)).astype(np.float16),
            "network": later.normal(size=(5 * seconds, 2, 6)).astype(np.float16),
        }
        if number % 4 == 3:
            del features["audio"]
        targets = {"label": number % 3, "mood": float(generator.normal())}
        yield {"clip_id": f"clip{number}", "features": features, "targets": targets}


def batch(count=8):
    return collate(list(samples(count)), FEATURES, TASKS)


def learn(model):
    """STEPS steps on the fixed batch, on one thread, and their losses: what a version of the code learns."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model.fit_statistics([batch()])
        trainer, losses = Trainer(model, TASKS, OptimConfig(epochs=1, warmup=0.1), STEPS), []
        for step in range(STEPS):
            torch.manual_seed(step)
            model.train()
            losses.append(trainer.train_step(batch())["train/loss"])
        model.prepare_evaluation(lambda clips: [batch(clips)])
    finally:
        torch.set_num_threads(threads)
    model.eval()
    return losses


def answers(model):
    """What a model says of the fixed batch: logits by task."""
    with torch.no_grad():
        return {task: logits.float().tolist() for task, logits in model(batch()).logits.items()}


def write_models(folder):
    for architecture in (*MODELS, "video"):
        torch.manual_seed(3)
        model = clcr.build(architecture, CLCRConfig.from_dict(SHAPE), FEATURES, TASKS)
        losses = learn(model)
        clcr.save(model, folder / "models" / architecture, {})
        said = {"losses": losses, "logits": answers(model)}
        (folder / "models" / architecture / "answers.json").write_text(json.dumps(said))


def write_store_run_and_sweep(folder):
    """By the jobs themselves: three clips of real media, one in each split, a training and a sweep of two trials."""
    import subprocess

    from mediafiles import numbered, sine, write_manifest, write_media

    media = folder / "media"
    media.mkdir()
    rows = []
    for number, split in enumerate(("train", "val", "test")):
        write_media(media / f"{split}.mp4", numbered(25), sound=sine(300 + 100 * number, 1.0))
        rows.append({"clip_id": f"c/{number}.x", "video": f"{split}.mp4", "split": split, "label": "ab"[number % 2]})
    rows[1]["label"] = "a"
    rows.append(rows[0] | {"clip_id": "c/3", "label": "b"})
    write_manifest(media / "corpus.csv", rows)

    def job(name, *options):
        subprocess.run([sys.executable, name, *options], check=True, cwd=GOLDEN.parents[1])

    store, recipe = str(folder / "store"), ("--model.width", "8", "--model.heads", "2", "--epochs", "2")
    corpus = str(media / "corpus.csv")
    video = ("--video.size", "8", "--video.fps", "5", "--audio.mels", "8", "--audio.hop", ".05", "--audio.window", ".1")
    job("pipelines/extract.py", "--corpus", corpus, "--store", store, *video)
    job("pipelines/train.py", "--store", store, "--out", str(folder / "run"), *recipe)
    job(
        "tuning/sweep.py",
        "--store",
        store,
        "--out",
        str(folder / "sweep"),
        "--trials",
        "2",
        "--final-seeds",
        "0",
        *recipe,
    )
    shutil.rmtree(folder / "run" / "checkpoints", ignore_errors=True)
    shutil.copy(folder / "sweep" / "best.yaml", folder / "best.yaml")
    for litter in ("sweep", "mlartifacts"):
        shutil.rmtree(folder / litter, ignore_errors=True)
    for litter in folder.glob("mlflow.db*"):
        litter.unlink()
    (folder / "run" / "run.json").unlink()
    config = folder / "run" / "config.yaml"
    config.write_text(config.read_text().replace(str(folder), "GOLDEN"))


def write_log_mel(folder):
    from mediafiles import sine, write_media

    from features.decode.audio import encode_audio
    from features.decode.specs import AudioSpec

    path = folder / "media" / "tone.wav"
    write_media(path, sound=sine(440, 1.0))
    encoded = encode_audio(str(path), AudioSpec())
    np.save(folder / "log_mel.npy", getattr(encoded, "values", encoded))


def write_options(folder):
    from pipelines.common.cli import option_types
    from pipelines.evaluate import EvaluateConfig
    from pipelines.explain import ExplainConfig
    from pipelines.export import ExportConfig
    from pipelines.extract import ExtractConfig
    from pipelines.predict import PredictConfig
    from pipelines.serve import ServeConfig
    from pipelines.train import TrainConfig
    from tuning.ablate import AblateConfig
    from tuning.compare import CompareConfig
    from tuning.options import SweepConfig

    jobs = {
        "pipelines/extract.py": ExtractConfig,
        "pipelines/train.py": TrainConfig,
        "pipelines/predict.py": PredictConfig,
        "pipelines/explain.py": ExplainConfig,
        "pipelines/evaluate.py": EvaluateConfig,
        "pipelines/serve.py": ServeConfig,
        "pipelines/export.py": ExportConfig,
        "tuning/sweep.py": SweepConfig,
        "tuning/compare.py": CompareConfig,
        "tuning/ablate.py": AblateConfig,
    }
    names = {job: sorted(name.replace("_", "-") for name, _ in option_types(config)) for job, config in jobs.items()}
    (folder / "options.json").write_text(json.dumps(names, indent=1) + "\n")


if __name__ == "__main__":
    made = GOLDEN / sys.argv[1]
    made.mkdir()
    write_models(made)
    write_options(made)
    write_store_run_and_sweep(made)
    write_log_mel(made)
