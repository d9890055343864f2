"""Ray for tests: three nodes of one CPU on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from ray.cluster_utils import Cluster  # here, as it sets variables of the environment when it is first imported

NODE: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 80 * 2**20}


@pytest.fixture
def quiet_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a sweep, and Ray itself, put into the environment where it is not there; so the test leaves it as it was."""
    monkeypatch.setenv("PYTHONBREAKPOINT", "pdb.set_trace")
    monkeypatch.setenv("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")


@pytest.fixture(scope="module")
def three_nodes() -> Iterator[Cluster]:
    """A cluster of three nodes with one CPU each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")  # Ray's 15 lets other tests keep its workers from running
        cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
        for _ in range(2):
            cluster.add_node(**NODE)
    try:
        yield cluster
    finally:
        cluster.shutdown()
