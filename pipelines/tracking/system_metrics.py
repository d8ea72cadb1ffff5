"""What the machine of the process that logs is busy with: processors, memory, disk, network and GPUs.

The numbers are MLflow's own monitors'. Its thread that logs them ends for good at the first call that the server does
not answer, so ours sends them with all other points.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

from pipelines.tracking.run import Run

INTERVAL = 10.0  # seconds


@contextmanager
def log_system_metrics(run: Run, interval: float = INTERVAL) -> Iterator[None]:
    """Log system/... metrics every `interval` seconds while the block runs; their step is the second of the clock."""
    monitors, ended = _monitors(), threading.Event()

    def watch() -> None:
        while not ended.wait(interval):
            values: dict[str, float] = {}
            for monitor in monitors:
                monitor.collect_metrics()
                values |= monitor.aggregate_metrics()
                monitor.clear_metrics()
            run.log_metrics({f"system/{name}": value for name, value in values.items()}, int(time.time()))

    thread = threading.Thread(target=watch, name="machine", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _monitors() -> list[BaseMetricsMonitor]:
    monitors: list[BaseMetricsMonitor] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    with suppress(Exception):  # no GPU
        monitors.append(GPUMonitor())
    return monitors
