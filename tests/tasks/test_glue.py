"""GLUE tasks from the hub's layout and from local files; every mistake in the data gives one clear error."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors

from leap_dist.config.sections import DataConfig
from leap_dist.errors import UserError
from leap_dist.tasks import load_task, metric_names, needs_tokenizer
from leap_dist.tasks.glue import GLUE, LOCAL

DATA = Path(os.environ.get("LEAP_DATA", Path(__file__).resolve().parents[2].parent / "shared" / "data"))
GOOD = "sentence\tlabel\na good film\t1\na bad plot\t0\n"


TEXT = {"task": LOCAL, "text": "text"}


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


def test_a_text_of_which_no_token_is_made(files: Any, tokenizer: Any) -> None:
    bare = copy.deepcopy(tokenizer)
    bare.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B")
    table = "text,label\na,0\n   ,1\n"
    load_task(files(table, suffix=".csv", **TEXT), tokenizer)  # [CLS] and [SEP]
    with pytest.raises(UserError, match=r"train\.csv: line 3: got \('   ',\); allowed: a text of which the tokenizer"):
        load_task(files(table, suffix=".csv", **TEXT), bare)
