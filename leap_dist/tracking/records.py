"""What a run records, in its journal; and what it records last, which is made from its folder where it was killed."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from leap_dist.config.job_file import parse_section
from leap_dist.config.sections import TrackingConfig
from leap_dist.run_folder import CERTIFICATE, MODEL, PLOTS, REPORT, RESOLVED, read_files
from leap_dist.secrets import hide_in
from leap_dist.tracking.journal import Journal

SYSTEM = "system/"  # how measures of the machine begin


class Recorder:
    """Notes records in a journal; without one it does nothing. folder: that of the run, which paths are relative to."""

    def __init__(self, journal: Journal | None, folder: Path | None, tracking: TrackingConfig) -> None:
        self._journal, self._folder = journal, folder
        self._keeps = tracking.log_model, tracking.register
        self._last: dict[str, Any] = {}  # what `log` has recorded last

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record measures of an optimizer step; those that are recorded already at this step or a later one are not."""
        if self._journal is None:
            return
        self._last = {}
        if values := self._journal.new_metrics(step, metrics):
            self._last = {"step": step, "values": values, "time": now()}
            self._add("metrics", **self._last)

    def checkpoint(self) -> None:
        """The run has saved its model: what was logged last is recorded as measures of the model, too."""
        if values := {key: value for key, value in self._last.get("values", {}).items() if not key.startswith(SYSTEM)}:
            self._add("linked", **{**self._last, "values": values})
        self._last = {}

    def artifact(self, path: Path) -> None:
        """Store a file, or a folder with all that is in it under the folder's name. It is read when it is sent."""
        self._add("artifact", path=self._relative(path))

    def model(self, folder: Path, step: int = 0, tags: Mapping[str, str] | None = None) -> None:
        """Record the model of a finished run, with tags; its step is that of its last metrics.

        If the settings ask for it, its Hugging Face folder is stored, which `mlflow.pyfunc.load_model` then loads, and
        a version of a registered model is made of it.
        """
        stored, name = self._keeps
        files = {"path": self._relative(folder)} if stored or name else {}
        self._add("model", step=step, tags=dict(tags or {}), **files)
        if name:
            self._add("registered", name=name)

    def table(self, file: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Store rows as a table that MLflow shows, lists in them as text; file: a name that ends in .json."""
        columns = list(dict.fromkeys(name for row in rows for name in row))
        cells = [[row.get(name) for name in columns] for row in rows]
        shown = [[", ".join(map(str, cell)) if isinstance(cell, list) else cell for cell in row] for row in cells]
        self._add("table", file=file, columns=columns, rows=shown)

    def _add(self, kind: str, **content: Any) -> None:
        if self._journal is not None:
            shown = {key: value if key == "path" else hide_in(value) for key, value in content.items()}
            self._journal.add(kind, **{"time": now(), **shown})

    def _relative(self, path: Path) -> str:
        """A path as a journal has it: one in the journal's folder moves with it."""
        whole, folder = path.resolve(), self._folder.resolve() if self._folder else None
        return str(whole.relative_to(folder) if folder and whole.is_relative_to(folder) else whole)


def now() -> int:
    """Milliseconds, as MLflow counts."""
    return int(time.time() * 1000)


def record_end(
    recorder: Recorder,
    folder: Path,
    step: int,
    measured: Mapping[str, Mapping[str, float]],
    certificate: Mapping[str, Any],
    leap_ms: float | None,
) -> None:
    """What a run in `folder` records once it has its certificate, but for its page.

    measured: the metrics by model. leap_ms: what LEAP took of a pruning step, if it was measured.
    """
    metrics = {f"{name}_{metric}": value for name, values in measured.items() for metric, value in values.items()}
    left = {"pruned_density": "density", "kept_weights": "kept", "prunable_weights": "prunable"}
    metrics |= {name: certificate[key] for name, key in left.items()}
    recorder.log(step, metrics | ({} if leap_ms is None else {"leap_ms": leap_ms}))
    recorder.checkpoint()
    recorder.artifact(folder / CERTIFICATE)
    recorder.artifact(folder / RESOLVED)
    recorder.table("gates.json", certificate["gates"])
    tags = {f"leap.{key}": str(certificate[key]) for key in ("target", "density", "masks_sha256")}
    recorder.model(folder / MODEL, step, tags)


def record_end_of(folder: Path, journal: Journal) -> None:
    """`record_end` of a run that was killed once it had its certificate, and its page if that is there.

    What the journal has of it already is sent a second time, and is in MLflow once. Raises UserError where a file of
    the folder is damaged.
    """
    files = read_files(folder)
    tracking = parse_section(TrackingConfig, f"{folder / RESOLVED}: tracking", files.job.get("tracking", {}))
    recorder = Recorder(journal, folder, tracking)
    step = files.steps[-1]["step"] if files.steps else 0
    measured = {
        name: {metric: math.nan if value is None else value for metric, value in values.items()}
        for name, values in files.certificate["metrics"].items()
    }
    record_end(recorder, folder, step, measured, files.certificate, files.leap_ms)
    for path in (folder / PLOTS, folder / REPORT):
        if path.exists():
            recorder.artifact(path)
