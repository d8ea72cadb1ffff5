"""A picture of MLflow's own run-comparison page, taken by headless Chromium: `make screenshot` after `make demo`.

Needs Debian's chromium and chromium-driver, and selenium.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import tyro
from mlflow.tracking import MlflowClient
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from infra.head import ROOT, answers, free_ports, program

SECONDS = 12  # time that the charts get to be drawn


@dataclass(frozen=True)
class ScreenshotConfig:
    """Options of the screenshot."""

    tracking_uri: str = f"sqlite:///{ROOT / 'demo-out' / 'mlflow.db'}"
    """tracking store that holds the runs"""
    experiment: str = "demo"
    """MLflow experiment; the trials of its newest sweep are compared as parallel coordinates"""
    out: Path = ROOT / "infra" / "compare-runs.png"
    """PNG file to write"""


def main() -> None:
    """Serve the store, open the comparison of a sweep's trials, save the picture."""
    config = tyro.cli(ScreenshotConfig, description=__doc__)
    client = MlflowClient(config.tracking_uri)
    experiment = client.get_experiment_by_name(config.experiment)
    if experiment is None:
        sys.exit(f"error: {config.tracking_uri} has no experiment {config.experiment}: run `make demo` first")
    runs = client.search_runs([experiment.experiment_id], "tags.trial != ''", max_results=50)
    if not runs:
        sys.exit(f"error: experiment {config.experiment} holds no trial of a sweep")
    parent = runs[0].data.tags["mlflow.parentRunId"]
    ids = [run.info.run_id for run in runs if run.data.tags["mlflow.parentRunId"] == parent]
    query = f"runs={json.dumps(ids)}&experiments={json.dumps([experiment.experiment_id])}"
    with served(config.tracking_uri) as address, chromium() as browser:
        browser.get(f"{address}/#/compare-runs?{query}")
        time.sleep(SECONDS)
        browser.save_screenshot(str(config.out))
    print(f"written: {config.out}")


@contextmanager
def served(tracking_uri: str) -> Iterator[str]:
    """Run an MLflow server on a tracking store for as long as the block, which gets its address."""
    port = free_ports(1)[0]
    command = [program("mlflow"), "ui", "--workers", "1"]
    server = subprocess.Popen(
        [*command, "--backend-store-uri", tracking_uri, "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        if not answers(f"http://127.0.0.1:{port}/health", server, seconds=300):
            sys.exit(f"error: mlflow ui did not start on {tracking_uri}")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


@contextmanager
def chromium(width: int = 1500, height: int = 1100) -> Iterator[webdriver.Chrome]:
    """Run headless Chromium for as long as the block."""
    options = webdriver.ChromeOptions()
    flags = ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "disable-background-networking")
    for flag in (*flags, "disable-sync", f"window-size={width},{height}"):
        options.add_argument(f"--{flag}")
    with webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver")) as browser:
        yield browser


if __name__ == "__main__":
    main()
