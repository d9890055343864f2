"""The way from a journal to MLflow: in a thread beside the training, in batches, until MLflow has taken all.

Each kind of record has a line of its own, so that an artifact store that refuses does not hold up the metrics. What was
sent twice because its receipt was lost is there once: MLflow's databases know a metric by key, step, time and value.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from leap_dist.errors import UserError
from leap_dist.run_folder import JOURNAL
from leap_dist.tracking.journal import Journal, Record
from leap_dist.tracking.runs import CONTEXT
from leap_dist.tracking.store import begin, connect, first_line

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

THREAD = "mlflow-sender"
MAX_BATCH = 100  # parameters or tags in one request
MAX_METRICS = 1000  # metrics in one request
PAUSE = 2.0  # seconds between two batches
LONGEST_PAUSE = 60.0  # seconds between two tries while MLflow takes nothing
SHARE = 0.004  # of the time, at most, the thread computes during the run: Python runs one thread at a time
PATIENCE = 10.0  # seconds that the end of a run waits for a store that takes nothing
UPLOAD_RATE = 1e6  # bytes a second; an artifact is waited for as long as it takes at this rate
PACKING = 120.0  # seconds that a model's files may take to be made ready: MLflow's flavours import much


class Delivery:
    """Sends a journal's records. `problem`: why the last try has left some, "" if it has not.

    num_taken: records that MLflow has taken. grace: seconds that what is being sent now may take.
    """

    def __init__(self, journal: Journal, uri: str) -> None:
        self._journal, self._uri = journal, uri
        self._client: MlflowClient | None = None
        self.problem = ""
        self.num_taken = 0
        self.grace = 0.0

    def send(self) -> Iterator[str]:
        """Try once to send all that is waiting: the kind of every batch that was tried.

        What fails goes to `problem`, and stays in the journal.
        """
        self.problem = ""
        waiting = self._journal.waiting()
        if not waiting:
            return
        try:
            self._client = self._client or connect(self._uri)
            run_id = self._begun(self._client)
        except Exception as error:  # whatever a client raises: it is reported at the end of the run, and tried again
            self.problem = first_line(error)
            return
        for kind, (size, limit, deliver) in DELIVERIES.items():
            records = [record for record in waiting if record["kind"] == kind]
            for batch in _batches(records, size, limit):
                taken = self._deliver(deliver, self._client, run_id, batch)
                yield kind
                if not taken:
                    break

    def _begun(self, client: MlflowClient) -> str:
        """The id of the run, which is begun now if MLflow could not be reached when the job started."""
        if "run_id" not in self._journal.run:
            self._journal.describe(run_id=begin(client, self._uri, self._journal.run))
        return str(self._journal.run["run_id"])

    def _deliver(self, deliver: Deliver, client: MlflowClient, run_id: str, batch: list[Record]) -> bool:
        folder = Path() if self._journal.path is None else self._journal.path.parent
        files = [record for record in batch if "path" in record]
        self.grace = sum(_bytes(folder / record["path"]) for record in files) / UPLOAD_RATE
        self.grace += PACKING * sum(record["kind"] == "model" for record in files)
        try:
            deliver(client, run_id, batch, folder)
        except Exception as error:  # as above; a store of artifacts has errors of its own
            self.problem = first_line(error)
            return False
        finally:
            self.grace = 0.0
        self._journal.taken(batch)
        self.num_taken += len(batch)
        return True


class Sender:
    """A Delivery in a thread. Starts at once; `finish` ends it."""

    def __init__(self, journal: Journal, uri: str) -> None:
        self._journal = journal
        self._delivery = Delivery(journal, uri)
        self._finishing = threading.Event()
        self._given_up = threading.Event()
        self._thread = threading.Thread(target=self._run, name=THREAD, daemon=True)
        self._thread.start()

    def finish(self) -> str:
        """Send what is left, as long as MLflow takes something; "" or why not all was sent."""
        self._finishing.set()
        taken, since = self._delivery.num_taken, time.monotonic()
        while self._thread.is_alive() and time.monotonic() - since < PATIENCE + self._delivery.grace:
            self._thread.join(0.2)
            if self._delivery.num_taken > taken:
                taken, since = self._delivery.num_taken, time.monotonic()
        self._given_up.set()
        if not self._journal.waiting():
            return ""
        return self._delivery.problem or "it does not answer"

    def _run(self) -> None:
        tries = 0
        while not self._given_up.is_set():
            self._send()
            tries = tries + 1 if self._delivery.problem else 0
            if not self._finishing.is_set():
                self._finishing.wait(min(PAUSE * 2**tries, LONGEST_PAUSE))
            elif not self._journal.waiting():
                return
            else:
                self._given_up.wait(PAUSE / 4 if tries else 0.0)

    def _send(self) -> None:
        """Send what is waiting; after a batch of metrics the training has the processor to itself for a while."""
        started = time.thread_time()
        for kind in self._delivery.send():
            if kind in ("metrics", "linked"):
                self._finishing.wait((time.thread_time() - started) / SHARE)
            started = time.thread_time()
            if self._given_up.is_set():
                return


def _batches(records: Sequence[Record], size: Callable[[Record], int], limit: int) -> Iterator[list[Record]]:
    """Records in order, as many in one as fit."""
    batch: list[Record] = []
    for record in records:
        if batch and sum(map(size, batch)) + size(record) > limit:
            yield batch
            batch = []
        batch.append(record)
    if batch:
        yield batch


def check_paths(folder: Path, records: Sequence[Record]) -> None:
    """Raises UserError for a record of a file that is not in the folder: a journal may come from anywhere."""
    root = folder.resolve()
    for text in (record["path"] for record in records if "path" in record):
        path = folder / text if isinstance(text, str) else root.parent
        inside = [path, *path.rglob("*")] if path.is_dir() else [path]
        if any(not found.resolve().is_relative_to(root) or found.is_symlink() for found in inside):
            raise UserError(
                f"--sync: {folder / JOURNAL} names {text!r}, which is not in that folder, or is a link; allowed: files "
                "of the run folder; remove the record"
            )


def _bytes(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


# ---------------------------------------------------------------------------------------------- kinds of records

Deliver = Callable[["MlflowClient", str, list[Record], Path], None]
"""Sends a batch of one kind to a run. Paths in records are relative to the folder, or absolute."""


def _params(client: MlflowClient, run_id: str, batch: list[Record], folder: Path) -> None:
    from mlflow.entities import Param

    client.log_batch(run_id, params=[Param(key, text) for record in batch for key, text in record["values"].items()])


def _tags(client: MlflowClient, run_id: str, batch: list[Record], folder: Path) -> None:
    from mlflow.entities import RunTag

    client.log_batch(run_id, tags=[RunTag(key, text) for record in batch for key, text in record["values"].items()])


def _metrics(client: MlflowClient, run_id: str, batch: list[Record], folder: Path) -> None:
    client.log_batch(run_id, metrics=_measures(batch))


def _linked(client: MlflowClient, run_id: str, batch: list[Record], folder: Path) -> None:
    """Measures that the run has already, as those of its model."""
    from leap_dist.tracking.logged_model import link

    link(client, run_id, _measures(batch))


def _measures(batch: list[Record]) -> list[Metric]:
    from mlflow.entities import Metric

    return [
        Metric(key, value, record["time"], record["step"])
        for record in batch
        for key, value in record["values"].items()
    ]


def _datasets(client: MlflowClient, run_id: str, batch: list[Record], folder: Path) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    inputs = [DatasetInput(Dataset(**record["values"]), [InputTag(CONTEXT, record["context"])]) for record in batch]
    client.log_inputs(run_id, datasets=inputs)


def _table(client: MlflowClient, run_id: str, batch: list[Record], folder: Path) -> None:
    """As `log_table` writes it; that would add its rows to those of a try before."""
    import json

    (record,) = batch
    client.log_text(run_id, json.dumps({"columns": record["columns"], "data": record["rows"]}), record["file"])
    client.set_tag(run_id, "mlflow.loggedArtifacts", json.dumps([{"path": record["file"], "type": "table"}]))


def _artifact(client: MlflowClient, run_id: str, batch: list[Record], folder: Path) -> None:
    (record,) = batch
    path = folder / record["path"]
    if path.is_dir():
        client.log_artifacts(run_id, str(path), artifact_path=path.name)
    else:
        client.log_artifact(run_id, str(path))


def _model(client: MlflowClient, run_id: str, batch: list[Record], folder: Path) -> None:
    from leap_dist.tracking.logged_model import complete

    (record,) = batch
    files = folder / record["path"] if "path" in record else None
    complete(client, run_id, record.get("tags", {}), record.get("step", 0), files)


def _registered(client: MlflowClient, run_id: str, batch: list[Record], folder: Path) -> None:
    from leap_dist.tracking.logged_model import register

    (record,) = batch
    register(client, run_id, record["name"])


def _status(client: MlflowClient, run_id: str, batch: list[Record], folder: Path) -> None:
    from leap_dist.tracking.logged_model import give_up

    (record,) = batch
    if record["status"] == "RUNNING":
        client.update_run(run_id, status="RUNNING")
    else:
        client.set_terminated(run_id, record["status"], record["time"])
    if record["status"] in ("FAILED", "KILLED"):
        give_up(client, run_id)


def _one(record: Record) -> int:
    return 1


def _values(record: Record) -> int:
    return len(record["values"])


DELIVERIES: dict[str, tuple[Callable[[Record], int], int, Deliver]] = {
    "params": (_values, MAX_BATCH, _params),
    "tags": (_values, MAX_BATCH, _tags),
    "metrics": (_values, MAX_METRICS, _metrics),
    "linked": (_values, MAX_METRICS, _linked),
    "dataset": (_one, MAX_BATCH, _datasets),
    "table": (_one, 1, _table),
    "artifact": (_one, 1, _artifact),
    "model": (_one, 1, _model),
    "registered": (_one, 1, _registered),
    "status": (_one, 1, _status),
}
"""By kind: the size of a record, the size of a batch, and how it is sent. In this order."""
