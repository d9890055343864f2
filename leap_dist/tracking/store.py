"""Reaching an MLflow store: a client, an experiment, a run; and what a user reads where that fails.

MLflow's client is used with explicit run ids, without its global state, so that several runs in one process do not
meet. What MLflow would print about itself is kept off the console.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import queue
import re
import sqlite3
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast
from urllib.parse import quote

from leap_dist.errors import UserError
from leap_dist.files import alone
from leap_dist.machine import changed_environment
from leap_dist.secrets import hide_secrets, must_quote, plain_address, remember

if TYPE_CHECKING:
    from mlflow import MlflowClient

T = TypeVar("T")
PARENT = "mlflow.parentRunId"  # the tag by which MLflow shows a run below another
QUIET = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true"}
"""One retry: a wrong address is reported in seconds, and an address that is back is found in seconds."""
LONGEST_REASON = 400  # characters; some servers answer with whole pages
LONGEST_NAME = 200  # bytes; file systems take 255
AT_START = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}  # seconds for one request; MLflow would wait for minutes
LONGEST_START = 60.0  # seconds for all requests at the start
LONGEST_MIGRATION = 300.0  # seconds that other processes wait while one makes the tables of a sqlite store
CREDENTIALS = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
OWN_CREDENTIALS = [
    f"MLFLOW_TRACKING_{name}" for name in ("USERNAME", "PASSWORD", "TOKEN", "AUTH", "AWS_SIGV4", "CLIENT_CERT_PATH")
]
LOGGERS = ("mlflow", "alembic", "urllib3.connectionpool")


def connect(uri: str) -> MlflowClient:
    """A client; the folder of a sqlite store is made if need be.

    One process at a time makes the tables of a sqlite store, or brings those of an older MLflow up to date: MLflow
    itself lets several begin, and all but one of them fail.
    """
    from mlflow import MlflowClient

    file = _sqlite_file(uri)
    if file is None:
        return MlflowClient(tracking_uri=uri)
    file.parent.mkdir(parents=True, exist_ok=True)
    with alone(file.with_name(f".{file.name}.lock"), LONGEST_MIGRATION):
        with contextlib.closing(sqlite3.connect(file)) as database:
            database.execute("PRAGMA schema_version")  # fails at once where MLflow would try for a minute
        return MlflowClient(tracking_uri=uri)


def begin(client: MlflowClient, uri: str, run: Mapping[str, Any]) -> str:
    """The id of a new run; run: its "experiment", "name" and "parent".

    A trial has one run, not one a try: the run that a try which was cut off has begun is continued.
    """
    experiment, name, parent = _experiment_id(client, uri, run["experiment"]), run["name"], run["parent"]
    tags = {PARENT: parent} if parent else None
    if parent:
        same = quoted(parent, "tracking.parent_run"), quoted(name, "tracking.run_name")
        query = f"tags.`{PARENT}` = {same[0]} and attributes.run_name = {same[1]}"
        if found := client.search_runs([experiment], query):
            begun = str(found[0].info.run_id)
            client.update_run(begun, status="RUNNING")
            return begun
    begun = str(client.create_run(experiment, run_name=name, tags=tags).info.run_id)
    if not begun:
        raise RuntimeError("it gave the run no id: this is not an MLflow server")
    return begun


def _experiment_id(client: MlflowClient, uri: str, name: str) -> str:
    """The experiment of that name, made if need be; a sqlite store has its artifacts beside the database."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    file = _sqlite_file(uri)
    location = None if file is None else (file.parent / "mlruns" / _folder_name(name)).as_uri()
    try:
        return str(client.create_experiment(name, artifact_location=location))
    except MlflowException:
        if (made := client.get_experiment_by_name(name)) is None:
            raise
        return str(made.experiment_id)  # another job has made it meanwhile


def _folder_name(experiment: str) -> str:
    """A file name for an experiment: quoted, and cut with a digest where file systems would not take it."""
    quoted = quote(experiment, safe="")
    digest = hashlib.sha256(experiment.encode()).hexdigest()[:16]
    return quoted if len(quoted) <= LONGEST_NAME else f"{quoted[: LONGEST_NAME - 17]}-{digest}"


def quoted(value: str, option: str) -> str:
    """A value in a filter; MLflow's filters have no way to escape a quote. `option` is where the value is from."""
    mark = '"' if "'" in value else "'"
    if mark in value:
        raise UserError(f"{option}: got {value}; allowed: text with one kind of quotes at most")
    return f"{mark}{value}{mark}"


def _sqlite_file(uri: str) -> Path | None:
    """The database file of a sqlite store; None for any other store, and for one that is named in sqlite's own way."""
    from sqlalchemy.engine import make_url

    database = make_url(uri).database if uri.startswith("sqlite:") else None
    return Path(database).resolve() if database and not database.startswith("file:") else None


@contextlib.contextmanager
def open_store(uri: str) -> Iterator[MlflowClient]:
    """A client for a store that is there already; nothing is written, and no database is made.

    Raises UserError, also for what goes wrong inside the block, if the store cannot be reached or read.
    """
    remember(uri)
    if problem := must_quote(uri):
        raise UserError(f"--uri: {problem}")
    words = f"--uri: MLflow at {hide_secrets(uri)} cannot be read", "name the store that the jobs wrote to"
    with held_back(), starting(), user_errors(uri, *words):
        check_is_store(uri)
        yield connect(uri)


def without_credentials(uri: str) -> str:
    """An address that can be stored: neither user and password nor options; that of a sqlite file is absolute."""
    file = _sqlite_file(uri)
    return f"sqlite:///{file}" if file else plain_address(uri)


def is_down(error: BaseException | None) -> bool:
    """Whether waiting may help: the store cannot be reached, is busy or has a fault, but does not refuse."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import OperationalError

    if isinstance(error, MlflowException):
        return bool(error.get_http_status_code() >= 500)
    return isinstance(error, OperationalError | sqlite3.OperationalError | OSError)


def first_line(error: BaseException) -> str:
    """What an error says, in one line and without a password.

    Of a request that failed the reason alone; what SQLAlchemy may say first of how it came to an error is left out.
    """
    lines = [line for line in str(error).strip().splitlines() if not line.startswith("(raised as a result of")]
    line = (lines or [type(error).__name__])[0]
    found = re.search(r"""Caused by \w+\(["'](?:\w+\(.*?\): )?(.+?)["']\)(?:\)|$)""", line)
    reason = re.sub(r"', \w+\('", " ", found[1]) if found else line
    shown = hide_secrets(reason).rstrip(".")
    return shown if len(shown) <= LONGEST_REASON else f"{shown[:LONGEST_REASON]}..."


def check_is_store(uri: str) -> None:
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
def starting() -> Iterator[None]:
    """A server that does not answer is reported soon."""
    with environment(AT_START):
        yield


def in_time(uri: str, function: Callable[[], T]) -> T:
    """What `function` gives. Raises TimeoutError where a server takes too long, byte by byte for instance.

    The requests' own limit is for each part of an answer, not for the whole.
    """
    if not uri.startswith(("http:", "https:")):
        return function()
    ended: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue()

    def run() -> None:
        try:
            ended.put((function(), None))
        except BaseException as error:
            ended.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        found, error = ended.get(timeout=LONGEST_START)
    except queue.Empty:
        raise TimeoutError(f"it has not answered within {LONGEST_START:g} seconds") from None
    if error is not None:
        raise error
    return cast(T, found)


@contextlib.contextmanager
def user_errors(uri: str, problem: str = "", remedy: str = "") -> Iterator[None]:
    """A store that cannot be reached or refuses the run is the user's to mend; the cause is the UserError's.

    MLflow, its database driver and its plugins raise errors of many kinds; all of them are meant.
    """
    from mlflow.exceptions import MlflowException

    try:
        yield
    except UserError:
        raise
    except Exception as error:
        problem = problem or f"tracking: MLflow at {hide_secrets(uri)} does not take the run"
        remedy = remedy or "correct tracking.mlflow_uri or tracking.experiment, or set tracking.mlflow_uri to null"
        if isinstance(error, MlflowException) and error.get_http_status_code() in (401, 403):
            remedy = CREDENTIALS
        reason = first_line(error)
        if "filesystem tracking backend" in reason:  # a paragraph on how to go on using it
            reason = "MLflow has given up folders as stores, and takes a database such as sqlite:///mlflow.db"
        raise UserError(f"{problem}: {reason}; {remedy}") from error


@contextlib.contextmanager
def without_own_credentials(uri: str) -> Iterator[None]:
    """This user's credentials are out of MLflow's reach: an address that a folder names may be anybody's.

    Raises UserError for a kind of store whose credentials cannot be kept from it.
    """
    if not uri.startswith(("sqlite:", "http:", "https:")):
        raise UserError(f'--sync: the run was recorded at "{uri}"; to send there, name the address with --uri')
    with tempfile.TemporaryDirectory() as empty:
        homes = {"NETRC": os.devnull, "HOME": empty}  # of requests, and of ~/.mlflow/credentials
        with changed_environment(dict.fromkeys(OWN_CREDENTIALS) | homes):
            yield


@contextlib.contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for a while; those that the user has set stay as they are."""
    with changed_environment({name: text for name, text in values.items() if name not in os.environ}):
        yield


class _HeldBack:
    """MLflow says nothing on the console and gives up early, in all threads, while any run is tracked."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holders = 0
        self._undo = contextlib.ExitStack()

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        import mlflow  # noqa: F401  sets up its loggers when it is imported

        with self._lock:
            self._holders += 1
            if self._holders == 1:
                self._undo.enter_context(environment(QUIET))
                for logger in map(logging.getLogger, LOGGERS):
                    self._undo.callback(logger.setLevel, logger.level)
                    logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            with self._lock:
                self._holders -= 1
                if self._holders == 0:
                    self._undo.close()


held_back = _HeldBack()
