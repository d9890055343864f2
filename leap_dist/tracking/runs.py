"""Runs as an MLflow store has them, read in a few large requests; nothing is written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leap_dist.errors import UserError
from leap_dist.secrets import hide_secrets
from leap_dist.tracking.store import PARENT, open_store, quoted

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Dataset, Run

FOLDER = "leap.folder"  # the tag that says where a run's files are
CONTEXT = "mlflow.data.context"  # the tag that says what data are for
DIGITS = 8  # of a digest that are shown
REQUEST_SIZE = 1000  # runs or experiments in one request; every MLflow server gives as many
MOST_LISTED = 20  # names in one message


@dataclass(frozen=True, eq=False)
class StoredRun:
    """One run. metrics: the last value of each; seconds: None while it runs; data: what the model is judged on."""

    id: str
    name: str
    status: str
    seconds: float | None
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    tags: Mapping[str, str]
    data: str = ""

    @property
    def label(self) -> str:
        """The name, and enough of the id to find it by."""
        return f"{self.name} ({self.id[:8]})"


@dataclass(frozen=True)
class Selection:
    """Which runs: those that satisfy each part that is given, and without any all of the store.

    experiments: names, one of which is the run's. sweep: the id of the run that it is a trial of. tags: "key=value".
    runs: ids, beginnings of ids, or names; each has to be that of exactly one run.
    """

    experiments: Sequence[str] = ()
    sweep: str | None = None
    tags: Sequence[str] = ()
    runs: Sequence[str] = ()


def read_runs(uri: str, selection: Selection) -> list[StoredRun]:
    """The selected runs, at least one; those that are named in the order of their names.

    Raises UserError for a store that cannot be read, and for what is not there.
    """
    conditions = _conditions(selection)
    with open_store(uri) as client:
        experiments = _experiment_ids(client, selection.experiments)
        found = [_stored(run) for run in _pages(client.search_runs, experiments, " AND ".join(conditions))]
    if selection.runs:
        return [find(found, text) for text in selection.runs]
    if not found:
        asked = [f"--experiment {name}" for name in selection.experiments]
        asked += [f"--sweep {selection.sweep}"] if selection.sweep else []
        asked += [f"--tag {tag}" for tag in selection.tags]
        raise UserError(f"{hide_secrets(uri)} has no run{' with ' if asked else ''}{' '.join(asked)}")
    return found


def find(runs: Sequence[StoredRun], text: str) -> StoredRun:
    """The one run of that id or name, or whose id begins so. Raises UserError for none and for several."""
    by_rank = (
        [run for run in runs if run.id == text],
        [run for run in runs if run.name == text],
        [run for run in runs if run.id.startswith(text)],
    )
    matches = next((found for found in by_rank if found), [])
    if not matches:
        near = get_close_matches(text, [run.name for run in runs], n=3)
        raise UserError(f"no run has the id or name {text}{f'; did you mean {_listed(near)}?' if near else ''}")
    if len(matches) > 1:
        raise UserError(
            f"{len(matches)} runs are called {text}; name one by its id: {_listed([m.id for m in matches])}"
        )
    return matches[0]


def _experiment_ids(client: MlflowClient, names: Sequence[str]) -> list[str]:
    """The ids of those names, or of all experiments; the known names, nearest first, are in the error."""
    known = {item.name: str(item.experiment_id) for item in _pages(client.search_experiments)}
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, n=len(known), cutoff=0.0)
            raise UserError(f"--experiment: there is no {name}; known: {_listed(near)}")
    return [known[name] for name in names or known]


def _pages(search: Callable[..., Any], *arguments: Any) -> Iterator[Any]:
    """All that a search of the client finds, page by page."""
    token: str | None = None
    while True:
        page = search(*arguments, max_results=REQUEST_SIZE, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _conditions(selection: Selection) -> list[str]:
    """What the store filters by itself. Names and beginnings of ids are left to `find`."""
    conditions = [f"tags.`{PARENT}` = {quoted(selection.sweep, '--sweep')}"] if selection.sweep else []
    for text in selection.tags:
        key, equals, value = text.partition("=")
        if not equals or not re.fullmatch(r"[\w.\-/ ]+", key):
            raise UserError(f"--tag: got {text}; allowed: key=value, such as leap.rule=movement")
        conditions.append(f"tags.`{key}` = {quoted(value, '--tag')}")
    if selection.runs and all(re.fullmatch(r"[0-9a-f]{32}", text) for text in selection.runs):
        conditions.append(f"attributes.run_id IN ({', '.join(repr(text) for text in selection.runs)})")
    return conditions


def _stored(run: Run) -> StoredRun:
    info, data = run.info, run.data
    seconds = (info.end_time - info.start_time) / 1000.0 if info.end_time else None
    name = info.run_name or info.run_id
    return StoredRun(info.run_id, name, info.status, seconds, data.params, data.metrics, data.tags, judged_on(run))


def judged_on(run: Run) -> str:
    """The data of validation as tracking/datasets.py records them; "" where a run has none.

    Of a file the name, and of files the beginning of their digest: the folder may be another on each machine.
    """
    found = [
        _source_name(item.dataset)
        for item in (run.inputs.dataset_inputs if run.inputs else ())
        if any((tag.key, tag.value) == (CONTEXT, "validation") for tag in item.tags)
    ]
    return ", ".join(sorted(set(found)))


def _source_name(data: Dataset) -> str:
    source = json.loads(data.source)
    if data.source_type == "local":
        place = Path(source["uri"])  # of several files the folder
        return f"{place.name if place.suffix else 'files'} {data.digest[:DIGITS]}"
    values = [str(value) for value in source.get("tags", source).values() if value is not None]
    names = [Path(value).name if Path(value).is_absolute() else value for value in values]
    return " ".join(names if names == values else [*names, data.digest[:DIGITS]])


def _listed(names: Sequence[str]) -> str:
    """Names with commas, the first few of very many."""
    more = [f"and {len(names) - MOST_LISTED} more"] if len(names) > MOST_LISTED else []
    return ", ".join([*names[:MOST_LISTED], *more])
