"""What MLflow records of the data: its digest follows its contents, wherever they are from."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from leap_dist.config.sections import DataConfig
from leap_dist.tasks.base import Task, TokenTable, flat
from leap_dist.tracking.datasets import describe, file_digests
from leap_dist.tracking.runs import CONTEXT, judged_on


def task(name: str, tokens: list[list[int]]) -> Task:
    table = TokenTable(flat({"input_ids": tokens}), labels=[0] * len(tokens))
    splits = {"matched": table, "mismatched": TokenTable(flat({"input_ids": tokens[:1]}), labels=[1])}
    evaluation: Any = None
    return Task(name, 2, table, splits, lambda examples: {}, evaluation, "accuracy", "regression", ("score",))


def test_local_files_are_hashed(tmp_path: Path) -> None:
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / name).write_text(f"of {name}")
    data = DataConfig(task="glue/sst2", train=str(tmp_path / "train.tsv"), validation=str(tmp_path / "dev.tsv"))
    train, *validation = describe(data, task("glue/sst2", [[1], [2, 3]]))
    digest = hashlib.sha256(b"of train.tsv").hexdigest()[:32]
    source = json.dumps({"uri": str(tmp_path / "train.tsv")})
    profile = json.dumps({"num_rows": 2})
    values = {"digest": digest, "source_type": "local", "source": source, "profile": profile}
    assert train == {"context": "train", "values": {"name": "glue/sst2 train", **values}}
    assert [record["values"]["name"] for record in validation] == ["glue/sst2 matched", "glue/sst2 mismatched"]
    assert {record["context"] for record in validation} == {"validation"}


def test_a_file_is_read_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run asks when it checks its folder, when it writes to it, and for MLflow; a file may have a terabyte."""
    read, whole = [], hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, kind: read.append(file.name) or whole(file, kind))
    (file := tmp_path / "a.tsv").write_text("one")
    data = DataConfig(task="glue/sst2", train=str(file), validation=str(file))
    first = file_digests(data)
    assert first == file_digests(data) and len(read) == 1
    assert describe(data, task("glue/sst2", [[1]]))[0]["values"]["digest"] == first["data.train"] and len(read) == 1
    file.write_text("three")
    assert file_digests(data)["data.train"] == hashlib.sha256(b"three").hexdigest()[:32] and len(read) == 2


def judged(data: DataConfig) -> str:
    """What a run on these data is compared by, as MLflow gives it back."""
    from mlflow.entities import Dataset, DatasetInput, InputTag, RunInputs

    inputs = [
        DatasetInput(Dataset(**record["values"]), [InputTag(CONTEXT, record["context"])])
        for record in describe(data, task(data.task, [[1], [2, 3]]))
    ]
    run: Any = SimpleNamespace(inputs=RunInputs(inputs))
    return judged_on(run)


def test_data_are_known_wherever_a_machine_has_them(tmp_path: Path) -> None:
    """Files by their content, whatever their folder is called."""
    found = []
    for name in ("here", "there"):
        (folder := tmp_path / name).mkdir()
        files = [folder / "a.tsv", folder / "b.tsv"]
        for file in files:
            file.write_text(f"of {file.name}")
        both = DataConfig(task="lm", train=str(files[0]), validation=tuple(map(str, files)))
        one = DataConfig(task="lm", train=str(files[0]), validation=str(files[0]))
        local = DataConfig(task="lm", dataset=str(folder / "set"), validation="test")
        found.append([judged(data) for data in (both, one, local)])
    digest = hashlib.sha256(b"of a.tsv").hexdigest()[:8]
    assert found[0] == found[1]
    assert found[0][0].startswith("files ") and found[0][1] == f"a.tsv {digest}"
    assert found[0][2].startswith("set test ")  # and the digest, as another folder may have the same name
    assert judged(DataConfig(task="glue/sst2")) == "glue/sst2"
    assert judged(DataConfig(task="lm", dataset="a/b", subset="c", validation="d")) == "a/b c d"


def test_of_hub_data_the_tokens_are_hashed() -> None:
    data = DataConfig(task="text/classification", dataset="someone/films", subset="short", train="all")
    first, *_ = describe(data, task("text/classification", [[1], [2, 3]]))
    assert first["values"]["source_type"] == "hugging_face"
    assert json.loads(first["values"]["source"]) == {"path": "someone/films", "config_name": "short", "split": "all"}
    again, other = (
        describe(data, task("t", tokens))[0]["values"]["digest"] for tokens in ([[1], [2, 3]], [[1, 2], [3]])
    )
    assert first["values"]["digest"] == again != other
