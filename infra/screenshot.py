"""A picture of MLflow's own run-comparison page, taken by headless Chromium: `make screenshot` after `make demo`.

Needs Debian's chromium and chromium-driver, and selenium.
"""

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro
from mlflow.tracking import MlflowClient
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from infra.head import ROOT, answers, free_ports


@dataclass(frozen=True)
class ScreenshotConfig:
    """What to picture."""

    tracking_uri: str = f"sqlite:///{ROOT / 'demo-out' / 'mlflow.db'}"
    """tracking store that holds the runs"""
    experiment: str = "demo"
    """experiment whose newest sweep is compared: its trials, as parallel coordinates"""
    out: Path = ROOT / "infra" / "compare-runs.png"
    """picture to write"""


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
    port = free_ports(1)[0]
    command = [Path(sys.executable).parent / "mlflow", "ui", "--backend-store-uri", config.tracking_uri]
    server = subprocess.Popen([*command, "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        if not answers(f"http://127.0.0.1:{port}/health", server):
            sys.exit(f"error: mlflow ui did not start on {config.tracking_uri}")
        query = f"runs={json.dumps(ids)}&experiments={json.dumps([experiment.experiment_id])}"
        photograph(f"http://127.0.0.1:{port}/#/compare-runs?{query}", config.out)
    finally:
        server.terminate()
        server.wait()
    print(f"written: {config.out}")


def photograph(url: str, out: Path, width: int = 1500, height: int = 1100, seconds: float = 12) -> None:
    """Open a page in headless Chromium, let its charts draw for `seconds`, save a PNG."""
    options = webdriver.ChromeOptions()
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-background-networking", "disable-sync"):
        options.add_argument(f"--{flag}")
    options.add_argument(f"--window-size={width},{height}")
    with webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver")) as browser:
        browser.get(url)
        time.sleep(seconds)
        browser.save_screenshot(str(out))


if __name__ == "__main__":
    main()
