"""The demo: from mp4 files to features, four models and a sweep, all by `ray job submit`, compared in MLflow.

It starts its own head node and stops it at the end. Everything it makes is in demo-out/ of the current folder. A second
run resumes after what the first one finished.
"""

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from infra.head import CHECKOUT, ROOT, Head, job, local_head, program

OUT = Path("demo-out").resolve()
CLIPS = 1000
TASKS = "label,match,when"
# Two more tasks are learned alongside: `match` compares two rhythms, and has no gradient until the model can read both.
LEARNED = ["--tasks", f"{TASKS},video_rate,audio_rate", "--loss.task-weights", "when=4,audio_rate=2"]
MODELS = ("clcr", "concat", "video", "audio")
EPOCHS = 20
WIDTH = "64"
CHATTER = re.compile(  # lines of Ray, not of the job
    r"^(\S* ?\d{4}[-/]\d\d[-/]\d\d \S+\s+(INFO|SUCC|WARNING)|Running entrypoint)"
    r"|core_worker.cc|Reporting training result|Checkpoint successfully created|^\s*$"
)
PREFIX = re.compile(r"^\x1b\[\d+m\(.*?\)\x1b\[0m ")  # Ray puts the name of the worker before each line
COMPARED, OPENED = "compare the trials: ", "  then open"  # begin the sweep's last lines: how to see the comparison
SWEEP = {"trials": 6, "epochs": 9, "final-seeds": 0}


def main() -> int:
    """Run every step; returns the exit code of the first step that failed, or 0."""
    prog = "python -m infra.demo" if CHECKOUT else "clcr-demo"
    argparse.ArgumentParser(prog=prog, description=__doc__).parse_args()
    started = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the head node is stopped too
    say(f"1/4 writing {CLIPS} mp4 files with planted semantics to {OUT.name}/corpus")
    corpus = ["features.synthetic", "--out", str(OUT / "corpus"), "--clips", str(CLIPS), "--rhythms"]
    if code := subprocess.run([sys.executable, "-m", *corpus], cwd=ROOT).returncode:
        return code
    with local_head() as head:
        say(f"Ray head node at {head.dashboard}, stopped when the demo ends")
        if code := run_jobs(head):
            return code
    print_results()
    print(f"\nthe demo took {(time.monotonic() - started) / 60:.1f} minutes")
    return 0


def run_jobs(head: Head) -> int:
    """Extract, train every model, sweep; returns the exit code of the first job that failed, or 0."""
    # The user's own MLflow server if there is one; else one sqlite file holds all of the demo's runs.
    env = {"MLFLOW_TRACKING_URI": os.environ.get("MLFLOW_TRACKING_URI", tracking_uri())}
    store = ["--store", str(OUT / "store")]
    say("2/4 extract: mp4 -> features")
    extract = ["--corpus", str(OUT / "corpus" / "corpus.csv"), *store, "--video.size", "32"]
    if code := submit(head, "pipelines/extract.py", *extract, env=env):
        return code
    say(f"3/4 train: {', '.join(MODELS)}, as many at a time as there are cores")

    def train(model: str) -> int:
        options = ["--model", model, *LEARNED, "--epochs", str(EPOCHS), "--experiment", "demo"]
        options += ["--model.width", WIDTH, "--cpus-per-worker", "1"]
        return submit(head, "pipelines/train.py", *store, "--out", str(OUT / model), *options, env=env)

    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        codes = list(pool.map(train, MODELS))
        if failed := [code for code in codes if code]:  # negative if a signal ended the client
            return failed[0]
    finally:  # on Ctrl-C do not wait for the jobs: they end with the head node
        pool.shutdown(wait=False, cancel_futures=True)
    if (OUT / "sweep" / "best.yaml").exists():
        return 0
    print_accuracies()
    say(f"4/4 sweep: {SWEEP['trials']} trials over token budgets and loss weights")
    options = [*LEARNED, "--model.width", WIDTH, "--experiment", "demo"]
    options += [word for name, value in SWEEP.items() for word in (f"--{name}", str(value))]
    return submit(head, "tuning/sweep.py", *store, "--out", str(OUT / "sweep"), *options, env=env)


def submit(head: Head, script: str, *options: str, env: dict[str, str]) -> int:
    """Submit one job and return its exit code. Its own lines go to the screen, all lines to demo-out/logs."""
    settings = [f"{name}={value}" for name, value in env.items()]
    command = head.submit_command("env", *settings, *job(script), *options)
    (OUT / "logs").mkdir(exist_ok=True)
    name = Path(options[options.index("--out") + 1]).name if "--out" in options else Path(script).stem
    # Several jobs share the screen: print would write the end of a line by itself.
    print(f"{name:8}ray {' '.join(command[1:])}\n", end="", flush=True)
    with open(OUT / "logs" / f"{name}.log", "w") as log:
        client = subprocess.Popen(
            command, cwd=ROOT, env=dict(head.env), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert client.stdout is not None
        for line in client.stdout:
            log.write(line)
            if not CHATTER.search(line):
                print(f"{name:8}{PREFIX.sub('', line)}", end="", flush=True)
    return client.wait()


def print_results() -> None:
    """Print each model's accuracy, the sweep's best trial, and where the runs are compared."""
    print_accuracies()
    trials = pq.read_table(OUT / "sweep" / "trials.parquet").to_pandas()
    best = trials.loc[trials["best/score"].idxmax()]
    print(f"sweep: {len(trials)} trials, best validation score {best['best/score']:.3f} (trial {best['trial']:.0f})")
    print("\n" + (comparison(OUT / "logs" / "sweep.log") or f"compare the runs: {compare_command()}"))


def comparison(log: Path) -> str:
    """What a sweep's log says last: how to see its trials compared; empty if there is no log of one that ended."""
    _, found, said = (log.read_text() if log.exists() else "").rpartition(COMPARED)
    lines = said.splitlines() if found else []
    then = [line for line in lines[1:] if line.startswith(OPENED)]
    return "\n".join([found + lines[0], *then]) if lines else ""


def print_accuracies() -> None:
    """Print one table: each model's accuracy by task, and the best that is possible from each modality."""
    ceilings = json.loads((OUT / "corpus" / "ceilings.json").read_text())["ceilings"]
    tasks = TASKS.split(",")
    table = Table("", *tasks, title="test accuracy")
    for model in MODELS:
        metrics = json.loads((OUT / model / "metrics.json").read_text())
        table.add_row(model, *(f"{metrics[task]['accuracy']:.3f}" for task in tasks))
    table.add_section()
    for source in ("video", "audio", "both"):
        table.add_row(f"best possible from {source}", *(f"{ceilings[task][source]:.3f}" for task in tasks))
    Console(width=100).print(table)


def compare_command() -> str:
    """The address or the command that opens the runs in MLflow."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", tracking_uri())
    return uri if uri.startswith("http") else shlex.join([program("mlflow"), "ui", "--backend-store-uri", uri])


def tracking_uri() -> str:
    """The sqlite file that holds the demo's runs."""
    return f"sqlite:///{OUT / 'mlflow.db'}"


def say(what: str) -> None:
    """Print a headline between the jobs' logs."""
    print(f"\n=== {what}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
