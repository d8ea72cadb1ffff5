"""The jobs as commands of an installed package: `clcr-train --store ...` is `python pipelines/train.py --store ...`.

The package's base is what `import clcr` needs; a job needs more, and says how to get it.
"""

import importlib.metadata
import runpy
import sys
from functools import partial
from pathlib import Path
from typing import NoReturn

OURS = ("clcr", "features", "pipelines", "tuning", "infra")


def run(module: str) -> NoReturn:
    """Run a job's module as Python runs a script. Exits with 1 and one line where a library is not installed."""
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library in OURS:
            raise
        extra = "serve" if module.endswith(".serve") else "pipeline"
        package = importlib.metadata.metadata("clcr-pipeline")["Name"]
        sys.exit(f"{Path(sys.argv[0]).name}: {library} is not installed; pip install '{package}[{extra}]'")
    sys.exit(0)


extract = partial(run, "pipelines.extract")
train = partial(run, "pipelines.train")
evaluate = partial(run, "pipelines.evaluate")
predict = partial(run, "pipelines.predict")
explain = partial(run, "pipelines.explain")
export = partial(run, "pipelines.export")
serve = partial(run, "pipelines.serve")
sweep = partial(run, "tuning.sweep")
compare = partial(run, "tuning.compare")
ablate = partial(run, "tuning.ablate")
doctor = partial(run, "infra.doctor")
demo = partial(run, "infra.demo")
