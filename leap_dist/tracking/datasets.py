"""The data of a run: where it is from, its digest and its size, as MLflow records it. No data is copied."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from leap_dist.config.sections import DataConfig, names_files
from leap_dist.errors import UserError
from leap_dist.tasks.base import Example, Task, TokenTable
from leap_dist.tasks.files import files_of

DIGEST = 32  # characters; MLflow takes 36


def describe(data: DataConfig, task: Task) -> list[dict[str, Any]]:
    """A record for the training data and each split of the validation data.

    Each has its "context", and as "values" the fields of mlflow.entities.Dataset.
    """
    splits = {"train": ("train", task.train)} | {name: ("validation", split) for name, split in task.validation.items()}
    return [
        {"context": context, "values": _values(data, f"{task.name} {name}", context, examples)}
        for name, (context, examples) in splits.items()
    ]


def file_digests(data: DataConfig) -> dict[str, str]:
    """What the files of data.train and data.validation hold, by key; data sets of a hub are left out.

    Raises UserError for a file that cannot be read.
    """
    found = {}
    for context in ("train", "validation"):
        try:
            if files := _files(data, context):
                found[f"data.{context}"] = _digest_of_files(files)
        except OSError as error:
            raise UserError(f"data.{context}: {error.filename}: {error.strerror or error}") from error
    return found


def _files(data: DataConfig, context: str) -> list[Path]:
    """What a key names, where this is files."""
    given = data.train if context == "train" else data.validation
    local = given and (not data.dataset or (context == "validation" and names_files(given)))
    return files_of(f"data.{context}", given or ()) if local else []


def _values(data: DataConfig, name: str, context: str, examples: Sequence[Example]) -> dict[str, str]:
    given = data.train if context == "train" else data.validation
    source: dict[str, Any] = {"path": data.dataset or data.task, "config_name": data.subset}
    source["split"] = given[0] if given else None
    kind, profile = "hugging_face", {"num_rows": len(examples)}
    if files := _files(data, context):
        digest, kind, source = _digest_of_files(files), "local", {"uri": os.path.commonpath(map(Path.resolve, files))}
    elif data.streaming and context == "train":  # nobody has seen all of it
        digest, profile = hashlib.sha256(json.dumps(source).encode()).hexdigest()[:DIGEST], {}
    else:
        digest = _digest(examples)
        if data.task.startswith("builtin/"):
            kind, source = "code", {"tags": {"task": data.task, "seed": str(data.seed)}}
    found = {"name": name, "digest": digest, "source_type": kind, "source": json.dumps(source)}
    return {**found, "profile": json.dumps(profile)}


def _digest_of_files(files: Sequence[Path]) -> str:
    """Of one file its own, of several that of theirs."""
    found = []
    for file in files:
        about = file.stat()
        found.append(_digest_of_file(file.resolve(), about.st_size, about.st_mtime_ns, about.st_ino))
    return (found[0] if len(found) == 1 else hashlib.sha256("".join(found).encode()).hexdigest())[:DIGEST]


@cache
def _digest_of_file(file: Path, *state: int) -> str:
    """state: what of the file changes when it is written to. A run asks several times, and files can be large."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _digest(examples: Sequence[Example]) -> str:
    """Of the tokens, where there is no file to hash."""
    assert isinstance(examples, TokenTable), "every task has its examples in tables"
    found = hashlib.sha256()
    for key, values in {**examples.columns, "starts": examples.starts, **examples.numbers}.items():
        found.update(key.encode() + values.tobytes())
    return found.hexdigest()[:DIGEST]
