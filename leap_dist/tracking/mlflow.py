"""One MLflow run per job: parameters, metrics by step, data, artifacts, model. Only rank 0 writes.

Nothing but the start of the run waits for MLflow. What is logged goes to a journal (journal.py), from which a thread
sends it (delivery.py): a server that is slow or down neither slows nor stops the training.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from leap_dist.config.sections import DataConfig, TrackingConfig, default_store
from leap_dist.console import console
from leap_dist.errors import UserError
from leap_dist.run_folder import CERTIFICATE, JOURNAL
from leap_dist.secrets import hide_in, hide_secrets, remember
from leap_dist.tracking.delivery import MAX_BATCH, Delivery, Sender, check_paths
from leap_dist.tracking.journal import Journal
from leap_dist.tracking.logged_model import check_has_models
from leap_dist.tracking.records import Recorder, now, record_end_of
from leap_dist.tracking.store import (
    begin,
    check_is_store,
    connect,
    first_line,
    held_back,
    in_time,
    is_down,
    starting,
    user_errors,
    without_credentials,
    without_own_credentials,
)
from leap_dist.tracking.system import System

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from leap_dist.tasks.base import Task

Status = Literal["FINISHED", "FAILED", "KILLED"]
SYNC = "python launch/compare.py --sync"
MAX_KEY = 250  # characters that MLflow takes in a parameter's name
MAX_VALUE = 500  # characters of a parameter's value that every MLflow server since 1.0 takes


class Tracker(Recorder):
    """An MLflow run as a context manager; without `enabled`, or with a null URI, it does nothing.

    config: the resolved job, logged as parameters with dotted keys. run_id: a run to resume (a resumed
    job); its parameters stay as they are. tags: what runs are found by later, such as the commit; those of a
    resumed run are set anew. folder: where the journal is, and an earlier one is continued; None: in memory. Leaving
    the context ends the run: FINISHED, KILLED on an interrupt, FAILED on any other exception.

    Raises UserError on entering if the store cannot be reached or refuses the run. A job that is resumed, and a trial
    of a sweep, run where the store is down: their records wait in the journal.
    """

    def __init__(
        self,
        tracking: TrackingConfig,
        config: Mapping[str, Any],
        enabled: bool,
        run_id: str | None = None,
        tags: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> None:
        super().__init__(None, folder, tracking)
        self._config = config
        self._uri = tracking.mlflow_uri if enabled else None
        remember(self._uri or "")
        name = tracking.run_name or (folder.resolve().name if folder else None)
        self._about = hide_in({"experiment": tracking.experiment, "name": name, "parent": tracking.parent_run})
        self._run_id = run_id
        self._tags = tags or {}
        self._sender: Sender | None = None  # None: nothing is recorded
        self._system = System()
        self._held = contextlib.ExitStack()

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None before it is entered, where nothing is tracked, and until it has begun."""
        return self._run_id if self._journal is None else self._journal.run.get("run_id")

    def __enter__(self) -> Tracker:
        if self._uri is not None:
            with contextlib.ExitStack() as stack:
                stack.enter_context(held_back())
                self._begin(self._uri)
                self._held = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.finish("FINISHED")
        else:
            self.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record measures of an optimizer step, and from time to time those of the machine."""
        if self._sender is not None:
            super().log(step, {**metrics, **self._system.sample()})

    def datasets(self, data: DataConfig, task: Task) -> None:
        """Record what the run is trained and judged on."""
        from leap_dist.tracking.datasets import describe  # torch, which tables do without

        for record in describe(data, task) if self._sender is not None else ():
            self._add("dataset", **record)

    def finish(self, status: Status) -> None:
        """End the run; what comes after is not recorded. Waits a while for MLflow to take what it has not yet."""
        if self._sender is None or self._journal is None:
            return
        self._add("status", status=status)
        self._journal.describe(status=status)
        try:
            problem = self._sender.finish()
        finally:  # also if the user does not want to wait
            self._sender = None
            self._journal.close(remove=status == "FINISHED")
            self._held.close()
        if left := len(self._journal.waiting()):
            command = f"{SYNC} {shlex.quote(str(self._folder))}{_named(str(self._uri))}"
            wait = f"they wait in {self._journal.path}; to send them: {command}"
            kept = wait if self._folder and not self._journal.problem else "they are lost"
            if self._journal.problem:
                kept = f"{self._journal.path} could not be written: {self._journal.problem}: {kept}"
            self._tell(f"has not taken {left} records of this run: {problem}; {kept}")

    def _begin(self, uri: str) -> None:
        """Begin the run, or resume it, and start to send."""
        journal = Journal(self._folder) if self._folder and (self._folder / JOURNAL).is_file() else None
        earlier = journal.run if journal else {}
        run_id, resumed = earlier.get("run_id") or self._run_id, bool(self._run_id or earlier)
        try:
            with starting(), user_errors(uri):
                run_id = in_time(uri, lambda: self._begun(uri, run_id))
        except UserError as error:
            if not (resumed or self._about["parent"]) or not is_down(error.__cause__):
                if journal:
                    journal.close(remove=False)
                raise
            kept = f"its records wait in {self._folder / JOURNAL}" if self._folder else "its records wait in memory"
            self._tell(f"cannot be reached: {first_line(error.__cause__ or error)}; the run continues, {kept}")
        self._journal = journal or Journal(self._folder)
        begun = {"run_id": run_id} if run_id else {}
        self._journal.describe(uri=without_credentials(uri), status="RUNNING", **self._about, **begun)
        self._sender = Sender(self._journal, uri)
        self._add_description(resumed)

    def _begun(self, uri: str, run_id: str | None) -> str:
        """The id of the run, which is begun or resumed."""
        client = _reached(uri, *self._keeps)
        if not run_id:
            return begin(client, uri, self._about)
        client.update_run(run_id, status="RUNNING")
        return run_id

    def _add_description(self, resumed: bool) -> None:
        if resumed:
            self._add("status", status="RUNNING")
        else:
            params = list(parameters(self._config).items())
            for start in range(0, len(params), MAX_BATCH):
                self._add("params", values=dict(params[start : start + MAX_BATCH]))
        if self._tags:
            self._add("tags", values=dict(self._tags))

    def _add(self, kind: str, **content: Any) -> None:
        if self._sender is not None:
            super()._add(kind, **content)

    def _tell(self, what: str) -> None:
        """A line on the console."""
        console().print(f"MLflow at {hide_secrets(str(self._uri))} {what}", markup=False, soft_wrap=True)


def _reached(uri: str, log_model: bool, register: str | None) -> MlflowClient:
    """A client of a store that can keep the model as the run's settings ask for."""
    client = connect(uri)
    check_has_models(client, log_model, register)
    return client


def check_store_answers(tracking: TrackingConfig) -> None:
    """Raises UserError where a new run could not begin now; a trial of a sweep runs where the store is down."""
    uri = tracking.mlflow_uri
    if uri is not None and not tracking.parent_run:
        remember(uri)
        with held_back(), starting(), user_errors(uri):
            in_time(uri, lambda: _reached(uri, tracking.log_model, tracking.register).search_experiments(max_results=1))


def sync(folder: Path, uri: str | None) -> str:
    """Send what a run that has ended could not, and what one recorded last that was killed at its very end.

    Returns a line that says what was sent.

    uri: another address than the run's, or the same. Credentials go only to an address that is given here or
    configured: anybody may have made the folder. Raises UserError, with nothing sent, for a record of a file outside
    the folder; and if not all could be sent.
    """
    if not (folder / JOURNAL).is_file():
        raise UserError(f"--sync: got {folder}; there is no {JOURNAL} in it: nothing waits there for MLflow")
    if (folder / JOURNAL).is_symlink():
        raise UserError(f"--sync: {folder / JOURNAL} is a link; allowed: a file of the run folder")
    journal = Journal(folder)
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: journal.close(remove=journal.run.get("status") == "FINISHED"))
        stack.enter_context(held_back())
        was_killed = (folder / CERTIFICATE).is_file() and journal.run.get("status") != "FINISHED"  # at its very end
        if was_killed:
            record_end_of(folder, journal)
        check_paths(folder, journal.waiting())
        if was_killed:
            journal.add("status", time=now(), status="FINISHED")
            journal.describe(status="FINISHED")
        stored, configured = journal.run.get("uri"), default_store()
        if uri is None and stored == without_credentials(configured):
            uri = configured
        if uri is None:
            uri = stored if isinstance(stored, str) else ""
            stack.enter_context(without_own_credentials(uri))
        remember(uri)
        with user_errors(uri, f"MLflow at {hide_secrets(uri)} cannot be reached", "name it with --uri"):
            check_is_store(uri)
        delivery = Delivery(journal, uri)
        for _ in delivery.send():
            pass
        if left := len(journal.waiting()):
            raise UserError(
                f"MLflow at {hide_secrets(uri)} has not taken {left} records: {delivery.problem}; "
                "try again when it does, or name another address of the same store with --uri"
            )
        return (
            f"MLflow at {hide_secrets(uri)} has taken {delivery.num_taken} records of run {journal.run.get('run_id')}"
        )


def _named(uri: str) -> str:
    """The address as --sync needs it, where it would not be given credentials otherwise."""
    found = uri == default_store() or uri.startswith("sqlite:")
    return "" if found else f" --uri {shlex.quote(without_credentials(uri))}"


def parameters(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as MLflow parameters: dotted keys, values as text without secrets; a value that is longer than
    MLflow takes is cut, and ends with a digest of all of it."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= parameters(value, f"{name}.")
        else:
            text = hide_secrets(str(hide_in({key: value})[key]))  # before it is cut: the rest of a secret would be left
            flat[re.sub(r"[^\w.\- :/]", "_", name)[:MAX_KEY]] = text if len(text) <= MAX_VALUE else _cut(text)
    return flat


def _cut(text: str) -> str:
    end = f"... sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}"
    return text[: MAX_VALUE - len(end)] + end


def differing(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """The parameters that are not the same in both, sorted."""
    return sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))
