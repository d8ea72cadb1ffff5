#!/usr/bin/env python
"""Sweep: search token budgets, loss weights, learning rate, size or any other options of a model (Ray Tune, Optuna).

Each trial trains as `pipelines/train.py` does, on the training and validation splits; it has no access to the test
split. One MLflow run holds the sweep, with a child run for every trial. The job ends with `best.yaml`, which
`pipelines/train.py --config` takes, with pictures, and with the best and the given recipe trained over seeds and scored
on the test split. Run again with the same options, it resumes; with more --trials, it continues the same search.
"""

import logging
import math
import os
import shlex
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace as replaced
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray import tune
from ray.train import LoggingConfig, ScalingConfig
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.search import ConcurrencyLimiter
from ray.util.placement_group import get_current_placement_group

from features.files import open_fs
from features.store import open_store
from pipelines.common.cli import main, resolve_uri
from pipelines.common.cluster import count_slots
from pipelines.common.compat import plain_train_driver
from pipelines.common.errors import JobError, find_user_error
from pipelines.training.inputs import check
from pipelines.training.learner import Learner
from pipelines.training.loading import task_specs
from pipelines.training.run_folder import as_begun, claim, open_run, prepare, sole_owner, title
from pipelines.training.workers import worker_learner
from tuning.dry_run import print_plan
from tuning.objectives import COST, SCORE, Objective, kept
from tuning.options import SweepConfig
from tuning.record import PLACEMENT, Record
from tuning.samplers import sampler
from tuning.schedulers import chosen, scheduler
from tuning.space import apply
from tuning.space_file import keep_space
from tuning.study import ENDED, STATUS, StudyFile, StudySearch, own_trials
from tuning.warm_start import lend

SEARCHED = ("train", "val")  # what a trial may read
# What may differ from one start to the next: how much is tried, what comes after it, and what it runs on.
CHANGEABLE: tuple[str, ...] = ("trials", "hours", "start_from", "warm_start", "final_seeds", "concurrency")
CHANGEABLE += ("space",)  # its content may not: `keep_space` compares it
CHANGEABLE += ("workers_per_trial", "cpus_per_trial", "gpus_per_trial")
# Resources of a trial whose workers have the CPUs; Tune refuses a trial that asks for nothing at all.
DRIVER: dict[str, float] = {"CPU": 0, "memory": 1 << 20}


def sweep(config: SweepConfig) -> None:
    """The job: check the options, claim the output folder, search, report; then score the best on the test split."""
    config = replaced(config, store=resolve_uri("--store", config.store), out=resolve_uri("--out", config.out))
    config = as_begun(config)
    check(config.store, config.recipe)
    if config.dry_run:
        return print_plan(config)
    with sole_owner(config.out):
        search_and_train(config)


def search_and_train(config: SweepConfig) -> None:
    """The sweep in its folder, which no other job writes to meanwhile."""
    points = config.first_points
    started = claim(config, may_differ=CHANGEABLE)
    keep_space(config.out, config.space, started is None)
    uri = prepare(config.out, dashboard=config.workers_per_trial > 1)
    architecture, tasks = config.recipe.architecture, task_specs(open_store(config.store), config.recipe.tasks)
    name = f"sweep of {title(config.store, config.recipe)}"
    tags = {"model": architecture, "tasks": ", ".join(tasks), "seed": str(config.recipe.seed)}
    run = open_run(config, started, uri, name, tags)
    with run.ending():
        file = StudyFile(config.out)
        study, limit = file.open(config.wanted), config.limit
        study.sampler = sampler(config.sampler, config.searched, config.recipe.seed + len(study.trials), limit)
        if config.left_out:
            print(f"the recipe as given is not tried: {config.left_out} lies outside of --space", flush=True)
        for point in points:  # before other sweeps' trials, of which Optuna would take one for it
            study.enqueue_trial(point, skip_if_exists=True)
        for other in config.warm_start:
            print(lend(study, other, config), flush=True)
        search = StudySearch(study, config.searched, limit, config.hours)
        many = f"{limit} trials" if limit else f"{config.hours:g} hours"
        before = len(own_trials(study, *STATUS))
        print(
            f"sweep of {many}, {before} done; MLflow run {run.run_id} at {run.uri}\n"
            f"watch it: optuna-dashboard {shlex.quote(str(file.path))}",
            flush=True,
        )
        record = Record(run, config.experiment, config.recipe, search, file, limit)
        if not search.over:
            run_trials(config, search, record)
        from tuning.results import compare_hint, finish, train_final  # what draws: trials do without

        name, best = finish(config, run, study)
        if config.final_seeds:
            train_final(config, run, name, best)
    print(compare_hint(run, study))


def run_trials(config: SweepConfig, search: StudySearch, record: Record) -> None:
    """Run the trials on the cluster; `record` is told every result."""
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"  # a trial that failed has none: Tune would end the sweep
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"  # no csv, JSON and TensorBoard file per trial,
    logging.getLogger("ray.tune").setLevel(logging.ERROR)  # and no warning that there are none
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # Ctrl-C ends the job; Tune would otherwise report first
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # only the old output can be silenced; the job prints its own
    concurrency, resources = allocate(config)
    alone = config.workers_per_trial == 1
    trainable = tune.with_parameters(run_trial if alone else run_workers, config=config, gpu="GPU" in resources)
    fs, path = open_fs(config.out)
    tuner = tune.Tuner(
        tune.with_resources(trainable, resources if alone else DRIVER),
        tune_config=tune.TuneConfig(
            num_samples=-1,  # until the searcher ends the search
            search_alg=ConcurrencyLimiter(search, max_concurrent=concurrency),
            scheduler=scheduler(
                chosen(config.scheduler, config.sampler, config.wanted),
                config.wanted,
                config.recipe.optim.epochs,
                config.grace_epochs,
                config.reduction,
                own_trials(search.study, *STATUS),
                lambda trial_id: search.asked[trial_id].number,
            ),
            trial_dirname_creator=lambda trial: trial.trial_id,
            reuse_actors=alone,  # spares seconds of imports; Ray Train's driver cannot be reused
        ),
        run_config=tune.RunConfig(
            name="trials",
            storage_path=path,
            storage_filesystem=fs,
            callbacks=[record],
            failure_config=tune.FailureConfig(max_failures=2),  # restarts after its process died; an exception ends it
            verbose=0,
        ),
    )
    tuner.fit()


def allocate(config: SweepConfig) -> tuple[int, dict[str, float]]:
    """How many trials run at a time, and the resources of each of their workers.

    Raises JobError where Tune would wait for ever.
    """
    gpu = config.gpus_per_trial if ray.cluster_resources().get("GPU", 0) else 0
    need = {"CPU": config.cpus_per_trial} | ({"GPU": gpu} if gpu else {})
    slots = count_slots(need)
    fitting = slots // config.workers_per_trial
    concurrency = config.concurrency or min(fitting, config.limit or fitting)
    if concurrency < 1 or concurrency > fitting:
        each = " and ".join(f"{n:g} {name}s" for name, n in need.items())
        raise JobError(
            f"{max(concurrency, 1)} trials of {config.workers_per_trial} workers with {each} each do not fit: the "
            f"cluster's nodes have room for {slots} such workers"
        )
    if config.workers_per_trial > 1:
        # Without its dashboard Ray never returns the resources of workers whose trial ended before its first result.
        context: Any = ray.init(ignore_reinit_error=True)
        if not context.address_info["webui_url"]:
            raise JobError(
                f"--workers-per-trial {config.workers_per_trial}: this Ray cluster runs without its dashboard, and "
                "then a trial that ends early may never give its workers back; start the cluster with the dashboard, "
                "or take one worker"
            )
    return concurrency, need


def run_trial(point: Mapping[str, Any], config: SweepConfig, gpu: bool) -> None:
    """Run a trial of one worker, in the process that Tune gave it."""
    torch.set_num_threads(config.cpus_per_trial)
    try:
        recipe = apply(config.recipe, point)
        learner = Learner(config.store, recipe, device="cuda" if gpu else "cpu", splits=SEARCHED)
        for result in results(learner, config.wanted):
            tune.report(result)
    except Exception as error:
        tune.report(failure(error))


def run_workers(point: Mapping[str, Any], config: SweepConfig, gpu: bool) -> None:
    """Run a trial of several workers: Ray Train starts them, and passes rank 0's results to Tune.

    If a worker dies, the trial dies and Tune starts it again. Ray Train must not replace workers: it would also replace
    those of a trial that is being stopped, and keep them.
    """
    # Every epoch is reported, and a worker that reports waits until the controller next polls it.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    fs, path = open_fs(config.out)
    need = {"CPU": config.cpus_per_trial} | ({"GPU": config.gpus_per_trial} if gpu else {})
    try:
        # What the workers get is an object of Ray's, for the reason that pipelines/train.py gives.
        trainer = ray.train.torch.TorchTrainer(
            run_worker,
            train_loop_config={"job": ray.put({"config": config, "recipe": apply(config.recipe, point)})},
            scaling_config=ScalingConfig(num_workers=config.workers_per_trial, use_gpu=gpu, resources_per_worker=need),
            # Without running the code mypy sees the RunConfig and Callback of Ray Train v1, which take less.
            run_config=ray.train.RunConfig(  # type: ignore[call-arg]  # hints of Ray Train v1; it is v2
                name=f"workers-{tune.get_context().get_trial_id()}",
                storage_path=f"{path}/trials",
                storage_filesystem=fs,
                callbacks=[TuneReportCallback()],  # type: ignore[list-item]  # the same
                logging_config=LoggingConfig(log_level="ERROR"),
                worker_runtime_env={"env_vars": {"RAY_TRAIN_ENABLE_PRINT_PATCH": "0"}},
            ),
        )
        with plain_train_driver(own_cluster=False):
            trainer.fit()
    except Exception as error:
        if not find_user_error(error):
            raise
        tune.report(failure(error))


def run_worker(loop_config: Mapping[str, ray.ObjectRef]) -> None:
    """Run one of a trial's workers. The trainer gathers metrics over the clips of all workers.

    Every result names the placement group of the trial: Ray Train does not return it if Tune stops the trial.
    """
    job = ray.get(loop_config["job"])
    config = job["config"]
    torch.set_num_threads(config.cpus_per_trial)
    learner = worker_learner(config.store, job["recipe"], splits=SEARCHED)
    group = get_current_placement_group()
    assert group is not None  # Ray Train places its workers in one
    for result in results(learner, config.wanted):
        ray.train.report(result | {PLACEMENT: group.id.hex()})


def results(learner: Learner, objectives: Sequence[Objective]) -> Iterator[dict[str, Any]]:
    """What a trial reports after each epoch: its metrics, and the objectives of the best epoch so far."""
    cost: dict[str, float] = {}
    for epoch in learner.fit():
        shares = [value for name, value in epoch.metrics.items() if name.startswith("diag/participation/")]
        if epoch.improved and shares:
            cost |= {COST: sum(shares) / len(shares)}
        if epoch.improved:
            cost |= kept(objectives, epoch.metrics)
        worth = {SCORE: learner.trainer.best_score, ENDED: learner.trainer.finished}
        yield {**epoch.metrics, **cost, **worth, "epoch": epoch.number + 1}


def failure(error: Exception) -> dict[str, Any]:
    """An exception as a trial's last result: the trial fails and is not tried again."""
    cause = find_user_error(error) or error
    line = " ".join(str(cause).split()) or type(cause).__name__
    return {"error": line, "traceback": "".join(traceback.format_exception(error)), SCORE: math.nan}


if __name__ == "__main__":
    main(sweep, SweepConfig, "Search a model's options on the validation split; ends with best.yaml.")
