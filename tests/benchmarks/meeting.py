"""Which exchange learns to meet: one modality marks a quarter of the clip, the other says a code in each; which is it?

    python -m tests.benchmarks.meeting --out tests/benchmarks/results/meeting.csv --seeds 1,2,3

Nothing but an exchange between equal instants can answer (chance .25), so that designs differ by far more than their
seeds. Vectors made on the fly, a fresh batch at every step; `accuracy` on 512 new clips; `alone` where each modality
is the only one, `alpha` the correlation of a token's weight with lying in a half that is noise (--noise).
"""

import argparse
import csv
import sys
import time
from pathlib import Path

import torch

import clcr
from clcr.batches import Batch, Features
from clcr.training import OptimConfig, Trainer
from tests.benchmarks.fusion import commit_of_code
from tests.benchmarks.recipes import parse

TOKENS, RATE, CODES = 16, 8.0, 4
FEATURES = {"mark": clcr.FeatureSpec((4,), RATE, "float32"), "code": clcr.FeatureSpec((8,), RATE, "float32")}
TASKS = {"said": clcr.TaskSpec("said", "classification", tuple("abcd"))}
BASE = "model.width=32 model.levels=2 model.heads=2 stem.motion=false lr=3e-3 batch_size=64"
RECIPES = [
    "clcr",
    "clcr model.null_key=false",
    "clcr model.alike=false",
    "clcr model.farthest=0.0",
    "clcr model.synchronise=false",
    "clcr model.private_share=0.5",
    "clcr model.space=lifted",
    "clcr model.space=tokens",
    "clcr model.exchange=dense",
    "clcr budget.evidence=content",
    "clcr budget.lr_scale=1.0",
    "clcr model.exchange=none",
    "concat",
]


def clips(n: int, seed: int, noise: float) -> Batch:
    """n clips: the mark lies on one quarter, each quarter has a code; noise: that of a half of the codes' tokens."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.randint(0, 4, (n,), generator=generator)
    codes = torch.randint(0, CODES, (n, 4), generator=generator)
    quarter = torch.arange(TOKENS) // (TOKENS // 4)
    basis = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0))).Q[:CODES] * 2
    mark = 0.3 * torch.randn(n, TOKENS, 4, generator=generator)
    mark[..., 0] += 2.0 * (quarter == place[:, None])
    code = 0.3 * torch.randn(n, TOKENS, 8, generator=generator) + basis[codes[:, quarter]]
    late = place >= 2
    noisy = (quarter >= 2)[None] != late[:, None]  # never where the answer is
    code = code + noise * noisy[..., None] * torch.randn(code.shape, generator=generator)
    valid = torch.ones(n, TOKENS, dtype=torch.bool)
    there = dict.fromkeys(FEATURES, torch.ones(n, dtype=torch.bool))
    batch = Batch(
        {"mark": Features(mark, valid), "code": Features(code, valid)},
        there,
        {"said": codes.gather(1, place[:, None])[:, 0]},
        [str(i) for i in range(n)],
    )
    batch.noisy = noisy
    return batch


def run(text: str, seed: int, steps: int, noise: float) -> dict[str, str]:
    """Train one recipe; its scores."""
    recipe = parse(f"{text} {BASE} epochs={steps}", seed)
    torch.manual_seed(seed)
    model = clcr.build(recipe.architecture, recipe.network, FEATURES, TASKS)
    trainer = Trainer(model, TASKS, OptimConfig(epochs=steps, lr=recipe.optim.lr), 1, seed=seed)
    model.train()
    for step in range(steps):
        trainer.train_step(clips(64, 10_000 * seed + step, noise))
    test = clips(512, 7, noise)
    with torch.no_grad():
        out = model.eval()(test)
        found = {"accuracy": accuracy(out, test)}
        for m in FEATURES:
            part = clips(512, 7, noise)
            part.present = {n: there & (n == m) for n, there in part.present.items()}
            found[f"{m} alone"] = accuracy(model(part), part)
    if noise and getattr(out, "alpha", None):
        alpha = out.alpha[0]["code"]
        found["alpha"] = torch.corrcoef(torch.stack([alpha.flatten(), test.noisy.float().flatten()]))[0, 1].item()
    return {name: f"{value:.3f}" for name, value in found.items()}


def accuracy(out: clcr.base.Output, batch: Batch) -> float:
    return (out.logits["said"].argmax(1) == batch.targets["said"]).float().mean().item()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--noise", type=float, default=0.0)
    parser.add_argument("recipes", nargs="*", default=RECIPES)
    args = parser.parse_args()
    torch.set_num_threads(1)
    key = ["recipe", "seed", "steps", "noise"]
    columns = ["commit", *key, "accuracy", "mark alone", "code alone", "alpha", "seconds"]
    new = not args.out.exists()
    done = set() if new else {tuple(row[k] for k in key) for row in csv.DictReader(args.out.read_text().splitlines())}
    commit = commit_of_code()
    for seed in map(int, args.seeds.split(",")):
        for text in args.recipes:
            row = dict(zip(key, (text, str(seed), str(args.steps), f"{args.noise:g}"), strict=True))
            if tuple(row.values()) in done:
                continue
            started = time.process_time()
            row |= run(text, seed, args.steps, args.noise) | {"commit": commit}
            row["seconds"] = f"{time.process_time() - started:.0f}"
            with open(args.out, "a", newline="") as file:
                table = csv.DictWriter(file, columns)
                if new:
                    table.writeheader()
                new = False
                table.writerow(row)
            print(*row.values(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
