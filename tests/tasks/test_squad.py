"""Questions about texts: official files and the hub's layout, windows, labels, answers, and every mistake."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from leap_dist.config.sections import DataConfig
from leap_dist.errors import UserError
from leap_dist.tasks import Task, load_task
from leap_dist.tasks.base import TokenTable
from leap_dist.tasks.squad import SpanEvaluation

TEXT = "a b c d good bad film plot a b c d good bad film plot a b c d good bad film plot a b"
"""26 words, one token each."""


def question(number: int, answer: str | None, begin: int = 0, text: str = TEXT) -> dict[str, Any]:
    """A paragraph with one question; no answer: it is marked as impossible."""
    answers = [] if answer is None else [{"text": answer, "answer_start": begin}]
    entry = {"id": f"q{number}", "question": " film ", "answers": answers, "is_impossible": answer is None}
    return {"context": text, "qas": [entry]}


@pytest.fixture
def squad(tmp_path: Path) -> Callable[..., DataConfig]:
    """Writes the paragraphs of train, and of validation if they differ, and gives the data section."""

    def make(train: list[Any], validation: list[Any] | None = None, **settings: Any) -> DataConfig:
        paths = []
        for name, paragraphs in (("train", train), ("dev", train if validation is None else validation)):
            path = tmp_path / f"{name}.json"
            path.write_text(json.dumps({"version": "1.1", "data": [{"title": "", "paragraphs": paragraphs}]}), "utf-8")
            paths.append(str(path))
        return DataConfig(**{"task": "squad", "train": paths[0], "validation": paths[1], "max_length": 32, **settings})

    return make


def windows(task: Task) -> TokenTable:
    table = task.validation["validation"]
    assert isinstance(table, TokenTable)
    return table


# ------------------------------------------------------------------------------ windows and labels


def test_a_long_text_is_cut_into_windows_that_overlap(squad: Any, tokenizer: Any) -> None:
    task = load_task(squad([question(0, "c", 4)]), tokenizer)
    assert (task.problem, task.primary, task.num_labels, task.label_names) == ("question_answering", "f1", 2, ())
    assert len(task.train) == 1  # 26 words, the question and three special tokens are 30
    table = windows(load_task(squad([question(0, "c", 4, f"{TEXT} {TEXT}")], doc_stride=5), tokenizer))
    assert table.lengths.tolist() == [32, 32, 10]  # words 0 to 27, 23 to 50, 46 to 51
    shared = [set(zip(table[i]["char_start"], table[i]["char_end"], strict=True)) - {(0, 0)} for i in range(3)]
    assert [len(shared[0] & shared[1]), len(shared[1] & shared[2])] == [5, 5]


def test_labels_point_at_the_answer_or_at_the_first_token(squad: Any, tokenizer: Any) -> None:
    """The answer stands in the second window of three alone."""
    text = " ".join(["a"] * 30 + ["good", "film"] + ["b"] * 20)
    task = load_task(squad([question(0, "good film", text.index("good"), text)], doc_stride=5), tokenizer)
    table = windows(task)
    assert [table[i]["start_positions"] > 0 for i in range(3)] == [False, True, False]
    row = table[1]
    found = row["input_ids"][row["start_positions"] : row["end_positions"] + 1]
    assert found == tokenizer("good film", add_special_tokens=False)["input_ids"]
    assert "char_start" not in task.train[0] and task.train[1]["start_positions"] == row["start_positions"]
    batch = task.collate([task.train[i] for i in range(3)])
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids", "start_positions", "end_positions"}


def test_part_of_a_word_is_the_word(squad: Any, tokenizer: Any) -> None:
    row = load_task(squad([question(0, "oo", TEXT.index("oo"))]), tokenizer).train[0]
    assert row["start_positions"] == row["end_positions"] == 3 + 4


@pytest.mark.parametrize(
    ("text", "answer", "span"),
    [("a good film ", "good film ", (4, 5)), (" a film b", " a film", (3, 4)), ("a film b", " film ", (4, 4))],
)
def test_white_space_at_the_edges_of_an_answer(squad: Any, tokenizer: Any, text: str, answer: str, span: Any) -> None:
    """Of white space at the edges of a text the tokenizer makes no tokens; the text begins at token 3."""
    row = load_task(squad([question(0, answer, text.index(answer), text)]), tokenizer).train[0]
    assert (row["start_positions"], row["end_positions"]) == span


def test_long_questions_leave_room_for_the_text(squad: Any, tokenizer: Any) -> None:
    paragraph = question(0, "a", 0)
    paragraph["qas"][0]["question"] = "film " * 100
    table = windows(load_task(squad([paragraph], doc_stride=16), tokenizer))
    assert table.longest == 32
    assert {table[i]["context_start"] for i in range(len(table))} == {12}


# ------------------------------------------------------------------------------ answers


def spans_of(task: Task, chosen: list[tuple[int, int, int, float]], null: list[float]) -> dict[str, torch.Tensor]:
    """What a model would leave that has one span (window, start, end, score) in each window."""
    kept = {key: torch.zeros(len(chosen), 1, dtype=torch.int64) for key in ("starts", "ends")}
    scores = torch.full((len(chosen), 1), -float("inf"))
    for window, start, end, score in chosen:
        kept["starts"][window], kept["ends"][window], scores[window] = start, end, score
    return {**kept, "scores": scores, "null": torch.tensor(null), "loss": torch.ones(len(chosen))}


def test_the_best_window_answers(squad: Any, tokenizer: Any) -> None:
    text = " ".join(["a"] * 30 + ["good", "film"] + ["b"] * 20)
    task = load_task(squad([question(0, "good film", text.index("good"), text)], doc_stride=5), tokenizer)
    row = windows(task)[1]
    right = (1, row["start_positions"], row["end_positions"])
    kept = spans_of(task, [(0, 3, 3, 1.0), (*right, 2.0), (2, 3, 3, 1.5)], [9.0, 9.0, 9.0])
    assert task.evaluation.score("validation", kept) == {"exact_match": 100.0, "f1": 100.0, "loss": 1.0}
    kept = spans_of(task, [(0, 3, 3, 3.0), (*right, 2.0), (2, 3, 3, 1.5)], [9.0, 9.0, 9.0])
    assert task.evaluation.score("validation", kept)["f1"] == 0.0
    assert isinstance(task.evaluation, SpanEvaluation)
    ((best, null),) = task.evaluation.answers(kept)
    assert (best[:2], null) == ([(3.0, "a"), (2.0, "good film")], 9.0)


def test_no_answer_in_version_2(squad: Any, tokenizer: Any) -> None:
    """The score of no answer is the least over a question's windows; the threshold says how much more it needs."""
    paragraphs = [question(0, "b", 2), question(1, None)]
    spans = [(0, 4, 4, 2.0), (1, 4, 4, 2.0)]
    values = []
    for threshold in (-1.0, 0.0, 2.0):
        task = load_task(squad(paragraphs, task="squad_v2", null_score_threshold=threshold), tokenizer)
        values.append(task.evaluation.score("validation", spans_of(task, spans, [1.5, 3.0])))
    assert [value["f1"] for value in values] == [50.0, 100.0, 50.0]
    assert [value["no_answer_f1"] for value in values] == [100.0, 100.0, 0.0]


def test_a_model_that_knows_is_right_on_every_question(squad: Any, tokenizer: Any) -> None:
    """Through predict: logits that peak at the labels, over windows of several questions."""
    long = " ".join(["a"] * 30 + ["good", "film"] + ["b"] * 20)
    task = load_task(squad([question(0, "good film", long.index("good"), long), question(1, "d", 6)]), tokenizer)
    table = windows(task)
    batch = task.collate(table[:])

    def model(**inputs: torch.Tensor) -> Any:
        peak = {
            side: 8.0 * torch.nn.functional.one_hot(batch[f"{side}_positions"], inputs["input_ids"].shape[1])
            for side in ("start", "end")
        }
        return type("Output", (), {"start_logits": peak["start"], "end_logits": peak["end"]})

    kept = task.evaluation.predict(model, batch)
    assert kept["scores"].shape == (len(table), 20)
    assert task.evaluation.score("validation", kept)["exact_match"] == 100.0


# ------------------------------------------------------------------------------ the hub's layout


@pytest.mark.parametrize("name", ["squad", "squad_v2"])
def test_the_hub_layout(name: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    answers = [{"text": ["a", "a"], "answer_start": [0, 0]}] * 2
    if name == "squad_v2":
        answers[1] = {"text": [], "answer_start": []}
    rows = {
        "id": ["x", "y"],
        "title": ["", ""],
        "question": ["film", "plot"],
        "context": [TEXT] * 2,
        "answers": answers,
    }
    made = datasets.DatasetDict(dict.fromkeys(("train", "validation"), datasets.Dataset.from_dict(rows)))
    asked: list[Any] = []

    def load_dataset(*args: str) -> datasets.DatasetDict:
        asked.append(args)
        return made

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = load_task(DataConfig(task=name), tokenizer)
    assert asked == [(f"rajpurkar/{name}",)]
    assert [example["start_positions"] for example in task.train] == [3, 3 if name == "squad" else 0]
    assert task.max_length == 30


# ------------------------------------------------------------------------------ refused


def marked(impossible: Any, answer: str | None = "a") -> list[dict[str, Any]]:
    """A question with such a mark."""
    paragraph = question(0, answer)
    paragraph["qas"][0]["is_impossible"] = impossible
    return [paragraph]


NO_ANSWERS = {"context": TEXT, "qas": [{"id": "q0", "question": "film"}]}
REFUSED = {
    "no answers": ([NO_ANSWERS], r'question q0: no answers; .*"is_impossible": true and are for "task": "squad_v2"'),
    "version 2 as 1": ([question(0, None)], r'question q0 has no answer; allowed: one or more, or "task": "squad_v2"'),
    "answer elsewhere": ([question(0, "good", 3)], r'q0: answer "good" at character 3: the text reads " c d" there'),
    "answer before the text": ([question(0, "a", -26)], r'answer "a" at character -26: the text reads "" there'),
    "no text": ([question(0, "", 0, "  ")], r"question q0: its question or its text is empty"),
    "an answer of white space": (
        [question(0, " ", 1)],
        r"question q0: an answer is empty, or white space alone; remove it$",
    ),
    "a mark in words": (marked("false"), r'q0: is_impossible: got "false"; allowed: true or false, or no such key$'),
    "a mark of nothing": (marked(None), r"q0: is_impossible: got null; allowed: true or false, or no such key$"),
    "a mark in numbers": (marked(0), r"q0: is_impossible: got 0; allowed: true or false"),
    "an answer to what has none": (
        marked(True),
        r'q0: has answers, and "is_impossible": true; remove the answers, or make it false$',
    ),
    "none, and no mark": (marked(False, None), r"question q0: no answers; a file to train or to judge with holds"),
    "no questions": ([], r"train\.json: no questions in it"),
    "no text but a list": (
        [question(0, "a", 0, ["a"])],
        r"question q0, column \"context\": got \['a'\]; allowed: text",
    ),
    "a place in words": ([question(0, "a", "0")], r"question q0: got '0' as answer_start; allowed: an integer"),
    "no context": (
        [{"qas": [{"id": 1, "question": "a", "is_impossible": True}]}],
        r"not a SQuAD file: 'context'; allowed",
    ),
}


@pytest.mark.parametrize(("paragraphs", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(squad: Any, tokenizer: Any, paragraphs: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_task(squad(paragraphs), tokenizer)


@pytest.mark.parametrize("name", ["train.parquet", "train.jsonl", "train.csv.gz", "train.tsv"])
def test_rows_of_a_table(squad: Any, tokenizer: Any, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"PAR1\xff\n{}\n")
    data = squad([question(0, "a")]).model_copy(update={"train": (str(tmp_path / name),)})
    remedy = r"official SQuAD JSON; for rows with the columns id, question, context and answers, name their folder in"
    with pytest.raises(UserError, match=rf"^data\.train: got .*{name}; allowed: {remedy} data\.dataset$"):
        load_task(data, tokenizer)


def test_a_text_whose_characters_all_vanish(squad: Any, tokenizer: Any) -> None:
    from tokenizers import Tokenizer, normalizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.normalizer = normalizers.BertNormalizer()
    cleaning = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")
    with pytest.raises(UserError, match=r"question q1: the tokenizer keeps no character of its text; remove it"):
        load_task(squad([question(0, "a"), question(1, "\u200b", 0, "\u200b\u200b")]), cleaning)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", r"data\.train: .*cannot be read"), ("[1]", r"data\.train: .*not a SQuAD file"), ("3", "not a SQuAD file")],
)
def test_a_file_of_another_kind(squad: Any, tokenizer: Any, content: str, message: str) -> None:
    data = squad([question(0, "a")])
    Path(data.train[0]).write_text(content)
    with pytest.raises(UserError, match=message):
        load_task(data, tokenizer)


def test_a_file_that_is_not_there(squad: Any, tokenizer: Any) -> None:
    data = squad([question(0, "a")]).model_copy(update={"validation": ("nowhere.json",)})
    with pytest.raises(UserError, match=r"data\.validation: got nowhere\.json; there is no such file"):
        load_task(data, tokenizer)


# ------------------------------------------------------------------------------ real text


@pytest.mark.slow
def test_gold_spans_are_found_in_the_official_data(data_dir: Path, tokenizer: Any) -> None:
    """Tokens that the labels point at, turned back into text, are the answers; SQuAD 1.1, first articles."""
    from transformers import PreTrainedTokenizerFast

    file = data_dir / "squad" / "train-v1.1.part_first12articles.json"
    if not file.is_file():
        pytest.skip(f"no {file}")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "[PAD]": 3}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    words = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]")
    task = load_task(DataConfig(task="squad", train=str(file), validation=str(file), max_length=128), words)
    table = windows(task)
    labels = {key: torch.from_numpy(table.numbers[key]).long()[:, None] for key in ("start_positions", "end_positions")}
    has = labels["start_positions"] > 0
    kept = {"scores": torch.where(has, 1.0, -float("inf")), "null": torch.zeros(len(table)), "loss": torch.zeros(1)}
    kept |= {"starts": labels["start_positions"], "ends": labels["end_positions"]}
    scores = task.evaluation.score("validation", kept)
    assert scores["exact_match"] > 99.0  # longer answers than two windows share are in neither
