"""compare.py --register: the run that was chosen becomes a version of a registered model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from leap_dist.errors import UserError
from leap_dist.run_folder import MODEL
from leap_dist.tracking.logged_model import (
    EXTERNAL,
    check_has_registry,
    complete,
    find_model,
    register,
    store_files,
)
from leap_dist.tracking.rows import Row, folder_of
from leap_dist.tracking.store import open_store

if TYPE_CHECKING:
    from mlflow import MlflowClient

NAME = re.compile(r"(\w[\w .\-]*)(?:@(?!latest$|v\d+$)(\w[\w\-]*))?")  # of a model and an alias, as MLflow takes them


@dataclass(frozen=True)
class Place:
    """Where a model is registered."""

    name: str
    alias: str | None


def parse_place(text: str) -> Place:
    """--register. Raises UserError for what MLflow would not take."""
    found = NAME.fullmatch(text)
    if found is None:
        raise UserError(
            f'--register: got "{text}"; allowed: NAME or NAME@ALIAS, of letters, digits, ".", "-" and "_", such as '
            "sst2@champion; an alias is neither latest nor v and a number"
        )
    return Place(found[1], found[2])


def register_best(uri: str, row: Row, place: Place, move: bool) -> str:
    """Register a run's model; a line that says what was done.

    Raises UserError, with nothing written, for an alias that another version has, unless it is to move; for a model
    that is neither in the store nor in a folder here; and for a store without a registry.
    """
    with open_store(uri) as client:
        check_has_registry(client, place.name, "--register", "name a store that has one with --uri")
        run_id = row.run.id
        held = _holder(client, place)
        if held and held[1] != run_id and not move:
            raise UserError(
                f"--register: the alias {place.alias} of {place.name} is version {held[0]}'s (run {held[1][:8]}); "
                "choose another alias, or move this one with --move"
            )
        _have_files(client, row)
        version = register(client, run_id, place.name)
        done = f"{row.run.label} is version {version} of {place.name}"
        if place.alias is None:
            return done
        client.set_registered_model_alias(place.name, place.alias, version)
        moved = f", which was that of version {held[0]}" if held and held[0] != version else ""
        return f"{done}, alias {place.alias}{moved}: models:/{place.name}@{place.alias}"


def _holder(client: MlflowClient, place: Place) -> tuple[str, str] | None:
    """The version that has the alias now, and its run."""
    from mlflow.exceptions import MlflowException

    if place.alias is None:
        return None
    try:
        version = client.get_model_version_by_alias(place.name, place.alias)
    except MlflowException as error:
        if error.get_http_status_code() in (400, 404):  # no such model, or no such alias of it
            return None
        raise
    return str(version.version), str(version.run_id)


def _have_files(client: MlflowClient, row: Row) -> None:
    """See that the store has the run's model, from the run's folder if need be.

    A model is ready once its files are stored, or are known to be elsewhere: of one that is not they may be missing.
    """
    run, folder = row.run, folder_of(row.run)
    model = find_model(client, run.id)
    ready = model is not None and str(model.status) == "READY"
    if model is not None and ready and EXTERNAL not in model.tags:
        return
    if folder is None or not (folder / MODEL / "config.json").is_file():
        raise UserError(
            f"--register: {run.label} has no model in the store, and its folder {folder} is not here; train it with "
            "tracking.log_model or tracking.register, or call this where the folder is"
        )
    if model is not None and ready:
        store_files(client, model, folder / MODEL)
    else:  # the run is of an older version of this package, or could not send its model
        complete(client, run.id, {"leap.target": str(row.target), "leap.density": str(row.density)}, 0, folder / MODEL)
