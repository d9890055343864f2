"""Fixtures of all tests: rank processes, the folder of real data, and a guard on the environment."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from leap_dist import secrets
from tests.ranks import RankPools

NOT_OURS = {
    "PYTEST_CURRENT_TEST",  # pytest's own
    "TORCHINDUCTOR_CACHE_DIR",  # the rest is set by libraries when they are first imported: torch,
    "PYTORCH_NVML_BASED_CUDA_CHECK",  # DeepSpeed,
    "KMP_DUPLICATE_LIB_OK",  # scikit-learn
    "KMP_INIT_AT_FORK",
    "_MLFLOW_TELEMETRY_SESSION_ID",  # MLflow, whenever it saves a model
}

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is first imported; tiny products wait for threads
os.environ["DO_NOT_TRACK"] = "true"  # MLflow, which takes no "1", and the hub report usage over the network


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests on rank processes are slow."""
    for item in items:
        if "ranks" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPools]:
    """`ranks(world_size).run(function, *args, timeout=120)`: results by rank, from real processes."""
    with RankPools() as pools:
        yield pools


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database without runs, to copy: its tables take seconds to make, once for all."""
    from mlflow import MlflowClient

    file = tmp_path_factory.mktemp("empty store") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{file}")
    return file


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of eight megabytes. Mounting one takes root."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], check=True)
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.fixture(autouse=True)
def _environment_unchanged() -> Iterator[None]:
    """Fails a test that leaves environment variables changed, and puts them back for the next one."""
    before = dict(os.environ)
    yield
    after = dict(os.environ)
    names = before.keys() | after.keys()
    changed = sorted(name for name in names - NOT_OURS if before.get(name) != after.get(name))
    for name in changed:
        os.environ.pop(name, None)
        if name in before:
            os.environ[name] = before[name]
    if changed:
        pytest.fail(f"the test left environment variables changed: {', '.join(changed)}", pytrace=False)


@pytest.fixture(autouse=True)
def _secrets_forgotten() -> Iterator[None]:
    """A password of one test is not hidden in what the next one reads."""
    yield
    secrets._remembered.clear()


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data sets: $LEAP_DATA, or shared/data beside the checkout; skips without one."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("LEAP_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"no data folder: set LEAP_DATA, or put one at {beside}")
    return folder
