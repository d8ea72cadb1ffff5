"""Test accuracy when the sound is noisy: every model tuned alike, every kind of noise and strength, over seeds.

    python -m tests.benchmarks.robustness --corpus grid/corpus.csv --tasks command,color,letter,digit --out DIR

Noise is mixed into the sound before log-mel, of all splits alike (features/noise.py). Each condition is extracted and
compared by tuning/compare.py, as a user would: the models are tuned in one of them, with as many trials each, and then
trained with what was best there in all. Run it again to resume. Prints mean accuracy over the
tasks, mean over seeds and half the 95 % t interval, the share of tokens that CLCR exchanges, and draws robustness.png.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import tyro
from matplotlib.figure import Figure

from features.files import read_json
from features.noise import Options, add_noise_to_corpus
from features.store.sheet import write_figure
from pipelines.tracking.run import Run
from tests.benchmarks.accuracy import job
from tuning.report import MEAN, Line, compare

CLEAN, DEAF = "clean", "video"  # the picture alone: noise changes nothing for it, so it is trained once


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
    models: str = "clcr,concat,mult,audio,video"
    """models, separated by commas; the others are tested against the first"""
    trials: int = 12
    """trials of each model's sweep; 0 = no tuning"""
    search: str = ""
    """options that the sweeps search, as tuning/compare.py takes them; none named = all"""
    tuned_in: str = "babble -5 dB"
    """the condition in which they are tuned, and the picture alone is trained"""
    seeds: int = 5
    """trainings of each best recipe"""
    epochs: int = 20
    """epochs of each training"""
    extract: str = "--video.size 32 --video.crop .30,.47,.70,.92"
    """further options of pipelines/extract.py, in one string; the crop holds GRID's mouth"""
    train: str = "--model.width 64"
    """further options of tuning/compare.py, in one string"""

    def conditions(self) -> dict[str, tuple[str, float] | None]:
        """Kind and strength of the noise by name; None is the corpus as it is."""
        pairs = [(kind, float(snr)) for kind in self.kinds.split(",") for snr in self.snrs.split(",")]
        return {CLEAN: None} | {f"{kind} {snr:g} dB": (kind, snr) for kind, snr in pairs}


def main() -> int:
    """Every condition, the one to tune in first, then the table and the picture."""
    config = tyro.cli(RobustnessConfig, description=__doc__)
    conditions = config.conditions()
    if config.tuned_in not in conditions:
        sys.exit(f"--tuned-in {config.tuned_in}: choose one of {', '.join(conditions)}")
    for name in sorted(conditions, key=lambda name: name != config.tuned_in):
        print(f"== {name}", flush=True)
        if code := run(config, name, conditions[name]):
            return code
    report(config)
    return 0


def run(config: RobustnessConfig, name: str, noise: tuple[str, float] | None) -> int:
    """One condition: its corpus, its store, its comparison; the exit code."""
    folder, corpus = folder_of(config, name), Path(config.corpus).resolve()
    if noise is not None:
        clean, corpus = corpus, folder / "corpus" / "corpus.parquet"
        if not corpus.exists():
            add_noise_to_corpus(Options(str(clean), corpus.parent, *noise))
    here = name == config.tuned_in
    models = [model for model in config.models.split(",") if model != DEAF or here]
    store, options = str(folder / "store"), ["--tasks", config.tasks, "--models", ",".join(models)]
    options += ["--seeds", str(config.seeds), "--epochs", str(config.epochs)]
    options += ["--trials", str(config.trials if here else 0)]
    if config.search and config.trials and here:
        options += ["--search", config.search]
    if config.trials and not here:
        options += ["--tuned-in", str(folder_of(config, config.tuned_in) / "comparison")]
    return job("pipelines/extract.py", "--corpus", str(corpus), "--store", store, *config.extract.split()) or job(
        "tuning/compare.py", "--store", store, "--out", str(folder / "comparison"), *options, *config.train.split()
    )


def folder_of(config: RobustnessConfig, condition: str) -> Path:
    """Where all of one condition lies."""
    return config.out.resolve() / condition.replace(" ", "_")


def report(config: RobustnessConfig) -> None:
    """Mean accuracy by model and condition, and what CLCR exchanges."""
    lines = {name: lines_of(config, name) for name in config.conditions()}
    print(f"\n| mean of {len(config.tasks.split(','))} tasks | {' | '.join(lines)} |")
    print("|---" * (len(lines) + 1) + "|")
    for model in lines[CLEAN]:
        cells = [
            f"{line[model].mean(MEAN):.3f} ± {line[model].half_width(MEAN):.3f}" + " *" * (line[model].p[MEAN] < 0.05)
            for line in lines.values()
        ]
        print(f"| {model} | {' | '.join(cells)} |")
    if "clcr" in lines[CLEAN]:
        print(f"| tokens exchanged by clcr | {' | '.join(f'{exchanged(config, name):.2f}' for name in lines)} |")
    picture = config.out / "robustness.png"
    write_figure(str(picture), figure(config, lines))
    first = next(iter(lines[CLEAN]))
    print(f"\n* p < 0.05, paired t-test against {first}, corrected by condition. Drawn to {picture}")


def lines_of(config: RobustnessConfig, condition: str) -> dict[str, Line]:
    """Every model's scores in one condition."""
    results = {}
    for model in config.models.split(","):
        runs = folder_of(config, config.tuned_in if model == DEAF else condition) / "comparison"
        results[model] = {
            seed: read_json(f"{runs}/{model}-seed{seed}", "metrics.json") for seed in range(1, config.seeds + 1)
        }
    return {line.name: line for line in compare(results, next(iter(results)))}


def exchanged(config: RobustnessConfig, condition: str) -> float:
    """The share of tokens that CLCR exchanges on the test split, mean over levels, modalities and seeds."""
    shares = []
    for seed in range(1, config.seeds + 1):
        started = read_json(f"{folder_of(config, condition)}/comparison/clcr-seed{seed}", "run.json")
        run = Run(started["tracking_uri"], started["run_id"])
        metrics = run.client.get_run(run.run_id).data.metrics
        shares += [value for name, value in metrics.items() if name.startswith("test/diag/participation/")]
    return mean(shares)


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
