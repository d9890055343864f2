"""Stores for the tests of this folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from leap_dist.tracking import delivery


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> str:
    """The URI of one sqlite store for all tests of this file."""
    return f"sqlite:///{shutil.copy(empty_store, tmp_path_factory.mktemp('a store'))}"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of a run waits less."""
    monkeypatch.setattr(delivery, "PATIENCE", 0.5)
    monkeypatch.setattr(delivery, "PAUSE", 0.1)
