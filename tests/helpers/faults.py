"""The extract job with faults planted in it: at a named point, for the n-th time it is reached, a process is killed.

    python tests/helpers/faults.py FAULTS.json --corpus ... --store ...     (options as pipelines/extract.py)

FAULTS.json lies in a folder of its own, which counts how often each point was reached, over all runs:
[{"point": "mid-tar", "victim": "driver" | "worker" | PID, "nth": 1}, ...]
Points: mid-tar (the first sample is in the tar), tar (the tar is done, no failures part), failures (both
done, no index part), index (the shard is committed), lock (all is committed, the lock not yet released).
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import ray.cloudpickle

import features.extractor
import pipelines.extract
from features.store.lock import StoreLock
from features.store.shards import ShardWriter
from pipelines.common.cli import main


def strike(point):
    """Count that a point is reached, and kill whom its fault names when its turn has come."""
    counter = os.open(FOLDER / point, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(counter, b".")
    reached = os.lseek(counter, 0, os.SEEK_CUR)
    os.close(counter)
    for fault in FAULTS:
        if (fault["point"], fault["nth"]) == (point, reached):
            committed = len(list(Path(STORE, "index").glob("*.parquet")))
            with open(FOLDER / "struck", "a") as log:
                log.write(json.dumps(fault | {"committed": committed}) + "\n")
            os.kill({"worker": os.getpid(), "driver": DRIVER}.get(fault["victim"], fault["victim"]), signal.SIGKILL)
            time.sleep(2)  # a driver's or a node's death takes a moment to reach its workers


class FaultyWriter(ShardWriter):
    """Reaches every point of writing a shard."""

    def add(self, clip, sample):
        super().add(clip, sample)
        if len(self.rows) == 1:
            strike("mid-tar")

    def _write_part(self, folder, rows, schema):
        strike("tar" if folder == "failures" else "failures")
        super()._write_part(folder, rows, schema)
        if folder == "index":
            strike("index")


class FaultyLock(StoreLock):
    """Reaches the point between the last commit and the lock's release."""

    def __exit__(self, *error):
        strike("lock")
        super().__exit__(*error)


if __name__ == "__main__":
    FOLDER, FAULTS, DRIVER = Path(sys.argv[1]).parent, json.loads(Path(sys.argv.pop(1)).read_text()), os.getpid()
    STORE = sys.argv[sys.argv.index("--store") + 1]
    features.extractor.ShardWriter = FaultyWriter
    pipelines.extract.StoreLock = FaultyLock
    # Workers get this module's classes as they stand here, not as their files say.
    ray.cloudpickle.register_pickle_by_value(features.extractor)
    main(pipelines.extract.extract, pipelines.extract.ExtractConfig, "")
