"""The sweep job with trials that go wrong: python crashing_trials.py all|workers --store ... (as tuning/sweep.py).

all: every trial raises; workers: the process of the first trial dies once, after its first epoch; a trial's workers
have other processes.
"""

import os
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

from ray.tune.integration.ray_train import TuneReportCallback

import tuning.options
import tuning.sweep
from pipelines.common.cli import main

HOW, RUN, RUN_WORKERS = sys.argv.pop(1), tuning.sweep.run_trial, tuning.sweep.run_workers


def crashing(point, config, gpu):
    """Defined in the main module, so that a trial's process gets it as it stands."""
    RUN(point, replace(config, store="/planted") if HOW == "all" else config, gpu)


def crashing_workers(point, config, gpu):
    """The trial's own process: its workers, and what runs them, have others."""
    begun, reported = Path(config.out, "begun"), Path(config.out, "reported")

    class Reporting(TuneReportCallback):
        def after_report(self, *args, **named):
            super().after_report(*args, **named)
            reported.touch()
            time.sleep(10)  # the process dies before there is another epoch

    def die():
        while not reported.exists():
            time.sleep(0.1)
        time.sleep(2)  # for the sweep to hear of the epoch
        Path(config.out, "died").touch()
        os._exit(7)

    if not begun.exists():
        begun.touch()
        RUN_WORKERS.__globals__["TuneReportCallback"] = Reporting  # a copy of it runs here, not the module's
        threading.Thread(target=die, daemon=True).start()
    RUN_WORKERS(point, config, gpu)


if __name__ == "__main__":
    tuning.sweep.run_trial, tuning.sweep.run_workers = crashing, crashing_workers
    main(tuning.sweep.sweep, tuning.options.SweepConfig, "")
