"""The model that a run makes, in MLflow: with parameters, metrics, files, and its versions in the registry.

It is a LoggedModel of MLflow 3. It begins, pending, with the run's first checkpoint, and is ready when the run has
finished. What is done twice, because MLflow's answer was lost, is there once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from leap_dist.errors import UserError
from leap_dist.tracking.store import first_line

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Metric

MODEL = "model"  # its name: `runs:/RUN_ID/model` finds it
EXTERNAL = "mlflow.model.isExternal"  # MLflow's tag of a model whose files are not in the store
MOST_METRICS = 1000  # in one request
REMEDY = "name another store in tracking.mlflow_uri, or set this key to"


def check_has_models(client: MlflowClient, log_model: bool, register: str | None) -> None:
    """Raises UserError, before a run begins, for a store that cannot keep the model as the run's settings ask for."""
    from mlflow.exceptions import MlflowException

    try:
        if log_model or register:
            client.search_logged_models(["0"], max_results=1)
    except MlflowException as error:
        if not is_unknown(error):
            raise
        key, off = ("register", "null") if register else ("log_model", "false")
        raise UserError(f"tracking.{key}: the server knows no models ({first_line(error)}); {REMEDY} {off}") from error
    if register:
        check_has_registry(client, register, "tracking.register", f"{REMEDY} null")


def check_has_registry(client: MlflowClient, name: str, key: str, remedy: str) -> None:
    """Raises UserError for a store without a registry of models, or one that does not take the name."""
    from mlflow.exceptions import MlflowException

    try:
        client.search_model_versions(f"name = '{name}'", max_results=1)
    except MlflowException as error:
        if error.get_http_status_code() >= 500 and not is_unknown(error):
            raise
        raise UserError(
            f"{key}: got {name}; the store has no registry for it: {first_line(error)}; {remedy}"
        ) from error


def is_unknown(error: Exception) -> bool:
    """Whether the store is of a kind, or of an age, that does not know what was asked for."""
    code = getattr(error, "error_code", "")
    return code in ("ENDPOINT_NOT_FOUND", "NOT_IMPLEMENTED", "FEATURE_DISABLED") or isinstance(
        error, NotImplementedError
    )


def model_of(client: MlflowClient, run_id: str) -> LoggedModel:
    """The run's model; made, if it is not there yet, with the run's parameters."""
    if found := find_model(client, run_id):
        return found
    run = client.get_run(run_id)
    return client.create_logged_model(run.info.experiment_id, MODEL, run_id, params=dict(run.data.params))


def find_model(client: MlflowClient, run_id: str) -> LoggedModel | None:
    """The run's model, if it has one."""
    experiment = client.get_run(run_id).info.experiment_id
    found = client.search_logged_models([experiment], f"source_run_id = '{run_id}' and name = '{MODEL}'", max_results=1)
    return found[0] if found else None


def link(client: MlflowClient, run_id: str, metrics: Sequence[Metric]) -> None:
    """Measures of the model: the run's metrics, by step. A server that knows no models has them with the run alone."""
    from mlflow.entities import Metric
    from mlflow.exceptions import MlflowException

    try:
        model_id = model_of(client, run_id).model_id
    except MlflowException as error:
        if not is_unknown(error):
            raise
        model_id = None
    for start in range(0, len(metrics), MOST_METRICS):
        batch = metrics[start : start + MOST_METRICS]
        client.log_batch(run_id, metrics=[Metric(m.key, m.value, m.timestamp, m.step, model_id) for m in batch])


def complete(client: MlflowClient, run_id: str, tags: Mapping[str, str], step: int, files: Path | None) -> None:
    """The run has finished: the model is ready. files: its Hugging Face folder, if the store is to keep a copy."""
    from mlflow.entities import LoggedModelOutput
    from mlflow.exceptions import MlflowException

    try:
        model = model_of(client, run_id)
    except MlflowException as error:
        if files is not None or not is_unknown(error):
            raise
        return
    client.set_logged_model_tags(model.model_id, dict(tags) | ({} if files else {EXTERNAL: "true"}))
    if files is not None:
        store_files(client, model, files)
    client.finalize_logged_model(model.model_id, "READY")
    outputs = client.get_run(run_id).outputs
    if outputs is None or all(output.model_id != model.model_id for output in outputs.model_outputs):
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step)])


def give_up(client: MlflowClient, run_id: str) -> None:
    """The run ends without a model: what it has begun is marked as failed. Resumed and finished, it is ready."""
    from mlflow.exceptions import MlflowException

    try:
        if (model := find_model(client, run_id)) and model.status == "PENDING":
            client.finalize_logged_model(model.model_id, "FAILED")
    except MlflowException as error:
        if not is_unknown(error):
            raise


def store_files(client: MlflowClient, model: LoggedModel, files: Path) -> None:
    """Copy a Hugging Face folder to the store, as a model that MLflow loads and serves."""
    from leap_dist.tracking.model import saved

    with saved(files, model) as path:
        client.log_model_artifacts(model.model_id, str(path))
    if EXTERNAL in model.tags:
        client.delete_logged_model_tag(model.model_id, EXTERNAL)


def register(client: MlflowClient, run_id: str, name: str) -> str:
    """The version of the registered model `name` that is the run's model, made if need be, with the model's tags."""
    from mlflow.exceptions import MlflowException

    same = client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'", max_results=1)
    if same:
        return str(same[0].version)
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    model = model_of(client, run_id)
    tags = {key: text for key, text in model.tags.items() if not re.match(r"mlflow\.", key)}
    source = model.artifact_location  # a sqlite store would look for models:/ID in MLflow's global store
    return str(client.create_model_version(name, source, run_id, tags=tags, model_id=model.model_id).version)
