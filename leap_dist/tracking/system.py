"""What the machine does meanwhile, under the names that MLflow shows as system metrics.

MLflow has a thread of its own for them, which ends when a server fails once. Its monitors are read here instead, when a
step is logged anyway, and what they say goes the way of all metrics.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor

EVERY = 10.0  # seconds between two samples, as MLflow has it


class System:
    """Processor, memory, disk and network, and NVIDIA GPUs where `nvidia-ml-py` is installed."""

    def __init__(self) -> None:
        self._monitors: list[BaseMetricsMonitor] = []
        self._last = 0.0

    def sample(self) -> dict[str, float]:
        """Values by name; nothing if the last sample is less than EVERY seconds old, and at the first call."""
        if self._monitors and time.monotonic() - self._last < EVERY:
            return {}
        self._last = time.monotonic()
        first = not self._monitors
        self._monitors = self._monitors or _monitors()
        values: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.collect_metrics()
            values |= {f"system/{name}": float(value) for name, value in monitor.aggregate_metrics().items()}
            monitor.clear_metrics()
        return {} if first else values  # processor time is measured from call to call


def _monitors() -> list[BaseMetricsMonitor]:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    found: list[BaseMetricsMonitor] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    with contextlib.suppress(ImportError, RuntimeError):  # without its package, or without a GPU
        found.append(GPUMonitor())
    return found
