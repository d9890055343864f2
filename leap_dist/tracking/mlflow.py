"""One MLflow run per job: parameters, metrics by step, artifacts. Only rank 0 writes.

MLflow's client is used with explicit run ids, without its global state, so that several trackers in one
process do not meet. What MLflow would print about itself is kept off the console.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import sqlite3
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote

from leap_dist.config import TrackingConfig
from leap_dist.errors import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient

Status = Literal["FINISHED", "FAILED", "KILLED"]
RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
PARENT = "mlflow.parentRunId"  # the tag by which MLflow shows a run below another
MAX_KEY = 250  # characters that MLflow takes in a parameter's name
MAX_VALUE = 500  # characters of a parameter's value that every MLflow server since 1.0 takes
MAX_BATCH = 100  # parameters in one request


class Tracker:
    """An MLflow run as a context manager; without `enabled`, or with a null URI, it does nothing.

    config: the resolved job, logged as parameters with dotted keys. run_id: a run to go on with (a resumed
    job); its parameters stay as they are. tags: what runs are found by later, such as the commit; those of a
    resumed run are set anew. Leaving the context ends the run: FINISHED, KILLED on an interrupt, FAILED on any other
    exception.

    Raises UserError on entering if the store cannot be reached or refuses the run.
    """

    def __init__(
        self,
        tracking: TrackingConfig,
        config: Mapping[str, Any],
        enabled: bool,
        run_id: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        self._tracking = tracking
        self._config = config
        self._uri = tracking.mlflow_uri if enabled else None
        self._client: MlflowClient | None = None
        self._run_id = run_id or ""
        self._tags = tags or {}

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None before it is entered, and where nothing is tracked."""
        return self._run_id or None

    def __enter__(self) -> Tracker:
        if self._uri is not None:
            with _quiet(), _user_errors(self._uri), _give_up_early():
                from mlflow.entities import RunTag

                client = _connect(self._uri)
                if self._run_id:
                    client.update_run(self._run_id, status="RUNNING")
                else:
                    self._run_id = self._create_run(client, self._uri)
                if self._tags:
                    client.log_batch(self._run_id, tags=[RunTag(key, text) for key, text in self._tags.items()])
                self._client = client
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.finish("FINISHED")
        else:
            self.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record measures of an optimizer step."""
        if self._client is None:
            return
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(
            self._run_id, metrics=[Metric(name, float(value), now, step) for name, value in metrics.items()]
        )

    def artifact(self, path: Path) -> None:
        """Store a file, or a folder with all that is in it under the folder's name."""
        if self._client is None:
            return
        if path.is_dir():
            self._client.log_artifacts(self._run_id, str(path), artifact_path=path.name)
        else:
            self._client.log_artifact(self._run_id, str(path))

    def finish(self, status: Status) -> None:
        """End the run; what comes after is not recorded."""
        if self._client is None:
            return
        with contextlib.redirect_stdout(io.StringIO()):  # a server's client prints the address of the run
            self._client.set_terminated(self._run_id, status)
        self._client = None

    def _create_run(self, client: MlflowClient, uri: str) -> str:
        from mlflow.entities import Param

        experiment = _experiment_id(client, uri, self._tracking.experiment)
        name, parent = self._tracking.run_name, self._tracking.parent_run
        if parent and (begun := _child(client, experiment, parent, name)):
            client.update_run(begun, status="RUNNING")
            return begun
        tags = {PARENT: parent} if parent else None
        run_id: str = client.create_run(experiment, run_name=name, tags=tags).info.run_id
        params = [Param(key, value) for key, value in parameters(self._config).items()]
        for start in range(0, len(params), MAX_BATCH):
            client.log_batch(run_id, params=params[start : start + MAX_BATCH])
        return run_id


def parameters(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as MLflow parameters: dotted keys, values as text, both cut to what MLflow takes."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= parameters(value, f"{name}.")
        else:
            flat[re.sub(r"[^\w.\- :/]", "_", name)[:MAX_KEY]] = str(value)[:MAX_VALUE]
    return flat


def differing(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """The parameters that are not the same in both, sorted."""
    return sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))


def _connect(uri: str) -> MlflowClient:
    from mlflow import MlflowClient

    file = _sqlite_file(uri)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(sqlite3.connect(file)) as database:
            database.execute("PRAGMA schema_version")  # fails at once where MLflow would try for a minute
    return MlflowClient(tracking_uri=uri)


def _experiment_id(client: MlflowClient, uri: str, name: str) -> str:
    """The experiment of that name, made if need be; a sqlite store has its artifacts beside the database."""
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    file = _sqlite_file(uri)
    location = None if file is None else (file.parent / "mlruns" / quote(name, safe="")).as_uri()
    return str(client.create_experiment(name, artifact_location=location))


def _child(client: MlflowClient, experiment: str, parent: str, name: str | None) -> str | None:
    """The parent's run of that name, if a try that was cut off has begun one: a trial has one run, not one a try."""
    found = client.search_runs([experiment], f"tags.`{PARENT}` = '{parent}' and attributes.run_name = '{name}'")
    return str(found[0].info.run_id) if found else None


def _sqlite_file(uri: str) -> Path | None:
    """The database file of a sqlite store; None for any other store."""
    from sqlalchemy.engine import make_url

    database = make_url(uri).database if uri.startswith("sqlite:") else None
    return Path(database).resolve() if database else None


@contextlib.contextmanager
def reading(uri: str) -> Iterator[MlflowClient]:
    """A client for a store that is there already; nothing is written, and no database is made.

    Raises UserError, also for what goes wrong inside the block, if the store cannot be reached or read.
    """
    words = f"--uri: MLflow at {hide_password(uri)} cannot be read", "name the store that the jobs wrote to"
    with _quiet(), _user_errors(uri, *words), _give_up_early():
        from mlflow import MlflowClient

        _check_is_store(uri)
        yield MlflowClient(tracking_uri=uri)


def hide_password(text: str) -> str:
    """A text with the user and password of every address in it left out."""
    return re.sub(r"://[^/@\s]+@", "://***@", text)


def _check_is_store(uri: str) -> None:
    """Raises UserError for a database file that is missing or not MLflow's: its client would fill it with tables."""
    if not uri:
        raise UserError("--uri: got nothing; allowed: an MLflow tracking URI, such as sqlite:///mlflow.db")
    file = _sqlite_file(uri)
    if file is None:
        return
    if not file.is_file():
        raise UserError(f"--uri: there is no database {file}; name the store that the jobs wrote to")
    with contextlib.closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as database:
        tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if not {"experiments", "runs", "alembic_version"} <= tables:
        raise UserError(f"--uri: the database {file} is not MLflow's; name the store that the jobs wrote to")


@contextlib.contextmanager
def _user_errors(uri: str, problem: str = "", remedy: str = "") -> Iterator[None]:
    """A store that cannot be reached or refuses the run is the user's to mend."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, sqlite3.Error, OSError, ImportError) as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        problem = problem or f"tracking: MLflow at {hide_password(uri)} does not take the run"
        remedy = remedy or "mend tracking.mlflow_uri or tracking.experiment, or set tracking.mlflow_uri to null"
        raise UserError(f"{problem}: {hide_password(why)}; {remedy}") from error


@contextlib.contextmanager
def _give_up_early() -> Iterator[None]:
    """One retry while the job starts: a wrong address is told in seconds; MLflow would try for minutes."""
    if RETRIES in os.environ:
        yield
        return
    os.environ[RETRIES] = "1"
    try:
        yield
    finally:
        del os.environ[RETRIES]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Warnings only, from the loggers that tell of a new database's migrations."""
    import mlflow  # noqa: F401  sets up its loggers when it is imported

    loggers = [logging.getLogger(name) for name in ("mlflow", "alembic")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
