"""GLUE tasks from the hub's layout and from local files; every mistake in the data gives one clear error."""

from __future__ import annotations

import bz2
import copy
import gzip
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors

from leap_dist.config.job_file import parse_job
from leap_dist.config.sections import DataConfig
from leap_dist.errors import UserError
from leap_dist.tasks import load_task, metric_names, needs_tokenizer
from leap_dist.tasks.files import zstd
from leap_dist.tasks.glue import GLUE, LOCAL

DATA = Path(os.environ.get("LEAP_DATA", Path(__file__).resolve().parents[2].parent / "shared" / "data"))
GOOD = "sentence\tlabel\na good film\t1\na bad plot\t0\n"


@pytest.fixture
def files(tmp_path: Path) -> Callable[..., DataConfig]:
    """Writes train and validation files and gives the data section that names them."""

    def make(train: str, validation: str | None = None, suffix: str = ".tsv", **settings: Any) -> DataConfig:
        paths = []
        for name, text in (("train", train), ("dev", train if validation is None else validation)):
            path = tmp_path / f"{name}{suffix}"
            path.write_bytes(text.encode())
            paths.append(str(path))
        return DataConfig(**{"task": "glue/sst2", "train": paths[0], "validation": paths[1], **settings})

    return make


# ------------------------------------------------------------------------------ reading


def test_tsv_is_unquoted_and_may_start_with_a_bom(files: Any, tokenizer: Any) -> None:
    task = load_task(files('\ufeffsentence\tlabel\n"a good film\t1\r\na "bad" plot\t0\n'), tokenizer)
    assert [example["labels"] for example in task.train] == [1, 0]
    assert task.train[0]["input_ids"] == [2, 1, 4, 8, 10, 3]
    assert (task.num_labels, task.label_names, task.primary) == (2, ("negative", "positive"), "accuracy")
    assert (task.vocab_size, task.max_length) == (13, 7)


def test_a_tokenizer_without_a_token_for_a_word(files: Any) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["[PAD]", "a", "good", "film", "bad"])}))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    words = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]")
    with pytest.raises(
        UserError, match=r'^data\.tokenizer: the tokenizer cannot take "a bad plot" \(WordLevel error: .*UNK'
    ):
        load_task(files(GOOD), words)


def test_csv_is_quoted(files: Any, tokenizer: Any) -> None:
    data = files('label,sentence\n1,"a, good film"\n0,"bad\nplot"\n', suffix=".csv")
    assert [len(example["input_ids"]) for example in load_task(data, tokenizer).train] == [6, 4]


def test_jsonl_labels_may_be_numbers(files: Any, tokenizer: Any) -> None:
    rows = [{"sentence": "good", "label": 1}, {"sentence": "bad", "label": 0.0}]
    data = files("\n".join(map(json.dumps, rows)) + "\n\n", suffix=".jsonl")
    assert [example["labels"] for example in load_task(data, tokenizer).train] == [1, 0]


def test_pairs_get_two_segments_and_are_cut(files: Any, tokenizer: Any) -> None:
    text = "one\ttwo\ty\na b c d\tgood bad\t1\na\tb\t0\n"
    data = files(text, task="glue/qqp", text=("one", "two"), label="y", max_length=8)
    task = load_task(data, tokenizer)
    assert task.train[0]["input_ids"] == [2, 4, 5, 6, 3, 8, 9, 3]
    assert task.train[0]["token_type_ids"] == [0, 0, 0, 0, 0, 1, 1, 1]
    assert task.collate(task.train[:2])["attention_mask"].tolist() == [[1] * 8, [1] * 5 + [0] * 3]


@pytest.mark.parametrize(
    ("task", "labels", "ids", "names"),
    [
        (LOCAL, ["b", "a", "c"], [1, 0, 2], ("a", "b", "c")),
        (LOCAL, ["2", "0", "1"], [2, 0, 1], ("0", "1", "2")),
        (LOCAL, ["10", "9", "11"], [1, 0, 2], ("9", "10", "11")),
        ("glue/sst2", ["up", "down", "up"], [1, 0, 1], ("down", "up")),
        (
            "glue/wnli",
            ["entailment", "not_entailment", "entailment"],
            [1, 0, 1],
            ("not_entailment", "entailment"),
        ),
    ],
)
def test_how_labels_are_numbered(
    files: Any, tokenizer: Any, task: str, labels: list[str], ids: list[int], names: tuple[str, ...]
) -> None:
    text = "s\tlabel\n" + "".join(f"a\t{label}\n" for label in labels)
    loaded = load_task(files(text, task=task, text="s"), tokenizer)
    assert [example["labels"] for example in loaded.train] == ids
    assert loaded.label_names == names


@pytest.mark.filterwarnings("ignore:Metric `SpearmanCorrcoef` will save")  # a note on memory, for any use
def test_stsb_is_a_regression(files: Any, tokenizer: Any) -> None:
    text = "sentence1\tsentence2\tlabel\na\tb\t3.8\nc\td\t0\na\tc\t5\n"
    task = load_task(files(text, task="glue/stsb"), tokenizer)
    assert (task.problem, task.num_labels, task.primary) == ("regression", 1, "spearman")
    batch = task.collate(task.train[:3])
    assert batch["labels"].dtype == torch.float32
    kept = {"prediction": torch.tensor([3.0, 0.1, 4.0]), "label": batch["labels"], "loss": torch.zeros(3)}
    values = task.evaluation.score("validation", kept)
    assert values["spearman"] == pytest.approx(1.0, abs=1e-5)
    assert values["pearson"] == pytest.approx(0.99985, abs=1e-5)


# ------------------------------------------------------------------------------ the hub's layout


def hub_rows(name: str) -> dict[str, list[Any]]:
    known = GLUE[name]
    labels: list[Any] = list(range(len(known.label_names))) or [0.5, 4.0]
    return {**{column: ["a good film"] * len(labels) for column in known.text}, "label": labels}


@pytest.mark.parametrize("name", GLUE)
def test_every_glue_task_loads_from_the_hub_layout(name: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    splits = ("train", *GLUE[name].validation)
    made = datasets.DatasetDict({split: datasets.Dataset.from_dict(hub_rows(name)) for split in splits})
    asked: list[tuple[str, ...]] = []

    def load_dataset(*args: str) -> datasets.DatasetDict:
        asked.append(args)
        return made

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = load_task(DataConfig(task=name), tokenizer)
    assert asked == [("nyu-mll/glue", name.removeprefix("glue/"))]
    assert tuple(task.validation) == GLUE[name].validation
    assert [example["labels"] for example in task.train] == hub_rows(name)["label"]
    assert task.num_labels == (len(GLUE[name].label_names) or 1)


def test_metrics_that_files_never_give() -> None:
    local = {"train": "a.tsv", "validation": "b.tsv"}
    assert "validation_mismatched_accuracy" in metric_names("glue/mnli", DataConfig(task="glue/mnli"))
    assert metric_names("glue/mnli", DataConfig(task="glue/mnli", **local)) == ("accuracy", "loss")
    chats = DataConfig(task="lm", text=["question", "answer"], **local)
    assert metric_names("lm", chats) == ("perplexity", "accuracy", "loss")
    assert "bits_per_byte" in metric_names("lm", DataConfig(task="lm", **local))


def test_names_and_metrics_are_pinned() -> None:
    assert {name: known.metrics for name, known in GLUE.items()} == {
        "glue/cola": ("matthews", "accuracy"),
        "glue/sst2": ("accuracy",),
        "glue/mrpc": ("accuracy", "f1"),
        "glue/qqp": ("accuracy", "f1"),
        "glue/stsb": ("spearman", "pearson"),
        "glue/mnli": ("accuracy",),
        "glue/qnli": ("accuracy",),
        "glue/rte": ("accuracy",),
        "glue/wnli": ("accuracy",),
    }


def test_metric_values(files: Any, tokenizer: Any) -> None:
    """Five predictions by hand: 2 true positives, 1 true negative, 1 false of each kind."""
    preds, target = torch.tensor([1, 1, 0, 1, 0]), torch.tensor([1, 1, 0, 0, 1])
    values: dict[str, float] = {}
    for name, text in (("glue/cola", "sentence"), ("glue/mrpc", ("sentence1", "sentence2"))):
        data = files("sentence\tsentence1\tsentence2\tlabel\na\ta\ta\t0\nb\tb\tb\t1\n", task=name, text=text)
        kept = {"prediction": preds, "label": target, "loss": torch.ones(5)}
        values |= load_task(data, tokenizer).evaluation.score("validation", kept)
    assert values == pytest.approx({"matthews": 1 / 6, "accuracy": 0.6, "f1": 2 / 3, "loss": 1.0}, abs=1e-6)


def test_hub_out_of_reach(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def fail(*_: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match=r'data\.task: .*"rte" could not be loaded .*no route.*local files'):
        load_task(DataConfig(task="glue/rte"), tokenizer)


# ------------------------------------------------------------------------------ refused

REFUSED = {
    "label column": (
        {"label": "labell"},
        GOOD,
        r'data\.label: got "labell", which is not a column of .*train\.tsv; allowed: sentence, label',
    ),
    "text column": ({"text": "text"}, GOOD, r'data\.text: got "text", which is not a column'),
    "no rows": ({}, "sentence\tlabel\n", r"data\.train: .*train\.tsv: no examples in it"),
    "empty file": ({}, "", r"data\.train: .*train\.tsv: no examples in it"),
    "short row": ({}, GOOD + "alone\n", r'train\.tsv: line 4: nothing in column "label"'),
    "label out of range": ({}, GOOD + "a\t2\n", r"train\.tsv: line 4, column \"label\": got '2'; allowed: 0, 1"),
    "one name twice": ({}, "sentence\tlabel\tlabel\na\t1\t0\n", r'train\.tsv: line 1: more than one .* "label"'),
    "one class": (
        {"task": LOCAL, "text": "sentence"},
        "sentence\tlabel\na\tx\n",
        r"got 1 different labels \(x\)",
    ),
    "too many classes": ({}, "sentence\tlabel\na\tx\na\ty\na\tz\n", r"got 3 different labels .*allowed: 2"),
    "no text named": ({"task": LOCAL}, GOOD, r"data\.text: missing; text/classification needs"),
    "score": (
        {"task": "glue/stsb", "text": "sentence"},
        "sentence\tlabel\na\t5.1\n",
        r"line 2, column \"label\": got '5\.1'; allowed: a number from 0 to 5",
    ),
    "score in words": (
        {"task": "glue/stsb", "text": "sentence"},
        "sentence\tlabel\na\thigh\n",
        r"line 2, column \"label\": got 'high'; allowed: a number",
    ),
}


@pytest.mark.parametrize(("settings", "text", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(files: Any, tokenizer: Any, settings: dict[str, Any], text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_task(files(text, **settings), tokenizer)


NO_CLASSES = ["", "   ", "nan", "NaN", "<NA>", "inf", "-1", "-1.0", "-100"]
NO_CLASS_VALUES = [None, float("nan"), float("inf"), -1, -1.0, [1], [], {"a": 1}, ""]


@pytest.mark.parametrize("label", NO_CLASSES)
@pytest.mark.parametrize("task", [LOCAL, "glue/sst2"])
def test_what_is_no_class_in_a_table(files: Any, tokenizer: Any, task: str, label: str) -> None:
    good = 's,label\na,1\n"b\nc",0\n'
    for train, dev, name in ((good + f"d,{label}\n", good, "train"), (good, good + f"d,{label}\n", "dev")):
        data = files(train, dev, suffix=".csv", task=task, text="s")
        with pytest.raises(
            UserError, match=rf'{name}\.csv: line 5, column "label": got .*; that is not a class; allowed'
        ):
            load_task(data, tokenizer)


@pytest.mark.parametrize("label", NO_CLASS_VALUES, ids=repr)
def test_what_is_no_class_in_json_lines(files: Any, tokenizer: Any, label: Any) -> None:
    rows = [{"s": "a", "label": "x"}, {"s": "b", "label": "y"}, {"s": "c", "label": label}]
    data = files("\n\n".join(map(json.dumps, rows)), suffix=".jsonl", task=LOCAL, text="s")
    with pytest.raises(
        UserError, match=r'train\.jsonl: line 5(, column "label": got .* not a class|: nothing in column "l)'
    ):
        load_task(data, tokenizer)


@pytest.mark.parametrize("label", ["nan", "inf", "", "high", [1.0], True, "-0.5"], ids=repr)
def test_what_is_no_score(files: Any, tokenizer: Any, label: Any) -> None:
    rows = [{"s": "a", "label": 4}, {"s": "b", "label": label}]
    data = files("\n".join(map(json.dumps, rows)), suffix=".jsonl", task="glue/stsb", text="s")
    with pytest.raises(UserError, match=r'train\.jsonl: line 2, column "label": got .*; allowed: a number from 0 to 5'):
        load_task(data, tokenizer)


@pytest.mark.parametrize(
    ("labels", "ids", "names"),
    [
        ([1, 1.0, "1", " 1.0 ", 0], [1, 1, 1, 1, 0], ("0", "1")),
        (["good ", "bad", " good"], [1, 0, 1], ("bad", "good")),
        ([True, False, True], [1, 0, 1], ("False", "True")),
        ([2.5, 3, "3.0"], [1, 0, 0], ("3", "2.5")),
    ],
)
def test_one_class_has_one_spelling(
    files: Any, tokenizer: Any, labels: list[Any], ids: list[int], names: tuple[str, ...]
) -> None:
    rows = [json.dumps({"s": "a", "label": label}) for label in labels]
    task = load_task(files("\n".join(rows), suffix=".jsonl", task=LOCAL, text="s"), tokenizer)
    assert [example["labels"] for example in task.train] == ids
    assert task.label_names == names


def test_true_beside_numbers(files: Any, tokenizer: Any) -> None:
    rows = [json.dumps({"s": "a", "label": label}) for label in (1, 0, True)]
    with pytest.raises(UserError, match=r'line 3, column "label": got True, and other rows have numbers'):
        load_task(files("\n".join(rows), suffix=".jsonl", task=LOCAL, text="s"), tokenizer)


@pytest.mark.parametrize("value", [None, ["a"], {"a": 1}, True, float("nan"), "half \ud83d"], ids=repr)
def test_what_is_no_text(files: Any, tokenizer: Any, value: Any) -> None:
    rows = [{"s": "a", "label": 0}, {"s": value, "label": 1}]
    data = files("\n".join(map(json.dumps, rows)), suffix=".jsonl", text="s")
    with pytest.raises(UserError, match=r'train\.jsonl: line 2.* column "s"'):
        load_task(data, tokenizer)


def test_a_label_that_train_does_not_have(files: Any, tokenizer: Any) -> None:
    data = files("s\ty\na\tx\nb\tz\n", "s\ty\na\tw\n", task=LOCAL, text="s", label="y")
    with pytest.raises(UserError, match=r"dev\.tsv: line 2, column \"y\": got 'w'; allowed: x, z"):
        load_task(data, tokenizer)


def test_a_file_that_is_not_there(files: Any, tokenizer: Any) -> None:
    data = files(GOOD).model_copy(update={"validation": ("nowhere.tsv",)})
    with pytest.raises(UserError, match=r"data\.validation: got nowhere\.tsv; there is no such file"):
        load_task(data, tokenizer)


def test_a_file_of_another_kind(files: Any, tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"data\.train: got .*train\.xml; allowed: a file that ends in \.tsv"):
        load_task(files(GOOD, suffix=".xml"), tokenizer)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{\n", r"data\.train: .*cannot be read"), ("[1]\n", r"line 1: got \[1\]; allowed: a JSON object")],
)
def test_broken_jsonl(files: Any, tokenizer: Any, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_task(files(text, suffix=".jsonl"), tokenizer)


MANY = "sentence\tlabel\n" + "".join(f"a good film {i * i}\t{i % 2}\n" for i in range(5000))


def flipped(content: bytes) -> bytes:
    """With one bit in the middle changed."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize(
    ("content", "suffix", "message"),
    [
        (
            gzip.compress(GOOD.encode(), mtime=0),
            ".tsv",
            r"train\.tsv: is a gzip file, not text; unpack or convert it first",
        ),
        (GOOD.encode(), ".tsv.gz", r"train\.tsv\.gz: damaged, or cut off: Not a gzipped file"),
        (gzip.compress(GOOD.encode(), mtime=0)[:-9], ".tsv.gz", r"damaged, or cut off: Compressed file ended before"),
        (flipped(gzip.compress(MANY.encode(), mtime=0)), ".tsv.gz", r"damaged, or cut off: "),
        (GOOD.encode(), ".tsv.zst", r"train\.tsv\.zst: damaged, or cut off: Unable to decompress Zstandard data"),
        (zstd.compress(GOOD.encode())[:-1], ".tsv.zst", r"damaged, or cut off: Compressed file ended before"),
        (zstd.compress(MANY.encode()) + zstd.compress(GOOD.encode())[:-3], ".tsv.zst", r"Compressed file ended before"),
        (flipped(zstd.compress(MANY.encode())), ".tsv.zst", r"damaged, or cut off: "),
        (lzma.compress(MANY.encode())[:-40], ".tsv.xz", r"damaged, or cut off: Compressed file ended before"),
        (bz2.compress(MANY.encode())[:-40], ".tsv.bz2", r"damaged, or cut off: Compressed file ended before"),
        (gzip.compress(b"PAR1....PAR1", mtime=0), ".tsv.gz", r"is a Parquet file, not text"),
        (b"PAR1....PAR1", ".tsv", r"is a Parquet file"),
        (b"PAR1....PAR1", ".parquet", r"cannot be read: .*Parquet"),
        (GOOD.encode(), ".parquet", r"cannot be read: .*Parquet"),
        (
            b'{"sentence": "a", "label": 1}',
            ".json",
            r"cannot be read: got one JSON value; allowed: a list of objects, or",
        ),
        (
            b'{"sentence": "a"}\n{"sentence": "b"}',
            ".json",
            r"cannot be read: Extra data.*; one object a line is \.jsonl",
        ),
        (GOOD.encode("utf-16"), ".tsv", r"not UTF-8 text: .* at byte 0; it looks like UTF-16; save it as UTF-8"),
        (GOOD.replace("good", "g\u00f6d").encode("latin-1"), ".csv", r"not UTF-8 text: .*; save it as UTF-8"),
        (
            b'sentence,label\n"a,1\nb,0\n',
            ".csv",
            r"train\.csv: cannot be read: line 2: the quoted cell that begins there",
        ),
        (b'{"sentence": "a", "label": 1}\n{"sentence"\n', ".jsonl", r"cannot be read: line 2: Expecting ':'"),
        (b"[" * 100_000, ".jsonl", r"cannot be read: line 1: maximum recursion|line 1: Expecting"),
    ],
)
def test_a_file_that_cannot_be_read(files: Any, tokenizer: Any, content: bytes, suffix: str, message: str) -> None:
    data = files("", suffix=suffix)
    Path(data.train[0]).write_bytes(content)
    with pytest.raises(UserError, match=rf"^data\.train: .*{message}"):
        load_task(data, tokenizer)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"sentence": "a", "label": 1}, 3]', r"train\.json: row 2: got 3; allowed: a JSON object"),
        (b'[{"sentence": "a"}, 3]', r'^data\.label: got "label", which is not a column'),
    ],
)
def test_a_row_that_is_no_object_is_named(files: Any, tokenizer: Any, content: bytes, message: str) -> None:
    data = files("", suffix=".json")
    Path(data.train[0]).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_task(data, tokenizer)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"sentence": "a", "label": 1}\n{"sentence": "b"}',
            r'train\.jsonl: line 2: no "label" in it; it has sentence$',
        ),
        ("{}", r'train\.jsonl: line 1: no "sentence" in it; it has nothing$'),
    ],
)
def test_a_row_that_lacks_a_column_is_named(files: Any, tokenizer: Any, content: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_task(files(content, suffix=".jsonl"), tokenizer)


def test_a_folder_as_a_file(files: Any, tokenizer: Any, tmp_path: Path) -> None:
    data = files(GOOD).model_copy(update={"train": (str(tmp_path),)})
    for task in ("glue/sst2", "lm", "squad"):
        with pytest.raises(UserError, match=r"^data\.train: got .*; that is a folder; allowed: a file$"):
            load_task(data.model_copy(update={"task": task}), tokenizer)


def test_a_name_that_no_file_can_have(files: Any, tokenizer: Any) -> None:
    data = files(GOOD).model_copy(update={"train": ("x" * 300 + ".tsv",)})
    with pytest.raises(UserError, match=r"^data\.train: x+\.tsv: cannot be read: File name too long"):
        load_task(data, tokenizer)


def test_a_cell_of_any_length(files: Any, tokenizer: Any) -> None:
    task = load_task(files(f"sentence\tlabel\n{'a ' * 100_000}\t1\nb\t0\n"), tokenizer)
    assert task.train.longest == 128


def test_a_file_that_is_not_text(files: Any, tokenizer: Any) -> None:
    data = files(GOOD)
    Path(data.train[0]).write_bytes(b"sentence\tlabel\n\xff\t1\n")
    with pytest.raises(UserError, match=r"data\.train: .*not UTF-8 text"):
        load_task(data, tokenizer)


def test_unknown_task() -> None:
    with pytest.raises(UserError, match=r'data\.task: got "glue/sst-2"; allowed: .*did you mean glue/sst2'):
        needs_tokenizer("glue/sst-2")


def test_text_without_a_tokenizer() -> None:
    with pytest.raises(UserError, match=r'data\.task: got "glue/sst2", a text task; it needs a model with a tokenizer'):
        load_task(DataConfig(task="glue/sst2"), None)


def test_local_task_without_files(tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"data\.train: missing; text/classification needs local files"):
        load_task(DataConfig(task=LOCAL), tokenizer)


def test_a_tokenizer_that_cannot_pad(files: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tokenizer._special_tokens_map, "pad_token", None)
    with pytest.raises(UserError, match=r"model\.name: its tokenizer has no padding token"):
        load_task(files(GOOD), tokenizer)


# ------------------------------------------------------------------------------ real text


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "sst2").is_dir(), reason="no SST-2: set LEAP_DATA to the folder of real data")
def test_sst2_whole(tokenizer: Any) -> None:
    train, dev = str(DATA / "sst2" / "train.tsv"), str(DATA / "sst2" / "dev.tsv")
    task = load_task(DataConfig(task="glue/sst2", train=train, validation=dev, max_length=64), tokenizer)
    dev_labels = [example["labels"] for example in task.validation["validation"]]
    assert (len(task.train), len(dev_labels), sum(dev_labels)) == (67349, 872, 444)
    assert sum(task.train[i]["labels"] for i in range(67349)) == 37569


@pytest.mark.skipif(not (DATA / "mrpc").is_dir(), reason="no MRPC: set LEAP_DATA to the folder of real data")
def test_mrpc_with_a_bom_and_literal_quotes(tokenizer: Any) -> None:
    train, dev = (str(DATA / "mrpc" / f"msr_paraphrase_{name}.txt") for name in ("train", "test"))
    columns = ("#1 String", "#2 String")
    data = DataConfig(task="glue/mrpc", train=train, validation=dev, text=columns, label="Quality")
    task = load_task(data, tokenizer)
    assert (len(task.train), len(task.validation["validation"])) == (4076, 1725)


# ------------------------------------------------------------------------------ what would be read as something else

JOB = {
    "train_micro_batch_size_per_gpu": 4,
    "model": {"name": "m"},
    "train": {"epochs": 1},
    "leap": {"target": 0.1},
}
TEXT = {"task": LOCAL, "text": "text"}
MISREAD = {
    "a comma in a text": ("text,label\na, b,0\nc,1\n", ".csv", r"line 2: got 3 cells, and line 1 names 2 columns; put"),
    "a space before a quote": (
        'label,text\n0,"a"\n1, "b, c"\n',
        ".csv",
        r"line 3: got 3 cells.* right after the comma",
    ),
    "a tab in a text": ("text\tlabel\na\tb\t0\nc\t1\n", ".tsv", r"line 2: got 3 cells.*; replace tabs"),
    "semicolons": ("text;label\na;0\nb;1\n", ".csv", r'data\.text: got "text".*they look parted by \';\''),
    "commas in .tsv": ("text,label\na,0\nb,1\n", ".tsv", r"they look parted by ','"),
    "UTF-16 without its mark": ("t\0e\0x\0t\0,\0", ".csv", r"data\.train: .*not text: a zero byte at byte 1"),
    "a pointer of Git LFS": ("version https://git-lfs.github.com/spec/v1\n", ".csv", r"is a pointer of Git LFS"),
    "several labels": ('text,label\na,"[0, 1]"\nb,[1]\n', ".csv", r"line 2.*: got '\[0, 1\]'; a list of labels"),
    "names in a list": ("text,label\na,['x']\nb,['y']\n", ".csv", r"line 2.*a list of labels"),
    "nothing, as SQL writes it": ("text,label\na,x\nb,NULL\n", ".csv", r"line 3.*got 'NULL'; that is not a class"),
    "a key twice": ('{"text": "a", "label": 0, "label": 1}\n', ".jsonl", r'line 1: the key "label" stands there more'),
}


@pytest.mark.parametrize(("text", "suffix", "message"), MISREAD.values(), ids=MISREAD.keys())
def test_what_would_be_read_as_something_else(files: Any, tokenizer: Any, text: str, suffix: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_task(files(text, suffix=suffix, **TEXT), tokenizer)


def test_a_header_may_stand_below_empty_lines(files: Any, tokenizer: Any) -> None:
    task = load_task(files("\n\r\ntext,label,\na,0,\n\nb,1\n", suffix=".csv", **TEXT), tokenizer)
    assert [example["labels"] for example in task.train] == [0, 1]
    with pytest.raises(UserError, match=r"train\.csv: line 5: got 3 cells, and line 3 names 2 columns"):
        load_task(files("\n\ntext,label\na,0\nb,1,2\n", suffix=".csv", **TEXT), tokenizer)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (("s", "s"), "data.text: .*allowed: one column, or two that differ"),
        (("s", "label"), "data.text: .*label is the column of the label"),
    ],
)
def test_a_column_that_is_read_twice(text: tuple[str, ...], message: str) -> None:
    """A label among the texts is an accuracy of 1 that means nothing."""
    data = {"task": LOCAL, "train": "a.csv", "validation": "b.csv", "text": list(text)}
    with pytest.raises(UserError, match=message):
        parse_job(JOB | {"data": data})
    if text == ("s", "label"):
        parse_job(JOB | {"data": data | {"label": "y"}})


def test_known_names_in_another_case_are_those_classes(files: Any, tokenizer: Any) -> None:
    """F1 is that of class 1, which the alphabet would make "Not_Equivalent"."""
    table = "sentence1\tsentence2\tlabel\na\tb\tEquivalent\na\tc\tNot_Equivalent\n"
    task = load_task(files(table, task="glue/mrpc"), tokenizer)
    assert [example["labels"] for example in task.train] == [1, 0]
    assert task.label_names == ("not_equivalent", "equivalent")


PARTLY = (
    r"allowed: not_equivalent, equivalent, the classes of glue/mrpc, or in all rows their numbers, from 0 to 1; ren"
)


@pytest.mark.parametrize(
    ("task", "labels", "message"),
    [
        ("glue/mrpc", ["equivalent", "not equivalent"], rf"line 3, column \"label\": got 'not equivalent'; {PARTLY}"),
        ("glue/mrpc", ["same", "other"], rf"line 2, column \"label\": got 'same'; {PARTLY}"),
        ("glue/mrpc", ["equivalent", "0"], rf"line 3, column \"label\": got '0'; {PARTLY}"),
        ("glue/mrpc", ["1", "no"], rf"line 3, column \"label\": got 'no'; {PARTLY}"),
        ("glue/qqp", ["y", "n"], r"got 'y'; allowed: not_duplicate, duplicate, the classes of glue/qqp"),
        ("glue/rte", ["entailment", "not-entailment"], r"got 'not-entailment'; allowed: entailment, not_entailment"),
        ("glue/sst2", ["positive", "neg"], r"got 'neg'; allowed: negative, positive, the classes of glue/sst2"),
    ],
)
def test_names_that_are_known_in_part(files: Any, tokenizer: Any, task: str, labels: list[str], message: str) -> None:
    """The alphabet would number them anew, and F1 be that of the other class."""
    table = "s\tlabel\n" + "".join(f"a\t{label}\n" for label in labels)
    with pytest.raises(UserError, match=rf"train\.tsv: .*{message}"):
        load_task(files(table, task=task, text="s"), tokenizer)


def test_classes_of_thousands_of_digits(files: Any, tokenizer: Any) -> None:
    """More than Python makes an integer of."""
    labels = ["9" * 5000, "1" + "0" * 5000, "007"]
    table = "text,label\n" + "".join(f"a,{label}\n" for label in labels)
    task = load_task(files(table, suffix=".csv", **TEXT), tokenizer)
    assert [example["labels"] for example in task.train] == [1, 2, 0]


@pytest.mark.parametrize(
    ("labels", "classes", "ids"),
    [
        ("10", ("bad", "good"), [1, 0]),  # as a head that was trained before calls them
        ("11", ("bad", "good"), [1, 1]),
        ("21", ("1", "2"), [1, 0]),
        ("11", ("1", "0"), [0, 0]),
    ],
)
def test_numbers_in_the_data_of_a_trained_model(
    files: Any, tokenizer: Any, labels: str, classes: tuple[str, ...], ids: list[int]
) -> None:
    data = files("text\tlabel\n" + "".join(f"a\t{label}\n" for label in labels), **TEXT)
    task = load_task(data, tokenizer, classes)
    assert [example["labels"] for example in task.validation["validation"]] == ids
    assert task.label_names == classes
    with pytest.raises(UserError, match=r"got '2'; allowed: bad, good$"):
        load_task(files("text\tlabel\na\t2\n", **TEXT), tokenizer, ("bad", "good"))


def test_a_text_of_which_no_token_is_made(files: Any, tokenizer: Any) -> None:
    bare = copy.deepcopy(tokenizer)
    bare.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B")
    table = "text,label\na,0\n   ,1\n"
    load_task(files(table, suffix=".csv", **TEXT), tokenizer)  # [CLS] and [SEP]
    with pytest.raises(UserError, match=r"train\.csv: line 3: got \('   ',\); allowed: a text of which the tokenizer"):
        load_task(files(table, suffix=".csv", **TEXT), bare)
