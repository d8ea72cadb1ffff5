"""The sweep job with trials that go wrong: python crashing_trials.py one|all --store ... (options as tuning/sweep.py).

one: the process of the recipe as given dies, every time it is started; all: every trial raises.
"""

import os
import sys
from dataclasses import replace

import tuning.options
import tuning.sweep
from pipelines.cli import main

HOW, RUN = sys.argv.pop(1), tuning.sweep.run_trial


def crashing(point, config, gpu):
    """Defined in the main module, so that a trial's process gets it as it stands."""
    if HOW == "one" and point["lr"] == config.recipe.optim.lr:
        os._exit(7)
    RUN(point, replace(config, store="/planted") if HOW == "all" else config, gpu)


if __name__ == "__main__":
    tuning.sweep.run_trial = crashing
    main(tuning.sweep.sweep, tuning.options.SweepConfig, "")
