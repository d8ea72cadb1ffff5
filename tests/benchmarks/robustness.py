"""Test accuracy when the sound is noisy: every model, every kind of noise and strength, over seeds.

    python -m tests.benchmarks.robustness --corpus grid/corpus.csv --tasks command,color,letter,digit --out DIR

Noise is mixed into the sound before log-mel, of all splits alike (features/noise.py); each condition is then extracted
and trained as tests/benchmarks/accuracy.py does. Run again and it goes on from what is finished. Prints mean accuracy
over the tasks, mean over seeds and half the 95 % t interval, and draws robustness.png.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import tyro
from matplotlib.figure import Figure

from features.files import read_json
from features.noise import Options, add_noise_to_corpus
from features.store.sheet import write_figure
from tests.benchmarks.accuracy import AccuracyConfig, compare
from tuning.report import MEAN, Line
from tuning.report import compare as compare_runs

CLEAN = "clean"


@dataclass(frozen=True)
class RobustnessConfig:
    """What is compared."""

    corpus: str
    """manifest of the clips"""
    out: Path
    """folder for noisy corpora, stores, runs and mlflow.db"""
    tasks: str
    """tasks learned together, separated by commas"""
    kinds: str = "babble,white"
    """kinds of noise, separated by commas"""
    snrs: str = "-10,-5,0"
    """strengths: power of the sound over the noise's, dB, separated by commas"""
    models: str = "concat,audio,video"
    """models to train beside clcr, separated by commas"""
    seeds: int = 3
    """seeds 0, 1, ... of each model"""
    epochs: int = 40
    """epochs of each training"""
    extract: str = "--video.size 32 --video.crop .30,.47,.70,.92"
    """further options of pipelines/extract.py, in one string; the crop holds GRID's mouth"""
    train: str = ""
    """further options of tuning/ablate.py, in one string"""

    def conditions(self) -> dict[str, tuple[str, float] | None]:
        """Kind and strength of the noise by name; None is the corpus as it is."""
        pairs = [(kind, float(snr)) for kind in self.kinds.split(",") for snr in self.snrs.split(",")]
        return {CLEAN: None} | {f"{kind} {snr:g} dB": (kind, snr) for kind, snr in pairs}


def main() -> int:
    """Every condition, then the table and the picture."""
    config = tyro.cli(RobustnessConfig, description=__doc__)
    for name, noise in config.conditions().items():
        folder = config.out / name.replace(" ", "_")
        corpus = config.corpus
        if noise is not None:
            corpus = str(folder / "corpus" / "corpus.parquet")
            if not Path(corpus).exists():
                add_noise_to_corpus(Options(config.corpus, folder / "corpus", *noise))
        print(f"== {name}", flush=True)
        run = AccuracyConfig(
            corpus, folder, config.tasks, config.models, config.seeds, config.epochs, config.extract, config.train
        )
        if code := compare(run):
            return code
    report(config)
    return 0


def report(config: RobustnessConfig) -> None:
    """Mean accuracy by model and condition."""
    lines = {name: lines_of(config, config.out / name.replace(" ", "_") / "runs") for name in config.conditions()}
    models = list(lines[CLEAN])
    print(f"\n| mean of {len(config.tasks.split(','))} tasks | {' | '.join(lines)} |")
    print("|---" * (len(lines) + 1) + "|")
    for model in models:
        cells = [f"{line[model].mean(MEAN):.3f} ± {line[model].half_width(MEAN):.3f}" for line in lines.values()]
        print(f"| {model} | {' | '.join(cells)} |")
    picture = config.out / "robustness.png"
    write_figure(str(picture), figure(config, lines))
    print(f"\ndrawn to {picture}")


def lines_of(config: RobustnessConfig, runs: Path) -> dict[str, Line]:
    """Every model's scores in one condition."""
    names = ("full", *config.models.split(","))
    results = {
        name: {seed: read_json(f"{runs}/{name}-seed{seed}", "metrics.json") for seed in range(config.seeds)}
        for name in names
    }
    return {line.name: line for line in compare_runs(results, names[0])}


def figure(config: RobustnessConfig, lines: Mapping[str, Mapping[str, Line]]) -> Figure:
    """A panel per kind of noise: accuracy over its strength, clean at the right."""
    kinds, snrs = config.kinds.split(","), [float(snr) for snr in config.snrs.split(",")]
    drawn = Figure(figsize=(4.6 * len(kinds), 3.6), layout="constrained")
    for axes, kind in zip(drawn.subplots(1, len(kinds), sharey=True, squeeze=False)[0], kinds, strict=True):
        conditions = [*(f"{kind} {snr:g} dB" for snr in snrs), CLEAN]
        for model in lines[CLEAN]:
            scores = [lines[condition][model] for condition in conditions]
            means, halves = [s.mean(MEAN) for s in scores], [s.half_width(MEAN) for s in scores]
            axes.errorbar(range(len(conditions)), means, yerr=halves, marker="o", capsize=3, label=model)
        axes.set_xticks(range(len(conditions)), [*(f"{snr:g} dB" for snr in snrs), CLEAN])
        axes.set(title=kind, xlabel="sound over noise")
        axes.grid(alpha=0.3)
    drawn.axes[0].set_ylabel("mean test accuracy")
    drawn.axes[0].legend()
    return drawn


if __name__ == "__main__":
    sys.exit(main())
