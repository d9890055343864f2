"""Any dataset by name and columns (here a local folder, which `datasets` loads as it loads a hub id)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from leap_dist.config.job_file import parse_section
from leap_dist.config.sections import DataConfig
from leap_dist.errors import UserError
from leap_dist.tasks import load_task, needs_tokenizer, problem_of

pytestmark = pytest.mark.slow

ROWS = [{"one": "a good film", "two": "plot", "kind": "up"}, {"one": "bad", "two": "a plot", "kind": "down"}]


@pytest.fixture
def dataset(tmp_path: Path) -> Callable[..., str]:
    """Writes a dataset with the rows in each of the named splits; gives its folder."""

    def make(rows: list[dict[str, Any]], *splits: str) -> str:
        folder = tmp_path / "dataset"
        folder.mkdir()
        for split in splits:
            (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
        return str(folder)

    return make


def section(**settings: Any) -> DataConfig:
    return parse_section(DataConfig, "data", settings)


def test_a_split_to_learn_and_to_judge(dataset: Any, tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    data = {"task": "text/classification", "dataset": dataset(ROWS, "train", "test"), "text": "one", "label": "kind"}
    load_task(section(**data, validation="test"), tokenizer)
    assert "also in data.train" not in caplog.text
    load_task(section(**data, validation="train"), tokenizer)
    assert "data.validation: the split train: also in data.train" in caplog.text


def test_pairs_by_column_names(dataset: Any, tokenizer: Any) -> None:
    name = dataset(ROWS, "train", "test")
    data = section(
        task="text/classification", dataset=name, validation="test", text=["one", "two"], label="kind", max_length=16
    )
    task = load_task(data, tokenizer)
    assert task.label_names == ("down", "up")
    assert task.train[0]["input_ids"] == [2, 4, 8, 10, 3, 11, 3]
    assert [example["labels"] for example in task.validation["validation"]] == [1, 0]


def test_another_dataset_for_a_known_task(dataset: Any, tokenizer: Any) -> None:
    name = dataset([{"sentence": "a", "label": 0}, {"sentence": "b", "label": 1}], "train", "validation")
    task = load_task(section(task="glue/sst2", dataset=name), tokenizer)
    assert (task.label_names, len(task.train)) == (("negative", "positive"), 2)


def test_names_of_classes_come_with_the_dataset(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    made = datasets.DatasetDict(train=rows, validation=rows)
    asked: list[Any] = []

    def load_dataset(*args: str) -> datasets.DatasetDict:
        asked.append(args)
        return made

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = load_task(section(task="text/classification", dataset="some/set", subset="part", text="text"), tokenizer)
    assert asked == [("some/set", "part")]
    assert task.label_names == ("no", "yes")
    assert [example["labels"] for example in task.train] == [1, 0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"validation": "dev"}, r'data\.validation: got "dev", not a split of the dataset; allowed: train, test'),
        (
            {"text": "won"},
            r'data\.text: got "won", no column of the dataset; allowed: one, two, kind; did you mean two',
        ),
        ({"label": "knd"}, r'data\.label: got "knd", no column of the dataset; .*; did you mean kind'),
        ({"text": None}, r"data\.text: missing; text/classification needs the name of one or two text columns"),
    ],
)
def test_refused(dataset: Any, tokenizer: Any, settings: dict[str, Any], message: str) -> None:
    data = {"dataset": dataset(ROWS, "train", "test"), "validation": "test", "text": "one", "label": "kind", **settings}
    with pytest.raises(UserError, match=message):
        load_task(section(task="text/classification", **data), tokenizer)


def test_a_row_without_a_label(dataset: Any, tokenizer: Any) -> None:
    name = dataset([*ROWS, {"one": "a", "two": "b", "kind": None}], "train", "validation")
    with pytest.raises(UserError, match=r'dataset train: row 3: nothing in column "kind"'):
        load_task(section(task="text/classification", dataset=name, text="one", label="kind"), tokenizer)


def test_a_dataset_that_is_not_there(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(
        UserError, match=r'data\.dataset: the dataset ".*nowhere" could not be loaded .*; check its name'
    ):
        load_task(section(task="squad", dataset=str(tmp_path / "nowhere")), tokenizer)


# ------------------------------------------------------------------------------ names and settings


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("squad2", "squad or squad_v2"),
        ("sqad", "squad"),
        ("mml", "mlm"),
        ("glue/mnl", "glue/mnli"),
        ("clock", "builtin/clock"),
    ],
)
def test_a_task_that_does_not_exist(name: str, near: str) -> None:
    with pytest.raises(UserError, match=rf'data\.task: got "{name}"; allowed: .*; did you mean {near}'):
        needs_tokenizer(name)


def test_what_each_task_asks_of_a_model() -> None:
    names = ("builtin/clock", "glue/mnli", "glue/stsb", "squad_v2", "lm", "mlm")
    assert [problem_of(name) for name in names] == [
        "single_label_classification", "single_label_classification", "regression",
        "question_answering", "causal_lm", "masked_lm",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("task", "length", "shared"), [("squad", 384, 128), ("squad_v2", 384, 128), ("lm", 512, 170), ("mlm", 128, 42)]
)
def test_lengths_by_task(task: str, length: int, shared: int) -> None:
    data = section(task=task)
    assert (data.max_length, data.shared_tokens) == (length, shared)
    assert section(**data.model_dump(mode="json")) == data
    assert section(task=task, max_length=64).max_length == 64


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "lm", "n_best": 5}, r"data\.n_best: got 5; an option of squad and squad_v2: remove it"),
        ({"task": "squad", "null_score_threshold": 1.0}, r"data\.null_score_threshold: .*an option of squad_v2"),
        ({"task": "lm", "mask_probability": 0.2}, r"data\.mask_probability: got 0\.2; an option of mlm"),
        ({"task": "squad", "text": "a"}, r'data\.text: got "a"; squad has no such column'),
        ({"task": "lm", "dataset": "x", "label": "y"}, r'data\.label: got "y"; lm has no such column'),
        ({"task": "squad", "doc_stride": 200}, r"data\.doc_stride: got 200; allowed: at most half of .* is 384"),
        ({"task": "squad", "max_length": 16}, r"data\.max_length: got 16; allowed: at least 32"),
        ({"task": "lm", "subset": "x"}, r'data\.subset: got "x"; a subset is of a dataset'),
        ({"task": "builtin/clock", "tokenizer": "x"}, r'data\.tokenizer: got "x"; a builtin task generates its data'),
        ({"task": "mlm", "mask_probability": 1.0}, r"data\.mask_probability: got 1\.0; allowed: a number, 0 < p < 1"),
    ],
)
def test_settings_that_a_task_would_ignore(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        section(**settings)


# ------------------------------------------------------------------------------ what `datasets` refuses


def hub(monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]], names: Any = None, others: Any = None) -> None:
    """`datasets` gives these rows for any name, with these classes in train and validation."""
    import datasets

    def split(names: Any) -> Any:
        made = datasets.Dataset.from_list(rows)
        return made.cast_column("label", datasets.ClassLabel(names=names)) if names else made

    made = datasets.DatasetDict(train=split(names), validation=split(others or names))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: made)


def rows_of(labels: list[Any]) -> list[dict[str, Any]]:
    return [{"text": "a", "label": label} for label in labels]


@pytest.mark.parametrize("labels", [[0, 1, -1], ["x", "y", ""], [0.0, 1.0, float("nan")], [[0], [1], [1]]], ids=repr)
def test_what_is_no_class(tokenizer: Any, monkeypatch: pytest.MonkeyPatch, labels: list[Any]) -> None:
    hub(monkeypatch, rows_of(labels))
    row = 1 if isinstance(labels[0], list) else 3
    with pytest.raises(
        UserError, match=rf'some/set train: row {row}, column "label": got .*; that is not a class; allowed'
    ):
        load_task(section(task="text/classification", dataset="some/set", text="text"), tokenizer)


def test_classes_by_their_place_whatever_they_are_called(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, rows_of([0, 1, 2]), names=["2", "1", "0"])
    task = load_task(section(task="text/classification", dataset="some/set", text="text"), tokenizer)
    assert task.label_names == ("2", "1", "0")
    assert [example["labels"] for example in task.train] == [0, 1, 2]
    hub(monkeypatch, rows_of([0, 1]), names=["positive", "negative"])  # GLUE has them the other way round
    task = load_task(section(task="glue/sst2", dataset="some/set", text="text"), tokenizer)
    assert task.label_names == ("positive", "negative")


@pytest.mark.parametrize(
    ("names", "fits"),
    [
        (["Not_Equivalent", "equivalent"], True),
        (["0", "1"], True),
        (["equivalent", "not_equivalent"], False),
        (["1", "0"], False),
        (["different", "equivalent"], False),
    ],
)
def test_classes_of_a_dataset_where_f1_is_judged(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, names: list[str], fits: bool
) -> None:
    """F1 is that of class 1."""
    hub(monkeypatch, rows_of([0, 1]), names=names)
    data = section(task="glue/mrpc", dataset="some/set", text="text")
    if fits:
        assert load_task(data, tokenizer).label_names == tuple(names)
        return
    allowed = (
        r"allowed: not_equivalent, equivalent, in this order, as F1 is that of the second; rename them, or judge by"
    )
    with pytest.raises(UserError, match=rf"some/set: got the classes {', '.join(names)}; {allowed} accuracy"):
        load_task(data, tokenizer)


def test_classes_that_do_not_fit(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, rows_of([0, 1]), names=["a", "b"], others=["b", "a"])
    with pytest.raises(UserError, match=r"some/set: train has the classes a, b, validation b, a; allowed: the same"):
        load_task(section(task="text/classification", dataset="some/set", text="text"), tokenizer)
    hub(monkeypatch, rows_of([0, 1]), names=["a", "b", "c"])
    with pytest.raises(UserError, match=r"some/set: got 3 classes \(a, b, c\); allowed: 2, as glue/sst2 has"):
        load_task(section(task="glue/sst2", dataset="some/set", text="text"), tokenizer)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"set.py": "raise SystemExit"}, r"Dataset scripts are no longer supported"),
        ({"train.jsonl": '{"text": "a"}\n{"text": '}, r"error occurred while generating.*JSON"),
        ({"train.parquet": "PAR1 no"}, r"[Pp]arquet"),
        ({"train.csv": "a,b\n1,2\n1,2,3\n"}, r"Error tokenizing data"),
    ],
)
def test_what_datasets_refuses_is_one_message(
    tmp_path: Path, tokenizer: Any, files: dict[str, str], message: str
) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_text(content, "utf-8")
    with pytest.raises(UserError, match=rf'^data\.dataset: the dataset ".*set" could not be loaded \(.*{message}'):
        load_task(section(task="lm", dataset=str(folder)), tokenizer)


def test_a_split_without_rows(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    empty = datasets.Dataset.from_dict({"text": [], "label": []})
    made = datasets.DatasetDict(train=empty, validation=empty)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: made)
    with pytest.raises(UserError, match=r'data\.train: the split "train" of the dataset has no rows'):
        load_task(section(task="text/classification", dataset="some/set", text="text"), tokenizer)
