"""Small features, tasks, batches and models that the model tests share."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import clcr
from clcr.batches import collate
from clcr.config import (
    BudgetConfig,
    LossConfig,
    MISAConfig,
    MMOrientConfig,
    ModelConfig,
    MulTConfig,
    OGMGEConfig,
    StemConfig,
)
from clcr.tasks import task_loss

FRAMES = clcr.FeatureSpec((16, 16, 3), 12.5, "uint8")
LOGMEL = clcr.FeatureSpec((20,), 50.0, "float16")
LAYERS = clcr.FeatureSpec((3, 12), 10.0, "float32")
WORDS = clcr.FeatureSpec((3, 24), 0.0, "float32")
WORD = clcr.TaskSpec("word", "classification", ("a", "b", "c"))
MOOD = clcr.TaskSpec("mood", "regression")


@pytest.fixture(autouse=True)
def one_thread_and_seed():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def make_config(loss=None, stem=None, budget=None, mm_orient=None, misa=None, ogm_ge=None, depth=2, **model):
    model = {"width": 32, "levels": 3, "heads": 2, "dropout": 0.0, **model}
    return clcr.CLCRConfig(
        ModelConfig(**model),
        StemConfig(**(stem or {})),
        BudgetConfig(**(budget or {})),
        LossConfig(**(loss or {})),
        MMOrientConfig(**(mm_orient or {})),
        MISAConfig(**(misa or {})),
        OGMGEConfig(**(ogm_ge or {})),
        MulTConfig(depth),
    )


def make_samples(n, features, seed=0, seconds=2.0):
    rng = np.random.default_rng(seed)
    samples = []
    for i in range(n):
        length = seconds * rng.uniform(0.6, 1.0)
        arrays = {}
        for m, spec in features.items():
            shape = (max(2, int(length * spec.rate)), *spec.shape)
            frames = spec.dtype == "uint8"
            arrays[m] = (rng.integers(0, 256, shape) if frames else rng.normal(size=shape)).astype(spec.dtype)
        samples.append(
            {"clip_id": f"clip{i}", "features": arrays, "targets": {"word": i % 3, "mood": float(rng.normal())}}
        )
    return samples


@pytest.fixture
def make():
    """make.samples / .batch / .model / .config, make.features, make.tasks: two modalities and two tasks."""
    features, tasks = {"video": FRAMES, "audio": LOGMEL}, {"word": WORD, "mood": MOOD}

    def batch(n=6, seed=0, features=features):
        return collate(make_samples(n, features, seed), features, tasks)

    def model(name="clcr", features=features, **options):
        return clcr.build(name, make_config(**options), features, tasks)

    def samples(n=6, seed=0, features=features):
        return make_samples(n, features, seed)

    def loss(model, batch):
        out = model(batch)
        parts = [task_loss(spec, out.logits[t], batch.targets[t]) for t, spec in model.tasks.items()]
        return sum(total / count.clamp(min=1) for total, count in parts) + sum(out.losses.values())

    @torch.enable_grad()
    def train(model, batch, steps, lr=3e-3, optimizer=torch.optim.AdamW):
        model.train()
        optimizer = optimizer(model.parameter_groups(1e-4), lr=lr)
        for _ in range(steps):
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()
        return model

    return SimpleNamespace(
        features=features,
        three={"video": FRAMES, "audio": LAYERS, "text": WORDS},
        tasks=tasks,
        samples=samples,
        batch=batch,
        model=model,
        config=make_config,
        loss=loss,
        train=train,
    )
