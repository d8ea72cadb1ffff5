"""A real sweep: Ray Tune, Optuna, MLflow; killed in the middle, resumed, asked for more; its best.yaml trains."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import quote

import optuna
import pyarrow.parquet as pq
import pytest
import ray
import yaml
from inprocess import run_here
from mlflow.tracking import MlflowClient
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

import tuning.sweep
from infra.screenshot import chromium, served
from pipelines.train import TrainConfig, train
from tuning.options import SweepConfig
from tuning.sweep import sweep

ROOT = Path(__file__).parents[2]
SMALL = ["--model.width", "16", "--model.heads", "2", "--batch-size", "8", "--epochs", "3", "--grace-epochs", "1"]
BRIEF = ["--trials", "2", "--final-seeds", "0", "--epochs", "1", "--concurrency", "1"]
TRIALS = "tags.trial != ''"
pytestmark = pytest.mark.slow


def journal(folder):
    """The study as another process sees it: what optuna-dashboard opens."""
    storage = JournalStorage(JournalFileBackend(str(folder / "study.journal")))
    return optuna.load_study(study_name=None, storage=storage)


def ended(folder):
    try:
        return [t for t in journal(folder).trials if t.state.is_finished()]
    except (FileNotFoundError, KeyError, ValueError):  # not there yet
        return []


def command(store, out, *options):
    return [sys.executable, "tuning/sweep.py", "--store", store.uri, "--out", str(out), *SMALL, *options]


def kill_after(trials, command, out, log):
    """Start a sweep and kill its driver, which takes Ray along, when so many trials have ended."""
    with open(log, "w") as file:
        job = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, start_new_session=True)
    deadline = time.monotonic() + 600
    while not (out / "study.journal").exists() or len(ended(out)) < trials:
        assert job.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)
    os.kill(job.pid, signal.SIGKILL)
    job.wait()
    return ended(out)


@pytest.fixture(scope="module")
def swept(store, tmp_path_factory):
    """Killed after two trials, while it wrote a line of its journal, and between a trial's run and its note of it."""
    folder = tmp_path_factory.mktemp("sweep")
    out = folder / "sweep"
    options = ["--trials", "7", "--tasks", "label,mood", "--concurrency", "2"]
    before = kill_after(2, command(store, out, *options, "--final-seeds", "2"), out, folder / "killed.log")
    with open(out / "study.journal", "a") as file:
        file.write('{"op_code": 6, "trial')
    if not os.path.lexists(out / "study.journal.lock"):
        os.symlink(out / "study.journal", out / "study.journal.lock")
    client, parent, *_ = runs_of(out)
    tags = {"mlflow.parentRunId": parent.info.run_id, "trial": "4"}
    client.create_run(parent.info.experiment_id, run_name="trial-004", tags=tags)
    done = subprocess.run(command(store, out, *options, "--final-seeds", "2"), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out, before, done, options


def trials_of(out):
    return pq.read_table(out / "trials.parquet").to_pylist()


def runs_of(out):
    """The parent run, and the children that are trials."""
    client = MlflowClient(f"sqlite:///{out.parent}/mlflow.db")
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    (parent,) = [r for r in runs if "mlflow.parentRunId" not in r.data.tags]
    return client, parent, [r for r in runs if "trial" in r.data.tags], [r for r in runs if "variant" in r.data.tags]


def test_after_a_kill_no_trial_is_lost_and_none_that_ended_is_run_again(swept):
    out, before, done, _ = swept
    assert len(before) >= 2 and f"sweep of 7 trials, {len(before)} done" in done.stdout
    after = {t.number: t for t in journal(out).trials}
    assert sorted(after) == list(range(7)) and all(t.state.is_finished() for t in after.values())
    for trial in before:
        assert after[trial.number] == trial  # its parameters, its values and its times, to the microsecond


def test_every_trial_is_a_row_and_one_child_run_of_one_parent_with_each_epoch_once(swept):
    out, *_ = swept
    trials = trials_of(out)
    assert [t["trial"] for t in trials] == list(range(7))
    assert all(1 <= t["epochs"] <= 3 and t["best/score"] <= 1 for t in trials)
    client, parent, children, _ = runs_of(out)
    assert {c.data.tags["mlflow.parentRunId"] for c in children} == {parent.info.run_id}
    assert sorted(c.info.run_id for c in children) == sorted(t["run_id"] for t in trials)
    assert parent.info.status == "FINISHED" and {c.info.status for c in children} == {"FINISHED"}
    searched = set(trials[0]) - {"trial", "run_id", "status", "epochs", "error", "best/score"}
    for child in children:
        row = next(t for t in trials if t["run_id"] == child.info.run_id)
        assert set(child.data.params) == searched
        recipe = yaml.safe_load(Path(client.download_artifacts(child.info.run_id, "recipe.yaml")).read_text())
        assert recipe["epochs"] == 3 and recipe["lr"] == row["lr"]
        assert float(child.data.params["budget.start.1"]) == pytest.approx(row["budget.start.1"])
        history = client.get_metric_history(child.info.run_id, "val/label/accuracy")
        assert [m.step for m in history] == list(range(row["epochs"]))
        assert not any(name.startswith("test/") for name in child.data.metrics), "a trial saw the test split"


def test_runs_say_what_they_are_and_the_parent_holds_the_pictures(swept):
    client, parent, children, _ = runs_of(swept[0])
    assert "[Compare the trials](#/compare-runs?runs=" in parent.data.tags["mlflow.note.content"]
    for child in children:
        note = child.data.tags["mlflow.note.content"]
        assert note.startswith(f"Trial {child.data.tags['trial']}. ") and "`lr`" in note
    files = {f.path for f in client.list_artifacts(parent.info.run_id, "pictures")}
    names = ("history", "parallel", "importance", "contour", "scatter", "curves")
    assert files == {f"pictures/{name}.png" for name in names}
    assert all((swept[0] / file).stat().st_size > 10_000 for file in files)


def test_the_first_trial_is_the_recipe_as_given_and_no_point_is_drawn_twice(swept):
    trials = trials_of(swept[0])
    assert trials[0]["lr"] == 0.001 and trials[0]["loss.lambda_intra"] == 0.01 and trials[0]["model.width"] == 16
    assert len({t["lr"] for t in trials}) == 7


def test_the_last_lines_count_what_asha_stopped_over_both_starts(swept):
    out, _, done, _ = swept
    stopped = [t for t in trials_of(out) if t["status"] == "STOPPED"]
    saved = sum(3 - t["epochs"] for t in stopped)
    assert f"ASHA stopped {len(stopped)} of 7 trials and saved {saved} epochs; 0 failed" in done.stdout


def test_the_best_and_the_given_recipe_are_scored_on_the_test_split_with_the_same_seeds(swept):
    out, _, done, _ = swept
    table = (out / "final.md").read_text()
    assert table in done.stdout and "seeds 1, 2" in table
    _, parent, _, final = runs_of(out)
    best = yaml.safe_load((out / "best.yaml").read_text())
    trial = next(t for t in trials_of(out) if t["lr"] == best["lr"])["trial"]
    names = {"given", f"trial-{trial:03d}"} if trial else {"given"}  # trial 0 is the recipe as given
    assert {(r.data.tags["variant"], r.data.tags["seed"]) for r in final} == {(n, s) for n in names for s in "12"}
    assert all("test/score" in r.data.metrics for r in final) and "test/given/mean" in parent.data.metrics
    assert {float(r.data.params["lr"]) for r in final if r.data.tags["variant"] != "given"} <= {best["lr"]}


def test_a_person_selects_the_trials_in_mlflow_and_sees_them_compared(swept):
    """In a browser, as README says: the sweep's row is opened, its trials are ticked, Compare is pressed."""
    if not shutil.which("chromedriver"):
        pytest.skip("no Chromium here: `make screenshot` installs Debian's")
    out, *_ = swept
    _, parent, children, _ = runs_of(out)

    def panel(browser):
        return browser.find_element(By.CSS_SELECTOR, "[role=tabpanel][data-state=active]")

    with served(f"sqlite:///{out.parent}/mlflow.db") as address, chromium(1600, 1200) as browser:

        def found(selector):
            elements = WebDriverWait(browser, 90).until(lambda b: b.find_elements(By.CSS_SELECTOR, selector))
            return elements

        def click(element):
            browser.execute_script("arguments[0].click()", element)

        browser.get(f"{address}/#/experiments/{parent.info.experiment_id}/runs?searchFilter={quote(TRIALS)}")
        click(found(".ag-row button")[0])
        WebDriverWait(browser, 90).until(lambda b: f"trial-{len(children) - 1:03d}" in b.page_source)
        for row in found(".ag-row"):
            number = row.get_attribute("row-index")
            names = browser.find_elements(By.CSS_SELECTOR, f".ag-row[row-index='{number}'] a")
            if any(name.text.startswith("trial-") for name in names):
                click(browser.find_element(By.CSS_SELECTOR, f".ag-row[row-index='{number}'] input[type=checkbox]"))
        (compare,) = [b for b in found("button") if b.text.strip() == "Compare"]
        WebDriverWait(browser, 30).until(lambda _: compare.is_enabled())
        click(compare)
        assert found(".parcoords") and found("canvas")
        assert f"Comparing {len(children)} Runs" in browser.page_source
        axes = [e.text for e in found(".axis-title")]
        assert "best/score" in axes and any(axis.startswith("budget.") for axis in axes), axes
        for tab in ("Scatter Plot", "Contour Plot"):  # open with two searched options and the score
            next(t for t in found("[role=tab]") if t.text == tab).click()
            WebDriverWait(browser, 60).until(
                lambda b: "best/score" in panel(b).text and panel(b).find_elements(By.CSS_SELECTOR, ".js-plotly-plot")
            )
            assert any(option in panel(browser).text for option in children[0].data.params)


def test_the_job_prints_its_own_lines_and_none_of_the_libraries(swept):
    _, _, done, _ = swept
    ours = (
        "sweep ",
        "sweep's options in short: b. is budget.,",
        "watch it:",
        "runs ",
        "ASHA ",
        "best: ",
        "test split",
        "| ",
        "|-",
        "written ",
        "compare ",
        "  then open ",
    )
    box = ("┏", "┃", "┡", "│", "└", "Test split")
    strange = [line for line in done.stdout.splitlines() if line and not line.startswith(ours + box)]
    assert strange == []
    # Ray ends a stopped trial by SystemExit, wherever that is; Python says so where nothing can catch it,
    # and the process may be gone before its last lines are read.
    prefix = r"\S*\(run_trial pid=\d+\)\S* "
    rest = rf"(({prefix})?(Traceback \(most|  ).*\n)*(({prefix})?SystemExit: 1\n)?"
    assert re.sub(rf"{prefix}Exception ignored in.*\n{rest}", "", done.stderr).strip() == ""


def test_a_finished_sweep_says_its_result_again_and_more_trials_continue_it(swept, store, shared_ray):
    out, _, _, options = swept
    before = journal(out).trials
    more = ["--trials", "8", *options[2:], "--final-seeds", "0", "--start-from", str(out / "best.yaml")]
    done = run_here(sweep, SweepConfig, *command(store, out, *more)[2:])
    assert done.returncode == 0 and "sweep of 8 trials, 7 done" in done.stdout, done.stderr
    after = journal(out).trials
    assert after[:7] == before and len([t for t in after if t.state.is_finished()]) == 8


def test_best_yaml_is_what_train_takes_as_it_is(swept, store, shared_ray):
    out, *_ = swept
    options = ["--store", store.uri, "--out", out.parent / "best", "--epochs", "1"]
    done = run_here(train, TrainConfig, "--config", out / "best.yaml", *options)
    assert done.returncode == 0, done.stderr
    assert set(json.loads((out.parent / "best" / "metrics.json").read_text())) == {"label", "mood"}


def test_another_recipe_in_the_same_folder_is_refused_in_one_line(swept, store):
    out, _, _, options = swept
    done = run_here(sweep, SweepConfig, *command(store, out, *options, "--lr", "0.002")[2:])
    assert done.returncode == 1 and "holds another run (lr" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_trial_whose_process_always_dies_costs_that_trial(store, tmp_path, monkeypatch, shared_ray):
    run_trial = tuning.sweep.run_trial

    def dying(point, config, gpu):
        """The process of the recipe as given dies, every time it is started."""
        if point["lr"] == config.recipe.optim.lr:
            os._exit(7)
        run_trial(point, config, gpu)

    monkeypatch.setattr(tuning.sweep, "run_trial", dying)
    done = run_here(sweep, SweepConfig, *command(store, tmp_path / "sweep", *BRIEF)[2:])
    assert done.returncode == 0 and "1 failed" in done.stdout, done.stderr
    trials = trials_of(tmp_path / "sweep")
    assert [t["status"] for t in trials].count("FAILED") == 1 and trials[0]["error"].startswith("its process died")
    _, _, children, _ = runs_of(tmp_path / "sweep")
    assert sorted(c.info.status for c in children) == ["FAILED", "FINISHED"]


def test_when_every_trial_fails_the_job_fails_with_the_first_error(store, tmp_path, shared_ray):
    job = command(store, tmp_path / "sweep", *BRIEF)
    job[1:2] = ["-m", "tests.helpers.crashing_trials", "all"]
    joined = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(job, cwd=ROOT, capture_output=True, text=True, env=joined)
    assert done.returncode == 1
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: all 2 trials failed, the first is trial 0: no feature store at /planted")
    client, parent, children, _ = runs_of(tmp_path / "sweep")
    assert {run.info.status for run in (parent, *children)} == {"FAILED"}
    assert {f.path for f in client.list_artifacts(children[0].info.run_id)} == {"error.txt", "recipe.yaml"}
