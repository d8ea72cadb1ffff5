"""MLflow as a person opens it: from the list of experiments to the runs, best first, and to a sweep's comparison."""

import json
import os
import shlex
import time
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from infra.screenshot import chromium, served
from pipelines.tracking import views
from pipelines.tracking.run import NOTE, start_run

SCORES = [0.31, 0.82, 0.55]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """An experiment with a training and a sweep of three trials, as the jobs leave them."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"
    training = start_run(uri, "demo", "clcr on grid, seed 0", {"model": "clcr", "seed": 0}, {"store": "grid"})
    training.log_metrics({"best/score": 0.4, "diag/omega_entropy": 1.0, "val/score": 0.4})
    training.finish()
    parent = start_run(uri, "demo", "sweep of clcr on grid, seed 0", {"model": "clcr"}, {"store": "grid"})
    trials = []
    for number, score in enumerate(SCORES):
        tags = {"trial": str(number)}
        trial = start_run(uri, "demo", f"trial-{number:03d}", {"lr": 10.0**-number}, tags, parent.run_id)
        trial.log_metrics({"best/score": score, "diag/omega_entropy": 1.0})
        trial.finish()
        trials.append(trial.run_id)
    experiment = parent.experiment_id()
    state = views.view(["params.`lr`"], ["best/score"], f"tags.`mlflow.parentRunId` = '{parent.run_id}'")
    parent.client.set_experiment_tag(experiment, views.SHARED + parent.run_id[:12], state)
    link = views.comparison_path(trials, experiment)[1:]
    parent.set_tag(NOTE, f"[Compare the trials]({link})")
    parent.finish()
    with served(uri) as address:
        yield address, experiment, parent.run_id


def see(browser, *texts, seconds=90):
    """Wait until a page shows some texts; its text."""
    wait = WebDriverWait(browser, seconds, ignored_exceptions=(Exception,))
    wait.until(lambda b: all(text in b.find_element(By.TAG_NAME, "body").text for text in texts), f"no {texts}")
    return browser.find_element(By.TAG_NAME, "body").text


def picture(browser, name):
    """A screenshot for the notes, where PICTURES names a folder."""
    if folder := os.environ.get("PICTURES"):
        time.sleep(3)
        browser.save_screenshot(str(Path(folder, f"{name}.png")))


def click(browser, text):
    """Click a link as a person would, and follow it where it opens a new tab."""
    before = set(browser.window_handles)
    WebDriverWait(browser, 60, ignored_exceptions=(Exception,)).until(
        lambda b: b.find_element(By.PARTIAL_LINK_TEXT, text).click() or True
    )
    time.sleep(1)
    if new := set(browser.window_handles) - before:
        browser.switch_to.window(new.pop())


def test_a_person_clicks_from_the_experiments_to_the_comparison(tracked):
    address, _, _ = tracked
    with chromium() as browser:
        browser.get(f"{address}/#/experiments")
        see(browser, "demo")
        picture(browser, "experiments")
        browser.find_element(By.XPATH, "//*[text()='Model training']").click()  # the browser remembers it
        time.sleep(1)
        click(browser, "demo")
        see(browser, "clcr on grid, seed 0", "sweep of clcr on grid")  # runs, and not traces
        picture(browser, "runs")
        click(browser, "sweep of clcr on grid")
        see(browser, "Compare the trials")
        picture(browser, "run")
        click(browser, "Compare the trials")
        see(browser, "trial-000", "trial-001", "trial-002", "best/score")
        picture(browser, "comparison")


def test_printed_addresses_open_runs_best_first_with_scores_and_searched_options(tracked):
    address, experiment, run_id = tracked
    with chromium() as browser:
        browser.set_window_size(2200, 1100)
        for key, names in (
            (views.RUNS, ["trial-001", "trial-002", "clcr on grid, seed 0", "trial-000"]),
            (run_id[:12], ["trial-001", "trial-002", "trial-000"]),
        ):
            browser.get("about:blank")
            browser.get(views.runs_page(address, experiment, key))
            text = see(browser, *names, "best/score", "0.82")
            picture(browser, f"view-{key}")
            places = [text.index(name) for name in names]
            assert places == sorted(places), text
            assert ("lr" in text.split()) == (key != views.RUNS)


def test_an_experiment_is_opened_with_its_runs_and_keeps_what_people_set(tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(uri)
    run = start_run(uri, "x", "run", {}, {})
    tags = client.get_experiment(run.experiment_id()).tags
    assert tags["mlflow.experimentKind"] == "custom_model_development"
    assert json.loads(tags[views.SHARED + views.RUNS])["orderByKey"] == "metrics.`best/score`"


def test_addresses_are_quoted_for_a_shell_and_for_a_server():
    assert views.page("http://host/prefix/", "/#/x") == "http://host/prefix/#/x"
    command, then = views.page("sqlite:////a b/mlflow.db", "/#/x").splitlines()
    program, *options = shlex.split(command)
    assert os.access(program, os.X_OK) and options == ["ui", "--backend-store-uri", "sqlite:////a b/mlflow.db"]
    assert then == "  then open  http://127.0.0.1:5000/#/x"
