"""Runs as a store has them, for tests that have logged to it."""

from __future__ import annotations

import time
from collections.abc import Callable

JOB = {"train_batch_size": 4, "leap": {"target": 0.1, "gates": ["row", "block:4x4"]}, "empty": {}}


def read_run(uri: str, run_id: str | None):  # type: ignore[no-untyped-def]  # mlflow is not imported up here
    from mlflow import MlflowClient

    assert run_id is not None
    return MlflowClient(tracking_uri=uri).get_run(run_id)


def artifacts(uri: str, run_id: str | None, folder: str | None = None) -> list[str]:
    from mlflow import MlflowClient

    assert run_id is not None
    return [item.path for item in MlflowClient(tracking_uri=uri).list_artifacts(run_id, folder)]


def history(uri: str, run_id: str | None, key: str = "loss") -> list[tuple[int, float]]:
    from mlflow import MlflowClient

    assert run_id is not None
    return sorted((point.step, point.value) for point in MlflowClient(uri).get_metric_history(run_id, key))


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
